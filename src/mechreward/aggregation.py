"""From values per token to one value per rollout."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from mechreward.errors import ConfigError, nearest

Aggregate = Callable[[Tensor, Tensor], Tensor]
"""(values ``[B, T]``, mask ``[B, T]``) -> ``[B]``, NaN where no token of a row is masked in."""

NAMES = ["mean", "max", "last", "sum", "mean_last_32_tokens", "top_4_mean", "per_token"]


def aggregation(name: str) -> Aggregate:
    """The function for a name: ``mean``, ``max``, ``last``, ``sum``, ``mean_last_{n}_tokens``, ``top_{n}_mean``.

    ``last`` is the last token that was read. ``per_token`` gives 0: such a reward acts through the advantages alone.

    Raises:
        ConfigError: An unknown name, or n = 0.
    """
    simple = {"mean": _mean, "max": _max, "last": _last, "sum": _sum, "per_token": _nothing}
    if name in simple:
        return simple[name]
    if match := re.fullmatch(r"mean_last_([1-9]\d*)_tokens", name):
        n = int(match[1])
        return lambda values, mask: _mean(values, _last_n(mask, n))
    if match := re.fullmatch(r"top_([1-9]\d*)_mean", name):
        n = int(match[1])
        return lambda values, mask: _top_mean(values, mask, n)
    raise ConfigError(
        f"There is no aggregation '{name}': use mean, max, last, sum, mean_last_{{n}}_tokens, top_{{n}}_mean or "
        f"per_token.{nearest(name, NAMES)}"
    )


def attention_over(scores: Tensor, mask: Tensor) -> Tensor:
    """How much each token counts: softmax over the masked-in tokens of a row, ``[B, T]``; 0 elsewhere."""
    return scores.masked_fill(~mask, -torch.inf).softmax(dim=1).masked_fill(~mask, 0.0)  # NaN in a row without tokens


def _empty_as_nan(result: Tensor, mask: Tensor) -> Tensor:
    return result.masked_fill(~mask.any(dim=1), torch.nan)


def _sum(values: Tensor, mask: Tensor) -> Tensor:
    return _empty_as_nan(values.masked_fill(~mask, 0.0).sum(dim=1), mask)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return _sum(values, mask) / mask.sum(dim=1)


def _max(values: Tensor, mask: Tensor) -> Tensor:
    if mask.shape[1] == 0:
        return values.new_full((len(values),), torch.nan)
    return _empty_as_nan(values.masked_fill(~mask, -torch.inf).amax(dim=1), mask)


def _last_n(mask: Tensor, n: int) -> Tensor:
    """The last n True entries of each row."""
    from_the_end = mask.long().flip(1).cumsum(1).flip(1)
    return mask & (from_the_end <= n)


def _last(values: Tensor, mask: Tensor) -> Tensor:
    return _sum(values, _last_n(mask, 1))


def _top_mean(values: Tensor, mask: Tensor, n: int) -> Tensor:
    top = values.masked_fill(~mask, -torch.inf).topk(min(n, mask.shape[1]), dim=1).values
    return _mean(top.masked_fill(top.isinf(), 0.0), ~top.isinf())


def _nothing(values: Tensor, mask: Tensor) -> Tensor:
    return _empty_as_nan(torch.zeros(len(values), device=values.device), mask)
