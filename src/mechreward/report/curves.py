"""Training curves: every figure that was logged, with the spread over seeds, in the groups in which they are shown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mechreward.report.comparison import by_arm
from mechreward.report.runs import Folder

GROUPS: dict[str, tuple[str, ...]] = {
    "Test questions": (r"test/.*",),
    "Reward and its parts": (r"reward", r"rewards/.*/mean", r"composite/(?!.*(seconds|lambda|flagged|disagreement)).*"),
    "KL, entropy, length": (r"kl", r"beta", r"entropy", r"completions/(mean_length|clipped_ratio)"),
    "Guards and alarms": (r".*disagreement", r"(guards|composite)/(flagged|disabled).*", r"monitor/alarm/.*"),
    "Monitors": (r"monitor/(?!alarm/).*",),
    "Time and memory": (r"seconds", r".*/([a-z_]*_)?seconds", r"peak_memory_bytes", r"mechreward/reading_bytes"),
    "Everything else that was logged": (r".*",),
}
"""Groups of charts, by patterns of what is logged; a figure belongs to the first that matches."""

LABELS = {
    "test/right": "right answers, sampled at the training temperature (share)",
    "test/right_steps": "steps of the solution that are made (share)",
    "test/tokens": "length (tokens)",
    "test/ended": "completions that ended by themselves (share)",
    "reward": "reward (mean of the step's rollouts)",
    "kl": "KL to the starting model (nats a token)",
    "beta": "KL coefficient",
    "entropy": "entropy of the next token (nats)",
    "completions/mean_length": "length (tokens)",
    "completions/clipped_ratio": "completions cut off at the limit (share)",
    "guards/flagged": "flagged rollouts (share)",
    "composite/flagged": "flagged rollouts (share)",
    "seconds": "a whole step (seconds)",
    "mechreward/hook_seconds": "reading, guards, monitors (seconds a step)",
    "mechreward/recording_seconds": "recording for this report (seconds a step)",
    "mechreward/reading_bytes": "readings held (bytes)",
    "peak_memory_bytes": "most memory held so far (bytes)",
}

COST = {
    "reading, guards, monitors": r"mechreward/hook_seconds",
    "scoring": r"[^/]+/seconds",
    "verifiers": r".*verifier_seconds",
    "recording for this report": r"mechreward/recording_seconds",
}
"""Where a step's time goes beside the training itself, by patterns of what is logged."""

SKIPPED = ("step", "epoch", "question", "number")


def curves(folders: Sequence[Folder]) -> list[dict[str, Any]]:
    """For each group its charts, in order: ``key``, ``label``, and for each arm ``steps``, ``mean``, ``low``, ``high``.

    Mean, lowest and highest are over the seeds that have the figure at that step; ``runs`` says how many.
    """
    arms = {arm: [_logged(run) for run in runs] for arm, runs in by_arm(folders).items()}
    keys = list(dict.fromkeys(key for runs in arms.values() for run in runs for key in run))
    single = len([key for key in keys if re.fullmatch(r"rewards/.*/mean", key)]) == 1  # it is the reward itself
    keys = [key for key in keys if not (single and re.fullmatch(r"rewards/.*/(mean|std)", key))]
    grouped: dict[str, list[dict[str, Any]]] = {group: [] for group in GROUPS}
    for key in keys:
        series = {arm: _over_seeds([run[key] for run in runs if key in run]) for arm, runs in arms.items()}
        chart = {
            "key": key,
            "label": label(key),
            "explained": label(key).replace(" ", "") != key.replace("_", ""),
            "arms": {arm: s for arm, s in series.items() if s["steps"]},
        }
        if chart["arms"]:
            grouped[_group(key)].append(chart)
    return [{"group": group, "charts": _ordered(group, charts)} for group, charts in grouped.items() if charts]


def _logged(run: Folder) -> dict[str, dict[int, float]]:
    """Each figure's value at each step; what was measured on the test questions is ``test/...``."""
    found: dict[str, dict[int, float]] = {}
    for log in run.metrics:
        for key, value in log.items():
            if isinstance(value, (int, float)) and key not in SKIPPED and np.isfinite(value):
                found.setdefault(key, {})[int(log["step"])] = float(value)
    if run.tested is not None:
        for column in run.tested.rows[0]:
            if column not in SKIPPED:
                values = zip(run.tested.steps, run.tested.curve(column), strict=True)
                found[f"test/{column}"] = {step: float(value) for step, value in values if np.isfinite(value)}
    return found


def _over_seeds(runs: Sequence[dict[int, float]]) -> dict[str, list]:
    steps = sorted({step for run in runs for step in run})
    at = [[run[step] for run in runs if step in run] for step in steps]
    return {
        "steps": steps,
        "mean": [float(np.mean(values)) for values in at],
        "low": [min(values) for values in at],
        "high": [max(values) for values in at],
        "runs": [len(values) for values in at],
    }


def _group(key: str) -> str:
    return next(group for group, patterns in GROUPS.items() if any(re.fullmatch(p, key) for p in patterns))


def _ordered(group: str, charts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By the pattern that matches, then as they were logged."""
    return sorted(charts, key=lambda c: next(i for i, p in enumerate(GROUPS[group]) if re.fullmatch(p, c["key"])))


def label(key: str) -> str:
    """A figure in words, where its key does not say it well enough."""
    if key in LABELS:
        return LABELS[key]
    if key.startswith("test/"):
        return f"reading of {key.removeprefix('test/')} (mean)"
    return key.replace("_", " ").replace("/", " / ")


def alarms(folders: Sequence[Folder]) -> list[dict[str, Any]]:
    """Each alarm that rang: run, name, at which steps, and whether it ended the training."""
    found = []
    for run in folders:
        said = run.metrics[-1].get("stopped_because") if run.metrics else None  # an earlier one was gone on from
        found += [{"run": run.name, "alarm": name, "steps": steps} for name, steps in rang(run.metrics).items()]
        found += [{"run": run.name, "alarm": "training was ended", "steps": [], "said": said}] if said else []
    return found


def rang(logs: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """The steps at which each alarm rang."""
    steps: dict[str, list[int]] = {}
    for log in logs:
        for key, value in log.items():
            if key.startswith("monitor/alarm/") and isinstance(value, (int, float)) and value > 0:
                steps.setdefault(key.removeprefix("monitor/alarm/"), []).append(int(log["step"]))
    return steps


def cost(folders: Sequence[Folder]) -> list[dict[str, Any]]:
    """For each arm, where a step's time went (seconds, mean over steps and runs), and what memory the readings took."""
    rows = []
    for arm, runs in by_arm(folders).items():
        logs = [log for run in runs for log in run.metrics if isinstance(log.get("seconds"), (int, float))]
        if not logs:
            rows.append({"arm": arm, "steps": 0})
            continue
        parts = {name: _sum(logs, pattern) for name, pattern in COST.items()}
        whole = float(np.mean([log["seconds"] for log in logs]))
        peaks = [log["peak_memory_bytes"] for log in logs if "peak_memory_bytes" in log]
        held = [log["mechreward/reading_bytes"] for log in logs if "mechreward/reading_bytes" in log]
        rows.append(
            {
                "arm": arm,
                "steps": len(logs),
                "whole": whole,
                "parts": parts,
                "ours": (parts["reading, guards, monitors"] + parts["scoring"]) / whole if whole else None,
                "peak_memory_bytes": max(peaks, default=None),
                "memory_of": next((m for run in runs if (m := run.recording.get("memory"))), None),
                "reading_bytes": max(held, default=None),
                "device": next((d for run in runs if (d := run.environment.get("device"))), None),
            }
        )
    return rows


def _sum(logs: Sequence[dict[str, Any]], pattern: str) -> float:
    """Mean over steps of the sum of what matches."""
    each = [sum(v for key, v in log.items() if re.fullmatch(pattern, key) and np.isfinite(v)) for log in logs]
    return float(np.mean(each))
