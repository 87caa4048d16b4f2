"""DualVerifier: a feature reward that counts only as far as an independent probe agrees.

The idea is one-sided: where the features say that a rollout shows the behaviour and a probe with another training,
layer or model says that it does not, the features are likely to have been gamed. The evidence for it is modest:
ensembles help little against an optimiser (arXiv 2510.21531), and a policy that evades one probe partly evades others
(Neural Chameleons, arXiv 2512.11949). Reading the probe on the frozen reference keeps the two from sharing changed
activations; text that fools both remains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from mechreward.errors import ConfigError
from mechreward.probes.linear_probe import Probe
from mechreward.readout import Readings, Reads, Request
from mechreward.reward.base import Reward, Scores
from mechreward.reward.feature_reward import FeatureReward
from mechreward.reward.guards import Verdict, apply_guards
from mechreward.rollout.batch import RolloutBatch


class Disagreement:
    """Flags rollouts where the features say yes and the probe says no.

    Both are brought to 0..1: the features' raw reward r to the share q(r) of the gate's rollouts that lie below (the
    pack's calibration), the probe's logit to a probability p (Platt's, from the probe's card). Flagged is q(r) - p >
    threshold: the other way round is no sign of gaming.

    Args:
        feature_reward: Calibrated, with the aggregation that it was calibrated for.
        independent_probe: Calibrated.
        threshold: In 0..1.
        reads: Whose activations the probe reads.
        action: ``"downweight"`` leaves ``trust`` of a positive feature reward; ``"drop"`` removes the rollout from
            training.
        trust: The share that is left of it, 0..1.

    Raises:
        ConfigError: Something is not calibrated, or an option makes no sense.
    """

    names = ("dual verifier",)

    def __init__(
        self,
        feature_reward: FeatureReward,
        independent_probe: Probe,
        threshold: float = 0.3,
        reads: Reads = "reference",
        action: Literal["downweight", "drop"] = "downweight",
        trust: float = 0.0,
    ):
        name, calibration = feature_reward.__name__, feature_reward.calibration
        if calibration is None:
            raise ConfigError(f"'{name}' has no calibration to compare a probe with: use a pack that was gated.")
        if calibration.aggregation != feature_reward.aggregation:
            raise ConfigError(
                f"'{name}' is calibrated for aggregation '{calibration.aggregation}', not "
                f"'{feature_reward.aggregation}': use the same."
            )
        if independent_probe.card.calibration is None:
            raise ConfigError(
                f"Probe '{independent_probe.name}' has no calibration: train one with 'mechreward probe train'."
            )
        if not 0 <= threshold <= 1 or not 0 <= trust <= 1:
            raise ConfigError(f"disagreement_threshold and downweight must lie in 0 to 1, not {threshold} and {trust}.")
        if action not in ("downweight", "drop"):
            raise ConfigError(f"There is no action '{action}': use 'downweight' or 'drop'.")
        self.features, self.calibration = feature_reward, calibration
        self.probe = independent_probe
        self.logits = FeatureReward(independent_probe, reads=reads, name="probe", scale="logit")
        self.threshold, self.action, self.trust = threshold, action, trust

    @property
    def requests(self) -> list[Request]:
        return [*self.features.requests, *self.logits.requests]

    def said(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> tuple[Tensor, Tensor]:
        """Return what the features say, q(r), and what the probe says, p: ``[B]`` in 0..1, or NaN."""
        plain = replace(batch, trust=None)  # raw values: no guard has touched them
        raw = self.features.score(plain, readings).parts["raw"]
        logit = self.logits.score(plain, readings).parts["raw"]
        yes = torch.tensor(self.calibration.to_unit(raw.numpy())).masked_fill(raw.isnan(), torch.nan)
        return yes.float(), torch.tensor(self.probe.calibrated(logit.numpy())).float()

    def __call__(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> Verdict:
        yes, agrees = self.said(batch, readings)
        flagged = yes - agrees > self.threshold  # False for NaN
        return Verdict(
            trust=torch.where(flagged, self.trust, 1.0),
            dropped=flagged & (self.action == "drop"),
            flags=[
                [f"dual verifier: features say {q:.2f}, the probe {p:.2f}"] if flag else []
                for flag, q, p in zip(flagged.tolist(), yes.tolist(), agrees.tolist(), strict=True)
            ],
        )


class DualVerifier(Reward):
    """A feature reward, lowered for rollouts on which an independent probe disagrees; see :class:`Disagreement`.

    Guards act on raw values and can only lower: r -> w max(r, 0) + min(r, 0). In a composite the verdict holds for all
    of its feature rewards, since it is about the rollout.

    Args:
        feature_reward: What is rewarded.
        independent_probe: Trained on other data, at another layer or with another pooling; never rewarded.
        disagreement_threshold: Flag where the features' share exceeds the probe's probability by more.
        downweight: What is left of a flagged rollout's positive feature reward, 0..1; ``"drop"`` leaves the rollout out
            of training.
        probe_reads: ``"reference"``, the frozen model reading the policy's text, so that the two do not share a
            failure; or ``"policy"``.

    Raises:
        ConfigError: Something is not calibrated, or an option makes no sense.
    """

    def __init__(
        self,
        feature_reward: FeatureReward,
        independent_probe: Probe,
        disagreement_threshold: float = 0.3,
        downweight: float | Literal["drop"] = 0.0,
        probe_reads: Reads = "reference",
    ):
        super().__init__(f"dual_{feature_reward.__name__}")
        self.feature_reward = feature_reward
        drops = downweight == "drop"
        self.disagreement = Disagreement(
            feature_reward,
            independent_probe,
            disagreement_threshold,
            probe_reads,
            "drop" if drops else "downweight",
            0.0 if isinstance(downweight, str) else downweight,
        )

    @property
    def aggregation(self) -> str:
        return self.feature_reward.aggregation

    @property
    def requests(self) -> list[Request]:
        return self.disagreement.requests

    def guard(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> RolloutBatch:
        return apply_guards([self.disagreement], batch, readings)

    def score(self, batch: RolloutBatch, readings: Mapping[Request, Readings], sense: float = 1.0) -> Scores:
        """Return the feature reward's scores, with what both say and how often they disagree."""
        scores = self.feature_reward.score(batch, readings, sense)
        yes, agrees = self.disagreement.said(batch, readings)
        apart = (yes - agrees)[~(yes - agrees).isnan()]
        rate = float((apart > self.disagreement.threshold).float().mean()) if len(apart) else 0.0
        return replace(
            scores,
            parts={**scores.parts, "features_say": yes, "probe_says": agrees},
            metrics={**scores.metrics, "disagreement": rate},
        )
