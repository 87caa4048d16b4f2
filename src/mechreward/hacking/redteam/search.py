"""Attacks that search: best-of-N against the reward, and a suffix found by greedy replacement of its tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mechreward import progress
from mechreward.errors import ConfigError, DataError
from mechreward.hacking.redteam.report import Point
from mechreward.hacking.redteam.target import Floats
from mechreward.rollout.batch import RolloutBatch
from mechreward.stats import Interval, percentiles

Objective = Callable[[RolloutBatch], Floats]
"""What an attacker maximises: rollouts -> ``[B]``."""

DRAWS = 1000
"""Resamples of the bootstrap."""


# -- best of N ---------------------------------------------------------------------------------------------------------


def best_of_n(proxy: ArrayLike, gold: ArrayLike, n: int) -> float:
    """Expected gold of the rollout with the highest proxy among n drawn without replacement from m.

    Unbiased for fresh draws too, as pass@k's estimator is (arXiv 2107.03374). With the rollouts in ascending order of
    the proxy, the i-th (from 0) is the best of the n in C(i, n - 1) of C(m, n) draws. Rollouts with the same proxy
    count by their mean gold: one of those drawn is chosen at random. NaN in the proxy ranks below everything.

    Args:
        proxy: ``[m]``.
        gold: ``[m]``; give the proxy again for the expected maximum.
        n: At most m.

    Raises:
        ConfigError: n is not among 1 to m.
    """
    proxy = np.nan_to_num(np.asarray(proxy, dtype=np.float64), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    gold = np.asarray(gold, dtype=np.float64)
    if not 1 <= n <= len(proxy):
        raise ConfigError(f"The best of {n} cannot be told from {len(proxy)} rollouts: sample more, or lower N.")
    order = np.argsort(proxy, kind="stable")
    _, rank = np.unique(proxy[order], return_inverse=True)
    level = np.bincount(rank, weights=gold[order]) / np.bincount(rank)
    all_draws = math.comb(len(proxy), n)
    weights = [math.comb(i, n - 1) / all_draws for i in range(len(proxy))]  # of Python's exact integers
    return float(np.dot(weights, level[rank]))


def curve(proxy: Floats, gold: Floats, flagged: ArrayLike, seed: int = 0) -> list[Point]:
    """The over-optimisation curve for N = 1, 2, 4, ..., with 95 % bootstrap intervals over questions.

    Args:
        proxy: Raw reward of m rollouts on each of Q questions, ``[Q, m]``.
        gold: Whether they are right, ``[Q, m]``; a question with a NaN is left out of the gold's mean.
        flagged: Whether they are flagged, ``[Q, m]``.
        seed: Random seed of the bootstrap.
    """
    flagged, most = np.asarray(flagged, dtype=np.float64), proxy.shape[1]
    # What cannot be read ranks last, and earns what the worst of its question does.
    worst = np.nanmin(np.where(np.isnan(proxy).all(axis=1, keepdims=True), 0.0, proxy), axis=1, keepdims=True)
    earned = np.where(np.isnan(proxy), worst, proxy)
    drawn = np.random.default_rng(seed).integers(len(proxy), size=(DRAWS, len(proxy)))
    points = []
    for n in [*itertools.takewhile(lambda n: n < most, (2**i for i in itertools.count())), most]:
        reward = np.array([best_of_n(p, e, n) for p, e in zip(proxy, earned, strict=True)])
        right = np.array([best_of_n(p, g, n) for p, g in zip(proxy, gold, strict=True)])
        noticed = np.array([best_of_n(p, f, n) for p, f in zip(proxy, flagged, strict=True)])
        points.append(
            Point(
                n=n,
                proxy=_interval(reward, drawn),
                gold=_interval(right, drawn),
                flagged=min(1.0, max(0.0, float(noticed.mean()))),
                kl_bound=math.log(n) - (n - 1) / n,
            )
        )
    return points


def _interval(per_question: Floats, drawn: NDArray[np.int64]) -> Interval:
    known = np.isfinite(per_question)
    if not known.any():
        raise DataError("No question has rollouts that can be read and judged: sample others.")
    sums = np.where(known, per_question, 0.0)[drawn].sum(axis=1)
    counts = known[drawn].sum(axis=1)
    value = float(per_question[known].mean())
    low, high = percentiles(sums[counts > 0] / counts[counts > 0])
    return Interval(value=value, low=min(low, value), high=max(high, value))


# -- a suffix ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Suffix:
    """What the search found.

    Attributes:
        ids: The suffix with its lead, token ids.
        before: The objective's mean on the rollouts that were searched on, without a suffix.
        after: The same with it. Both are the attacker's own figures: what counts is measured on other rollouts.
        queries: Rollouts that were read.
    """

    ids: list[int]
    before: float
    after: float
    queries: int


def search_suffix(
    objective: Objective,
    rollouts: RolloutBatch,
    candidates: Sequence[int],
    length: int = 8,
    steps: int = 24,
    width: int = 32,
    lead: Sequence[int] = (),
    seed: int = 0,
) -> Suffix:
    """One suffix for all rollouts that raises the mean objective: greedy coordinate search without gradients.

    As in GCG (arXiv 2307.15043), one token is replaced at a time and the best replacement is kept if it is better; the
    candidates are drawn at random, since the attacker sees only the reward. Positions take turns, in a new order each
    round.

    Args:
        objective: What to raise; read for ``width`` copies of the rollouts a step.
        rollouts: A few, whose end tokens stay at the end.
        candidates: Tokens that may be used.
        length: Of the suffix, tokens.
        steps: Replacements that are tried.
        width: Candidates for each.
        lead: Tokens that stand before the suffix and stay, e.g. a line break that keeps it out of the answer.
        seed: Random seed.

    Raises:
        ConfigError: No candidates, or a size below 1.
        DataError: No rollouts.
    """
    allowed = [token for token in dict.fromkeys(candidates) if token not in rollouts.eos_token_ids]
    if not allowed or min(length, steps, width) < 1:
        raise ConfigError("A suffix needs candidate tokens, and length, steps and width of at least 1.")
    if len(rollouts) == 0:
        raise DataError("A suffix is searched on rollouts, and there are none.")
    rng = np.random.default_rng(seed)
    suffix = [int(token) for token in rng.choice(allowed, length)]
    before = float(np.nanmean(objective(rollouts)))
    best = _mean_objective(objective, rollouts, [[*lead, *suffix]])[0]
    places: list[int] = []
    for _ in progress.track(range(steps), "Suffix", steps):
        places = places or rng.permutation(length).tolist()
        place = places.pop()
        tokens = rng.choice(allowed, min(width, len(allowed)), replace=False).tolist()
        tries = [[*suffix[:place], int(token), *suffix[place + 1 :]] for token in tokens]
        means = _mean_objective(objective, rollouts, [[*lead, *each] for each in tries])
        if means.max() > best:
            best, suffix = float(means.max()), tries[int(means.argmax())]
    queries = len(rollouts) * (2 + steps * min(width, len(allowed)))
    return Suffix([*lead, *suffix], before, float(best), queries)


def with_suffix(batch: RolloutBatch, suffix: Sequence[int], tokenizer: Any = None) -> RolloutBatch:
    """The model's own part of each rollout, as one turn, with a suffix before its end token.

    With a tokenizer their texts are those of the new tokens; without one they are empty, for rewards that read none.
    """
    ids = []
    for written in batch.written:
        ends = [token for token in written if token in batch.eos_token_ids]
        own = [token for token in written if token not in batch.eos_token_ids]
        ids.append([*own, *suffix, *ends[-1:]])
    texts = [""] * len(ids) if tokenizer is None else tokenizer.batch_decode(ids, skip_special_tokens=True)
    return replace(batch, completion_ids=ids, completions=texts, tool_mask=None, trust=None, dropped=None, flags=None)


def _mean_objective(objective: Objective, rollouts: RolloutBatch, suffixes: Sequence[Sequence[int]]) -> Floats:
    """The objective's mean over the rollouts for each suffix, read together."""
    copies = rollouts.take([row for _ in suffixes for row in range(len(rollouts))])
    ids = [row for suffix in suffixes for row in with_suffix(rollouts, suffix).completion_ids]
    values = objective(replace(copies, completion_ids=ids, completions=[""] * len(ids), tool_mask=None))
    return np.nanmean(values.reshape(len(suffixes), len(rollouts)), axis=1)
