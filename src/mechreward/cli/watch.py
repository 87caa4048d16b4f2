"""``mechreward watch``."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from mechreward.cli.common import console

if TYPE_CHECKING:
    from mechreward.report.live import Snapshot

BARS = "▁▂▃▄▅▆▇█"

QUIET = 120
"""Seconds without a word after which it is said that nothing comes."""


def watch(
    run: Annotated[Path, typer.Argument(help="Output folder of a training, or of an experiment: then its latest run.")],
    once: Annotated[bool, typer.Option("--once", help="Show it as it is now, and end.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 2.0,
) -> None:
    """Watch a training in the terminal: reward and its parts, accuracy, KL, length, flags, alarms, time left.

    It reads the files of the run, and can be started and ended (Ctrl-C) at any time without touching the training.

    Example: mechreward watch runs/mine
    """
    from rich.live import Live

    from mechreward.report.live import run_in, snapshot

    folder = run_in(run)
    now = snapshot(folder)
    if once:
        console.print(frame(now))
        return
    try:
        with Live(frame(now), console=console, auto_refresh=False) as live:
            while not now.finished:
                time.sleep(every)
                now = snapshot(folder)
                live.update(frame(now), refresh=True)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def frame(now: Snapshot) -> Group:
    """What is on the screen."""
    parts: list[Any] = [_headline(now)]
    if now.stopped is not None:
        parts.append(Text(now.stopped, style="bold red"))
    if now.curves:
        parts.append(_figures(now))
    if now.alarms:
        rang = ", ".join(f"{name} (first at step {step})" for name, step in now.alarms.items())
        parts.append(Text(f"Alarms: {rang}", style="bold red"))
    if now.worst is not None:
        parts.append(_rollout(now.worst))
    return Group(*parts)


def _headline(now: Snapshot) -> Text:
    said = f"{now.folder}: step {now.step}" + ("" if now.steps is None else f" of {now.steps}")
    if now.finished:
        said += ", finished"
    elif now.left is not None:
        said += f", about {_time(now.left)} left"
    if not now.finished and now.quiet > QUIET:
        said += f"; nothing was written for {_time(now.quiet)}: is it still running?"
    return Text(said, style="bold")


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _figures(now: Snapshot) -> Table:
    table = Table("", "first", "last", "", box=None, pad_edge=False)
    for name, values in now.curves.items():
        table.add_row(Text(name), f"{values[0]:.4g}", f"{values[-1]:.4g}", sparkline(values))
    return table


def sparkline(values: Sequence[float], width: int = 30) -> str:
    """A curve of at most ``width`` characters, from the smallest value (low) to the largest (high); NaN is a gap.

    Of more values than that, each character shows the mean of as many.
    """
    if len(values) > width:
        cuts = [len(values) * i // width for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
    finite = [value for value in values if math.isfinite(value)]
    low, span = min(finite, default=0.0), max(finite, default=0.0) - min(finite, default=0.0)
    top = len(BARS) - 1
    return "".join(
        " " if not math.isfinite(v) else BARS[round((v - low) / span * top) if span > 0 else 0] for v in values
    )


def _rollout(record: dict[str, Any]) -> Text:
    """The rollout that earned most of the wrong ones; what could rewrite a terminal is shown as a sign."""
    from mechreward.features.show import visible

    said = f"Most rewarded wrong answer lately: {record['reward']:.3f} at step {record['step']}"
    flags = "; ".join(record.get("flags", []))
    said += f", gold {visible(str(record.get('gold')))}" + (f", flagged: {visible(flags)}" if flags else ", no flags")
    text = Text(said + "\n", style="bold")
    lines = "".join(record["tokens"])[:600].strip().split("\n")
    return text.append("\n".join(visible(line) for line in lines), style="not bold")
