"""FeatureReward: a weighted sum of readings on a completion's tokens, aggregated to one number."""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from mechreward.aggregation import aggregation as find_aggregation
from mechreward.aggregation import attention_over
from mechreward.errors import CandidateWarning, ConfigError, PackError, RewardError, nearest
from mechreward.features.pack import Calibration, FeaturePack
from mechreward.readout import LogitReadout, Readings, Readout, Reads, Request
from mechreward.reward.base import Reward
from mechreward.reward.normalization import zscore_in_batch, zscore_in_group
from mechreward.reward.schedule import Schedule
from mechreward.rollout.batch import Dense, RolloutBatch, Scores
from mechreward.sae.handle import SAEHandle

logger = logging.getLogger(__name__)

Normalize = Literal["none", "group", "batch", "quantile"]
NORMALIZE: tuple[Normalize, ...] = ("none", "group", "batch", "quantile")

Scale = Literal["probability", "logit"]
SCALES: tuple[Scale, ...] = ("probability", "logit")


class FeatureReward(Reward):
    """Rewards the activations of chosen features, a probe, or a raw direction.

    r_t = sum_k w_k f_k(h_t) on every completion token that is read, then aggregated over tokens. Guards act on the
    aggregated raw value r, before normalisation: r <- trust max(r, 0) + min(r, 0). No gradient flows through it.

    Of a probe, the tokens' logits are pooled as it was trained, s, then brought to ``scale``, then weighted:
    r = w sigmoid(a s + b), or r = w s. All of that comes before guards, which thus leave ``trust`` of a probability.

    Args:
        readout: What to read: ``sae.features([3, 17])``, ``mr.load_probe(...)``, ``mr.direction(...)``.
        weights: One per column of the readout; 1 each by default.
        aggregation: ``mean``, ``max``, ``last``, ``sum``, ``mean_last_{n}_tokens``, ``top_{n}_mean``, or ``per_token``
            (dense advantages; needs MechRewardGRPOTrainer). By default what a probe was trained with, else ``mean``.
            A probe with attention pooling has ``attention``, no other, and no weights.
        scale: Of a probe's reward. ``"probability"``: of the behaviour, by the card's calibration (Platt 1999), in
            0..1; the default where the card has one. ``"logit"``: s itself; the default where it has none, or where
            it does not hold, since ``aggregation`` or ``read_last`` differ from the probe's training. ``per_token``
            rewards each token's logit, always.
        reads: ``"policy"``, the model being trained, or ``"reference"``, the frozen model that it started from,
            reading the policy's text. The second cannot be fooled by changed activations, only by text.
        normalize: ``"none"``; z-score within ``"group"`` or ``"batch"``; ``"quantile"`` of the pack's calibration.
        schedule: Factor over training progress, e.g. ``mr.schedule.linear(1, 0)``.
        calibration: Quantiles of the raw reward, for ``normalize="quantile"``; a probe's need ``scale``.
        read_last: Also read the final sampled token (costs a forward pass).
        name: What it is called in logs.

    Attributes:
        pack: The pack that it pays for, where it was made from one.
        scale: As chosen; None for what is not a probe.

    Raises:
        RewardError: Weights that are not finite or do not match the readout.
        ConfigError: An unknown option.
    """

    def __init__(
        self,
        readout: Readout,
        weights: Sequence[float] | None = None,
        aggregation: str | None = None,
        reads: Reads = "policy",
        normalize: Normalize = "none",
        schedule: Schedule | None = None,
        calibration: Calibration | None = None,
        read_last: bool = False,
        name: str | None = None,
        scale: Scale | None = None,
    ):
        super().__init__(name or readout.name)
        self.readout = readout
        self.weights = torch.ones(readout.width) if weights is None else torch.tensor(weights, dtype=torch.float32)
        if self.weights.shape != (readout.width,):
            raise RewardError(f"'{self.__name__}' has {len(self.weights)} weights for {readout.width} readout columns.")
        if not self.weights.isfinite().all():
            raise RewardError(f"A weight of '{self.__name__}' is NaN or infinite: give finite numbers.")
        aggregation = readout.aggregation if aggregation is None else aggregation
        self._attention = readout.aggregation == "attention"
        if self._attention and (aggregation != "attention" or weights is not None):
            raise ConfigError(f"'{self.__name__}' pools by attention: leave aggregation and weights out.")
        if aggregation == "attention" and not self._attention:
            raise ConfigError(f"aggregation='attention' needs a probe trained with it, which '{self.__name__}' is not.")
        if reads not in ("policy", "reference"):
            raise ConfigError(f"reads='{reads}' is not possible: use 'policy' or 'reference'.")
        if normalize not in NORMALIZE:
            raise ConfigError(f"There is no normalisation '{normalize}'.{nearest(normalize, NORMALIZE)}")
        if normalize != "none" and aggregation == "per_token":
            raise ConfigError("aggregation='per_token' scales tokens within their group already: leave normalize out.")
        if normalize == "quantile" and calibration is None:
            raise ConfigError(f"'{self.__name__}' has no calibration: normalize='quantile' needs a calibrated pack.")
        if normalize == "quantile" and calibration is not None and calibration.aggregation != aggregation:
            raise ConfigError(
                f"'{self.__name__}' is calibrated for aggregation '{calibration.aggregation}', not '{aggregation}': "
                "normalize='quantile' needs the same."
            )
        self.aggregation = aggregation
        self.scale = _chosen_scale(readout, scale, aggregation, read_last, self.__name__)
        if self.scale is not None and scale is None and calibration is not None:
            raise ConfigError(
                f"'{self.__name__}' is a probe: say with scale='probability' or 'logit' what its quantiles are of."
            )
        self._pool = find_aggregation({"attention": "sum", "per_token": "mean"}.get(aggregation, aggregation))
        self.normalize: Normalize = normalize
        self.schedule = schedule
        self.calibration = calibration
        self.request = Request(readout, reads, read_last)
        self.pack: FeaturePack | None = None

    @classmethod
    def from_pack(
        cls,
        pack: str | FeaturePack,
        sae: SAEHandle | None = None,
        aggregation: str | None = None,
        reads: Reads = "policy",
        normalize: Normalize = "none",
        schedule: Schedule | None = None,
        strict: bool = False,
    ) -> FeatureReward:
        """The reward that a pack describes.

        Args:
            pack: A catalog name (``"pocket/reasoning_pack"``), a path, or a pack.
            sae: Its sparse autoencoder, loaded already; by default a frozen pack's own encoder columns, else the
                sparse autoencoder that the pack names.
            aggregation: By default the one that the pack's evidence was measured with.
            reads, normalize, schedule: See :class:`FeatureReward`.
            strict: Refuse a pack that has not been validated instead of warning.

        Raises:
            PackError: No such pack, a recipe without features, another SAE, or an unvalidated pack with ``strict``.
        """
        from mechreward.features.catalog import load_pack
        from mechreward.features.frozen import check_sae, frozen_readout
        from mechreward.sae.registry import load_sae

        name = pack if isinstance(pack, str) else pack.name
        pack = load_pack(pack) if isinstance(pack, str) else pack
        if not pack.features:
            raise PackError(
                f"{pack.name} is a recipe without features: {pack.status_reason} Find some with 'mechreward discover "
                f"--recipe {name} --data YOUR_ROLLOUTS.jsonl'."
            )
        if pack.status == "candidate":
            said = (
                f"{pack.name} is a candidate, not a validated pack: {pack.status_reason} Test it with 'mechreward gate "
                f"{name} --model {pack.model} --data YOUR_ROLLOUTS.jsonl'."
            )
            if strict:
                raise PackError(said)
            warnings.warn(said, CandidateWarning, stacklevel=2)
        if sae is None and pack.frozen is not None:
            readout = frozen_readout(pack)
            if (near := pack.frozen.approximation) is not None:
                warnings.warn(
                    f"{pack.name} is frozen with a threshold in the place of {near.of}: {near.changed:.1%} of its "
                    f"readings differ from the encoder's in being zero or not (on {near.tokens} tokens).",
                    CandidateWarning,
                    stacklevel=2,
                )
        else:
            sae = load_sae(pack.sae.release, pack.sae.sae_id) if sae is None else sae
            check_sae(pack, sae)
            readout = sae.features([f.id for f in pack.features], name=pack.name.split("/")[-1])
        chosen = aggregation or pack.aggregation
        if pack.evidence is not None and chosen != pack.evidence.aggregation:
            measured = pack.evidence.aggregation
            logger.warning("The evidence of %s was measured with %s, not %s.", pack.name, measured, chosen)
        reward = cls(
            readout=readout,
            weights=[f.weight for f in pack.features],
            aggregation=chosen,
            reads=reads,
            normalize=normalize,
            schedule=schedule,
            calibration=pack.calibration,
        )
        reward.pack = pack
        return reward

    @property
    def requests(self) -> list[Request]:
        return [self.request]

    def raw(self, readings: Readings) -> Tensor:
        """r_t before aggregation, ``[B, T]`` float32: of a probe w times each token's logit, whatever ``scale`` is.

        For attention pooling a_t v_t, whose sum is the logit.
        """
        return self._factor * self._unpooled(readings)

    def aggregated(self, readings: Mapping[Request, Readings]) -> Tensor:
        """The raw reward of each rollout, ``[B]`` float32 on the CPU: for ``per_token`` the mean of r_t."""
        read = readings[self.request]
        return self._pooled(self._unpooled(read), read.mask)

    @property
    def _factor(self) -> float:
        """What is multiplied after pooling: a probe's weight, so that a maximum stays one with a negative weight."""
        return 1.0 if self.scale is None else float(self.weights[0])

    def _unpooled(self, readings: Readings) -> Tensor:
        """What is pooled, ``[B, T]`` float32: a probe's logits, or the weighted sum of any other readout's columns."""
        if self._attention:
            score, value = readings.values.unbind(-1)
            return attention_over(score, readings.mask) * value
        if self.scale is not None:
            return readings.values[..., 0]
        return readings.values @ self.weights.to(readings.values.device)

    def _pooled(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The raw reward, ``[B]`` float32 on the CPU, of what :meth:`_unpooled` gives."""
        pooled = self._pool(tokens, mask).cpu()
        if self.scale == "probability" and isinstance(self.readout, LogitReadout) and self.readout.probability:
            pooled = torch.from_numpy(self.readout.probability(pooled.numpy())).float()
        return self._factor * pooled

    def score(self, batch: RolloutBatch, readings: Mapping[Request, Readings], sense: float = 1.0) -> Scores:
        """Aggregate, let guards lower, normalise, schedule.

        Raises:
            RewardError: What was read, or what the schedule gives, is not finite.
        """
        read = readings[self.request]
        tokens = self._unpooled(read)
        if not tokens[read.mask].isfinite().all():
            raise RewardError(
                f"'{self.__name__}' read NaN or infinite activations at {self.readout.hook_point}: the model has "
                "diverged; go back to an earlier checkpoint and lower the learning rate."
            )
        factor = 1.0 if self.schedule is None else self.schedule(batch.progress)
        if not math.isfinite(factor):
            raise RewardError(f"The schedule of '{self.__name__}' gave {factor} at progress {batch.progress:.3f}.")
        sense *= math.copysign(1.0, factor)
        raw = self._pooled(tokens, read.mask)
        if self.aggregation == "per_token":
            nothing = find_aggregation("per_token")(tokens, read.mask).cpu()
            trust = None if batch.trust is None else batch.trust.to(tokens.device)[:, None]
            dense = lowered(self._factor * tokens, trust, sense)
            return Scores(nothing, [Dense(factor, dense, read.mask)], {"raw": raw})
        values = self._normalized(lowered(raw, batch.trust, sense), batch)
        return Scores(values * factor, (), {"raw": raw})

    def per_token(self, batch: RolloutBatch, readings: Mapping[Request, Readings], sense: float = 1.0) -> Tensor:
        """r_t / n on the n tokens that are read, as much of it as the guards leave of their mean.

        What is summed over tokens (``sum``, attention pooling) is not divided. What is normalised, scheduled or a
        probability is a number of the whole rollout, and goes to its last token.
        """
        if self.normalize != "none" or self.schedule is not None or self.scale == "probability":
            return super().per_token(batch, readings, sense)
        read = readings[self.request]
        shares = self.raw(read)
        if self.aggregation not in ("sum", "attention"):
            shares = shares / read.mask.sum(dim=1, keepdim=True)
        shares = shares.masked_fill(~read.mask, 0.0).cpu()
        kept = _kept(shares.sum(dim=1), batch.trust, sense)
        return (shares * kept[:, None]).masked_fill(~read.mask.cpu(), torch.nan)

    def _normalized(self, values: Tensor, batch: RolloutBatch) -> Tensor:
        if self.normalize == "group":
            return zscore_in_group(values, batch)
        if self.normalize == "batch":
            return zscore_in_batch(values, batch)
        if self.normalize == "quantile" and self.calibration is not None:
            unit = torch.tensor(self.calibration.to_unit(values.nan_to_num().numpy()), dtype=torch.float32)
            return unit.masked_fill(values.isnan(), torch.nan)
        return values


def _chosen_scale(readout: Readout, scale: Scale | None, aggregation: str, read_last: bool, name: str) -> Scale | None:
    """The scale of a probe's reward; None for what is not a probe.

    Raises:
        ConfigError: There is no such scale, or not here.
    """
    if not isinstance(readout, LogitReadout):
        if scale is not None:
            raise ConfigError(f"'{name}' is not a probe, and has no logit to bring to a scale: leave scale out.")
        return None
    if scale is not None and scale not in SCALES:
        raise ConfigError(f"There is no scale '{scale}': use 'probability' or 'logit'.{nearest(scale, SCALES)}")
    if aggregation == "per_token":
        lacks = "aggregation='per_token' rewards each token's logit"
    elif readout.probability is None:
        lacks = "it has no calibration, which 'mechreward probe train' makes"
    elif aggregation != readout.aggregation:
        lacks = f"its calibration is for aggregation '{readout.aggregation}', not '{aggregation}'"
    elif read_last:
        lacks = "its calibration is for rollouts without their final token, not for read_last=True"
    else:
        return scale or "probability"
    if scale == "probability":
        raise ConfigError(f"'{name}' cannot give a probability: {lacks}. Use scale='logit'.")
    if scale is None and aggregation != "per_token":
        _say_once(f"The reward of the probe '{name}' is its pooled logit: {lacks}. scale='logit' says so.")
    return "logit"


@functools.cache
def _say_once(said: str) -> None:
    logger.warning(said)


def lowered(values: Tensor, trust: Tensor | None, sense: float = 1.0) -> Tensor:
    """What the guards leave of a raw feature reward: trust max(r, 0) + min(r, 0).

    Where the reward is subtracted (``sense`` < 0, e.g. a hedging pack weighted -0.5), what a guard may take is the
    other side: max(r, 0) + trust min(r, 0). Otherwise to be flagged would be the way out of a penalty.

    Args:
        values: r, ``[B]`` or ``[B, T]`` float32.
        trust: ``[B]`` or ``[B, 1]`` in 0..1, or None where nothing guards.
        sense: The sign with which the reward is used.
    """
    if trust is None:
        return values
    return values * _kept(values, trust, sense)


def _kept(values: Tensor, trust: Tensor | None, sense: float) -> Tensor:
    """The share that the guards leave of each value."""
    return torch.ones_like(values) if trust is None else torch.where(values * sense > 0, trust, 1.0)
