"""Reward: what every reward of this library is, seen from TRL and from a composite."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mechreward.errors import RewardError
from mechreward.readout import Readings, Request
from mechreward.reward.guards import Guard, RepetitionDetector, apply_guards, flag_rates
from mechreward.rollout.batch import Call, RolloutBatch, Scores, Text
from mechreward.rollout.plain import find_source
from mechreward.rollout.source import Source

VERIFIER_SECONDS = "verifier_seconds"
"""Metric under which time spent in verifiers is reported, so that it can be told from our own cost."""


class Reward:
    """A reward: declares what it needs read, and scores a batch from the readings. It never touches a model.

    An instance is a TRL reward function. Called by a trainer, it finds the activations by itself (see
    ``rollout/plain.py``); called by hand, it needs ``source=HFSource(model, tokenizer)``.
    """

    guards: Sequence[Guard] | None = ()
    """The guards that this reward brings along; None for the repetition detector, unless a trainer guards."""

    aggregation: str = ""
    """From readings per token to one number; ``"per_token"`` rewards each token through its advantage."""

    def __init__(self, name: str):
        self.__name__ = name

    @property
    def children(self) -> Sequence[tuple[Reward, float]]:
        """The rewards that this one is made of, each with its weight."""
        return ()

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
        """Run the guards of this reward and of all that it is made of over the batch, before anything is scored.

        A trainer's guards have looked at the batch by then, and left their flags: the default one stands back.
        """
        default = [RepetitionDetector()] if self.guards is None and batch.flags is None else []
        return apply_guards([*default, *guards_of([self])], batch, readings)

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
        origin = find_source(source, log_metric, needs_model=bool(self.requests))
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


def all_within(rewards: Iterable[Any]) -> Iterator[Any]:
    """Yield reward functions and all that they are made of, however deep they are nested."""
    for reward in rewards:
        yield reward
        if isinstance(reward, Reward):
            yield from all_within(child for child, _ in reward.children)


def guards_of(rewards: Iterable[Any]) -> Iterator[Guard]:
    """Yield the guards that reward functions bring along."""
    for reward in all_within(rewards):
        if isinstance(reward, Reward):
            yield from reward.guards or ()
