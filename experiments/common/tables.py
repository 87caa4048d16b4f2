"""Figures as text, tables in Markdown, and the files of results."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "results"


def table(header: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table's lines below its header, which is written as it stands in the table."""
    separator = "|---" * (header.count("|") - 1) + "|"
    return [header, separator, *(f"| {' | '.join(cells)} |" for cells in rows)]


def number(value: float | None, form: str = ".3f") -> str:
    """Format a number; ``?`` where it is unknown."""
    return "?" if value is None else f"{value:{form}}"


def numbers(values: Iterable[float | None], form: str = ".3f") -> str:
    """Format several numbers, such as each seed's."""
    return " ".join(number(value, form) for value in values)


def interval(ends: Sequence[float | None], form: str = "+.3f") -> str:
    """Format an interval: ``-0.010 to +0.020``."""
    return " to ".join(number(end, form) for end in ends)


def figure(found: Mapping[str, Any] | None, form: str = ".3f") -> str:
    """Format a mean with its interval over seeds; nothing where there is no figure."""
    return "" if found is None else f"{number(found['mean'], form)} ({interval(found['interval'], form)})"


def mean(found: Mapping[str, Any] | None, form: str = ".3f") -> str:
    """Format a mean alone; nothing where there is no figure."""
    return "" if found is None or found["mean"] is None else f"{found['mean']:{form}}"


def seeds(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """Return how many seeds the arms have: ``5``, or ``3 to 5``."""
    counts = sorted({len(arm["seeds"]) for arm in arms.values()})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def write_results(file: Path, report: Mapping[str, Any], page: str, flat: bool = False) -> None:
    """Write ``<file>.json`` and ``<file>.md``, and print the page.

    Args:
        file: Without the suffix; its folder is made.
        report: Goes into the JSON file.
        page: Goes into the Markdown file.
        flat: Write each innermost list of the JSON file on one line.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, allow_nan=False)
    if flat:
        innermost = r"\[\n\s+([^\[\]{}]*?)\n\s+\]"
        text = re.sub(innermost, lambda found: "[" + re.sub(r"\n\s+", " ", found[1]) + "]", text)
    Path(f"{file}.json").write_text(text + "\n", encoding="utf-8")
    Path(f"{file}.md").write_text(page, encoding="utf-8")
    print(page)
