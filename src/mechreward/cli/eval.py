"""``mechreward eval``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mechreward import progress
from mechreward.cli.common import (
    POCKET_ROWS,
    Answer,
    AsJson,
    Dtype,
    MaxNewTokens,
    Prompt,
    Subset,
    Verifier,
    beside,
    console,
    default_test_split,
    expanded,
    flag,
    made,
    question_source,
    resumable,
    typed,
)
from mechreward.errors import ConfigError

if TYPE_CHECKING:
    from mechreward.train.evaluation import EvalRequest

WITH_A_RUN = ("measured", "tasks", "task_questions", "pocket_suite", "out", "as_json")
"""Options that go with a run; its configuration decides the others."""


@dataclass
class EvalOptions:
    """The command's argument and options."""

    measured: Annotated[str, typer.Argument(help="A finished run's folder, or a model: a folder or a hub id.")]
    data: Annotated[
        str | None,
        typer.Option(help="Questions: mechreward/pocket (the default for that model), a hub id, or a .jsonl."),
    ] = None
    subset: Subset = None
    split: Annotated[str | None, typer.Option(help="Split of the questions. Default: test; for a file, train.")] = None
    prompt: Prompt = "{prompt}"
    answer: Answer = "answer"
    verifier: Verifier = "math_boxed"
    questions: Annotated[int, typer.Option(min=1, help="Maximum number of questions, drawn by the seed.")] = 500
    max_new_tokens: MaxNewTokens = 256
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the draw and of the sampling.")] = 0
    dtype: Dtype = "float32"
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval besides: task[:metric[:filter]], separated by commas.")
    ] = None
    task_questions: Annotated[int, typer.Option(min=1, help="Questions per task.")] = 200
    pocket_suite: Annotated[bool, typer.Option(help="Measure pocket's two skills and its perplexity besides.")] = False
    out: Annotated[
        Path | None, typer.Option(help="File for the figures. Default: eval.json, in the run's folder or here.")
    ] = None
    as_json: AsJson = False


@expanded
def evaluate(ctx: typer.Context, *, options: EvalOptions) -> None:
    """Measure how often a model is right, sampled and greedy, with intervals; and what else it can do.

    A run is measured on its own test questions, which no step was trained on.
    If interrupted, the same command resumes.

    Examples: mechreward eval runs/pocket/sum/seed-0

    mechreward eval mechreward/pocket --questions 200

    mechreward eval google/gemma-2-2b --data openai/gsm8k --subset main --prompt "{question}" --verifier gsm8k
    --tasks hellaswag:acc_norm,arc_easy
    """
    from mechreward.probes.training import check_writable
    from mechreward.train import capability, evaluation
    from mechreward.train.runner import quiet

    run = Path(options.measured)
    is_run = (run / "config.yaml").exists()
    request = evaluation.request_of_run(run) if is_run else _request(options)
    if is_run and (ignored := [name for name in typed(ctx) if name not in WITH_A_RUN]):
        raise ConfigError(f"The run in {run} decides what {flag(ignored[0])} would: leave it out.")
    file = options.out or (run if is_run else Path()) / "eval.json"
    check_writable(file)
    suites: list[capability.Suite] = [capability.PocketSuite(seed=request.seed)] if options.pocket_suite else []
    suites += evaluation.parse_tasks(options.tasks or "", options.task_questions)
    quiet()
    kept = beside(file, "eval")
    with resumable(kept) as unfinished, progress.shown():
        steps = unfinished.steps("evaluations", cache_key := request.cache_key)
        found = evaluation.accuracy_figures(request, steps)
        scores = capability.measure(
            request.model, suites, seed=request.seed, kept=kept, log=lambda line: made(line, as_json=True)
        )
        besides = evaluation.capability_figures(scores)
        report = {**cache_key, "questions": found, "capabilities": besides}
        text = json.dumps(report, indent=2) + "\n"
        file.write_text(text, encoding="utf-8")
    if options.as_json:
        typer.echo(text, nl=False)
    else:
        console.print(_table({**found, **besides}))
    made(f"{file}: {found['sampled']['n']} questions.", options.as_json)


def _request(options: EvalOptions) -> EvalRequest:
    """Measure a model on questions that the options name."""
    from mechreward import pocket
    from mechreward.train.config import ExperimentConfig, validated
    from mechreward.train.evaluation import EvalRequest

    model, data = options.measured, options.data
    if data is None and pocket.resolve(model) != pocket.path():
        raise ConfigError(
            f"{model} is no finished run, and as a model it needs questions: name them with --data, a dataset of the "
            "hub or a .jsonl."
        )
    data = data or pocket.MODEL_ID
    rows = max(options.questions, POCKET_ROWS["test"])  # from which they are drawn
    source = question_source(options, data, options.split or default_test_split(data), rows)
    fields = {
        "output": "unused",
        "model": model,
        "verifier": options.verifier,
        "data": {name: [source] for name in ("train", "discovery", "test")},
        "training": {"max_steps": 1, "max_completion_length": options.max_new_tokens},
        "evaluation": {"questions": options.questions},
        "arms": {"unused": {"outcome": 1.0}},
        "seeds": [options.seed],
    }
    config = validated(ExperimentConfig, fields, "", "evaluation")
    return EvalRequest(model, config, options.seed, options.dtype)


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
