"""What the commands share: options, progress, what is said at the end, and how they are interrupted."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, get_type_hints

import typer
from rich.console import Console

from mechreward.features.pack import FeaturePack
from mechreward.unfinished import TellStage, Unfinished

console = Console()


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn each parameter of a command that is a dataclass into options, one for each of its fields.

    A field is declared as typer declares an option, ``name: Annotated[type, typer.Option(help=...)] = default``, and
    typer reads the command's ``__signature__``. The command gets the dataclass, filled.
    """
    signature = inspect.signature(command, eval_str=True)
    groups = {name: each.annotation for name, each in signature.parameters.items() if is_dataclass(each.annotation)}
    parameters = []
    for name, parameter in signature.parameters.items():
        options = {name: parameter}
        if name in groups:
            hints = get_type_hints(groups[name], include_extras=True)
            fields = inspect.signature(groups[name]).parameters
            options = {field: each.replace(annotation=hints[field]) for field, each in fields.items()}
        parameters += [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in options.values()]

    @functools.wraps(command)
    def called(**values: object) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field: values.pop(field) for field in inspect.signature(kind).parameters})
        command(**values)

    called.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportFunctionMemberAccess]
    return called


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
