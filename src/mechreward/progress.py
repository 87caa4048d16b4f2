"""Progress of long work: a command shows it as bars; everywhere else it is silent.

Long work opens a stage, and whatever reads or samples rollouts inside it advances the stage by so many rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

T = TypeVar("T")

_bars: ContextVar[Progress | None] = ContextVar("bars", default=None)
_stage: ContextVar[TaskID | None] = ContextVar("stage", default=None)


@contextmanager
def shown() -> Iterator[None]:
    """Show a bar with the time that is left, on stderr, for each stage inside."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        token = _bars.set(bars)
        try:
            yield
        finally:
            _bars.reset(token)


@contextmanager
def stage(name: str, of: int) -> Iterator[None]:
    """Name the work inside, which will :func:`advance` ``of`` times."""
    bars = _bars.get()
    token = _stage.set(None if bars is None else bars.add_task(name, total=of))
    try:
        yield
    finally:
        _stage.reset(token)


def advance(count: int = 1) -> None:
    """Report that so many rollouts, fits or the like are done."""
    bars, current = _bars.get(), _stage.get()
    if bars is not None and current is not None:
        bars.advance(current, count)


@contextmanager
def steps(name: str, of: int, done: int = 0) -> Iterator[Callable[[], None]]:
    """Name the work inside, of which ``done`` steps are done, and yield what alone advances it, by one step."""
    bars = _bars.get()
    if bars is None:
        yield lambda: None
        return
    task, token = bars.add_task(name, total=of, completed=done), _stage.set(None)
    try:
        yield lambda: bars.advance(task)
    finally:
        _stage.reset(token)


def in_lines() -> bool:
    """Return whether progress is to be shown, but not on a terminal, where a bar would not be seen."""
    bars = _bars.get()
    return bars is not None and not bars.console.is_terminal


def track(items: Iterable[T], name: str, of: int) -> Iterator[T]:
    """Yield the items as work that advances with each; what happens to them does not advance it."""
    with steps(name, of) as advance_one:
        for item in items:
            yield item
            advance_one()
