"""Experiment 04: SARM, a reward model that reads a sparse autoencoder (arXiv 2508.08746), and its controls.

    python experiments/04_sarm_reproduction.py --config configs/sarm.yaml
    python experiments/04_sarm_reproduction.py --config configs/sarm.yaml --stage report

Four stages, each of which skips what it finds finished in the experiment's folder:

- pairs: preferences, read from a file or the hub; or, on `pocket`, sampled from the model itself and judged by the
  verifier, right answers preferred to wrong ones of the same question;
- models: for every seed, reward models that differ in one thing each, and what else can rank a pair;
- grpo: some of them as the only reward of a policy, at the budget of experiments 01 to 03;
- report: experiments/results/<name>.{json,md}.
"""

import argparse
import gc

from common.cli import start
from common.tables import write_results
from mechreward.train import runner
from mechreward.train.config import read_config
from sarm import cells, results
from sarm.config import SarmConfig

STAGES = ("pairs", "models", "grpo", "report")


def work(options: argparse.Namespace) -> None:
    """Carry out the chosen stages."""
    runner.quiet()
    config = read_config(options.config, SarmConfig)
    for stage in [options.stage] if options.stage else STAGES:
        if stage == "pairs":
            _ = cells.Pipeline(config).sets
        elif stage == "models":
            pipeline = cells.Pipeline(config)
            for cell, seed in runner.chosen_runs(config.cells, config.seeds, options.cell, options.seed, "cell"):
                cells.make_cell(pipeline, cell, seed)
        elif stage == "grpo" and config.grpo is not None:
            for arm, seed in runner.chosen_runs(config.grpo.arms, config.grpo.seeds, options.arm, options.seed):
                runner.run(config.grpo, arm, seed, setup=cells.setup(config))
                gc.collect()  # a trainer and its model hold each other
        elif stage == "report":
            report = results.report(config)
            write_results(options.out / config.name, report, results.markdown(report), flat=True)


if __name__ == "__main__":
    start(
        __doc__,
        work,
        "config arm seed out",
        {
            "--stage": {"choices": STAGES, "help": "only this; default: all, one after the other"},
            "--cell": {"action": "append", "help": "only this cell (may be repeated); default: all"},
        },
    )
