"""Compare the finished runs of an experiment: curves, paired differences, and what else was measured.

Arms are compared at equal budget, which is checked; the statistics are those of :mod:`mechreward.train.results`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from common.provenance import made_by
from mechreward import stats
from mechreward.errors import ConfigError, nearest
from mechreward.files import ENVIRONMENT
from mechreward.train.results import (
    Run,
    difference,
    over_seeds,
    read_run,
    reading_moved,
    without_infinities,
)


def read_runs(output: str | Path) -> tuple[dict[str, list[Run]], dict[str, Any]]:
    """Read all finished runs of an experiment's folder, by arm, and what they have in common.

    Raises:
        ConfigError: There are none, or they differ in more than arm and seed.
    """
    found: dict[str, list[Run]] = {}
    budgets, rewards = {}, {}
    for file in finished_runs(output):
        folder = file.parent
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8-sig"))
        budgets[folder] = {key: value for key, value in config.items() if key not in ("arm", "seed")}
        first, reward = rewards.setdefault(folder.parent.name, (folder, config["arm"]))
        if config["arm"] != reward:
            raise ConfigError(f"{folder} and {first} are not one arm: their config.yaml reward differently.")
        found.setdefault(folder.parent.name, []).append(read_run(folder, config["seed"]))
    if not found:
        raise ConfigError(f"{output} holds no finished run: run an experiment of experiments/ first.")
    (first, budget), *others = budgets.items()
    for folder, other in others:
        if other != budget:
            raise ConfigError(f"{folder} and {first} were not run at equal budget: compare their config.yaml.")
    return {arm: sorted(runs, key=lambda run: run.seed) for arm, runs in found.items()}, budget


def finished_runs(output: str | Path) -> list[Path]:
    """Return the ``summary.json`` of every finished run of an experiment's folder."""
    return sorted(Path(output).glob("*/seed-*/summary.json"))


def compare(output: str | Path, baseline: str, target: float) -> dict[str, Any]:
    """Return everything that is reported of an experiment, as JSON.

    Args:
        output: The experiment's folder.
        baseline: The arm to compare with.
        target: The accuracy to count the steps to.

    Raises:
        ConfigError: There is nothing to compare, or no such baseline.
    """
    runs, budget = read_runs(output)
    if baseline not in runs:
        raise ConfigError(f"There is no finished arm '{baseline}', only {', '.join(runs)}.{nearest(baseline, runs)}")
    watched = [pack.split("/")[-1] for pack in budget["watch"]]
    order = sorted(runs, key=lambda arm: (arm != baseline, arm))
    environments = [file.with_name(ENVIRONMENT) for file in finished_runs(output)]
    report = {
        "made": made_by(environments),
        "budget": budget,
        "baseline": baseline,
        "target": target,
        "environment": json.loads(environments[0].read_text(encoding="utf-8")),
        "arms": {arm: _of_arm(runs[arm], runs[baseline], watched, target) for arm in order},
    }
    others = itertools.combinations([arm for arm in reversed(order) if arm != baseline], 2)
    ends = {arm: accuracy_at_the_end(of_arm) for arm, of_arm in runs.items()}
    gaps = {f"{one} - {two}": gap(ends[one], ends[two]) for one, two in others}
    report["pairs"] = {pair: {key: found[key] for key in ("mean", "student")} for pair, found in gaps.items()}
    return without_infinities(report)


def accuracy_at_the_end(runs: Sequence[Run]) -> dict[int, float]:
    """Return each seed's accuracy at the last step."""
    return {run.seed: float(run.rows[-1]["right"].mean()) for run in runs}


def gap(one: Mapping[int, float], two: Mapping[int, float]) -> dict[str, Any]:
    """Return one arm's figures minus another's over the seeds of both, with Student's interval."""
    gaps = [one[seed] - two[seed] for seed in sorted(one) if seed in two]
    return {"mean": float(np.mean(gaps)) if gaps else np.nan, "per_seed": gaps, "student": stats.t_interval(gaps)}


def steps_to_reach(run: Run, target: float) -> float | None:
    """Return the step at which accuracy first reaches the target, linear between evaluations; None if it never does."""
    curve = run.curve("right")
    for k, value in enumerate(curve):
        if value >= target:
            if k == 0:
                return float(run.steps[0])
            share = (target - curve[k - 1]) / (value - curve[k - 1])
            return float(run.steps[k - 1] + share * (run.steps[k] - run.steps[k - 1]))
    return None


def _of_arm(runs: list[Run], base: list[Run], watched: list[str], target: float) -> dict[str, Any]:
    reached = [steps_to_reach(run, target) for run in runs]
    there = [step for step in reached if step is not None]
    columns = ["right", *(["right_steps"] if "right_steps" in runs[0].rows[0] else [])]
    report: dict[str, Any] = {
        "seeds": [run.seed for run in runs],
        "steps": runs[0].steps,
        "curves": {c: _curve(runs, c) for c in [*columns, "tokens", "ended", *watched]},
        "complete": [_complete(runs, step) for step in (0, -1)] if "right_steps" in columns else None,
        "greedy_accuracy": over_seeds([run.figures[-1]["greedy_accuracy"] for run in runs]),
        "steps_to_target": {"per_seed": reached, "reached": len(there), "median": _median(reached)},
        "kl": over_seeds([_at(run, "last", "kl") for run in runs]),
        "reward": {part: over_seeds([_at(run, part) for run in runs]) for part in ("first", "last")},
        "own_reading": _own_reading(runs),
        "flagged": _mean([log["guards/flagged"] for run in runs for log in run.metrics]),
        "our_share_of_time": over_seeds([_our_share(run) for run in runs]),
        "readings": {name: reading_moved(runs, name) for name in watched},
    }
    if runs is not base:
        report["difference"] = {c: difference(runs, base, c).report() for c in columns}
        report["difference"]["right_over_training"] = difference(runs, base, "right", area=True).report()
    return report


def _median(reached: Sequence[float | None]) -> float | None:
    """Return the median over seeds; those that never reach the target count as infinite."""
    median = float(np.median([np.inf if step is None else step for step in reached]))
    return median if np.isfinite(median) else None


def _curve(runs: list[Run], column: str) -> dict[str, Any]:
    values = np.stack([run.curve(column) for run in runs])  # [seeds, E]
    intervals = [stats.t_interval(values[:, k]) for k in range(values.shape[1])]
    return {"mean": values.mean(axis=0).tolist(), "interval": intervals, "per_seed": values.tolist()}


def _at(run: Run, part: str, key: str = "reward") -> float:
    """Return the mean over the first or the last five training steps."""
    logs = run.metrics[:5] if part == "first" else run.metrics[-5:]
    return _mean([log.get(key, np.nan) for log in logs])


def _mean(values: Sequence[float]) -> float:
    """Return the mean; NaN where there are no values, as in an arm that trains nothing and has no log."""
    return float(np.mean(values)) if values else float("nan")


def _complete(runs: list[Run], step: int) -> dict[str, Any]:
    """Return the share of rollouts that make every step of the solution, and how many of them are right.

    ``right_steps`` ignores what comes after the solution's steps; here it shows in those that are wrong.
    """
    made = [run.rows[step]["right_steps"] == 1 for run in runs]
    right = [run.rows[step]["right"][of_run] for run, of_run in zip(runs, made, strict=True)]
    return {
        "share": over_seeds([float(of_run.mean()) for of_run in made]),
        "right": over_seeds([float(of_run.mean()) if len(of_run) else float("nan") for of_run in right]),
    }


def _own_reading(runs: list[Run]) -> dict[str, Any] | None:
    """Return the raw reading that the arm is rewarded for, on its training rollouts."""
    key = "composite/features/raw"
    if not runs[0].metrics or key not in runs[0].metrics[0]:
        return None
    return {part: over_seeds([_at(run, part, key) for run in runs]) for part in ("first", "last")}


def _our_share(run: Run) -> float:
    """Return our share of the training's time."""
    if not run.metrics:
        return float("nan")
    ours = [log["mechreward/hook_seconds"] + log["composite/seconds"] for log in run.metrics]
    return float(np.sum(ours) / np.sum([log["seconds"] for log in run.metrics]))
