"""Read finished runs, and compare accuracies: paired differences with two intervals, and what they allow one to say.

A difference is paired by seed and by test question. Two intervals are given, since five seeds are few: Student's t over
the seeds' own differences, and one from resampling seeds and the questions within them, which is too wide where seeds
hardly differ (the questions' variance counts twice) and too narrow where they differ much. A difference counts as shown
only if both exclude 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechreward import stats
from mechreward.errors import ConfigError
from mechreward.files import read_if_there, read_jsonl
from mechreward.stats import auc

DRAWS = 10_000


# -- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run's evaluations and logs.

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
        """Return a column's mean at each evaluation, ``[E]``, without rollouts that have no value."""
        return np.array([np.nanmean(rows[column]) for rows in self.rows])


def read_run(folder: Path, seed: int) -> Run:
    """Read a run's folder; of an unfinished run, what is there."""
    figures = read_jsonl(folder / "evaluations.jsonl")
    steps = [int(f["step"]) for f in figures]
    by_step: dict[int, list[dict[str, Any]]] = {step: [] for step in steps}
    for record in read_jsonl(folder / "samples.jsonl"):
        if record["step"] in by_step:  # the last evaluation's figures come after its samples
            by_step[record["step"]].append(record)
    rows = [_columns(by_step[step]) for step in steps]
    return Run(seed, steps, rows, figures, read_if_there(folder / "metrics.jsonl"))


def _columns(records: list[dict[str, Any]]) -> dict[str, NDArray]:
    """Return the numbers by column, with NaN for None."""
    numeric = dict.fromkeys(name for r in records for name in r if name not in ("completion", "step"))
    return {name: np.array([r.get(name) for r in records], dtype=np.float64) for name in numeric}


# -- statistics ------------------------------------------------------------------------------------------------------


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean, its interval and each seed's value; a seed without a value (NaN) counts in neither."""
    known = np.array([value for value in values if not np.isnan(value)])
    mean = float(known.mean()) if len(known) else np.nan
    return {"mean": mean, "interval": stats.t_interval(known), "per_seed": list(map(float, values))}


@dataclass(frozen=True)
class Difference:
    """One arm minus another in one column.

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

    @classmethod
    def of(cls, per_question: Sequence[NDArray]) -> Difference:
        """Average differences over questions (those that are known), then over seeds."""
        means = [float(np.nanmean(values)) for values in per_question]
        return cls(float(np.mean(means)), means, stats.resampled_interval(per_question, DRAWS), stats.t_interval(means))

    @property
    def shown(self) -> bool:
        """Whether both intervals exclude 0."""
        return all(low > 0 or high < 0 for low, high in (self.resampled, self.student))

    def report(self) -> dict[str, Any]:
        """Return the difference for JSON; see :func:`without_infinities`."""
        return {**vars(self), "shown": self.shown}


def difference(arm: Sequence[Run], baseline: Sequence[Run], column: str = "right", area: bool = False) -> Difference:
    """Return an arm minus the baseline, paired by seed and question.

    Args:
        arm, baseline: Their runs; a seed that only one of them has is left out.
        column: What to compare.
        area: Compare the mean over training (trapezoids over the evaluated steps) instead of the last step.

    Raises:
        ConfigError: They share no seed, or were evaluated on different questions.
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
    return Difference.of(per_question)


def _over_training(run: Run, column: str) -> NDArray:
    """Return each question's mean over the steps, ``[Q]``."""
    values = np.stack([rows[column] for rows in run.rows])
    return np.trapezoid(values, run.steps, axis=0) / (run.steps[-1] - run.steps[0])


def reading_moved(runs: list[Run], name: str) -> dict[str, Any]:
    """Measure how far a watched reading moved, and whether it still tells right from wrong.

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


# -- in JSON and in words --------------------------------------------------------------------------------------------


def without_infinities(value: Any) -> Any:
    """Replace by None what JSON cannot hold: the interval of one seed, the AUC where all answers are right, NaN."""
    if isinstance(value, dict):
        return {key: without_infinities(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinities(entry) for entry in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def verdict(name: str, d: dict[str, Any]) -> str:
    """Say in words what a difference in accuracy (:meth:`Difference.report`, without infinities) shows."""
    if None in d["student"]:
        return f"{name}: {d['mean']:+.3f} with one seed, of which no interval can be given."
    low, high = widest(d)
    if d["shown"]:
        more = "more" if d["mean"] > 0 else "less"
        return f"{name} is {more} accurate: {d['mean']:+.3f} ({low:+.3f} to {high:+.3f})."
    return f"{name}: no difference shown. Anything from {low:+.3f} to {high:+.3f} is compatible with the data."


def widest(d: dict[str, Any]) -> tuple[float, float]:
    """Return the interval that holds both of a difference's intervals."""
    lows, highs = zip(d["resampled"], d["student"], strict=True)
    return min(lows), max(highs)
