"""All latents of a dictionary against labels, in one pass: streaming moments, so that no activation is stored.

What is kept is a few sums per latent, for the labels and for permutations of them. From these come the effect size, the
firing-rate gap (SparseRM, arXiv 2511.07896), and for each latent the probability that the *largest* effect among all
latents would be as large if the labels said nothing (max-T of Westfall and Young 1993: controls the family-wise error
over thousands of correlated latents).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mechreward.errors import PackError


@dataclass(frozen=True)
class Scan:
    """What a pass over all rollouts says of each of F latents.

    Attributes:
        effect: Cohen's d between rollouts with and without the behaviour, ``[F]``; 0 for a latent that never varies.
        adjusted_p: Share of permutations (with the observed one) whose largest |d| reaches this latent's, ``[F]``.
        firing_with: Share of the rollouts with the behaviour in which the latent fires, ``[F]``.
        firing_without: The same without it, ``[F]``.
        spread: Standard deviation over all rollouts, ``[F]``.
        largest_by_chance: The largest |d| in each permutation, ``[P]``.
        rollouts: How many there were.
    """

    effect: NDArray[np.float64]
    adjusted_p: NDArray[np.float64]
    firing_with: NDArray[np.float64]
    firing_without: NDArray[np.float64]
    spread: NDArray[np.float64]
    largest_by_chance: NDArray[np.float64]
    rollouts: int

    @property
    def firing_gap(self) -> NDArray[np.float64]:
        """SparseRM's criterion: firing rate with the behaviour minus without, ``[F]``."""
        return self.firing_with - self.firing_without


def scan(
    blocks: Iterable[NDArray],
    labels: ArrayLike,
    groups: ArrayLike | None = None,
    permutations: int = 200,
    seed: int = 0,
) -> Scan:
    """Read blocks of aggregated activations once, and say how each latent differs with the labels.

    Args:
        blocks: The rollouts' activations, aggregated over tokens, in the order of the labels: ``[b, F]`` each.
        labels: Whether each rollout shows the behaviour, ``[n]``.
        groups: The question of each rollout, ``[n]``: whole questions exchange their labels where they have as many
            rollouts, since rollouts of one question are alike. By default every rollout for itself.
        permutations: How many; the smallest adjusted p is 1 / (permutations + 1).
        seed: Of the permutations.

    Raises:
        PackError: Labels of one kind only, activations that are not finite, or not as many rows as labels.
    """
    positive = np.asarray(labels).astype(bool)
    n = len(positive)
    if positive.all() or not positive.any() or n < 3:
        raise PackError(f"A scan needs rollouts with and without the behaviour, but {positive.sum()} of {n} show it.")
    shuffled = permuted(positive, groups, permutations, np.random.default_rng(seed))
    sides = np.concatenate([positive[None], shuffled]).astype(np.float64)  # [1 + P, n]
    origin = total = squares = fired = None
    with_it = np.zeros((len(sides), 0))
    row = 0
    for block in blocks:
        a = np.asarray(block, dtype=np.float64)
        if origin is None:
            # Sums are taken relative to the first rollout: a latent that never varies gets exactly 0.
            origin, total, squares = a[0].copy(), np.zeros(a.shape[1]), np.zeros(a.shape[1])
            fired, with_it = np.zeros((2, a.shape[1])), np.zeros((len(sides), a.shape[1]))
        if row + len(a) > n:
            raise PackError(f"There are more rows of activations than the {n} labels: give one label for each rollout.")
        here = sides[:, row : row + len(a)]
        assert total is not None and squares is not None and fired is not None  # set with origin
        fired += np.stack([~positive[row : row + len(a)], positive[row : row + len(a)]]).astype(float) @ (a > 0)
        a = a - origin
        total += a.sum(axis=0)
        squares += np.einsum("nf,nf->f", a, a)
        with_it += here @ a
        row += len(a)
    if row != n or total is None or squares is None or fired is None:
        raise PackError(f"There are {row} rows of activations and {n} labels: give one label for each rollout.")
    if not (np.isfinite(total).all() and np.isfinite(squares).all()):
        raise PackError("Some activations are NaN or infinite: leave out the rollouts in which no token could be read.")
    counts = np.array([n - positive.sum(), positive.sum()])
    effects = _effects(with_it, total, squares, sides.sum(axis=1), n)
    largest = np.abs(effects[1:]).max(axis=1) if permutations else np.zeros(0)
    reached = (largest[:, None] >= np.abs(effects[0])[None]).sum(axis=0)
    variance = np.maximum(squares / n - (total / n) ** 2, 0)
    return Scan(
        effect=effects[0],
        adjusted_p=(1 + reached) / (1 + permutations),
        firing_with=fired[1] / counts[1],
        firing_without=fired[0] / counts[0],
        spread=np.sqrt(variance),
        largest_by_chance=largest,
        rollouts=n,
    )


def permuted(
    labels: NDArray[np.bool_], groups: ArrayLike | None, count: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Permutations of the labels, ``[count, n]``: of whole groups among groups of the same size."""
    if groups is None:
        return rng.permuted(np.broadcast_to(labels, (count, len(labels))), axis=1)
    _, which = np.unique(np.asarray(groups), return_inverse=True)
    members = [np.flatnonzero(which == g) for g in range(which.max() + 1)]
    sizes = np.array([len(m) for m in members])
    result = np.empty((count, len(labels)), dtype=bool)
    for size in np.unique(sizes):
        rows = np.stack([m for m in members if len(m) == size])  # [groups, size]
        for draw in range(count):
            result[draw, rows] = labels[rows[rng.permutation(len(rows))]]
    return result


def _effects(with_it: NDArray, total: NDArray, squares: NDArray, n_1: NDArray, n: int) -> NDArray[np.float64]:
    """d = (m_1 - m_0) / s,  s^2 = (sum a^2 - n_1 m_1^2 - n_0 m_0^2) / (n - 2), for each labelling, ``[1 + P, F]``."""
    n_1 = n_1[:, None]
    n_0 = n - n_1
    m_1, m_0 = with_it / n_1, (total - with_it) / n_0
    rest = np.maximum(squares - n_1 * m_1**2 - n_0 * m_0**2, 0.0)
    # Below this, what is left is rounding: the latent varies between the sets alone, or not at all.
    noise = 1e-12 * np.maximum(squares, 1e-300)
    with np.errstate(divide="ignore", invalid="ignore"):
        effect = (m_1 - m_0) / np.sqrt(rest / (n - 2))
    return np.where(squares == 0, 0.0, np.where(rest <= noise, np.copysign(np.inf, m_1 - m_0), effect))
