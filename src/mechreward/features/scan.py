"""All latents of dictionaries against labels, in one pass: streaming moments, so that no activation is stored.

What is kept is a few sums per latent, for the labels and for permutations of them. From these come the effect size, the
firing-rate gap (SparseRM, arXiv 2511.07896), and for each latent the probability that the *largest* effect among all
latents would be as large if the labels said nothing (max-T of Westfall and Young 1993: controls the family-wise error
over thousands of correlated latents). What would have been selected from each permutation is known too, so that a gate
can repeat the selection without a second pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mechreward.errors import PackError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scan:
    """What a pass over all rollouts says of each of F latents.

    Row 0 of what has 1 + P rows is for the labels, the others are for P permutations of them.

    Attributes:
        effects: Cohen's d between rollouts with and without the behaviour, ``[1 + P, F]``; 0 for a latent that never
            varies.
        gaps: SparseRM's criterion: the share of the rollouts with the behaviour in which a latent fires, minus the
            share of those without, ``[1 + P, F]``.
        firing: Share of all rollouts in which it fires, ``[F]``.
        spread: Standard deviation over all rollouts, ``[F]``.
    """

    effects: Floats
    gaps: Floats
    firing: Floats
    spread: Floats

    @property
    def effect(self) -> Floats:
        """Cohen's d with the labels, ``[F]``."""
        return self.effects[0]

    @property
    def firing_gap(self) -> Floats:
        """SparseRM's criterion with the labels, ``[F]``."""
        return self.gaps[0]

    @property
    def adjusted_p(self) -> Floats:
        """Share of labellings, the true one among them, whose largest \\|d| reaches this latent's, ``[F]``."""
        reached = (self.largest_by_chance[:, None] >= np.abs(self.effect)).sum(axis=0)
        return (1 + reached) / len(self.effects)

    @property
    def largest_by_chance(self) -> Floats:
        """The largest \\|d| in each permutation, ``[P]``."""
        return np.abs(self.effects[1:]).max(axis=1)


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
        groups: The question of each rollout, ``[n]``; see :func:`permuted`. By default every rollout for itself.
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
    origin, row = np.zeros(0), 0
    total = squares = fired = with_it = fired_with = np.zeros(0)
    for block in blocks:
        a = np.asarray(block, dtype=np.float64)
        if row == 0:
            # Sums are taken relative to the first rollout: a latent that never varies gets exactly 0.
            origin, total, squares, fired = a[0].copy(), *np.zeros((3, a.shape[1]))
            with_it, fired_with = np.zeros((2, len(sides), a.shape[1]))
        if row + len(a) > n:
            raise PackError(f"There are more rows of activations than the {n} labels: give one label for each rollout.")
        here = sides[:, row : row + len(a)]
        firing = (a > 0).astype(np.float64)
        fired += firing.sum(axis=0)
        fired_with += here @ firing
        a = a - origin
        total += a.sum(axis=0)
        squares += np.einsum("nf,nf->f", a, a)
        with_it += here @ a
        row += len(a)
    if row != n:
        raise PackError(f"There are {row} rows of activations and {n} labels: give one label for each rollout.")
    if not (np.isfinite(total).all() and np.isfinite(squares).all()):
        raise PackError("Some activations are NaN or infinite: leave out the rollouts in which no token could be read.")
    n_1 = sides.sum(axis=1)[:, None]
    variance = np.maximum(squares / n - (total / n) ** 2, 0)
    return Scan(
        effects=_effects(with_it, total, squares, n_1, n),
        gaps=fired_with / n_1 - (fired - fired_with) / (n - n_1),
        firing=fired / n,
        spread=np.sqrt(variance),
    )


def permuted(
    labels: NDArray[np.bool_], groups: ArrayLike | None, count: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Permutations of the labels, ``[count, n]``.

    Rollouts of one question are alike, so the labels of whole questions are dealt out in another order: one after the
    other, so that questions of different sizes can exchange theirs, too. Contrasts have as many rollouts with the
    behaviour as without in each question: there, labels are exchanged within.
    """
    if groups is None:
        return rng.permuted(np.broadcast_to(labels, (count, len(labels))), axis=1)
    _, which = np.unique(np.asarray(groups), return_inverse=True)
    members = [np.flatnonzero(which == g) for g in range(which.max() + 1)]
    places = np.concatenate(members)
    within = len({float(labels[m].mean()) for m in members}) == 1
    result = np.empty((count, len(labels)), dtype=bool)
    for row in result:
        order = [rng.permutation(m) for m in members] if within else [members[g] for g in rng.permutation(len(members))]
        row[places] = labels[np.concatenate(order)]
    return result


def _effects(with_it: Floats, total: Floats, squares: Floats, n_1: Floats, n: int) -> Floats:
    """d = (m_1 - m_0) / s,  s^2 = (sum a^2 - n_1 m_1^2 - n_0 m_0^2) / (n - 2), for each labelling, ``[1 + P, F]``."""
    n_0 = n - n_1
    m_1, m_0 = with_it / n_1, (total - with_it) / n_0
    rest = np.maximum(squares - n_1 * m_1**2 - n_0 * m_0**2, 0.0)
    # Below this, what is left is rounding: the latent varies between the sets alone, or not at all.
    noise = 1e-12 * np.maximum(squares, 1e-300)
    with np.errstate(divide="ignore", invalid="ignore"):
        effect = (m_1 - m_0) / np.sqrt(rest / (n - 2))
    return np.where(squares == 0, 0.0, np.where(rest <= noise, np.copysign(np.inf, m_1 - m_0), effect))
