"""``mechreward eval``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mechreward.cli.common import Answer, AsJson, Dtype, Prompt, Subset, beside, console, made, progress, resumable
from mechreward.cli.train import POCKET_ROWS
from mechreward.errors import ConfigError

if TYPE_CHECKING:
    from mechreward.experiments.evaluation import Asked

WITH_A_RUN = ("measured", "tasks", "task_questions", "pocket_suite", "out", "as_json")
"""Options that a run's configuration does not decide."""


def evaluate(
    ctx: typer.Context,
    measured: Annotated[str, typer.Argument(help="A finished run's folder, or a model: a folder or a hub id.")],
    data: Annotated[
        str | None, typer.Option(help="Questions with answers: mechreward/pocket (its default), a hub id or a .jsonl.")
    ] = None,
    subset: Subset = None,
    split: Annotated[str | None, typer.Option(help="Of the questions. Default: test; a file's is train.")] = None,
    prompt: Prompt = "{prompt}",
    answer: Answer = "answer",
    verifier: Annotated[str, typer.Option(help="math_boxed, gsm8k or exact_match.")] = "math_boxed",
    questions: Annotated[int, typer.Option(min=1, help="So many, drawn by the seed.")] = 500,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="The longest completion.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw and of the sampling.")] = 0,
    dtype: Dtype = "float32",
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval besides: task[:metric[:filter]], separated by commas.")
    ] = None,
    task_questions: Annotated[int, typer.Option(min=1, help="Of each task.")] = 200,
    pocket_suite: Annotated[bool, typer.Option(help="pocket's two skills and its perplexity besides.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where the figures go. Default: eval.json, in the run's folder or here.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how often a model is right, sampled and greedy, with intervals; and what else it can do.

    A run is measured on its own test questions, which no step was trained on. Interrupted, the same command goes on.

    Examples: mechreward eval runs/pocket/sum/seed-0

    mechreward eval mechreward/pocket --questions 200

    mechreward eval google/gemma-2-2b --data openai/gsm8k --subset main --prompt "{question}" --verifier gsm8k
    --tasks hellaswag:acc_norm,arc_easy
    """
    from mechreward.experiments import evaluation
    from mechreward.experiments.capability import PocketSuite
    from mechreward.experiments.runner import quiet
    from mechreward.probes.training import check_writable

    a_run = (Path(measured) / "config.yaml").exists()
    asked = evaluation.of_run(Path(measured)) if a_run else _asked(ctx.params)
    if a_run:
        _refuse_what_the_run_decides(ctx, measured)
    file = out or (Path(measured) if a_run else Path()) / "eval.json"
    check_writable(file)
    extra = [evaluation.task(each, task_questions) for each in (tasks or "").split(",") if each]
    suite = PocketSuite(seed=asked.seed) if pocket_suite else None
    quiet()
    kept = beside(file, "eval")
    with resumable(kept) as unfinished, progress() as tell:
        steps = unfinished.steps("evaluations", decides := asked.decides)
        found = evaluation.answered(asked, steps, lambda done, of: tell("Answering", done, of))
        besides = evaluation.capabilities(
            asked.model, extra, suite, asked.seed, kept, lambda line: made(line, as_json=True)
        )
        report = {**decides, "questions": found, "capabilities": besides}
        text = json.dumps(report, indent=2) + "\n"
        file.write_text(text, encoding="utf-8")
    if as_json:
        typer.echo(text, nl=False)
    else:
        console.print(_table({**found, **besides}))
    made(f"{file}: {found['sampled']['n']} questions.", as_json)


def _asked(options: dict[str, Any]) -> Asked:
    """A model, and questions by the options."""
    from pydantic import ValidationError

    from mechreward import pocket
    from mechreward.experiments.config import ExperimentConfig
    from mechreward.experiments.evaluation import Asked
    from mechreward.schema import most_telling, sentence

    model, data = options["measured"], options["data"]
    if data is None and pocket.resolve(model) != pocket.path():
        raise ConfigError(
            f"{model} is no finished run, and as a model it needs questions: name them with --data, a dataset of the "
            "hub or a .jsonl."
        )
    data = data or pocket.MODEL_ID
    split = options["split"] or ("train" if data.endswith((".json", ".jsonl")) else "test")
    source: dict[str, Any] = {"path": data, "split": split}
    if data == pocket.MODEL_ID:
        source["rows"] = max(options["questions"], POCKET_ROWS["test"])  # from which they are drawn
    else:
        source |= {name: options[name] for name in ("subset", "prompt", "answer")}
    try:
        config = ExperimentConfig.model_validate(
            {
                "output": "unused",
                "model": model,
                "verifier": options["verifier"],
                "data": {name: [source] for name in ("train", "discovery", "test")},
                "training": {"max_steps": 1, "max_completion_length": options["max_new_tokens"]},
                "evaluation": {"questions": options["questions"]},
                "arms": {"unused": {"outcome": 1.0}},
                "seeds": [options["seed"]],
            }
        )
    except ValidationError as error:
        raise ConfigError(sentence(most_telling(error), ExperimentConfig, "evaluation")) from None
    return Asked(model, config, options["seed"], options["dtype"])


def _refuse_what_the_run_decides(ctx: typer.Context, run: str) -> None:
    for name in ctx.params:
        if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE" and name not in WITH_A_RUN:
            raise ConfigError(f"The run in {run} decides what --{name.replace('_', '-')} would: leave it out.")


def _table(figures: dict[str, dict[str, Any]]) -> Table:
    shown = {name: form for name, form in _COLUMNS.items() if any(name in row for row in figures.values())}
    table = Table("", "n", *(name.replace("_", " ") for name in shown), box=None)
    for what, row in figures.items():
        cells = [f"{row[name]:{form}}" if name in row else "" for name, form in shown.items()]
        if "interval" in row:
            cells[0] += " ({:.3f} to {:.3f})".format(*row["interval"])
        table.add_row(what, str(row["n"]), *cells)
    return table


_COLUMNS = {"accuracy": ".3f", "right_steps": ".3f", "tokens": ".1f", "truncated": ".1%", "perplexity": ".2f"}
