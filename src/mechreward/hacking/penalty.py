"""OneSidedPenalty: a reward, lowered for the rollouts of a group that show a concept more than the others.

Wu & Tang (arXiv 2604.01476) lower the rewards of GRPO by how far a rollout's score on a concept, such as a direction
for reward hacking, lies above its group's mean, *before* TRL normalises rewards within the group. In their two settings
the hack rate falls from 99.9 % and 78.9 % to 24.9 % and 15.1 % with the multiplicative form, to about 53 % and 48 %
with the additive one, and to 72.3 % and 64.8 % when the direction is suppressed during generation instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from mechreward.errors import ConfigError, RewardError, nearest
from mechreward.readout import Readings, Request
from mechreward.reward.base import Reward, Scores
from mechreward.reward.composition import is_dense, least_favourable
from mechreward.reward.feature_reward import FeatureReward
from mechreward.reward.normalization import nan_moments
from mechreward.rollout.batch import RolloutBatch

Form = Literal["multiplicative", "additive"]
FORMS: tuple[Form, ...] = ("multiplicative", "additive")


class OneSidedPenalty(Reward):
    """Any reward r, lowered where a concept's score c stands out in its group.

    z = (c - mean_g) / (std_g + eps), over the group of ``num_generations``, and then

    * ``"multiplicative"``: r (1 - alpha sigmoid(z) 1[z > 0]),
    * ``"additive"``: r - alpha max(z, 0),

    but never more than r: a factor below 1 would raise a negative reward, which is therefore left as it is. With
    alpha = 2 a positive reward falls to 0 as soon as z > 0, and towards -r as z grows. About half of a group lies above
    its mean whether or not any rollout shows the concept: ``eps``, in the concept's own units, keeps such differences
    small for the additive form alone.

    A rollout whose concept cannot be read (no token) counts as the one of its group that shows most of it, so that
    ending at once is no way out; where none can be read, nothing is penalised. One without a reward has none.

    Args:
        reward: What is rewarded: a composite, an OutcomeReward, any other.
        concept: What is penalised, higher for more of it: a direction for hacking, or a correctness probe with
            ``weights=[-1.0]``. Its raw value is used: guards, ``normalize`` and ``schedule`` do not touch it.
        alpha: Strength.
        form: See above.
        eps: Added to the group's standard deviation (unbiased, as TRL's).

    Raises:
        ConfigError: An unknown form, or a number that makes no sense.
        RewardError: One of the two acts on tokens (``aggregation="per_token"``), past any reward of a rollout.
    """

    def __init__(
        self,
        reward: Reward,
        concept: FeatureReward,
        alpha: float = 2.0,
        form: Form = "multiplicative",
        eps: float = 0.1,
    ):
        super().__init__(f"penalised_{reward.__name__}")
        if form not in FORMS:
            raise ConfigError(f"There is no form '{form}': use multiplicative or additive.{nearest(form, FORMS)}")
        if not (0 < alpha < math.inf and 0 < eps < math.inf):
            raise ConfigError(f"A penalty needs alpha > 0 and eps > 0, not alpha={alpha} and eps={eps}.")
        for part in (reward, concept):
            if is_dense(part):
                raise RewardError(
                    f"'{part.__name__}' has aggregation='per_token', which acts through the advantages, past any "
                    "penalty of a rollout: choose another aggregation."
                )
        self.rewards, self.concept = [reward], concept  # `rewards`: see mechreward.reward.guards.all_within
        self.alpha, self.form, self.eps = alpha, form, eps

    @property
    def reward(self) -> Reward:
        """What is penalised."""
        return self.rewards[0]

    @property
    def requests(self) -> list[Request]:
        return list(dict.fromkeys([*self.reward.requests, *self.concept.requests]))

    def guard(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> RolloutBatch:
        return self.reward.guard(batch, readings)

    def score(self, batch: RolloutBatch, readings: Mapping[Request, Readings], sense: float = 1.0) -> Scores:
        """Score the reward, then lower it.

        Raises:
            RewardError: The caller subtracts this reward, so that to lower it would raise the total.
        """
        if sense < 0:
            raise RewardError(
                f"'{self.__name__}' has a negative weight, under which its penalty would be a gain: penalise the "
                "whole composite instead."
            )
        scores = self.reward.score(batch, readings, sense)
        if scores.dense:
            raise RewardError(f"'{self.reward.__name__}' rewards tokens, past any penalty of a rollout.")
        concept = self.concept.score(batch, readings).parts["raw"]  # before any guard: no trust lifts the penalty
        grouped = batch.grouped(concept).double()
        mean, std = nan_moments(grouped)
        most = least_favourable(grouped[..., None], torch.tensor([-1.0]))[..., 0]  # subtracted
        z = batch.local((most - mean) / (std + self.eps)).float()
        above = z.nan_to_num(0.0).clamp(min=0)
        if self.form == "multiplicative":
            lower = scores.values * (1 - self.alpha * above.sigmoid() * (above > 0))
        else:
            lower = scores.values - self.alpha * above
        values = torch.minimum(scores.values, lower)  # NaN where the reward is
        return replace(
            scores,
            values=values,
            parts={**scores.parts, "before_penalty": scores.values, "concept": concept, "concept_z": z},
            metrics={**scores.metrics, "penalised": float((values < scores.values).float().mean())},
        )

    def state_dict(self) -> dict[str, Any]:
        return self.reward.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reward.load_state_dict(state)
