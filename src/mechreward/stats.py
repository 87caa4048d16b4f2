"""Statistics: AUC, rank correlation, 95 % intervals by bootstrap, Student's t and Wilson, and one way to print them.

Scores and labels are refused, with a sentence, where they cannot be compared. Rollouts of one question resemble each
other, so intervals are made by drawing whole questions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import model_validator

from mechreward.errors import PackError
from mechreward.schema import Strict

Floats = NDArray[np.float64]
Ends = tuple[float, float]


class Interval(Strict):
    """A statistic with its 95 % percentile bootstrap interval."""

    value: float
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"has its low end {self.low} above its high end {self.high}")
        return self

    def shown(self, form: str = ".3f", before: str = "") -> str:
        """Return the value with its interval; see :func:`with_interval`."""
        return with_interval(self.value, (self.low, self.high), form, before)


def with_interval(
    value: float | None, ends: Sequence[float | None], form: str = ".3f", before: str = "", unknown: str = "?"
) -> str:
    """Return a value with its interval, as in ``0.812 (0.774 to 0.846)``.

    Args:
        value: The statistic.
        ends: Of its interval.
        form: How each number is formatted.
        before: What stands in the brackets before the interval.
        unknown: What stands for a number that is ``None``.
    """
    middle, low, high = (unknown if number is None else f"{number:{form}}" for number in (value, *ends))
    return f"{middle} ({before}{low} to {high})"


# Comparing scores with labels ----------------------------------------------------------------------------------------


def comparable(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    """Return scores and labels as float64 [n], after making sure that there is something to compare.

    Raises:
        PackError: Shapes that differ, scores that are not finite, or labels that are all the same.
    """
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise PackError(f"The gate needs one score and one label per rollout, but got shapes {x.shape} and {y.shape}.")
    if not np.isfinite(x).all():
        raise PackError("Some scores are NaN or infinite: leave out the rollouts in which no token could be read.")
    if len(y) == 0 or (y == y[0]).all():
        raise PackError(
            f"All {len(y)} rollouts have the same label, so nothing can be compared: sample more rollouts, or at "
            "another temperature."
        )
    return x, y


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: P(score of a positive > score of a negative) + half of P(equal).

    Computed from ranks (Mann-Whitney U: Hanley and McNeil 1982), exactly, ties included.

    Args:
        scores: One number per rollout [n].
        labels: Bools [n], not all the same.
    """
    from scipy.stats import rankdata

    scores, labels = comparable(scores, labels)
    positive = labels.astype(bool)
    n_1 = int(positive.sum())
    n_0 = len(positive) - n_1
    return float((rankdata(scores)[positive].sum() - n_1 * (n_1 + 1) / 2) / (n_1 * n_0))


def grouped_auc(scores: NDArray, right: NDArray, wrong: NDArray) -> tuple[float, float]:
    """Return the AUC and its standard error for rollouts in groups (Obuchowski 1997, Biometrics 53, 567-578).

    With V10 of a right rollout the share of wrong ones below it, V01 of a wrong one the share of right ones above it
    (ties half), m and n their numbers, and a_g and b_g the sums of V10 - AUC and V01 - AUC over group g:

    var = I10 / (I10 - 1) sum a_g^2 / m^2 + I01 / (I01 - 1) sum b_g^2 / n^2 + 2 I / (I - 1) sum a_g b_g / (m n),

    where I10, I01 and I count the groups with right ones, with wrong ones, and all. With one rollout a group it is
    DeLong's. It is at least what half a rollout of the rarer kind would change: perfect separation is no certainty.

    Args:
        scores: ``[groups, num_generations]``.
        right, wrong: Bool, the same shape; rollouts in neither are left out.
    """
    above, below = np.sort(scores[right]), np.sort(scores[wrong])
    m, n = len(above), len(below)
    v10 = _share_below(below, scores[right])
    v01 = 1 - _share_below(above, scores[wrong])
    area = float(v10.mean())
    a = np.bincount(np.nonzero(right)[0], v10 - area, minlength=len(scores))
    b = np.bincount(np.nonzero(wrong)[0], v01 - area, minlength=len(scores))
    variance = (
        _correction(right.any(axis=1).sum()) * (a @ a) / m**2
        + _correction(wrong.any(axis=1).sum()) * (b @ b) / n**2
        + 2 * _correction((right | wrong).any(axis=1).sum()) * (a @ b) / (m * n)
    )
    return area, max(math.sqrt(max(0.0, variance)), 0.5 / min(m, n))


def _correction(groups: int) -> float:
    return groups / max(1, groups - 1)


def _share_below(ordered: NDArray, values: NDArray) -> NDArray:
    """Return the share of ``ordered`` that is less than each value, ties half."""
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / (2 * len(ordered))


def spearman(scores: ArrayLike, labels: ArrayLike) -> float:
    """Spearman's rank correlation, ties at their middle rank (Spearman 1904): Pearson's r of the ranks.

    Args:
        scores: One number per rollout [n].
        labels: Bools or numbers [n], not all the same.

    Returns:
        A float in [-1, 1]; 0 when every score is the same, since such a score orders nothing.
    """
    from scipy.stats import rankdata

    # scipy's own spearmanr gives NaN for such a score, and rounds the last digit of stored evidence otherwise.
    scores, labels = comparable(scores, labels)
    x, y = rankdata(scores), rankdata(labels)
    x, y = x - x.mean(), y - y.mean()
    norm = np.sqrt((x @ x) * (y @ y))
    return float(np.clip(x @ y / norm, -1, 1)) if norm > 0 else 0.0


# Intervals -----------------------------------------------------------------------------------------------------------


def bootstrap(
    statistic: Callable[..., float],
    *arrays: ArrayLike,
    groups: ArrayLike | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """A statistic with its 95 % percentile bootstrap interval (Efron 1979).

    Args:
        statistic: Takes the arrays, resampled alike, and gives a float.
        arrays: Each [n, ...], row i of all belonging to rollout i.
        groups: Prompt of each rollout [n]. Rollouts of one prompt are not independent, so whole prompts are drawn;
            without groups, single rollouts.
        draws: Resamples. Those in which the statistic is undefined (only one label drawn) are left out; should that be
            most of them, a PackError says so.
        seed: Seed of the resampling.
    """
    rows = [np.asarray(array) for array in arrays]
    value = statistic(*rows)
    n = len(rows[0])
    prompts = n if groups is None else len(np.unique(groups))
    if prompts < 2:
        raise PackError("A bootstrap interval needs rollouts of at least two prompts: sample more prompts.")
    values = []
    for index in _resampled(n, groups, draws, seed):
        try:
            values.append(statistic(*(array[index] for array in rows)))
        except PackError:
            continue
    if len(values) < draws / 2 or not values:
        raise PackError(
            f"Only {len(values)} of {draws} resamples of {prompts} prompts hold rollouts with and without the "
            "behaviour, too few for an interval: sample more prompts."
        )
    low, high = percentiles(values)
    return Interval(value=float(value), low=low, high=high)


def _resampled(n: int, groups: ArrayLike | None, draws: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield the row numbers of each resample."""
    rng = np.random.default_rng(seed)
    if groups is None:
        for _ in range(draws):
            yield rng.integers(n, size=n)
        return
    _, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    members = np.split(np.argsort(inverse, kind="stable"), np.cumsum(counts)[:-1])
    for _ in range(draws):
        yield np.concatenate([members[g] for g in rng.integers(len(members), size=len(members))])


def resampled_interval(per_question: Sequence[NDArray], draws: int, seed: int = 0) -> Ends:
    """95 % percentile interval of the mean over seeds and questions, from resampling seeds, then questions in each.

    Args:
        per_question: For each seed, a value for each of its questions; NaN where there is none.
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
    return percentiles(total / len(known))


def percentiles(values: Sequence[float] | Floats) -> Ends:
    """The ends of the 95 % percentile interval of resampled values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def t_interval(values: ArrayLike) -> Ends:
    """95 % interval of a mean: mean +- t(.975, n - 1) s / sqrt(n); infinite for a single value."""
    from scipy import stats

    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return -np.inf, np.inf
    half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return float(x.mean()) - half, float(x.mean()) + half


def wilson(k: int, n: int) -> Ends:
    """95 % interval of a share, k of n (Wilson 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(k, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
