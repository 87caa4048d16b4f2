"""Which part of a reward GRPO follows: the one that varies most within a group."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mechreward.reward.base import Reward
from mechreward.reward.composition import CompositeReward, holds_outcome, labels
from mechreward.reward.normalization import nan_moments
from mechreward.rollout.batch import Scores

logger = logging.getLogger(__name__)

STEPS = 10


class SpreadWatch:
    """Warns once where a feature reward varies more within groups than the outcome does.

    GRPO divides a group's rewards, summed, by their standard deviation: the part with the widest spread decides which
    of a question's rollouts are preferred. Compared are the means, over :data:`STEPS` generation steps and their
    groups, of  std(weight x part)  and of  std(sum of weight x outcome).

    The outcome is what reads no activations, OutcomeRewards and reward functions that are not of this library, and what
    is made of an outcome. Parts of a composite are told apart in ``mode="sum"``; the other modes hold features within
    what the outcome allows.
    """

    def __init__(self):
        self._steps = 0
        self._total: dict[tuple[int, str], float] = defaultdict(float)

    def see(
        self,
        rewards: Sequence[Any],
        weights: Sequence[float],
        values: Tensor,
        scores: Mapping[Reward, Scores],
        group: int,
    ) -> None:
        """Take in one step of the first process, and speak up after the last. It draws nothing and gathers nothing.

        Args:
            rewards: The trainer's F reward functions.
            weights: One for each.
            values: What they gave this process's B rollouts, ``[B, F]``; NaN where they gave none.
            scores: What those of this library said in full.
            group: Rollouts in a group; row 0 begins one.
        """
        if self._steps == STEPS:
            return
        self._steps += 1
        outcome = []
        columns = values.float().cpu().unbind(dim=1)
        for i, (reward, weight, column) in enumerate(zip(rewards, weights, columns, strict=True)):
            said = scores[reward].parts if reward in scores else {}
            for name, part, weighted in _parts(reward, weight, column, said):
                if holds_outcome(part) or not getattr(part, "requests", ()):
                    outcome.append(weighted)
                else:
                    self._total[i, name] += _spread(weighted, group)
        if outcome:
            stacked = torch.stack(outcome)
            together = stacked.nansum(dim=0).masked_fill(stacked.isnan().all(dim=0), torch.nan)
            self._total[-1, ""] += _spread(together, group)
        if self._steps == STEPS:
            self._judge()

    def _judge(self) -> None:
        outcome = self._total.pop((-1, ""), None)
        for (_, name), spread in self._total.items():
            if outcome is not None and spread > outcome:
                logger.warning(
                    "Over the first %d steps, the reward '%s' times its weight had a mean standard deviation of %.3g "
                    "within groups, more than the outcome's %.3g, so that it decides more than the outcome which "
                    'rollouts are preferred. Lower its weight; with normalize="group", the weight is its deviation.',
                    STEPS,
                    name,
                    spread / STEPS,
                    outcome / STEPS,
                )


def _parts(
    reward: Any, weight: float, values: Tensor, said: Mapping[str, Tensor], path: str = ""
) -> Iterator[tuple[str, Any, Tensor]]:
    """The name of each part of a reward, the part, and weight x values, ``[B]``."""
    if not isinstance(reward, CompositeReward) or reward.mode != "sum":
        yield path or getattr(reward, "__name__", ""), reward, weight * values
        return
    for label, part, own in zip(labels(reward.rewards), reward.rewards, reward.weights, strict=True):
        name = f"{path}/{label}" if path else label
        if name in said:
            yield from _parts(part, weight * own, said[name].float(), said, name)


def _spread(values: Tensor, group: int) -> float:
    """Mean over groups of the standard deviation within, ``[B]``; NaN is left out, and so are groups of one."""
    padded = torch.nn.functional.pad(values.double(), (0, -len(values) % group), value=torch.nan)
    grouped = padded.view(-1, group)
    known = (~grouped.isnan()).sum(dim=1) > 1
    return float(nan_moments(grouped[known])[1].mean()) if known.any() else 0.0
