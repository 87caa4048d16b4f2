"""Reward: what every reward of this library is, seen from TRL and from a composite."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mechreward.errors import RewardError
from mechreward.readout import Readings, Request
from mechreward.reward.guards import flag_rates, guards_of
from mechreward.rollout.batch import Call, RolloutBatch, Text
from mechreward.rollout.resolve import resolve_source

VERIFIER_SECONDS = "verifier_seconds"
"""Metric under which time spent in verifiers is reported, so that it can be told from our own cost."""


@dataclass(frozen=True, eq=False)
class Dense:
    """Per-token rewards, which become part of the advantages.

    Attributes:
        weight: lambda in A_t = A + lambda z(r_t).
        values: r_t, ``[B, T]`` float32.
        mask: ``[B, T]`` bool, the tokens that have one.
    """

    weight: float
    values: Tensor
    mask: Tensor


@dataclass(frozen=True, eq=False)
class Scores:
    """What a reward says of a batch.

    Attributes:
        values: ``[B]`` float32 on the CPU; NaN where a rollout cannot be scored.
        dense: Per-token parts.
        parts: Named values ``[B]`` for the logs: raw readings, components.
        metrics: Named numbers for the logs.
    """

    values: Tensor
    dense: Sequence[Dense] = ()
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


class Source(Protocol):
    """Whatever can turn a call from a trainer into a rollout batch, and produce readings for it."""

    def batch(self, call: Call) -> RolloutBatch:
        """The call with its token ids and groups."""
        ...

    def read(self, batch: RolloutBatch, requests: Sequence[Request]) -> Mapping[Request, Readings]:
        """Values ``[B, T, K]`` and their mask ``[B, T]``, for each request."""
        ...

    def accept(self, reward: Reward, batch: RolloutBatch, scores: Scores) -> None:
        """Take what a list of numbers cannot carry: dense parts, and the guards' verdicts in ``batch``."""
        ...


class Reward:
    """A reward: declares what it needs read, and scores a batch from the readings. It never touches a model.

    An instance is a TRL reward function. Called by a trainer, it finds the activations by itself (see
    ``rollout/resolve.py``); called by hand, it needs ``source=HFSource(model, tokenizer)``.
    """

    def __init__(self, name: str):
        self.__name__ = name

    @property
    def requests(self) -> list[Request]:
        """The readouts that this reward needs."""
        return []

    def score(self, batch: RolloutBatch, readings: Mapping[Request, Readings], sense: float = 1.0) -> Scores:
        """Score a batch of B rollouts.

        Args:
            batch: The rollouts, with what the guards say of them.
            readings: For each of :attr:`requests`.
            sense: Negative where the caller subtracts these scores: then guards must not lower but raise them.
        """
        raise RewardError(f"{type(self).__name__} does not say how it scores.")

    def per_token(self, batch: RolloutBatch, readings: Mapping[Request, Readings], sense: float = 1.0) -> Tensor:
        """The rollouts' rewards dealt out to their tokens, for trainers that take one number a token.

        Args:
            batch, readings, sense: As for :meth:`score`.

        Returns:
            ``[B, T]`` float32 on the CPU, NaN where a token gets nothing. Here the last token that the model wrote gets
            all.
        """
        values = self.score(batch, readings, sense).values
        return torch.where(batch.last_written(), values[:, None], torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """Running statistics, saved with checkpoints (JSON)."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore running statistics."""

    def guard(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> RolloutBatch:
        """Run this reward's own guards over the batch, before it scores."""
        return batch

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        source: Source | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        trainer_state: Any = None,
        environments: Any = None,
        **columns: Sequence[Any],
    ) -> list[float | None]:
        """Score completions: TRL's reward function interface.

        Args:
            prompts: B prompts, plain or conversational.
            completions: B completions.
            completion_ids: Their token ids, as TRL passes them.
            source: Where activations come from, if no trainer calls. (A list is a dataset's column of that name.)
            log_metric, log_extra, trainer_state, environments: Passed by TRL.
            **columns: The dataset's other columns.

        Returns:
            B rewards; None for a rollout that cannot be scored.

        Raises:
            RewardError: The call lacks something, in one sentence.
        """
        began = time.perf_counter()
        if isinstance(source, (list, tuple)):  # a dataset's column of that name, which NuminaMath has
            columns, source = {**columns, "source": source}, None
        origin = resolve_source(source, log_metric, needs_model=bool(self.requests))
        batch = origin.batch(Call(prompts, completions, completion_ids, columns))
        readings = origin.read(batch, self.requests) if self.requests else {}
        guarded = self.guard(batch, readings)
        scores = self.score(guarded, readings)
        origin.accept(self, guarded, scores)
        verifying = sum(v for name, v in scores.metrics.items() if name.endswith(VERIFIER_SECONDS))
        metrics = {**scores.metrics, "seconds": time.perf_counter() - began - verifying}
        flags = guarded.flags if guarded is not batch else None
        self._log(scores.parts, metrics, flags, log_metric, log_extra)
        dropped = [False] * len(batch) if guarded.dropped is None else guarded.dropped.tolist()
        return [
            None if math.isnan(value) or gone else value
            for value, gone in zip(scores.values.tolist(), dropped, strict=True)
        ]

    def _log(
        self,
        parts: Mapping[str, Tensor],
        metrics: Mapping[str, float],
        flags: Sequence[Sequence[str]] | None,
        log_metric: Callable[[str, float], None] | None,
        log_extra: Callable[[str, list], None] | None,
    ) -> None:
        if log_metric is not None:
            means = {name: float(v.nanmean()) for name, v in parts.items() if not v.isnan().all()}
            if flags is not None:
                means |= flag_rates(flags, list(guards_of([self])))
            for name, value in {**means, **metrics}.items():
                log_metric(f"{self.__name__}/{name}", value)
        if log_extra is not None:
            columns = {name: v.tolist() for name, v in parts.items()}
            if flags is not None:
                columns["flags"] = ["; ".join(said) for said in flags]
            for name, values in columns.items():
                log_extra(f"{self.__name__}/{name}", values)
