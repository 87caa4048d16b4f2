"""Scorer: one model and one reward, which score rollouts by their token ids. Lives in the server's worker process."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechreward import files
from mechreward.aggregation import aggregation
from mechreward.errors import ConfigError
from mechreward.integrations.served import Served, build_reward
from mechreward.integrations.server.models import HuggingFaceModel, VLLMModel
from mechreward.reward.composition import labels
from mechreward.reward.feature_reward import FeatureReward
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.source import over_tokens

INITIAL = "initial"
"""Version of the weights that the server was started with."""


@dataclass(frozen=True)
class Rollout:
    """One rollout to score.

    Attributes:
        prompt_ids: As the model reads them.
        response_ids: As they were sampled.
        label: The right answer, if there is one.
        group: Rollouts in its group, which lie beside it.
        mask: Of several turns, 1 for each token that the model wrote; None for a single turn.
    """

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    label: str | None = None
    group: int = 1
    mask: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class Score:
    """What the server says of one rollout; the fields are :class:`protocol.ScoreReply`'s, one row of each."""

    reward: float | None
    version: str
    token_rewards: list[float | None] = field(default_factory=list)
    features: dict[str, float | None] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)


class Scorer:
    """Loads what is served, and scores.

    Args:
        served: What to load.
        memory: File for what guards learn of the first rollouts, which another scorer goes on with: it would else
            learn what is usual from a policy that is trained already.

    Raises:
        MechRewardError: Something cannot be loaded, or does not fit the model.
    """

    def __init__(self, served: Served, memory: Path | None = None):
        self.served, self.version, self.memory = served, INITIAL, memory
        self.reward = build_reward(served)
        for part in self.reward.rewards:
            if isinstance(part, FeatureReward) and part.aggregation == "per_token":
                raise ConfigError(
                    "aggregation='per_token' has no number for a whole rollout: serve another, and ask for "
                    "token_rewards, which every reply can carry."
                )
        readouts = [request.readout for request in self.reward.requests]
        if served.vllm is None:
            self.model = HuggingFaceModel(served.model, served.dtype, readouts)
        else:
            self.model = VLLMModel(served.model, served.dtype, readouts, dict(served.vllm))
        if memory is not None and memory.exists():
            self.reward.load_state_dict(json.loads(memory.read_text()))

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Score rollouts; groups must be whole."""
        scores: dict[int, Score] = {}
        alike: dict[tuple[int, bool], list[int]] = {}
        for row, rollout in enumerate(rollouts):  # guards compare within groups, and those are of one size
            alike.setdefault((rollout.group, rollout.mask is None), []).append(row)
        for rows in alike.values():
            batch = self._batch([rollouts[row] for row in rows])
            # Requests are batched as they come: a group in which nothing can be read is scored apart from the others,
            # so that what its features count as does not depend on them.
            read = batch.grouped(batch.mask().any(dim=1)).any(dim=1, keepdim=True).expand(-1, batch.num_generations)
            for kind in (True, False):
                some = [k for k, can in enumerate(batch.local(read).tolist()) if can is kind]
                if some:
                    part = replace(batch.take(some), num_generations=batch.num_generations)
                    scores |= zip([rows[k] for k in some], self._score(part), strict=True)
        self._remember()
        return [scores[row] for row in range(len(rollouts))]

    def _remember(self) -> None:
        """Keep what the guards know after this batch, until they have learned all."""
        if self.memory is not None and self.reward.guards:
            files.write(self.memory, json.dumps(self.reward.state_dict()))
            if all(guard.thresholds for guard in self.reward.guards):  # pyright: ignore[reportAttributeAccessIssue]
                self.memory = None

    @torch.no_grad()
    def _score(self, batch: RolloutBatch) -> list[Score]:
        batch = batch.decoded(self.model.tokenizer)
        readings = self.model.read(batch, self.reward.requests)
        guarded = self.reward.guard(batch, readings)
        values = self.reward.score(guarded, readings).values
        per_token = self.reward.per_token(guarded, readings)
        if guarded.dropped is not None:
            values = values.masked_fill(guarded.dropped, torch.nan)
            per_token = per_token.masked_fill(guarded.dropped[:, None], torch.nan)
        columns = self._columns(readings)
        flags = guarded.flags if guarded.flags is not None else [[] for _ in values]
        return [
            Score(
                reward=_number(value),
                version=self.version,
                token_rewards=[_number(v) for v in per_token[row, : len(ids)].tolist()],
                features={name: _number(float(column[row])) for name, column in columns.items()},
                flags=list(flags[row]),
            )
            for row, (ids, value) in enumerate(zip(batch.completion_ids, values.tolist(), strict=True))
        ]

    def _batch(self, rollouts: Sequence[Rollout]) -> RolloutBatch:
        prompts, responses = [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
        return RolloutBatch(
            prompts=self.model.tokenizer.batch_decode(prompts, skip_special_tokens=True),
            completions=[""] * len(rollouts),
            prompt_ids=prompts,
            completion_ids=responses,
            columns={"label": [r.label for r in rollouts]},
            tool_mask=None if rollouts[0].mask is None else [r.mask or [] for r in rollouts],
            num_generations=rollouts[0].group,
            eos_token_ids=self.model.ends,
        )

    def _columns(self, readings: Any) -> dict[str, Tensor]:
        """Each reward's columns, averaged over each rollout's tokens, ``[B]`` each."""
        found = {}
        for name, part in zip(labels(self.reward.rewards), self.reward.rewards, strict=True):
            if isinstance(part, FeatureReward):
                means = over_tokens(readings[part.request], aggregation("mean"))
                found |= {f"{name}/{label}": means[:, k] for k, label in enumerate(part.readout.labels)}
        return found

    def load_weights(self, file: Path, version: str) -> int:
        """Read another version's weights into the model.

        Args:
            file: Safetensors, under the names of the model's own ``state_dict``; see `models.fitting`.
            version: What replies call it from now on.

        Returns:
            How many tensors were taken.

        Raises:
            ModelMismatchError: The file is damaged, or does not fit; the model is as it was.
        """
        tensors = self.model.load_weights(file)
        self.version = version
        return tensors


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
