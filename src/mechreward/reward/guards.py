"""Detectors look at rollouts for signs of gaming, and lower the trust in their feature rewards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from mechreward.errors import ConfigError, RewardError, nearest
from mechreward.readout import Readings, Request
from mechreward.rollout.batch import RolloutBatch


@dataclass(frozen=True)
class Verdict:
    """What a guard says of B rollouts.

    Attributes:
        trust: ``[B]`` in 0..1, what is left of a positive feature reward.
        dropped: ``[B]`` bool, rollouts to leave out of training.
        flags: For each rollout the reasons, in words; empty for a clean one.
    """

    trust: Tensor
    dropped: Tensor
    flags: Sequence[Sequence[str]]


class Guard(Protocol):
    """Anything that may lower a rollout's feature reward."""

    @property
    def requests(self) -> list[Request]: ...

    def __call__(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> Verdict: ...


@runtime_checkable
class Learns(Protocol):
    """A guard that learns from rollouts: what it has learned is saved with checkpoints (JSON)."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class Attaches(Protocol):
    """A guard that is told which rewards it guards."""

    def attach(self, rewards: Sequence[Any]) -> None: ...


@runtime_checkable
class Detects(Protocol):
    """A guard made of named detectors, each of which has a rate in the logs."""

    names: Sequence[str]


@runtime_checkable
class Disables(Protocol):
    """A guard that disables those of its detectors that raise."""

    disabled: Mapping[str, str]


def apply_guards(guards: Sequence[Guard], batch: RolloutBatch, readings: Mapping[Request, Readings]) -> RolloutBatch:
    """The batch with every guard's verdict: the lowest trust wins.

    Raises:
        RewardError: A trust outside 0..1, with which a guard would raise a reward or turn it round.
    """
    for guard in guards:
        verdict = guard(batch, readings)
        if not ((verdict.trust >= 0) & (verdict.trust <= 1)).all():
            raise RewardError(f"The guard {type(guard).__name__} gave a trust outside 0 to 1.")
        batch = batch.guarded(verdict.trust, verdict.dropped, verdict.flags)
    return batch


def attach(guards: Sequence[Guard], rewards: Sequence[Any]) -> None:
    """Tell guards that want to know which rewards they guard."""
    for guard in guards:
        if isinstance(guard, Attaches):
            guard.attach(rewards)


def guards_state(guards: Sequence[Guard]) -> dict[str, Any]:
    """What the guards have learned, by their class (JSON)."""
    return {name: guard.state_dict() for name, guard in _that_learn(guards)}


def load_guards_state(guards: Sequence[Guard], states: Mapping[str, Any]) -> None:
    """Go on from there."""
    for name, guard in _that_learn(guards):
        if name in states:
            guard.load_state_dict(states[name])


def _that_learn(guards: Sequence[Guard]) -> Iterator[tuple[str, Any]]:
    """Those with a state, by their class; the second of a class is ``Class_2``."""
    seen: Counter[str] = Counter()
    for guard in guards:
        if isinstance(guard, Learns):
            kind = type(guard).__name__
            seen[kind] += 1
            yield kind if seen[kind] == 1 else f"{kind}_{seen[kind]}", guard


def flag_rates(flags: Sequence[Sequence[str]], guards: Sequence[Guard] = ()) -> dict[str, float]:
    """For the logs: the share of rollouts that are flagged, and by which detector, and 1 for each that is disabled.

    Trainers average a metric over the steps in which it was logged: of the ``guards``' detectors, zeros are said, too.

    Args:
        flags: Each begins with its detector's name.
        guards: Which may have given them.
    """
    rows = [{said.split(":")[0] for said in row} for row in flags]
    rates = {"flagged": sum(map(bool, rows)) / max(len(rows), 1)}
    detectors = {name for guard in guards if isinstance(guard, Detects) for name in guard.names}
    for name in sorted(detectors.union(*rows)):
        rates[f"flagged/{name}"] = sum(name in row for row in rows) / max(len(rows), 1)
    return rates | {
        f"disabled/{name}": 1.0 for guard in guards if isinstance(guard, Disables) for name in guard.disabled
    }


def repeated_ngrams(ids: Sequence[int], n: int) -> float:
    """The share of a text's n-grams that have occurred before in it, 0 to nearly 1: 1 - distinct / total."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class RepetitionDetector:
    """Flags completions that say the same thing over and over.

    The score is the share of a completion's n-grams of token ids that have occurred before in it:
    1 - distinct / total (Welleck et al. 2020, arXiv 1908.04319, seq-rep-n).

    Args:
        n: Length of the n-grams.
        threshold: Flag above this score.
        min_ngrams: Completions with fewer n-grams are never flagged.
        action: ``"downweight"`` leaves ``trust`` of a positive feature reward; ``"drop"`` removes the rollout from
            training.
        trust: What is left of it.

    Raises:
        ConfigError: An unknown action, or a number that makes no sense.
    """

    names = ("repetition",)

    def __init__(
        self,
        n: int = 4,
        threshold: float = 0.5,
        min_ngrams: int = 16,
        action: Literal["downweight", "drop"] = "downweight",
        trust: float = 0.0,
    ):
        if action not in ("downweight", "drop"):
            hint = nearest(action, ["downweight", "drop"])
            raise ConfigError(f"The repetition detector has no action '{action}': use 'downweight' or 'drop'.{hint}")
        if n < 1 or not 0 <= threshold <= 1 or not 0 <= trust <= 1:
            raise ConfigError(
                f"The repetition detector needs n >= 1, and threshold and trust in 0 to 1, not n={n}, "
                f"threshold={threshold}, trust={trust}."
            )
        self.requests: list[Request] = []  # it reads token ids alone
        self.n, self.threshold, self.min_ngrams, self.action, self.trust = n, threshold, min_ngrams, action, trust

    def repetition(self, ids: Sequence[int]) -> float:
        """seq-rep-n of one completion, 0 (nothing repeated) to nearly 1."""
        return 0.0 if len(ids) - self.n + 1 < self.min_ngrams else repeated_ngrams(ids, self.n)

    def __call__(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> Verdict:
        scores = [self.repetition(ids) for ids in batch.written]
        flagged = torch.tensor([score > self.threshold for score in scores], dtype=torch.bool)
        return Verdict(
            trust=torch.where(flagged, self.trust, 1.0),
            dropped=flagged & (self.action == "drop"),
            flags=[
                [f"repetition: {score:.0%} of {self.n}-grams repeat"] if flag else []
                for score, flag in zip(scores, flagged.tolist(), strict=True)
            ],
        )
