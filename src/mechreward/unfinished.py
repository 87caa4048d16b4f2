"""Resumable work: completed steps are saved to disk and skipped on restart.

What takes long is kept: sampled rollouts, a red team's attacks, an evaluation's answers. It belongs to what decided it:
the model, the data, the seed, and so on. Steps that something else decided are left alone, and never mixed in. Numbers
come back as they were, so that work in two parts ends like work in one.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mechreward.errors import ConfigError
from mechreward.schema import shown

T = TypeVar("T")

Tell = Callable[[int, int], None]
"""Called with what is done, and of how many."""

TellStage = Callable[[str, int, int], None]
"""The same for work in several stages: called with the stage's name first."""


def silent(*_: Any) -> None:
    """No-op progress callback."""


class Steps:
    """The finished steps of one piece of work, in order. Without a file nothing is kept.

    Attributes:
        done: Each step that was kept, before and now.
        seconds: What the steps took that were done before.
    """

    def __init__(self, file: Path | None = None, decides: Mapping[str, Any] | None = None):
        self.done: list[Any] = []
        self.seconds, self._last = 0.0, time.perf_counter()
        self._file, self._decides = file, decides
        for number, seconds, step in [] if file is None else _lines(file)[1:]:
            # Two commands at once may both have written a step, which is the same.
            if number == len(self.done):
                self.done.append(step)
                self.seconds += seconds

    def __len__(self) -> int:
        return len(self.done)

    def add(self, step: Any) -> None:
        """Keep a finished step: lists, texts and numbers.

        Raises:
            ConfigError: It cannot be written.
        """
        if self._file is None:
            return
        now = time.perf_counter()
        lines = [] if self._file.exists() else [_dumped(self._decides)]
        lines.append(json.dumps([len(self), round(now - self._last, 3), step]))
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
        except OSError as error:
            raise ConfigError(f"{self._file} cannot be written ({error.strerror}): choose another place.") from None
        self.done.append(step)
        self._last = now

    def each(self, items: Iterable[T], do: Callable[[T], Any]) -> Iterator[Any]:
        """Yield what doing each item gives, from what was kept where it was done before."""
        for number, item in enumerate(items):
            if number < len(self.done):
                yield self.done[number]
            else:
                step = do(item)
                self.add(step)
                yield step


class Unfinished:
    """A folder for the finished steps of a command, which is removed when the command has finished.

    Args:
        folder: Made when the first step is kept; ``None`` keeps nothing.
        notice: Called with a sentence where something is gone on with, or left alone.
    """

    def __init__(self, folder: Path | None = None, notice: Callable[[str], None] = silent):
        self.folder, self._notice = folder, notice
        self.parts: dict[str, Steps] = {}

    def steps(self, name: str, decides: Mapping[str, Any]) -> Steps:
        """Return the finished steps of a piece of work.

        Args:
            name: Of the work, a plural.
            decides: All that its result depends on, as far as it may change from one start to the next.
        """
        if self.folder is None:
            return Steps()
        stem = name.replace(" ", "-")
        file = self.folder / f"{stem}-{digest(decides)}.jsonl"
        steps = self.parts[name] = Steps(file, decides)
        if steps.done:
            self._notice(f"Going on behind what is kept of the {name} in {file}.")
        elif other := next((f for f in _files(self.folder) if re.fullmatch(rf"{stem}-[0-9a-f]{{12}}\.jsonl", f)), None):
            self._notice(f"Not used: {self.folder / other}, {_difference(self.folder / other, decides)}.")
        return steps

    @property
    def seconds(self) -> float:
        """Seconds that the steps took which were done before this start."""
        return sum(steps.seconds for steps in self.parts.values())

    def kept(self) -> str:
        """Return a sentence on where an interrupted command stands."""
        some = [f"{len(steps)} of the {name}" for name, steps in self.parts.items() if len(steps)]
        if not some:
            return "Interrupted before anything was finished: the same command starts again."
        what = "steps of the work: " + ", ".join(some)
        return f"Interrupted: {self.folder} keeps finished {what}. The same command goes on from there."

    def remove(self) -> None:
        """Remove the folder: the command has finished."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def digest(value: Any) -> str:
    """Return twelve hexadecimal digits that tell values apart: names, texts, numbers, lists of them."""
    return hashlib.sha256(_dumped(value).encode()).hexdigest()[:12]


def _dumped(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _lines(file: Path) -> list[Any]:
    """Return the file's whole lines, and cut off what a killed command left behind them."""
    if not file.exists():
        return []
    try:
        text = file.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            file.write_text(whole, encoding="utf-8")
        return [json.loads(line) for line in whole.splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} is damaged ({type(error).__name__}): remove it, and its steps start again."
        ) from None


def _files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []


def _difference(file: Path, decides: Mapping[str, Any]) -> str:
    """Say by what the steps in a file were decided differently."""
    theirs, ours = (_lines(file) or [{}])[0], json.loads(_dumped(decides))
    for name in ours:
        if theirs.get(name) != ours[name]:
            return f"which was made with another {name} ({shown(theirs.get(name))}, not {shown(ours[name])})"
    return "which something else decided"
