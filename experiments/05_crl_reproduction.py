"""Experiment 05: CRL (arXiv 2602.10437), reproduced: RL over which SAE feature to add, the model left as it is.

    python experiments/05_crl_reproduction.py --config configs/crl.yaml

Does a learned choice of features beat fixed ones, at the budget of experiment 03? Before the runs, `--tune` tries
coefficients and learning rates on training questions; after them, `--tables` writes experiments/results/crl.{json,md}.
"""

import argparse
from pathlib import Path

from common.cli import start
from common.tables import RESULTS, write_results
from crl import experiment, results
from crl.experiment import CRLConfig
from mechreward.files import write_json
from mechreward.train.config import read_config
from mechreward.train.runner import chosen_runs, quiet


def work(options: argparse.Namespace) -> None:
    """Make the chosen runs, one after the other; or pilots, or the tables."""
    quiet()
    config = read_config(options.config, CRLConfig)
    if options.tune:
        tune(config)
    elif options.tables:
        command = f"python experiments/05_crl_reproduction.py --config {options.config} --tables"
        report = {"command": command, **results.report(config, RESULTS / "pocket.json")}
        file = options.out / Path(config.output).name
        write_results(file, report, results.markdown(report))
        print(f"Written: {file}.md, .json")
    else:
        wanted = chosen_runs(config.arms, config.seeds, options.arm, options.seed)
        bench = experiment.bench(config)
        for arm, seed in wanted:
            experiment.run(bench, arm, seed)
        print(f"Runs: {Path(config.output).resolve()}. Tables: the same command with --tables")


def tune(config: CRLConfig) -> None:
    """Run the pilots, and keep their results beside the runs."""
    pilots = experiment.tune(config)
    file = Path(config.output) / "tuning.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"pilots": pilots})
    best = max(pilots, key=lambda pilot: pilot["last"])
    print(f"Written: {file}. Best: coefficient {best['coefficient']:g}, learning_rate {best['learning_rate']:g}")


if __name__ == "__main__":
    start(
        __doc__,
        work,
        "config arm seed out",
        {
            "--tune": {"action": "store_true", "help": "no run: pilots on training questions"},
            "--tables": {"action": "store_true", "help": "no run: tables of the finished ones"},
        },
    )
