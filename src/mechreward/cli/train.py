"""``mechreward train``."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mechreward import progress
from mechreward.cli.common import (
    POCKET_ROWS,
    Answer,
    AsJson,
    Prompt,
    Subset,
    Verifier,
    console,
    default_test_split,
    expanded,
    flag,
    made,
    question_source,
    typed,
)
from mechreward.errors import ConfigError

WRITTEN = "train.yaml"
"""In the output folder: the configuration that was made from options."""

WITH_CONFIG = ("config", "arm", "seed", "jobs", "report_to", "as_json")
"""Options that go with a configuration; the configuration decides the others."""

ONE_OF_SEVERAL = "import sys; sys.stdout = sys.stderr; from mechreward.cli import app; app()"
"""Code of a process that makes one of several runs; the first process prints where all of them are."""


@dataclass
class TrainOptions:
    """The command's options."""

    config: Annotated[Path | None, typer.Option(help="An experiment's YAML file; the other options make one.")] = None
    arm: Annotated[list[str] | None, typer.Option(help="Only this arm of --config; may be repeated.")] = None
    seed: Annotated[list[int] | None, typer.Option(help="Only this seed; may be repeated. Without --config: 0.")] = None
    jobs: Annotated[int, typer.Option(help="Runs at a time, each in a process of its own.")] = 1
    report_to: Annotated[
        list[str] | None, typer.Option(help="A tracker of TRL's: tensorboard, trackio, wandb; may be repeated.")
    ] = None
    pack: Annotated[str | None, typer.Option(help="The pack that is rewarded beside the outcome.")] = None
    model: Annotated[str | None, typer.Option(help="A hub id or a folder. Default: the pack's.")] = None
    data: Annotated[
        str | None,
        typer.Option(help="Questions: mechreward/pocket (the default for that model), a hub id, or a .jsonl."),
    ] = None
    subset: Subset = None
    split: Annotated[str, typer.Option(help="The split to train on.")] = "train"
    test_data: Annotated[str | None, typer.Option(help="Questions for evaluation. Default: --data.")] = None
    test_split: Annotated[
        str | None,
        typer.Option(help="Their split, which must not be trained on. Default: test; for a file, train."),
    ] = None
    prompt: Prompt = "{prompt}"
    answer: Answer = "answer"
    verifier: Verifier = "math_boxed"
    weight: Annotated[float, typer.Option(help="Weight of the features; the outcome's is 1.")] = 0.3
    mode: Annotated[str, typer.Option(help="How the two are combined: sum, hero or gated.")] = "sum"
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 100
    prompts_per_step: Annotated[int, typer.Option(min=1, help="Questions per step.")] = 12
    num_generations: Annotated[int, typer.Option(min=2, help="Rollouts per question.")] = 8
    max_completion_length: Annotated[int, typer.Option(min=1, help="Maximum number of tokens of a rollout.")] = 256
    learning_rate: Annotated[float, typer.Option(help="Constant learning rate.")] = 1e-6
    beta: Annotated[float, typer.Option(min=0, help="KL coefficient.")] = 0.04
    lora_rank: Annotated[int | None, typer.Option(help="Train an adapter of this rank. Default: all weights.")] = None
    questions: Annotated[int, typer.Option(min=1, help="Test questions per evaluation, drawn by the seed.")] = 500
    every: Annotated[int, typer.Option(min=1, help="Steps between evaluations and checkpoints.")] = 10
    output: Annotated[Path | None, typer.Option(help="Folder for the runs. Default: runs/ and the pack's name.")] = None
    as_json: AsJson = False


@expanded
def train(ctx: typer.Context, *, options: TrainOptions) -> None:
    """Train with GRPO on outcome and features: the runs of an experiment's configuration, or one by options.

    Options make a configuration, which is written into the output folder, to be edited and given as --config.
    If interrupted, the same command resumes from the last checkpoint; finished runs are left as they are.

    Example: mechreward train --pack pocket/reasoning_pack --steps 30 --learning-rate 1e-4 --output runs/mine

    mechreward train --config configs/hybrid.yaml --arm sum --seed 0 --report-to tensorboard
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):  # trackers print, and stdout is for the result
            folders, output = _runs(ctx, options)
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. The same command goes on from the last checkpoint.", err=True)
        raise typer.Exit(130) from None
    if options.as_json:
        typer.echo(json.dumps([str(folder) for folder in folders]))
        return
    lines = [f"Run: {folder}" for folder in folders] + [f"Next: mechreward report {output}"]
    console.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)


def _runs(ctx: typer.Context, options: TrainOptions) -> tuple[list[Path], str]:
    """Make the runs; return their folders, and the folder that holds them all."""
    from mechreward.train.config import read_config
    from mechreward.train.runner import carry_out, check_trackers, chosen_runs

    report_to = options.report_to or []
    check_trackers(report_to)
    config = options.config
    if config is None:
        config = _written(_configuration(options))
    elif ignored := [name for name in typed(ctx) if name not in WITH_CONFIG]:
        raise ConfigError(
            f"{config} decides what {flag(ignored[0])} would: change it there, or leave one of the two out."
        )
    experiment = read_config(config)
    grid = chosen_runs(experiment.arms, experiment.seeds, options.arm, options.seed)
    command = [sys.executable, "-c", ONE_OF_SEVERAL, "train", "--config", str(config)]
    command += [part for name in report_to for part in ("--report-to", name)]
    with progress.shown():
        folders = carry_out(
            experiment, grid, options.jobs, command, lambda line: made(line, as_json=True), report_to=report_to
        )
    return folders, experiment.output


def _configuration(options: TrainOptions) -> dict[str, Any]:
    """Make an experiment of one arm, ``train``, from the options."""
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
        "training": {"max_steps": options.steps, **{name: vars(options)[name] for name in training}},
        "evaluation": {"every": options.every, "questions": options.questions},
        "arms": {"train": {"outcome": 1.0, "features": features, "mode": options.mode, **scaling}},
        "seeds": options.seed or [0],
    }


def _data(options: TrainOptions) -> dict[str, Any]:
    """Make the three sets; a recipe's features are found on the training questions, unless pocket has a set for it."""
    from mechreward import pocket

    data = options.data or pocket.MODEL_ID
    test = options.test_data or data
    of_test = options.test_split or default_test_split(test)
    sets = {"train": (data, options.split), "discovery": (data, options.split), "test": (test, of_test)}
    return {
        name: [question_source(options, path, name if path == pocket.MODEL_ID else split, POCKET_ROWS[name])]
        for name, (path, split) in sets.items()
    }


def _written(made: dict[str, Any]) -> Path:
    """Write the configuration beside its runs; another one is not overwritten."""
    import yaml

    from mechreward.train.config import ExperimentConfig, validated

    validated(ExperimentConfig, made, "The options make no configuration: ")
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
