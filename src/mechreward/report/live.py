"""A run's folder while the run goes on: how far it is, and what its figures say."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from mechreward.errors import DataError
from mechreward.files import read_if_there
from mechreward.recording import METRICS, RECORDING, TRACE
from mechreward.report.curves import GROUPS, rang

SHOWN = ("Test questions", "Reward and its parts", "KL, entropy, length", "Guards and alarms", "Monitors")
"""The report's groups of figures that are worth a line while a training runs."""

HIDDEN = (r"monitor/alarm/.*", r"test/(step|question|number)")
"""Alarms are told apart from the curves."""

LATELY = 200
"""The most rewarded wrong rollout is looked for among so many that were recorded last."""


@dataclass(frozen=True)
class Snapshot:
    """A run as it is now.

    Attributes:
        folder: Its folder.
        step, steps: Steps done, and all; None where nothing says so.
        left: Seconds that the remaining steps will take, by the median step so far, without evaluations; None before
            the second step, or where there is no end.
        quiet: Seconds since something was written.
        curves: Values by name, one for each step that logged it (``test/...``: each evaluation).
        alarms: The step at which each alarm first rang.
        worst: The rollout that earned most among those recorded lately whose answer is wrong, if any.
        stopped: Why training was ended before its last step, if it was.
        finished: Nothing more will come.
    """

    folder: Path
    step: int
    steps: int | None
    left: float | None
    quiet: float
    curves: dict[str, list[float]]
    alarms: dict[str, int]
    worst: dict[str, Any] | None
    stopped: str | None
    finished: bool


def run_in(folder: Path) -> Path:
    """The run that a folder holds, or of an experiment's the one that was written to last.

    Raises:
        DataError: There is none.
    """
    if _is_run(folder):
        return folder
    runs = [run for run in folder.glob("*/seed-*") if _is_run(run)]
    if not runs:
        raise DataError(f"{folder} holds no run: give the output folder of a training, or of an experiment.")
    return max(runs, key=_written)


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (METRICS, RECORDING, "config.yaml"))


def _written(folder: Path) -> float:
    """When something in it was last written, in seconds since the epoch."""
    times = [folder.stat().st_mtime]
    for file in folder.iterdir():
        try:
            times.append(file.stat().st_mtime)
        except FileNotFoundError:  # it has just been renamed
            continue
    return max(times)


def snapshot(folder: Path) -> Snapshot:
    """Read what there is of a run; a line that is being written is left for the next time."""
    logs, evaluations = read_if_there(folder / METRICS), read_if_there(folder / "evaluations.jsonl")
    step = max((int(record["step"]) for record in [*logs, *evaluations]), default=0)
    steps = _steps(folder)
    stopped = logs[-1].get("stopped_because") if logs else None  # an earlier one was gone on from
    finished = stopped is not None or _finished(folder, step, steps)
    took = [log["seconds"] for log in logs if "seconds" in log]
    left = median(took) * max(steps - step, 0) if steps is not None and len(took) > 1 and not finished else None
    quiet = max(0.0, time.time() - _written(folder))
    curves = series(logs, evaluations)
    alarms = {name: at[0] for name, at in rang(logs).items()}
    wrong = worst(read_if_there(folder / TRACE))
    return Snapshot(folder, step, steps, left, quiet, curves, alarms, wrong, stopped, finished)


def _steps(folder: Path) -> int | None:
    """How many steps the run will have, as far as its folder says."""
    try:
        return int(json.loads((folder / RECORDING).read_text(encoding="utf-8-sig"))["max_steps"])
    except (OSError, ValueError, KeyError):
        pass  # not recorded, or not yet
    try:
        return int(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8-sig"))["training"]["max_steps"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def _finished(folder: Path, step: int, steps: int | None) -> bool:
    """An experiment's run evaluates and saves after its last step, and then says so; any other ends with that step."""
    if (folder / "config.yaml").exists():
        return (folder / "summary.json").exists()
    return steps is not None and step >= steps


def series(logs: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Accuracy on the test questions, the reward and its parts, KL, length, flags, monitors: in the report's order.

    What counts flags or failures and was 0 throughout is left out, but for the rate of all flags.
    """
    found: dict[str, list[float]] = {}
    records = [*({f"test/{k}": v for k, v in e.items()} for e in evaluations), *logs]
    for record in records:
        for key, value in record.items():
            if isinstance(value, int | float) and not any(re.fullmatch(hidden, key) for hidden in HIDDEN):
                found.setdefault(key, []).append(float(value))
    places = [pattern for group in SHOWN for pattern in GROUPS[group]]
    counts = GROUPS["Guards and alarms"]
    ordered = {}
    for pattern in places:
        for key in found:
            silent = pattern in counts and not any(found[key]) and not key.endswith("/flagged")
            if re.fullmatch(pattern, key) and not silent:
                ordered.setdefault(key, found[key])
    single = len([key for key in ordered if re.fullmatch(r"rewards/.*/mean", key)]) == 1  # it is the reward itself
    return {key: values for key, values in ordered.items() if not (single and key.startswith("rewards/"))}


def worst(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The most rewarded of the wrong rollouts that were recorded lately in training: where hacking shows."""
    wrong = [r for r in records[-LATELY:] if r.get("right") is False and r.get("reward") is not None]
    return max(wrong, key=lambda record: record["reward"], default=None)
