"""How a reward's weight changes over training. A schedule maps progress in 0..1 to a factor."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float], float]


def linear(start: float, end: float) -> Schedule:
    """From ``start`` to ``end`` in a straight line."""
    return lambda progress: start + (end - start) * progress


def cosine(start: float, end: float) -> Schedule:
    """From ``start`` to ``end`` along half a cosine: end + (start - end) (1 + cos(pi p)) / 2."""
    return lambda progress: end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def warmup(share: float) -> Schedule:
    """From 0 to 1 over the first ``share`` of training."""
    return lambda progress: min(1.0, progress / share) if share > 0 else 1.0
