"""CompositeReward: outcome and features together."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mechreward.errors import ConfigError, RewardError, nearest
from mechreward.readout import Readings, Request
from mechreward.reward.base import Reward, all_within
from mechreward.reward.guards import (
    Guard,
    attach,
    guards_state,
    load_guards_state,
)
from mechreward.reward.outcome import OutcomeReward
from mechreward.rollout.batch import RolloutBatch, Scores

Mode = Literal["sum", "hero", "gated"]
MODES: tuple[Mode, ...] = ("sum", "hero", "gated")


@dataclass(frozen=True)
class Hero:
    """Constants of HERO's stratified combination (arXiv 2510.07242, main text).

    Attributes:
        alpha: Wrong rollouts lie in [-alpha, alpha].
        beta: Right ones in [1 - beta, 1 + beta]. alpha + beta < 1, or a wrong one could outrank a right one.
        w_min, w_max, k: Difficulty weight w = w_min + (w_max - w_min) sigmoid(k (sigma - sigma_bar)).
        memory: Of the running mean sigma_bar (0.9 in the published re-implementation; the paper does not say).
    """

    alpha: float = 0.05
    beta: float = 0.05
    w_min: float = 0.5
    w_max: float = 2.0
    k: float = 5.0
    memory: float = 0.9

    def __post_init__(self):
        if not (self.alpha >= 0 and self.beta >= 0 and self.alpha + self.beta < 1):
            raise ConfigError(f"HERO needs alpha, beta >= 0 and alpha + beta < 1, not {self.alpha} and {self.beta}.")
        if not 0 < self.w_min <= self.w_max < math.inf:
            raise ConfigError(f"HERO needs 0 < w_min <= w_max < infinity, not {self.w_min} and {self.w_max}.")
        if not (math.isfinite(self.k) and 0 <= self.memory <= 1):
            raise ConfigError(f"HERO needs a finite k and a memory in 0 to 1, not {self.k} and {self.memory}.")


class CompositeReward(Reward):
    """Several rewards as one, read in one pass.

    Modes:
        ``"sum"``: sum_i w_i r_i.
        ``"hero"``: bounded and stratified by the verifier, so that a wrong rollout never outranks a right one of its
            group: with z the features' reward scaled to 0..1 among the group's rollouts of the same verdict,
            r = w (-alpha + 2 alpha z) if wrong, w ((1 - beta) + 2 beta z) if right. A lone right rollout (or wrong
            one) of its group has z = 0 and gets the lower end of its band, as the formula says. The weight w cancels
            when the trainer divides by the group's standard deviation: use ``scale_rewards="none"``.
        ``"gated"``: features count only where the verifier passes (``gate="passes"``), or only as a penalty
            (``gate="penalty"``: min(features, 0)).

    Where a part that holds no outcome cannot score a rollout (no token of it is read), the part counts as the least
    favourable of its values in the rollout's group, by the sign with which it is used; where the group has none, in
    the batch; where that has none either, as 0. So a completion that ends at once neither outranks a right one nor
    escapes a penalty. ``<part>/unscored`` logs how many there were.

    The repetition detector runs over every batch, and lowers the feature rewards of what it flags.

    Args:
        rewards: Parts; composites may be nested, without guards of their own.
        weights: One per part, finite; 1 each by default.
        mode: See above; ``"hero"`` and ``"gated"`` need exactly one OutcomeReward among the parts.
        gate: For ``mode="gated"``.
        hero: For ``mode="hero"``.
        guards: In place of the default repetition detector (which also stands back where the trainer guards).
        name: What it is called in logs.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        weights: Sequence[float] | None = None,
        mode: Mode = "sum",
        gate: Literal["passes", "penalty"] = "passes",
        hero: Hero | None = None,
        guards: Sequence[Guard] | None = None,
        name: str = "composite",
    ):
        super().__init__(name)
        self.rewards = list(rewards)
        self.weights = [1.0] * len(self.rewards) if weights is None else [float(w) for w in weights]
        if not self.rewards:
            raise RewardError("A CompositeReward needs at least one reward.")
        if len(self.weights) != len(self.rewards):
            raise RewardError(f"CompositeReward has {len(self.rewards)} rewards and {len(self.weights)} weights.")
        if not all(math.isfinite(w) for w in self.weights):
            raise RewardError(f"A weight of '{name}' is NaN or infinite: give finite numbers.")
        not_ours = [r for r in self.rewards if not isinstance(r, Reward)]
        if not_ours:
            raise RewardError(
                f"{not_ours[0]!r} is not a mechreward reward: wrap a verifier in OutcomeReward, or pass a plain reward "
                "function to the trainer beside the composite."
            )
        if any(isinstance(r, CompositeReward) and r.guards is not None for r in self.rewards):
            raise RewardError("Guards look at whole rollouts: give them to the outermost CompositeReward alone.")
        if mode not in MODES:
            raise ConfigError(f"There is no mode '{mode}': use sum, hero or gated.{nearest(mode, MODES)}")
        if gate not in ("passes", "penalty"):
            raise ConfigError(f"gate='{gate}' is not possible: use 'passes' or 'penalty'.")
        self.mode: Mode = mode
        self.gate, self.hero = gate, hero or Hero()
        self.guards = None if guards is None else list(guards)
        self.outcomes = [i for i, r in enumerate(self.rewards) if isinstance(r, OutcomeReward)]
        if mode != "sum" and (len(self.outcomes) != 1 or len(self.rewards) < 2):
            raise RewardError(f"mode='{mode}' needs exactly one OutcomeReward and at least one other reward.")
        if mode != "sum" and any(map(is_dense, self.rewards)):
            raise RewardError(
                f"aggregation='per_token' acts through the advantages, past mode='{mode}': use mode='sum', or another "
                "aggregation."
            )
        self.filled = [i for i, r in enumerate(self.rewards) if not holds_outcome(r)]
        self.sigma_bar: float | None = None
        attach(self.guards or [], [self])

    @property
    def children(self) -> list[tuple[Reward, float]]:
        return list(zip(self.rewards, self.weights, strict=True))

    @property
    def requests(self) -> list[Request]:
        return list(
            dict.fromkeys(request for part in [*self.rewards, *(self.guards or [])] for request in part.requests)
        )

    def score(self, batch: RolloutBatch, readings: Mapping[Request, Readings], sense: float = 1.0) -> Scores:
        """Score every part, then combine."""
        scores, error = [], None
        for reward, weight in zip(self.rewards, self.weights, strict=True):
            try:
                scores.append(reward.score(batch, readings, sense * math.copysign(1.0, weight)))
            except Exception as raised:  # first all processes gather as often: the others may have raised nothing
                error = error or raised
                scores.append(Scores(torch.full((len(batch),), torch.nan)))
        values = self._filled([s.values for s in scores], batch, sense)  # [parts, B]
        if error is not None:
            raise error
        combined = self._combined(values, batch)
        parts, metrics = {}, {}
        for i, (label, weight, s) in enumerate(zip(labels(self.rewards), self.weights, scores, strict=True)):
            parts[label] = s.values
            if i in self.filled:
                metrics[f"{label}/unscored"] = float(s.values.isnan().sum())
            parts |= {f"{label}/{name}": part for name, part in s.parts.items()}
            metrics |= {f"{label}/{name}": metric for name, metric in s.metrics.items()}
            if s.dense:
                metrics[f"{label}/lambda"] = weight
        dense = [
            replace(part, weight=part.weight * weight)
            for weight, s in zip(self.weights, scores, strict=True)
            for part in s.dense
        ]
        if self.mode == "hero" and self.sigma_bar is not None:
            metrics["hero_sigma_bar"] = self.sigma_bar
        return Scores(combined, dense, parts, metrics)

    def per_token(self, batch: RolloutBatch, readings: Mapping[Request, Readings], sense: float = 1.0) -> Tensor:
        """Each part's :meth:`Reward.per_token` times its weight, what the gate closes out as 0.

        A rollout's tokens sum to its score where the features are aggregated by their mean or sum. What a part counts
        as that cannot score a rollout goes to the last token that the model wrote.

        Raises:
            RewardError: ``mode="hero"``, which ranks whole rollouts.
        """
        if self.mode == "hero":
            raise RewardError("mode='hero' ranks whole rollouts and has no rewards per token: use sum or gated.")
        senses = [sense * math.copysign(1.0, weight) for weight in self.weights]
        parts = list(zip(self.rewards, self.weights, senses, strict=True))
        values = self._filled([part.score(batch, readings, own).values for part, _, own in parts], batch, sense)
        tokens = torch.stack([part.per_token(batch, readings, own) for part, _, own in parts])  # [parts, B, T]
        unscored = tokens.isnan().all(dim=2, keepdim=True) & batch.last_written()
        tokens = torch.where(unscored, values[:, :, None], tokens) * torch.tensor(self.weights)[:, None, None]
        if self.mode == "gated":
            features = [i for i in range(len(parts)) if i not in self.outcomes]
            tokens[features] *= self._opens(values)[:, None]
        total = tokens.nansum(dim=0).masked_fill(tokens.isnan().all(dim=0), torch.nan)  # [B, T]
        return total.masked_fill(self._combined(values, batch).isnan()[:, None], torch.nan)

    def _filled(self, values: Sequence[Tensor], batch: RolloutBatch, sense: float) -> Tensor:
        """The parts' values ``[parts, B]``, with what counts in place of those that could not be scored."""
        scored = torch.stack(list(values))
        signs = torch.tensor([sense * math.copysign(1.0, weight) for weight in self.weights])
        if not self.filled:
            return scored
        least = batch.local(least_favourable(batch.grouped(scored.T), signs)).T
        scored[self.filled] = least[self.filled]
        return scored

    def _combined(self, values: Tensor, batch: RolloutBatch) -> Tensor:
        return {"sum": self._sum, "hero": self._hero, "gated": self._gated}[self.mode](values, batch)

    def _weighted(self, values: Tensor, which: Sequence[int]) -> Tensor:
        """sum_i w_i r_i over some parts, ``[B]``; NaN only where all of them are."""
        chosen = values[list(which)]
        total = (chosen * torch.tensor([self.weights[i] for i in which])[:, None]).nansum(dim=0)
        return total.masked_fill(chosen.isnan().all(dim=0), torch.nan)

    def _sum(self, values: Tensor, batch: RolloutBatch) -> Tensor:
        return self._weighted(values, range(len(values)))

    def _features(self, values: Tensor) -> Tensor:
        return self._weighted(values, [i for i in range(len(values)) if i not in self.outcomes])

    def _gated(self, values: Tensor, batch: RolloutBatch) -> Tensor:
        outcome, features = values[self.outcomes[0]], self._features(values).nan_to_num(0.0)  # NaN: none in the batch
        allowed = features * self._opens(values)
        return outcome * self.weights[self.outcomes[0]] + allowed  # NaN where the outcome is unknown

    def _opens(self, values: Tensor) -> Tensor:
        """Where the gate lets the features count, ``[B]`` bool."""
        return values[self.outcomes[0]] > 0.5 if self.gate == "passes" else self._features(values) < 0

    def _hero(self, values: Tensor, batch: RolloutBatch) -> Tensor:
        outcome = batch.grouped(values[self.outcomes[0]])  # [groups, N]
        features = batch.grouped(self._features(values)).double()  # in float32, squares of 1e20 are infinite
        features = features.masked_fill(features.isinf(), torch.nan)
        right = outcome > 0.5
        z = torch.where(right, _unit_within(features, right), _unit_within(features, ~right & ~outcome.isnan()))
        h = self.hero
        bands = torch.where(right, (1 - h.beta) + 2 * h.beta * z, -h.alpha + 2 * h.alpha * z)  # eq. 3
        sigma = _std(features)  # [groups, 1]
        mean_sigma = float(sigma.mean())
        sigma_bar = mean_sigma if self.sigma_bar is None else self.sigma_bar
        w = h.w_min + (h.w_max - h.w_min) * torch.sigmoid(h.k * (sigma - sigma_bar))  # eq. 4
        if batch.training:
            self.sigma_bar = h.memory * sigma_bar + (1 - h.memory) * mean_sigma
        return batch.local((w * bands).masked_fill(outcome.isnan(), torch.nan)).float()  # eq. 5

    def state_dict(self) -> dict[str, Any]:
        return {
            "sigma_bar": self.sigma_bar,
            "rewards": [r.state_dict() for r in self.rewards],
            "guards": guards_state(self.guards or []),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if len(state["rewards"]) != len(self.rewards):
            raise RewardError(
                f"The checkpoint holds '{self.__name__}' with {len(state['rewards'])} rewards, but it has "
                f"{len(self.rewards)} now: resume with the rewards that training began with."
            )
        self.sigma_bar = state["sigma_bar"]
        load_guards_state(self.guards or [], state.get("guards", {}))
        for reward, saved in zip(self.rewards, state["rewards"], strict=True):
            reward.load_state_dict(saved)


def least_favourable(values: Tensor, signs: Tensor) -> Tensor:
    """Replace what could not be scored by the least favourable value of the same reward.

    Args:
        values: ``[groups, N, rewards]``, NaN where a rollout could not be scored.
        signs: ``[rewards]``: positive where a reward is added, negative where it is subtracted.

    Returns:
        The same shape: for NaN the least of sign x value in the group, else of all groups. A reward without any value
        stays NaN.
    """
    if not values.numel():
        return values
    signs, unscored = signs.sign(), values.isnan()
    worth = (values * signs).masked_fill(unscored, torch.inf)
    none_in_group = unscored.all(dim=1, keepdim=True)
    least = torch.where(none_in_group, worth.amin(dim=(0, 1)), worth.amin(dim=1, keepdim=True))
    least = least.masked_fill(unscored.all(dim=1).all(dim=0), torch.nan) * signs
    return torch.where(unscored, least, values)


def holds_outcome(reward: Any) -> bool:
    """Whether it is an outcome, or is made of one: that an outcome is unknown is no fault of the rollout."""
    return any(isinstance(part, OutcomeReward) for part in all_within([reward]))


def is_dense(reward: Reward) -> bool:
    """Whether it, or any part of it, rewards tokens."""
    return any(isinstance(part, Reward) and part.aggregation == "per_token" for part in all_within([reward]))


def labels(rewards: Sequence[Reward]) -> list[str]:
    """The rewards' names for the logs; a name's second use becomes ``name_2``."""
    seen: Counter[str] = Counter()
    found = []
    for reward in rewards:
        seen[reward.__name__] += 1
        count = seen[reward.__name__]
        found.append(reward.__name__ if count == 1 else f"{reward.__name__}_{count}")
    return found


def _unit_within(features: Tensor, members: Tensor) -> Tensor:
    """z = (f - min) / (max - min + eps) among a group's members, ``[groups, N]``; 0 for the others and for NaN."""
    usable = members & ~features.isnan()
    low = features.masked_fill(~usable, torch.inf).amin(dim=1, keepdim=True)
    high = features.masked_fill(~usable, -torch.inf).amax(dim=1, keepdim=True)
    return ((features - low) / (high - low + 1e-8)).masked_fill(~usable, 0.0).clamp(0, 1)


def _std(features: Tensor) -> Tensor:
    """Population standard deviation of each group's readable features, ``[groups, 1]``."""
    mean = features.nanmean(dim=1, keepdim=True)
    return (features - mean).square().nanmean(dim=1, keepdim=True).sqrt().nan_to_num(0.0)


def warn_if_weight_cancels(reward: object, scale_rewards: object) -> None:
    """HERO's difficulty weight multiplies a whole group, so dividing by the group's deviation removes it."""
    if isinstance(reward, CompositeReward) and reward.mode == "hero" and scale_rewards == "group":
        warnings.warn(
            "scale_rewards='group' divides by the group's standard deviation, which cancels HERO's difficulty weight: "
            "set scale_rewards='none'.",
            stacklevel=3,
        )
