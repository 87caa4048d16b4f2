"""Experiment 05: CRL (arXiv 2602.10437), reproduced: RL over which SAE feature to add, the model left as it is.

    python experiments/05_crl_reproduction.py --config configs/crl.yaml

Does a learned choice of features beat fixed ones, at the budget of experiment 03? Before the runs, `--tune` tries
coefficients and learning rates on training questions; after them, `--tables` writes experiments/results/crl.{json,md}.
"""

import argparse
import json
import sys
from pathlib import Path

from crl import experiment, results
from crl.experiment import CRLConfig
from mechreward.errors import MechRewardError
from mechreward.integrations.recording import write_json
from mechreward.train.config import read_config
from mechreward.train.runner import chosen_runs, quiet


def carry_out(config: CRLConfig, arms: list[str] | None, seeds: list[int] | None) -> None:
    """The chosen runs, one after the other."""
    wanted = chosen_runs(config, arms, seeds)
    bench = experiment.bench(config)
    for arm, seed in wanted:
        experiment.run(bench, arm, seed)
    print(f"Runs: {Path(config.output).resolve()}. Tables: the same command with --tables")


def tune(config: CRLConfig) -> None:
    """Pilots; what they said is kept beside the runs."""
    pilots = experiment.tune(config)
    file = Path(config.output) / "tuning.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"pilots": pilots})
    best = max(pilots, key=lambda pilot: pilot["last"])
    print(f"Written: {file}. Best: coefficient {best['coefficient']:g}, learning_rate {best['learning_rate']:g}")


def tables(config: CRLConfig, command: str, out: Path, beside: Path) -> None:
    """What the finished runs say."""
    report = {"command": command, **results.report(config, beside)}
    out.mkdir(parents=True, exist_ok=True)
    file = out / Path(config.output).name
    text = json.dumps(report, indent=1, allow_nan=False)
    Path(f"{file}.json").write_text(text + "\n", encoding="utf-8")
    Path(f"{file}.md").write_text(results.markdown(report), encoding="utf-8")
    print(results.markdown(report))
    print(f"Written: {file}.md, .json")


if __name__ == "__main__":
    folder = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, help="the experiment's YAML file")
    parser.add_argument("--arm", action="append", help="only this arm (may be repeated); default: all")
    parser.add_argument("--seed", action="append", type=int, help="only this seed (may be repeated); default: all")
    parser.add_argument("--tune", action="store_true", help="no run: pilots on training questions")
    parser.add_argument("--tables", action="store_true", help="no run: tables of the finished ones")
    parser.add_argument("--out", type=Path, default=folder, help="folder for the tables")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    options = parser.parse_args()
    quiet()
    try:
        config = read_config(options.config, CRLConfig)
        if options.tune:
            tune(config)
        elif options.tables:
            command = f"python experiments/05_crl_reproduction.py --config {options.config} --tables"
            tables(config, command, options.out, folder / "pocket.json")
        else:
            carry_out(config, options.arm, options.seed)
    except MechRewardError as error:
        if options.debug:
            raise
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from the last checkpoint.")
