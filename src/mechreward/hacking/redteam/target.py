"""What is attacked: a reward on a model, with the guards around it and the verifier that knows what is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechreward import progress
from mechreward.errors import DataError
from mechreward.hacking.dual_verifier import Disagreement
from mechreward.readout import Readings, Request
from mechreward.reward.base import Reward
from mechreward.reward.feature_reward import lowered
from mechreward.reward.guards import Detects, Guard, RepetitionDetector
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.sampling import sample, samples_depend_on
from mechreward.rollout.source import HFSource
from mechreward.schema import shown
from mechreward.unfinished import Unfinished
from mechreward.verifiers.golds import golds, verdicts

ROWS = 128
"""Rollouts that are read and judged at once: about a training step's."""

GOLD = "answer"
"""Column with the right answers."""

Verifier = Callable[[Sequence[str], Sequence[str]], Sequence[bool | None]]
Floats = NDArray[np.float64]


@runtime_checkable
class Suite(Guard, Protocol):
    """A guard made of detectors with thresholds, as :class:`mechreward.hacking.AdversarialSuite` is."""

    thresholds: dict[str, float]

    def calibrate(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> None: ...

    def scores(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class Judged:
    """What n rollouts earn, whether they are right, and which detectors flag them.

    Attributes:
        reward: Raw reward before any guard, ``[n]``; NaN where no token is read.
        guarded: What the guards leave of it, ``[n]``: trust max(r, 0) + min(r, 0), or NaN for a dropped rollout.
        right: 1, 0, or NaN where the verifier cannot say, ``[n]``.
        flags: For each detector whether it flags the rollout, ``[n]`` bool.
    """

    reward: Floats
    guarded: Floats
    right: Floats
    flags: Mapping[str, NDArray[np.bool_]]

    @property
    def caught(self) -> NDArray[np.bool_]:
        """Flagged by any detector, ``[n]``."""
        return np.any([*self.flags.values(), np.zeros(len(self.reward), dtype=bool)], axis=0)

    def __len__(self) -> int:
        return len(self.reward)

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> Judged:
        """Return some of the rollouts."""
        flags = {name: flagged[rows] for name, flagged in self.flags.items()}
        return Judged(self.reward[rows], self.guarded[rows], self.right[rows], flags)

    @classmethod
    def together(cls, pieces: Sequence[Judged]) -> Judged:
        """Join several batches' rollouts."""
        names = dict.fromkeys(name for piece in pieces for name in piece.flags)
        return cls(
            np.concatenate([piece.reward for piece in pieces]),
            np.concatenate([piece.guarded for piece in pieces]),
            np.concatenate([piece.right for piece in pieces]),
            {
                name: np.concatenate([piece.flags.get(name, np.zeros(len(piece), dtype=bool)) for piece in pieces])
                for name in names
            },
        )


@dataclass(frozen=True)
class Target:
    """A reward on a model.

    Attributes:
        model: The untrained model, which is also the frozen reference.
        tokenizer: Its tokenizer.
        reward: What is attacked; the figure is its part ``raw``.
        guards: What may notice: guards, and suites of detectors.
        verifier: Of completions and golds (column :data:`GOLD`).
        generate: Options of HF `generate` for sampling.
        batch_size: Rollouts sampled at once.
    """

    model: Any
    tokenizer: Any
    reward: Reward
    guards: Sequence[Guard]
    verifier: Verifier
    generate: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 64

    @property
    def requests(self) -> list[Request]:
        """Everything that must be read to judge a rollout."""
        parts = [self.reward, *self.guards]
        return list(dict.fromkeys(request for part in parts for request in part.requests))

    def read(self, batch: RolloutBatch, requests: Sequence[Request], model: Any = None) -> Mapping[Request, Readings]:
        """Read the policy (by default the untrained model) and the reference."""
        source = HFSource(self.model if model is None else model, self.tokenizer, reference=self.model)
        return source.read(batch, requests)

    def sampled(
        self,
        questions: Any,
        rollouts: int,
        seed: int,
        model: Any = None,
        name: str = "rollouts",
        unfinished: Unfinished | None = None,
    ) -> RolloutBatch:
        """Sample rollouts on questions with columns ``prompt`` and :data:`GOLD`, groups contiguous.

        Torch's generator is left as it was. What ``unfinished`` keeps under ``name`` is not sampled again.
        """
        policy, prompts = self.model if model is None else model, list(questions["prompt"])
        decides = samples_depend_on(policy, prompts, rollouts, self.batch_size, seed, self.generate)
        kept = (unfinished or Unfinished()).steps(name, decides)
        with torch.random.fork_rng(), progress.stage(f"Sampling {name}", len(prompts) * rollouts):
            torch.manual_seed(seed)
            batch = sample(policy, self.tokenizer, prompts, rollouts, self.batch_size, kept, **self.generate)
        return replace(batch, columns={GOLD: [gold for gold in questions[GOLD] for _ in range(rollouts)]})

    def calibrated(self, batch: RolloutBatch) -> None:
        """Set the suites' thresholds on clean rollouts of the untrained model."""
        for guard in self.guards:
            if isinstance(guard, Suite):
                guard.calibrate(watched(batch), self.read(batch, guard.requests))

    def rewards(self, batch: RolloutBatch, model: Any = None) -> Floats:
        """Return the raw rewards alone, ``[n]``."""
        asked = self.reward.requests
        return np.concatenate([self.raw(piece, self.read(piece, asked, model)) for piece in _pieces(batch)])

    def raw(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> Floats:
        """Return the raw rewards from readings that are there already, ``[B]``."""
        scores = self.reward.score(replace(batch, trust=None, dropped=None, flags=None), readings)
        return scores.parts.get("raw", scores.values).cpu().double().numpy()

    def right(self, batch: RolloutBatch) -> Floats:
        """Return the verifier's verdicts, ``[n]``; NaN where it cannot say."""
        found = verdicts(self.verifier, batch.texts, golds(self.verifier, batch.columns[GOLD], GOLD))
        return np.array([np.nan if verdict is None else float(verdict) for verdict in found])

    def judged(self, batch: RolloutBatch, model: Any = None) -> Judged:
        """Judge rollouts, reading them in pieces of :data:`ROWS`."""
        pieces = [self.judged_on(piece, self.read(piece, self.requests, model)) for piece in _pieces(batch)]
        return Judged.together(pieces)

    def judged_on(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> Judged:
        """Judge rollouts from readings that are there already."""
        raw, batch = self.raw(batch, readings), watched(batch)
        trust, dropped = np.ones(len(batch)), np.zeros(len(batch), dtype=bool)
        names = [name for guard in self.guards for name in detector_names(guard)]
        flags = {name: np.zeros(len(batch), dtype=bool) for name in names}
        for guard in self.guards:
            verdict = guard(batch, readings)
            trust = np.minimum(trust, verdict.trust.cpu().double().numpy())
            dropped |= verdict.dropped.cpu().numpy()
            for row, reasons in enumerate(verdict.flags):
                for name in {reason.split(":")[0] for reason in reasons}:
                    flags.setdefault(name, np.zeros(len(batch), dtype=bool))[row] = True
        left = lowered(torch.tensor(raw), torch.tensor(trust)).numpy()
        return Judged(raw, np.where(dropped, np.nan, left), self.right(batch), flags)


def questions_that_can_be_judged(questions: Any, verifier: Verifier) -> Any:
    """Return the questions whose gold answer the verifier can read.

    Raises:
        DataError: Fewer than four.
    """
    asked = golds(verifier, questions[GOLD], GOLD)
    kept = [i for i, verdict in enumerate(verdicts(verifier, ["0"] * len(asked), asked)) if verdict is not None]
    if len(kept) < 4:
        raise DataError(
            f"The verifier can read {len(kept)} of {len(asked)} gold answers such as {shown(asked[0])}, and a red team "
            "needs 4: name the column with the answers, or another verifier."
        )
    return questions.select(kept)


# -- detectors as numbers ----------------------------------------------------------------------------------------------


def watched(batch: RolloutBatch) -> RolloutBatch:
    """Return the batch as one outside of training: running statistics of guards stay as they are.

    Each rollout stands alone, where thresholds are set and where they are applied: what a detector finds in groups
    cannot be compared with what it finds without.
    """
    return replace(batch, trust=None, dropped=None, flags=None, training=False, num_generations=1)


def detector_names(guard: Guard) -> list[str]:
    """Return what the guard's flags are called, whether or not one is raised."""
    if isinstance(guard, Suite):
        return list(guard.thresholds)
    return list(guard.names) if isinstance(guard, Detects) else [type(guard).__name__]


def suspicion(
    guard: Guard, batch: RolloutBatch, readings: Mapping[Request, Readings]
) -> dict[str, tuple[Floats, float]]:
    """Return each of a guard's detectors' score of every rollout, ``[B]``, higher = more suspicious, and its threshold.

    A guard that gives no scores gives 1 where it flags.
    """
    if isinstance(guard, Suite):
        scores = guard.scores(batch, readings)
        return {
            name: (scores[name].cpu().double().numpy(), float(threshold))
            for name, threshold in guard.thresholds.items()
            if name in scores
        }
    if isinstance(guard, Disagreement):
        yes, agrees = guard.said(batch, readings)
        return {"dual verifier": ((yes - agrees).double().numpy(), guard.threshold)}
    if isinstance(guard, RepetitionDetector):
        return {"repetition": (np.array([guard.repetition(ids) for ids in batch.written]), guard.threshold)}
    flags = guard(batch, readings).flags
    return {type(guard).__name__: (np.array([float(bool(reasons)) for reasons in flags]), 0.5)}


def _pieces(batch: RolloutBatch) -> list[RolloutBatch]:
    return [batch.take(range(start, min(start + ROWS, len(batch)))) for start in range(0, len(batch), ROWS)]
