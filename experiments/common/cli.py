"""The command line that the scripts share: their options, errors in one sentence, and how a script is interrupted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.tables import RESULTS
from mechreward.errors import ConfigError, MechRewardError
from mechreward.train import arms, runner
from mechreward.train.config import ExperimentConfig, read_config

OPTIONS: dict[str, dict[str, Any]] = {
    "config": {"required": True, "type": Path, "help": "the experiment's YAML file"},
    "arm": {"action": "append", "help": "only this arm (may be repeated); default: all"},
    "seed": {"action": "append", "type": int, "help": "only this seed (may be repeated); default: all"},
    "jobs": {
        "type": int,
        "default": 1,
        "help": "runs at a time, each in a process of its own, all on the same GPU if there is one (default 1)",
    },
    "out": {"type": Path, "default": RESULTS, "help": "folder for the results"},
    "debug": {"action": "store_true", "help": "show where an error comes from"},
}
"""Options that several scripts have, with argparse's settings."""


def start(
    about: str | None,
    work: Callable[[argparse.Namespace], None],
    shared: str,
    own: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Parse a script's options and do its work; an error becomes one sentence, and with --debug a traceback.

    Args:
        about: The script's docstring.
        work: Called with the options.
        shared: Names from :data:`OPTIONS`; ``debug`` is always there.
        own: The script's own arguments, by the names that argparse takes (``--stage``), with its settings.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments = {f"--{name}": OPTIONS[name] for name in [*shared.split(), "debug"]} | dict(own or {})
    for name, settings in arguments.items():
        parser.add_argument(name, **settings)
    options = parser.parse_args()
    try:
        work(options)
    except MechRewardError as error:
        if options.debug:
            raise
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from what is finished.")


def train(
    about: str | None,
    problem: Callable[[Any], str | None],
    schema: type[ExperimentConfig] = ExperimentConfig,
    setup: runner.Setup = arms.setup,
    next_step: str = "Compare them: python experiments/compare.py",
) -> None:
    """Start a script that trains an experiment's arms.

    Args:
        about: The script's docstring.
        problem: Returns what is wrong with a configuration for this experiment, in words, or None.
        schema: The configuration's schema.
        setup: Makes what an arm is trained with.
        next_step: What to do with the runs; their folder follows.
    """

    def work(options: argparse.Namespace) -> None:
        config = read_config(options.config, schema)
        if (wrong := problem(config)) is not None:
            raise ConfigError(f"{options.config}: {wrong}")
        grid = runner.chosen_runs(config.arms, config.seeds, options.arm, options.seed)
        command = [sys.executable, sys.argv[0], "--config", str(options.config)]
        command += ["--debug"] if options.debug else []
        runner.carry_out(config, grid, options.jobs, command, setup=setup)
        print(f"Runs: {Path(config.output).resolve()}. {next_step} {config.output}")

    start(about, work, "config arm seed jobs")
