"""Bringing raw rewards to a common scale. NaN (unscorable) stays NaN and is left out of the moments."""

from __future__ import annotations

import torch
from torch import Tensor

from mechreward.rollout.batch import RolloutBatch

EPS = 1e-4
"""Added to standard deviations, as TRL does in its advantages."""


def _float64(values: Tensor) -> Tensor:
    """In float64, on the CPU: Apple's GPU has none."""
    return values.cpu().double()


def nan_moments(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of each row's finite entries, ``[G, N] -> [G, 1], [G, 1]``."""
    count = (~grouped.isnan()).sum(dim=1, keepdim=True)
    mean = grouped.nanmean(dim=1, keepdim=True)
    variance = (grouped - mean).square().nansum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
    return mean, variance.sqrt()


def zscore_in_group(values: Tensor, batch: RolloutBatch) -> Tensor:
    """(r - mean) / (std + eps) within each group of ``num_generations``, ``[B] -> [B]``."""
    grouped = batch.grouped(_float64(values))  # in float32 a constant 12345.678 would differ from its own mean
    mean, std = nan_moments(grouped)
    return batch.local((grouped - mean) / (std + EPS)).float().to(values.device)


def zscore_in_batch(values: Tensor, batch: RolloutBatch) -> Tensor:
    """(r - mean) / (std + eps) over the rollouts of all processes, ``[B] -> [B]``."""
    mean, std = nan_moments(batch.gather(_float64(values))[None])
    return ((_float64(values)[None] - mean) / (std + EPS))[0].float().to(values.device)


def dense_zscore(values: Tensor, mask: Tensor, batch: RolloutBatch) -> Tensor:
    """z(r_t) with the moments of each group's real completion tokens only; 0 on the others.

    Every process sends three numbers a rollout (n, mean, M2), which combine exactly (Chan et al. 1979).

    Args:
        values: r_t, ``[B, T]`` float32.
        mask: ``[B, T]`` bool.
        batch: For its groups.

    Returns:
        ``[B, T]`` float32.
    """
    device, mask = values.device, mask.cpu()
    values = _float64(values).masked_fill(~mask, 0.0)
    n = _float64(mask.sum(dim=1))
    mean = values.sum(dim=1) / n.clamp(min=1)
    m2 = ((values - mean[:, None]).square() * mask).sum(dim=1)
    rows = batch.grouped(torch.stack([n, mean, m2], dim=1))  # [groups, rollouts, 3]
    n_g, mean_g, m2_g = rows.unbind(dim=2)
    total = n_g.sum(dim=1, keepdim=True).clamp(min=1)
    group_mean = (n_g * mean_g).sum(dim=1, keepdim=True) / total
    group_m2 = (m2_g + n_g * (mean_g - group_mean).square()).sum(dim=1, keepdim=True)
    group_std = (group_m2 / (total - 1).clamp(min=1)).sqrt()
    own_mean = batch.local(group_mean.expand_as(n_g))[:, None]
    own_std = batch.local(group_std.expand_as(n_g))[:, None]
    return ((values - own_mean) / (own_std + EPS) * mask).float().to(device)
