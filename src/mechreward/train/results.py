"""What an experiment's runs say when they are put side by side: curves, paired differences, and what cannot be told.

Arms are compared at equal budget, which is checked. A difference is paired by seed and by test question. Two intervals
are given, since five seeds are few: Student's t over the seeds' own differences, and one from resampling seeds and the
questions within them, which is too wide where seeds hardly differ (the questions' variance counts twice) and too narrow
where they differ much. A difference counts as shown only if both leave out 0.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy import stats

from mechreward.errors import ConfigError, nearest
from mechreward.features.gate import auc
from mechreward.integrations.made import made_by
from mechreward.integrations.recording import ENVIRONMENT, read_jsonl

DRAWS = 10_000


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        seed: Its seed.
        steps: The steps at which it was evaluated, ``[E]``.
        rows: For each of these steps, what was recorded of every test rollout, by column, ``[Q]`` each.
        figures: For each of these steps, the means that were recorded with it.
        metrics: TRL's log of every training step.
    """

    seed: int
    steps: list[int]
    rows: Sequence[Mapping[str, NDArray]]
    figures: list[dict[str, float]]
    metrics: list[dict[str, float]]

    def curve(self, column: str) -> NDArray:
        """A column's mean at each evaluation, ``[E]``, rollouts without a value left out."""
        return np.array([np.nanmean(rows[column]) for rows in self.rows])


def read_runs(output: str | Path) -> tuple[dict[str, list[Run]], dict[str, Any]]:
    """All finished runs of an experiment's folder, by arm, and what they have in common.

    Raises:
        ConfigError: There are none, or they differ in more than arm and seed.
    """
    output = Path(output)
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
    """The ``summary.json`` of every finished run of an experiment's folder."""
    return sorted(Path(output).glob("*/seed-*/summary.json"))


def read_run(folder: Path, seed: int) -> Run:
    """A run's folder; of one that goes on, what is there of it."""
    figures = read_jsonl(folder / "evaluations.jsonl")
    steps = [int(f["step"]) for f in figures]
    by_step: dict[int, list[dict[str, Any]]] = {step: [] for step in steps}
    for record in read_jsonl(folder / "samples.jsonl"):
        if record["step"] in by_step:  # the last evaluation's figures come after its samples
            by_step[record["step"]].append(record)
    rows = [_columns(by_step[step]) for step in steps]
    metrics = folder / "metrics.jsonl"
    return Run(seed, steps, rows, figures, read_jsonl(metrics) if metrics.exists() else [])


def _columns(records: list[dict[str, Any]]) -> dict[str, NDArray]:
    """Numbers by column, None as NaN."""
    numeric = dict.fromkeys(name for r in records for name in r if name not in ("completion", "step"))
    return {name: np.array([r.get(name) for r in records], dtype=np.float64) for name in numeric}


# -- statistics ------------------------------------------------------------------------------------------------------


def t_interval(values: Sequence[float] | NDArray) -> tuple[float, float]:
    """95 % interval of the mean over seeds: mean +- t(.975, n - 1) s / sqrt(n); infinite for a single seed."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return -np.inf, np.inf
    half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return float(x.mean()) - half, float(x.mean()) + half


def resampled_interval(per_question: Sequence[NDArray], draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean over seeds and questions, from resampling seeds, then questions in each.

    Args:
        per_question: For each seed, a value for each of its questions.
        draws: Resamples.
        seed: Of the resampling.
    """
    rng = np.random.default_rng(seed)
    known = [values[~np.isnan(values)] for values in per_question]
    total = np.zeros(draws)
    for _ in known:
        chosen = rng.integers(len(known), size=draws)
        for number, values in enumerate(known):
            here = np.flatnonzero(chosen == number)
            total[here] += values[rng.integers(len(values), size=(len(here), len(values)))].mean(axis=1)
    low, high = np.quantile(total / len(known), [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """One arm minus another on the same questions, in one column, at the last step (or over all).

    Attributes:
        mean: Over seeds.
        per_seed: Each seed's own.
        resampled: 95 % interval from resampling seeds and questions.
        student: 95 % interval by Student's t over seeds.
    """

    mean: float
    per_seed: list[float]
    resampled: tuple[float, float]
    student: tuple[float, float]

    @property
    def shown(self) -> bool:
        """Whether both intervals leave out 0."""
        return all(low > 0 or high < 0 for low, high in (self.resampled, self.student))

    def report(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "shown": self.shown}


def difference(arm: Sequence[Run], baseline: Sequence[Run], column: str = "right", area: bool = False) -> Difference:
    """An arm minus the baseline, paired by seed and question.

    Args:
        arm, baseline: Their runs; seeds that only one of them has are left out.
        column: What to compare.
        area: Compare the mean over training (trapezoids over the evaluated steps) instead of the last step.

    Raises:
        ConfigError: They share no seed.
    """
    theirs = {run.seed: run for run in baseline}
    pairs = [(run, theirs[run.seed]) for run in arm if run.seed in theirs]
    if not pairs:
        raise ConfigError("These arms share no seed: run both with the same seeds.")
    per_question = []
    for run, other in pairs:
        ours, base = (_over_training(r, column) if area else r.rows[-1][column] for r in (run, other))
        if not np.array_equal(run.rows[-1]["question"], other.rows[-1]["question"]):
            raise ConfigError(f"Seed {run.seed} was evaluated on different questions in the two arms.")
        per_question.append(ours - base)
    means = [float(np.nanmean(values)) for values in per_question]
    return Difference(float(np.mean(means)), means, resampled_interval(per_question), t_interval(means))


def _over_training(run: Run, column: str) -> NDArray:
    """Each question's mean over the steps, ``[Q]``."""
    values = np.stack([rows[column] for rows in run.rows])
    return np.trapezoid(values, run.steps, axis=0) / (run.steps[-1] - run.steps[0])


def steps_to_reach(run: Run, target: float) -> float | None:
    """The step at which accuracy first reaches the target, linear between evaluations; None if it never does."""
    curve = run.curve("right")
    for k, value in enumerate(curve):
        if value >= target:
            if k == 0:
                return float(run.steps[0])
            share = (target - curve[k - 1]) / (value - curve[k - 1])
            return float(run.steps[k - 1] + share * (run.steps[k] - run.steps[k - 1]))
    return None


# -- the comparison --------------------------------------------------------------------------------------------------


def compare(output: str | Path, baseline: str, target: float) -> dict[str, Any]:
    """Everything that is reported of an experiment, as JSON.

    Raises:
        ConfigError: Nothing to compare; an unknown baseline.
    """
    runs, budget = read_runs(output)
    if baseline not in runs:
        raise ConfigError(f"There is no finished arm '{baseline}', only {', '.join(runs)}.{nearest(baseline, runs)}")
    watched = [pack.split("/")[-1] for pack in budget["watch"]]
    order = sorted(runs, key=lambda arm: (arm != baseline, arm))
    report = {
        "made": made_by(file.with_name(ENVIRONMENT) for file in finished_runs(output)),
        "budget": budget,
        "baseline": baseline,
        "target": target,
        "environment": json.loads((_a_folder(output) / "environment.json").read_text(encoding="utf-8")),
        "arms": {arm: _of_arm(arm, runs[arm], runs[baseline], baseline, watched, target) for arm in order},
    }
    others = itertools.combinations([arm for arm in reversed(order) if arm != baseline], 2)
    report["pairs"] = {f"{one} - {two}": _pair(runs[one], runs[two]) for one, two in others}
    return without_infinities(report)


def _pair(one: list[Run], two: list[Run]) -> dict[str, Any]:
    """Accuracy at the last step, one arm minus another, by Student's t over the seeds that both have."""
    theirs = {run.seed: run.rows[-1]["right"].mean() for run in two}
    gaps = [run.rows[-1]["right"].mean() - theirs[run.seed] for run in one if run.seed in theirs]
    return {"mean": float(np.mean(gaps)) if gaps else np.nan, "student": t_interval(gaps)}


def without_infinities(value: Any) -> Any:
    """None in the place of what JSON can't hold: an interval from one seed, the AUC where all answers are right."""
    if isinstance(value, dict):
        return {key: without_infinities(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinities(entry) for entry in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _a_folder(output: str | Path) -> Path:
    return next(iter(sorted(Path(output).glob("*/seed-*/summary.json")))).parent


def _of_arm(
    arm: str, runs: list[Run], base: list[Run], baseline: str, watched: list[str], target: float
) -> dict[str, Any]:
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
    if arm != baseline:
        report["difference"] = {c: difference(runs, base, c).report() for c in columns}
        report["difference"]["right_over_training"] = difference(runs, base, "right", area=True).report()
    return report


def _median(reached: Sequence[float | None]) -> float | None:
    """The median over seeds, those that never reach it counted as infinite."""
    median = float(np.median([np.inf if step is None else step for step in reached]))
    return median if np.isfinite(median) else None


def _curve(runs: list[Run], column: str) -> dict[str, Any]:
    values = np.stack([run.curve(column) for run in runs])  # [seeds, E]
    intervals = [t_interval(values[:, k]) for k in range(values.shape[1])]
    return {"mean": values.mean(axis=0).tolist(), "interval": intervals, "per_seed": values.tolist()}


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean, interval and each seed's own; a seed without a value is left out."""
    known = np.array([value for value in values if not np.isnan(value)])
    mean = float(known.mean()) if len(known) else np.nan
    return {"mean": mean, "interval": t_interval(known), "per_seed": list(map(float, values))}


def _at(run: Run, part: str, key: str = "reward") -> float:
    """The mean over the first or the last five training steps."""
    logs = run.metrics[:5] if part == "first" else run.metrics[-5:]
    return _mean([log.get(key, np.nan) for log in logs])


def _mean(values: Sequence[float]) -> float:
    """NaN where there are none: an arm that trains nothing has no log."""
    return float(np.mean(values)) if values else float("nan")


def _complete(runs: list[Run], step: int) -> dict[str, Any]:
    """Rollouts that make every step of the solution: their share, and how many of them are right.

    What comes after the solution's steps is not looked at by ``right_steps``; here it shows in what is wrong.
    """
    made = [run.rows[step]["right_steps"] == 1 for run in runs]
    right = [run.rows[step]["right"][of_run] for run, of_run in zip(runs, made, strict=True)]
    return {
        "share": over_seeds([float(of_run.mean()) for of_run in made]),
        "right": over_seeds([float(of_run.mean()) if len(of_run) else float("nan") for of_run in right]),
    }


def _own_reading(runs: list[Run]) -> dict[str, Any] | None:
    """The raw reading that the arm is rewarded for, on its training rollouts."""
    key = "composite/features/raw"
    if not runs[0].metrics or key not in runs[0].metrics[0]:
        return None
    return {part: over_seeds([_at(run, part, key) for run in runs]) for part in ("first", "last")}


def _our_share(run: Run) -> float:
    if not run.metrics:
        return float("nan")
    ours = [log["mechreward/hook_seconds"] + log["composite/seconds"] for log in run.metrics]
    return float(np.sum(ours) / np.sum([log["seconds"] for log in run.metrics]))


def reading_moved(runs: list[Run], name: str) -> dict[str, Any]:
    """How far a watched reading moved, and whether it still tells right from wrong.

    ``moved``: (mean at each step - mean at the start) / SD over the start's rollouts; ``auc``: of the reading for a
    right answer, among the rollouts of that step.
    """
    moved, areas = [], []
    for run in runs:
        start = run.rows[0][name]
        moved.append([(np.nanmean(rows[name]) - np.nanmean(start)) / np.nanstd(start) for rows in run.rows])
        areas.append([_auc(rows[name], rows["right"]) for rows in run.rows])
    return {
        "moved": [over_seeds(column) for column in np.array(moved).T],
        "auc": [over_seeds(column) for column in np.array(areas).T],
    }


def _auc(reading: NDArray, right: NDArray) -> float:
    known = ~np.isnan(reading)
    labels = right[known] > 0.5
    return float("nan") if labels.all() or not labels.any() else float(auc(reading[known], labels))
