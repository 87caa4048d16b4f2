"""Experiment 04: SARM, a reward model that reads a sparse autoencoder (arXiv 2508.08746), and its controls.

    python experiments/04_sarm_reproduction.py --config configs/sarm.yaml
    python experiments/04_sarm_reproduction.py --config configs/sarm.yaml --stage report

Makes preference pairs, trains reward models on them, trains policies with some of these as the reward, and writes
experiments/results/<name>.{json,md}. What is finished is not done again: the same command goes on where it was
interrupted.
"""

import argparse
import gc
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mechreward.errors import ConfigError, MechRewardError, nearest
from mechreward.train import runner
from mechreward.train.config import read_config
from sarm import cells, results
from sarm.config import SarmConfig

STAGES = ("pairs", "models", "grpo", "report")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, help="the experiment's YAML file")
    parser.add_argument("--stage", choices=STAGES, help="only this; default: all, one after the other")
    parser.add_argument("--cell", action="append", help="only this cell (may be repeated); default: all")
    parser.add_argument("--arm", action="append", help="only this arm of GRPO (may be repeated); default: all")
    parser.add_argument("--seed", action="append", type=int, help="only this seed (may be repeated); default: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    options = parser.parse_args()
    runner.quiet()
    try:
        config = read_config(options.config, SarmConfig)
        for stage in [options.stage] if options.stage else STAGES:
            _carry_out(stage, config, options)
    except MechRewardError as error:
        if options.debug:
            raise
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from what is finished.")


def _carry_out(stage: str, config: SarmConfig, options: argparse.Namespace) -> None:
    if stage == "pairs":
        _ = cells.Workshop(config).sets
    elif stage == "models":
        shop = cells.Workshop(config)
        for cell, seed in _chosen("cell", config.cells, config.seeds, options.cell, options.seed):
            cells.make_cell(shop, cell, seed)
    elif stage == "grpo" and config.grpo is not None:
        for arm, seed in _chosen("arm", config.grpo.arms, config.grpo.seeds, options.arm, options.seed):
            runner.run(config.grpo, arm, seed, outfit=cells.outfit(config))
            gc.collect()  # a trainer and its model hold each other
    elif stage == "report":
        print(results.write(config, options.out))


def _chosen(
    what: str, names: Mapping[str, Any], seeds: list[int], only: list[str] | None, only_seeds: list[int] | None
) -> list[tuple[str, int]]:
    """What to make, everything of a seed before the next seed."""
    for name in only or []:
        if name not in names:
            raise ConfigError(f"There is no {what} '{name}'; there are {', '.join(names)}.{nearest(name, names)}")
    for seed in only_seeds or []:
        if seed not in seeds:
            raise ConfigError(f"The configuration has no seed {seed}: it has {', '.join(map(str, seeds))}.")
    return [(name, seed) for seed in only_seeds or seeds for name in only or names]


if __name__ == "__main__":
    main()
