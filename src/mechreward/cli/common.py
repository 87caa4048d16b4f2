"""What the commands share: options, progress, what is said at the end, and how they are interrupted."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console

from mechreward.features.pack import FeaturePack
from mechreward.unfinished import TellStage, Unfinished

console = Console()


def _packs_that_begin(typed: str) -> list[str]:
    from mechreward.features.catalog import shipped_packs

    return [name for name in shipped_packs() if name.startswith(typed)]


Name = Annotated[
    str,
    typer.Argument(help="A pack of the catalogs, or a path to its JSON file.", autocompletion=_packs_that_begin),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Verifier = Annotated[str, typer.Option(help="What labels sampled rollouts: math_boxed, gsm8k or exact_match.")]
Split = Annotated[str | None, typer.Option(help="The dataset's split, e.g. train[:500].")]
Subset = Annotated[str | None, typer.Option(help="The hub dataset's configuration, e.g. main.")]
Prompt = Annotated[str, typer.Option(help="What the model reads, with the dataset's columns in braces.")]
Answer = Annotated[str, typer.Option(help="The column with the gold answer.")]
MaxNewTokens = Annotated[int, typer.Option(min=2, help="The longest completion.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rollouts sampled at once.")]
Dtype = Annotated[str, typer.Option(help="Of the model's weights: float32, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]

POCKET_ROWS = {"train": 2000, "discovery": 400, "test": 5000}
"""Questions that pocket makes for each set, as in ``configs/``."""


def options_from(schema: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of a dataclass, which is annotated as Typer's parameters are.

    The decorated function takes a Typer context and the dataclass.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(ctx: typer.Context, **values: Any) -> None:
            command(ctx, schema(**values))

        hints = get_type_hints(schema, include_extras=True)
        fields = [field.replace(annotation=hints[name]) for name, field in inspect.signature(schema).parameters.items()]
        context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        run.__signature__ = inspect.Signature([context, *fields])  # pyright: ignore[reportAttributeAccessIssue]
        return run

    return decorate


def typed(ctx: typer.Context) -> list[str]:
    """Return the names of the parameters that were given on the command line."""
    return [name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"]


def flag(name: str) -> str:
    """Return an option as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def default_test_split(path: str) -> str:
    """Return the split with test questions; a file has only one."""
    return "train" if path.endswith((".json", ".jsonl")) else "test"


def question_source(options: Any, path: str, split: str, rows: int) -> dict[str, Any]:
    """Describe where questions come from, for a configuration.

    Args:
        options: With ``subset``, ``prompt`` and ``answer``; pocket needs none of them.
        path: ``mechreward/pocket``, a dataset of the hub, or a .jsonl.
        split: Its split.
        rows: Questions that pocket makes.
    """
    from mechreward import pocket

    if path == pocket.MODEL_ID:
        return {"path": path, "split": split, "rows": rows}
    columns = {"subset": options.subset, "prompt": options.prompt, "answer": options.answer}
    return {"path": path, "split": split, **columns}


class Interrupted(Exception):
    """Ctrl-C, with a sentence on what was kept."""


@contextmanager
def progress() -> Iterator[TellStage]:
    """Bars with the time that is left, on stderr: one for each stage, from when it is first told of."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        stages = {}

        def tell(stage: str, done: int, of: int) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=of)
            bars.update(stages[stage], completed=done, total=of)

        yield tell


@contextmanager
def resumable(folder: Path) -> Iterator[Unfinished]:
    """Work of which Ctrl-C leaves the finished part in a folder; the folder is removed when all is finished.

    Raises:
        Interrupted: By Ctrl-C.
    """
    unfinished = Unfinished(folder, lambda said: typer.echo(said, err=True))
    try:
        yield unfinished
    except KeyboardInterrupt:
        raise Interrupted(unfinished.kept()) from None
    unfinished.remove()


def beside(output: Path, command: str) -> Path:
    """Where a command keeps what is unfinished of an output."""
    return output.with_name(f".{output.stem}.{command}.partial")


def made(text: str, as_json: bool = False) -> None:
    """The last line: what was made, and where it is. Beside JSON it goes to stderr."""
    to = Console(stderr=True) if as_json else console
    to.print(text, soft_wrap=True, markup=False, highlight=False)


def show_verdict(pack: FeaturePack) -> None:
    if pack.evidence is not None:
        for test in pack.evidence.verdict:
            said = f"{'passed' if test.passed else 'FAILED'}  {test.name}: {test.sentence}"
            console.print(said, soft_wrap=True, markup=False, highlight=False)


def check_pack_file(file: Path, *others: Path | None) -> None:
    """Find out before the work, not after it, what cannot be written.

    Raises:
        ConfigError: The pack's file is not called as it should, or a file cannot be written.
    """
    from mechreward.errors import ConfigError
    from mechreward.probes.training import check_writable

    if not re.fullmatch(r"[\w.-]+\.json", file.name):
        raise ConfigError(
            f"--out {file}: a pack's file is called by letters, digits, '.', '-' and '_', and ends in .json."
        )
    for each in (file, *others):
        if each is not None:
            check_writable(each)


def check_folder(out: Path) -> None:
    """The same for a folder.

    Raises:
        ConfigError: It cannot be written to.
    """
    from mechreward.errors import ConfigError

    try:
        out.mkdir(parents=True, exist_ok=True)
        trial = out / ".writable"
        trial.touch()
        trial.unlink()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"--out {out} cannot be written to ({reason}): give another folder.") from None
