"""``mechreward train``."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mechreward.cli.common import console, expanded
from mechreward.errors import ConfigError

WRITTEN = "train.yaml"
"""In the output folder: the configuration that was made from options."""

ONE_OF_SEVERAL = "import sys; sys.stdout = sys.stderr; from mechreward.cli import app; app()"
"""A process that makes one of several runs; the first process says where they all are."""

POCKET_ROWS = {"train": 2000, "discovery": 400, "test": 5000}
"""Questions that pocket makes for each set, as in ``configs/``."""


@dataclass(frozen=True)
class RunOptions:
    """What the configuration of a run is made from: an experiment of one arm, ``train``."""

    pack: Annotated[str | None, typer.Option(help="What is rewarded beside the outcome.")] = None
    model: Annotated[str | None, typer.Option(help="A hub id or a folder. Default: the pack's.")] = None
    data: Annotated[
        str | None,
        typer.Option(help="Questions: mechreward/pocket (the default for that model), a hub dataset, or a .jsonl."),
    ] = None
    subset: Annotated[str | None, typer.Option(help="The hub dataset's configuration.")] = None
    split: Annotated[str, typer.Option(help="The split to train on.")] = "train"
    test_data: Annotated[str | None, typer.Option(help="Questions for evaluation. Default: --data.")] = None
    test_split: Annotated[
        str | None, typer.Option(help="Its split; nothing of it may be trained on. Default: test; a file's is train.")
    ] = None
    prompt: Annotated[str, typer.Option(help="What the model reads, with columns in braces.")] = "{prompt}"
    answer: Annotated[str, typer.Option(help="The column with the gold answer.")] = "answer"
    verifier: Annotated[str, typer.Option(help="math_boxed, gsm8k or exact_match.")] = "math_boxed"
    weight: Annotated[float, typer.Option(help="Weight of the features; the outcome's is 1.")] = 0.3
    mode: Annotated[str, typer.Option(help="How the two are combined: sum, hero or gated.")] = "sum"
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 100
    prompts_per_step: Annotated[int, typer.Option(min=1, help="Questions per step.")] = 12
    num_generations: Annotated[int, typer.Option(min=2, help="Rollouts per question.")] = 8
    max_completion_length: Annotated[int, typer.Option(min=1, help="Maximum number of tokens in a completion.")] = 256
    learning_rate: Annotated[float, typer.Option(help="Constant learning rate.")] = 1e-6
    beta: Annotated[float, typer.Option(min=0, help="KL coefficient.")] = 0.04
    lora_rank: Annotated[int | None, typer.Option(help="Train an adapter; by default all weights.")] = None
    questions: Annotated[int, typer.Option(min=1, help="Test questions per evaluation, drawn anew for each seed.")] = (
        500
    )
    every: Annotated[int, typer.Option(min=1, help="Steps between evaluations and checkpoints.")] = 10
    output: Annotated[Path | None, typer.Option(help="Folder for the runs. Default: runs/ and the pack's name.")] = None


@expanded
def train(
    ctx: typer.Context,
    config: Annotated[Path | None, typer.Option(help="An experiment's YAML file; the other options make one.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Only this arm of --config; may be repeated.")] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Only this seed; may be repeated. Without --config: 0.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time, each in a process of its own.")] = 1,
    report_to: Annotated[
        list[str] | None, typer.Option(help="A tracker of TRL's: tensorboard, trackio, wandb; may be repeated.")
    ] = None,
    *,
    options: RunOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print the runs' folders as JSON.")] = False,
) -> None:
    """Train with GRPO on outcome and features: the runs of an experiment's configuration, or one by options.

    Options make a configuration, which is written into the output folder, to be edited and given as --config.
    Interrupted, the same command resumes at the last checkpoint; finished runs are left as they are.

    Example: mechreward train --pack pocket/reasoning_pack --steps 30 --learning-rate 1e-4 --output runs/mine

    mechreward train --config configs/hybrid.yaml --arm sum --seed 0 --report-to tensorboard
    """
    if config is not None:
        _refuse_what_the_configuration_decides(ctx, config)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # trackers print, and stdout is for what is asked for
            folders, made_in = _train(config, arm, seed, jobs, report_to or [], options)
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. The same command goes on from the last checkpoint.", err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps([str(folder) for folder in folders]))
        return
    said = [f"Run: {folder}" for folder in folders] + [f"Next: mechreward report {made_in}"]
    console.print("\n".join(said), soft_wrap=True, markup=False, highlight=False)


def _refuse_what_the_configuration_decides(ctx: typer.Context, config: Path) -> None:
    for name in (field.name for field in fields(RunOptions)):
        if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE":
            raise ConfigError(
                f"{config} decides what --{name.replace('_', '-')} would: change it there, or leave one of the two out."
            )


def _train(
    config: Path | None, arm: Any, seed: Any, jobs: int, report_to: list[str], options: RunOptions
) -> tuple[list[Path], str]:
    """Make the runs; return their folders, and the one that holds them all."""
    from mechreward.experiments.config import read_config
    from mechreward.experiments.runner import carry_out, check_trackers, chosen_runs

    check_trackers(report_to)
    if config is None:
        config = _written(_configuration(options, seed or [0]))
    experiment = read_config(config)
    grid = chosen_runs(experiment, arm, seed)
    command = [sys.executable, "-c", ONE_OF_SEVERAL, "train", "--config", str(config)]
    trackers = [part for name in report_to for part in ("--report-to", name)]
    with Progress() as bar:
        folders = carry_out(
            experiment, grid, jobs, [*command, *trackers], bar.tell, report_to=report_to, progress=bar.step
        )
    return folders, experiment.output


class Progress:
    """How far the runs are, on stderr: a bar with the time that is left on a terminal, else a line at every step."""

    def __init__(self):
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        rest = TextColumn("left"), TimeRemainingColumn()
        self.bar = Bar(*columns, *rest, console=self.console, disable=not self.console.is_terminal)
        self.tasks: dict[str, Any] = {}
        self.began: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def tell(self, line: str) -> None:
        """A line above the bar."""
        self.console.print(line, soft_wrap=True, markup=False, highlight=False)

    def step(self, run: str, done: int, of: int) -> None:
        """A run has made another step, or begins."""
        if run not in self.tasks:
            self.tasks[run] = self.bar.add_task(run, total=of, completed=done)
            self.began[run] = time.monotonic(), done
        self.bar.update(self.tasks[run], completed=done)
        since, first = self.began[run]
        if not self.console.is_terminal and done > first:
            left = (time.monotonic() - since) / (done - first) * (of - done)
            self.tell(f"{run}, step {done} of {of}, about {left:.0f} s left")


def _configuration(options: RunOptions, seeds: list[int]) -> dict[str, Any]:
    """Return the options as an experiment of one arm, ``train``."""
    from mechreward import pocket
    from mechreward.features.catalog import load_pack

    pack = options.pack
    if pack is None:
        raise ConfigError("Name what to train with: --config, an experiment's YAML file, or --pack, a pack to reward.")
    model = options.model or load_pack(pack).model
    if options.data is None and pocket.resolve(model) != pocket.path():
        raise ConfigError(f"Name questions for {model} with --data: a dataset of the hub, or a .jsonl.")
    training = ("prompts_per_step", "num_generations", "max_completion_length", "learning_rate", "beta", "lora_rank")
    scaling = {"scale_rewards": "none"} if options.mode == "hero" else {}  # HERO's difficulty weight would cancel
    features = {"pack": pack, "weight": options.weight}
    return {
        "output": str(options.output or Path("runs") / pack.split("/")[-1].removesuffix(".json")),
        "model": model,
        "verifier": options.verifier,
        "watch": [pack],
        "data": _data(options),
        "training": {"max_steps": options.steps, **{name: getattr(options, name) for name in training}},
        "evaluation": {"every": options.every, "questions": options.questions},
        "arms": {"train": {"outcome": 1.0, "features": features, "mode": options.mode, **scaling}},
        "seeds": seeds,
    }


def _data(options: RunOptions) -> dict[str, Any]:
    """Return the three sets; a recipe's features are looked for on what is trained on, unless there is another set."""
    from mechreward import pocket

    data = options.data or pocket.MODEL_ID
    test = options.test_data or data
    columns = {"subset": options.subset, "prompt": options.prompt, "answer": options.answer}

    def source(path: str, name: str, split: str) -> list[dict[str, Any]]:
        if path == pocket.MODEL_ID:
            return [{"path": path, "split": name, "rows": POCKET_ROWS[name]}]
        return [{"path": path, "split": split, **columns}]

    test_split = options.test_split or ("train" if test.endswith((".json", ".jsonl")) else "test")
    return {
        "train": source(data, "train", options.split),
        "discovery": source(data, "discovery", options.split),
        "test": source(test, "test", test_split),
    }


def _written(made: dict[str, Any]) -> Path:
    """Keep the configuration beside its runs; another one is not written over."""
    import yaml
    from pydantic import ValidationError

    from mechreward.experiments.config import ExperimentConfig
    from mechreward.schema import most_telling, sentence

    try:
        ExperimentConfig.model_validate(made)
    except ValidationError as error:
        said = sentence(most_telling(error), ExperimentConfig, "configuration")
        raise ConfigError(f"The options make no configuration: {said}") from None
    file = Path(made["output"]) / WRITTEN
    text = yaml.safe_dump(made, sort_keys=False, allow_unicode=True)
    try:
        if file.exists() and file.read_text(encoding="utf-8") != text:
            raise ConfigError(
                f"{file} holds another configuration than these options: give another --output, or start that one by "
                f"mechreward train --config {file}."
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({error.strerror}): give another --output.") from None
    return file
