"""Files that runs leave behind: JSON Lines, atomic writes, and where, when and at which commit they were made."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).parent

ENVIRONMENT = "environment.json"
"""In a run's folder: what :func:`environment` returned when it began."""

PACKAGES = ("mechreward", "torch", "transformers", "trl", "accelerate", "datasets", "peft", "math-verify")

Made = dict[str, str | None]
"""``commit``, and ``date`` (ISO, UTC); None where it is not known."""


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file; a last line that was cut off is left out."""
    records = []
    for line in file.read_text(encoding="utf-8-sig").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def read_if_there(file: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file; none where it is missing."""
    return read_jsonl(file) if file.exists() else []


def append(file: Path, records: Sequence[Mapping[str, Any]]) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in records)


def write(file: Path, text: str) -> None:
    """All or nothing: a file that is there counts as finished."""
    unfinished = file.with_suffix(".part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    write(file, json.dumps(content, indent=2) + "\n")


def forget_after(file: Path, step: int) -> None:
    """Drop what was recorded after a step: it is about to be computed again."""
    if file.exists():
        write(file, "".join(json.dumps(r) + "\n" for r in read_jsonl(file) if r["step"] <= step))


def environment() -> dict[str, Any]:
    """What the run ran on, at which commit and when; no names of machines or people."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)},
        "device": device,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        **made_now(),
    }


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


# -- when and where something was made ---------------------------------------------------------------------------------


def made_now(package: Path = PACKAGE) -> Made:
    """Tell today's date, and the commit of the checkout that the package lies in; never raises."""
    return {"commit": _commit(package), "date": datetime.now(UTC).date().isoformat()}


def _commit(package: Path) -> str | None:
    """The checkout's commit, with ``-dirty`` if tracked files differ from it; None outside one, or without git."""
    try:
        # An installed copy may lie in somebody else's checkout, in its .venv: then git does not know the file.
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        changed = _git(package, "status", "--porcelain", "--untracked-files=no")
        return _git(package, "rev-parse", "--short=7", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    # Inside a git hook, these variables name the hook's repository.
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), "--no-optional-locks", *arguments]
    done = subprocess.run(command, capture_output=True, check=True, timeout=30, env=surroundings, encoding="utf-8")
    return done.stdout.strip()


def made_sentence(report: Mapping[str, Any]) -> str:
    """Say at which commit and when the figures of a report were made, from its ``made``; one without it is older."""
    told: Made = report.get("made", {})
    commit, date = told.get("commit"), told.get("date")
    called = "Commit not recorded" if commit is None else f"{'Commits' if ' and ' in commit else 'Commit'} {commit}"
    return f"{called}{'' if date is None else f', {date}'}."
