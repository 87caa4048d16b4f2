"""Finding features that track a behaviour, by contrast: rollouts that show it against rollouts that do not.

For each SAE latent, the mean activation over a rollout's tokens is compared between the two sets of rollouts, and the
latents with the largest standardised difference are kept. (SparseRM, arXiv 2511.07896, ranks by the gap in *firing
rates* instead and trains a small network on top; that is later work.)

With 2,048 latents and a few hundred rollouts some large difference is always found by chance, so a selection proves
nothing by itself: :mod:`mechreward.features.gate` tests it on other rollouts.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mechreward.errors import PackError

_ROWS = 64  # rows that are converted to float64 at a time: extra memory is 64 rows, however many rollouts there are


def effect_sizes(activations: NDArray, labels: ArrayLike) -> NDArray[np.float64]:
    """Cohen's d of every latent between rollouts with and without the behaviour.

    d = (mean_1 - mean_0) / s,  s^2 = ((n_1 - 1) s_1^2 + (n_0 - 1) s_0^2) / (n_1 + n_0 - 2)
    (Cohen 1988, Statistical Power Analysis for the Behavioral Sciences, section 2.5.2; s_1, s_0 with n - 1.)

    Args:
        activations: Aggregated activation per rollout and latent [n, F], any float type; computed in float64.
        labels: Whether the rollout shows the behaviour [n], bool.

    Returns:
        d [F], float64. A latent that never varies gets 0; one that varies only between the two sets gets an infinite
        or huge value.
    """
    positive = _checked_labels(activations, labels)
    weights = np.stack([~positive, positive]).astype(np.float64)  # [2, n]
    counts = weights.sum(axis=1)
    # Two passes, means then squares, since sums of squares cancel. Every value is taken relative to the first row,
    # which makes a constant latent exactly 0 in both, where rounding would give it a d of noise over noise.
    means = np.zeros((2, activations.shape[1]))
    for rows, block in _blocks(activations):
        means += weights[:, rows] @ block
    means /= counts[:, None]
    if not np.isfinite(means).all():
        raise PackError("Some activations are NaN or infinite: leave out the rollouts in which no token could be read.")
    squares = np.zeros(activations.shape[1])
    for rows, block in _blocks(activations):
        block -= means[positive[rows].astype(int)]
        squares += np.einsum("nf,nf->f", block, block)
    pooled = np.sqrt(squares / (len(positive) - 2))
    difference = means[1] - means[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0, 0.0, difference / pooled)


def select(
    activations: NDArray,
    labels: ArrayLike,
    n_positive: int = 10,
    n_negative: int = 10,
    min_firing: float = 0.01,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The latents with the strongest effect on either side, and weights that let each contribute alike.

    weight_k = sign(d_k) / (s_k K), s_k the standard deviation of latent k over all rollouts: the reward is the mean of
    K readings that are each in units of their standard deviation, so every latent contributes alike. (Weights of +-1
    on raw activations would let the few latents with large activations decide alone.)

    Args:
        activations: Aggregated activation per rollout and latent [n, F], any float type.
        labels: Whether the rollout shows the behaviour [n], bool.
        n_positive: How many latents to take among those that are higher with the behaviour.
        n_negative: How many among those that are lower.
        min_firing: Latents that fire (activation > 0) in a smaller share of the rollouts are left out: their effect
            rests on a handful of rollouts.

    Returns:
        ids [K] int64 and weights [K] float64, positive side first, strongest first, equal effects by lower id.
        K < n_positive + n_negative when fewer latents qualify.
    """
    effects = effect_sizes(activations, labels)
    fired = np.zeros(activations.shape[1])
    for start in range(0, len(activations), _ROWS):
        fired += np.count_nonzero(activations[start : start + _ROWS] > 0, axis=0)
    effects[fired < min_firing * len(activations)] = 0.0
    order = np.argsort(-effects, kind="stable")  # stable: ties go to the lower id
    raising = order[effects[order] > 0][:n_positive]
    order = np.argsort(effects, kind="stable")
    lowering = order[effects[order] < 0][:n_negative]
    ids = np.concatenate([raising, lowering]).astype(np.int64)
    if len(ids) == 0:
        raise PackError(
            f"No latent fires in at least {min_firing:.0%} of the {len(activations)} rollouts and differs between "
            "those with and without the behaviour: lower min_firing, or contrast more rollouts."
        )
    spread = activations[:, ids].astype(np.float64).std(axis=0)
    return ids, np.sign(effects[ids]) / spread / len(ids)


def _checked_labels(activations: NDArray, labels: ArrayLike) -> NDArray[np.bool_]:
    """Labels as bool, after making sure that there is something to contrast."""
    positive = np.asarray(labels).astype(bool)
    if activations.ndim != 2 or positive.shape != activations.shape[:1]:
        raise PackError(
            f"Contrast needs activations [rollouts, latents] and one label per rollout, but got shapes "
            f"{activations.shape} and {positive.shape}."
        )
    if positive.all() or not positive.any() or len(positive) < 3:
        raise PackError(
            f"Contrast needs rollouts with and without the behaviour, but {positive.sum()} of {len(positive)} show it: "
            "sample more rollouts, or at another temperature."
        )
    return positive


def _blocks(activations: NDArray) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """The activations a few rows at a time, in float64, relative to the first row."""
    origin = activations[0].astype(np.float64)
    for start in range(0, len(activations), _ROWS):
        rows = slice(start, start + _ROWS)
        yield rows, activations[rows].astype(np.float64) - origin
