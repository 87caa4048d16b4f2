"""At which commits, and when, the runs behind a result were made."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from mechreward.files import Made


def made_by(environments: Iterable[Path]) -> Made:
    """Say what several runs have in common: every commit, by date, and the first and the last date.

    Args:
        environments: The runs' ``environment.json``; one that is missing, or that names no commit, counts as not
            recorded.
    """
    each = [_recorded(file) for file in environments]
    commits = dict.fromkeys(one["commit"] for one in sorted(each, key=lambda one: one["date"] or "") if one["commit"])
    unknown = sum(not one["commit"] for one in each)
    dates = sorted({one["date"] for one in each if one["date"]})
    missing = f" (not recorded for {unknown} of {len(each)} runs)" if unknown else ""
    return {
        "commit": _listed(list(commits)) + missing if commits else None,
        "date": " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else None,
    }


def _recorded(file: Path) -> Made:
    there = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {key: there.get(key) for key in ("commit", "date")}


def _listed(names: list[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])
