"""What each arm rewards: the pack's features, the outcome, and controls that replace the features."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechreward import verifiers
from mechreward.aggregation import aggregation
from mechreward.errors import ConfigError
from mechreward.features.catalog import load_pack
from mechreward.features.discover import select
from mechreward.features.frozen import check_sae, frozen_readout
from mechreward.features.pack import FeaturePack, PackFeature
from mechreward.hacking.monitor import Monitor
from mechreward.readout import Readings, Readout, Request, direction, residual
from mechreward.reward.base import Reward
from mechreward.reward.composition import CompositeReward
from mechreward.reward.feature_reward import FeatureReward
from mechreward.reward.guards import Guard
from mechreward.reward.outcome import OutcomeReward
from mechreward.rollout.batch import RolloutBatch, Scores
from mechreward.rollout.labelled import Labelled, Verifier, sample_rollouts
from mechreward.rollout.sampling import as_training, load_model
from mechreward.rollout.source import over_tokens, read_in_pieces
from mechreward.sae.handle import SAEHandle
from mechreward.sae.registry import load_sae
from mechreward.train.config import Arm, ExperimentConfig, Features
from mechreward.train.data import load
from mechreward.unfinished import digest

NEIGHBOURS = 20
"""A random control is drawn from this many latents whose firing rates are nearest to the feature's."""

ROLLOUTS = "rollouts.jsonl"
"""The file in a run's folder with the training rollouts, in experiments that keep them."""


@dataclass(frozen=True)
class RunSetup:
    """What a run is trained with.

    Attributes:
        reward: The reward.
        guards: Guards that may lower it; None for the trainer's default.
        monitors: Monitors, logged beside it.
        beta: KL coefficient, instead of the configuration's.
    """

    reward: Reward
    guards: Sequence[Guard] | None = None
    monitors: Sequence[Reward | Monitor] = ()
    beta: float | None = None


def setup(config: ExperimentConfig, arm: str, seed: int, folder: Path) -> RunSetup:
    """Set a run up with its arm's reward alone."""
    return RunSetup(build(config, config.arms[arm], seed))


@dataclass(frozen=True)
class Contrast:
    """Readings on the untrained model's rollouts on the discovery questions.

    Attributes:
        latents: Every SAE latent, aggregated over each rollout, ``[n, d_sae]`` float32.
        residual: The residual vector at the SAE's hook point, aggregated likewise, ``[n, d_model]`` float32.
        firing: Share of the tokens on which each latent fires, ``[d_sae]`` float32.
        right: Whether the rollout's answer is right, ``[n]`` bool.
    """

    latents: NDArray[np.float32]
    residual: NDArray[np.float32]
    firing: NDArray[np.float32]
    right: NDArray[np.bool_]


def build(config: ExperimentConfig, arm: Arm, seed: int) -> CompositeReward:
    """Build an arm's reward.

    Raises:
        MechRewardError: A pack, an SAE or the data is unavailable.
    """
    parts: list[Reward] = []
    weights = []
    if arm.outcome:
        parts.append(outcome_reward(config))
        weights.append(arm.outcome)
    if arm.features is not None:
        parts.append(feature_reward(config, arm.features, seed))
        weights.append(arm.features.weight)
    return CompositeReward(parts, weights, mode=arm.mode)


def outcome_reward(config: ExperimentConfig) -> OutcomeReward:
    """Build the reward for right answers."""
    return OutcomeReward(verifier(config), gold_column="answer")


def verifier(config: ExperimentConfig) -> Verifier:
    """Return the experiment's verifier."""
    return getattr(verifiers, config.verifier)


def watched(config: ExperimentConfig) -> list[FeatureReward]:
    """Build the monitors of the ``watch`` packs, which every arm logs, so that arms can be compared."""
    return [feature_reward(config, Features(pack=pack), 0, name=pack.split("/")[-1]) for pack in config.watch]


def packs_of(config: ExperimentConfig) -> list[str]:
    """Return the name of every pack in the experiment."""
    rewarded = [arm.features.pack for arm in config.arms.values() if arm.features is not None]
    return list(dict.fromkeys([*rewarded, *config.watch]))


def feature_reward(config: ExperimentConfig, features: Features, seed: int, name: str = "features") -> FeatureReward:
    """Build the part of an arm's reward that reads activations: a pack's features, or a control."""
    pack = load_pack(features.pack)
    if pack.frozen is not None and features.control in ("none", "shuffled"):
        readout, weights = replace(frozen_readout(pack), name=name), [f.weight for f in pack.features]
    else:
        sae = load_sae(pack.sae.release, pack.sae.sae_id)
        check_sae(pack, sae)
        if not pack.features:
            pack = carried_out(pack, cached_contrast(config, pack, sae))
        ids, weights = [f.id for f in pack.features], [f.weight for f in pack.features]
        if features.control == "direction":
            found = cached_contrast(config, pack, sae)
            readout, weights = contrastive_direction(ids, weights, found, sae, name), [1.0]
        else:
            if features.control == "random":
                ids, weights = random_like(ids, weights, cached_contrast(config, pack, sae), seed)
            readout = sae.features(ids, name=name)
    options: dict[str, Any] = {
        "aggregation": features.aggregation or pack.aggregation,
        "reads": features.reads,
        "name": name,
    }
    if features.control == "shuffled":
        reward: FeatureReward = ShuffledReward(readout, weights, seed=seed, **options)
    else:
        reward = FeatureReward(readout, weights, **options)
    reward.pack = pack if features.control in ("none", "shuffled") else None
    return reward


def carried_out(recipe: FeaturePack, contrast: Contrast) -> FeaturePack:
    """Fill in a recipe: its features by contrast on the discovery rollouts, without a gate."""
    settings = {} if recipe.recipe is None else recipe.recipe.settings
    kinds = {"n_positive": int, "n_negative": int, "min_firing": float}
    chosen = {name: kind(settings[name]) for name, kind in kinds.items() if name in settings}
    ids, weights = select(contrast.latents, contrast.right, **chosen)
    found = [PackFeature(id=int(i), weight=float(w)) for i, w in zip(ids, weights, strict=True)]
    return recipe.model_copy(update={"features": found})


def random_like(ids: list[int], weights: list[float], contrast: Contrast, seed: int) -> tuple[list[int], list[float]]:
    """Replace features by random latents that fire about as often, and count as much.

    A feature's substitute is drawn from the :data:`NEIGHBOURS` latents nearest in (log) firing rate, excluding the
    pack's own. Its weight keeps the sign, and w' = c w s / s', s the standard deviation over rollouts: |w| s is what
    the feature contributes to the reward's spread. The pack's features vary together and random ones do not, so c
    brings the spread of the whole reward to that of the pack's.
    """
    rng = np.random.default_rng([seed, 1])
    latents = contrast.latents.astype(np.float64)
    spread = latents.std(axis=0)
    rate = np.log(np.maximum(contrast.firing.astype(np.float64), 1e-9))
    free = np.flatnonzero((contrast.firing > 0) & (spread > 0) & ~np.isin(np.arange(len(rate)), ids))
    if len(free) < len(ids):
        raise ConfigError(
            f"Only {len(free)} other latents fire on the discovery rollouts: too few for control: random."
        )
    chosen: list[int] = []
    for feature in ids:
        nearest = free[np.argsort(np.abs(rate[free] - rate[feature]), kind="stable")[:NEIGHBOURS]]
        chosen.append(int(rng.choice(nearest)))
        free = free[free != chosen[-1]]
    rescaled = np.array(weights) * spread[ids] / spread[chosen]
    c = (latents[:, ids] @ np.array(weights)).std() / (latents[:, chosen] @ rescaled).std()
    return chosen, (c * rescaled).tolist()


def contrastive_direction(
    ids: list[int], weights: list[float], contrast: Contrast, sae: SAEHandle, name: str
) -> Readout:
    """Read the raw difference of means, right minus wrong, without an SAE: r = x . v.

    v = (mean_right - mean_wrong) of the residual, scaled so that r varies over rollouts as the pack's reward does.
    """
    x = contrast.residual.astype(np.float64)
    v = x[contrast.right].mean(axis=0) - x[~contrast.right].mean(axis=0)
    packs_own = contrast.latents[:, ids].astype(np.float64) @ np.array(weights)
    v *= packs_own.std() / (x @ v).std()
    # Minus the mean, so that no token earns by merely being there: a reward summed over tokens would count them.
    readout = direction(name, torch.tensor(v), sae.hook_point, bias=-float(x.mean(axis=0) @ v))
    return replace(readout, model_name=sae.model_name)


class ShuffledReward(FeatureReward):
    """A feature reward whose readings are permuted among the rollouts of each group.

    A group keeps its set of rewards, but none says anything about its own rollout. The permutation depends on the seed
    and the rollouts' tokens, so that a resumed run permutes alike.
    """

    def __init__(self, readout: Readout, weights: list[float], seed: int, **options: Any):
        super().__init__(readout, weights, **options)
        self.seed = seed

    def score(self, batch: RolloutBatch, readings: Mapping[Request, Readings], sense: float = 1.0) -> Scores:
        read = readings[self.request]
        order = self._permutation(batch).to(read.values.device)
        permuted = Readings(read.values[order], read.mask[order.to(read.mask.device)])
        return super().score(batch, {self.request: permuted}, sense)

    def _permutation(self, batch: RolloutBatch) -> Tensor:
        tokens = json.dumps([list(map(int, ids)) for ids in batch.completion_ids])
        rng = np.random.default_rng([self.seed, zlib.crc32(tokens.encode())])
        groups = np.arange(len(batch)).reshape(-1, batch.num_generations)
        return torch.tensor(rng.permuted(groups, axis=1).reshape(-1))


# -- the discovery rollouts ------------------------------------------------------------------------------------------


def cached_contrast(config: ExperimentConfig, pack: FeaturePack, sae: SAEHandle) -> Contrast:
    """Return the contrast for a pack's SAE, computed once and kept in the experiment's folder."""
    cache_key = {
        "model": config.model,
        "verifier": config.verifier,
        "data": config.model_dump(mode="json")["data"]["discovery"],
        "discovery": config.discovery.model_dump(mode="json"),
        "length": config.training.max_completion_length,
        "dtype": dtype_of(config),
        "batch_size": config.evaluation.batch_size,  # it changes the stream of random numbers
        "temperature": config.training.temperature,
        "sae": pack.sae.model_dump(mode="json"),
        "aggregation": _aggregation(pack),
    }

    def compute() -> dict[str, Tensor]:
        return {name: torch.from_numpy(values) for name, values in vars(contrast(config, pack, sae)).items()}

    tensors = cached_tensors(Path(config.output), "contrast", cache_key, compute)
    return Contrast(**{name: tensor.numpy() for name, tensor in tensors.items()})


def cached_tensors(
    folder: Path, name: str, cache_key: Any, compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return tensors that are computed once and kept in ``<folder>/<name>-<hash of the key>.safetensors``."""
    file = folder / f"{name}-{digest(cache_key)}.safetensors"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}.part")
        save_file(compute(), unfinished)
        unfinished.replace(file)  # another process may be computing the same
    return load_file(file)


def contrast(config: ExperimentConfig, pack: FeaturePack, sae: SAEHandle) -> Contrast:
    """Sample from the untrained model, verify, and read every latent and the residual stream in one pass."""
    model, tokenizer = untrained(config)
    found = discovery_rollouts(config, model, tokenizer, load(config.data.discovery))
    aggregate, latents, vectors = aggregation(_aggregation(pack)), [], []
    fired, tokens = np.zeros(sae.d_sae), 0
    both = [sae.all_features(), residual(sae.hook_point, sae.d_model)]
    for _, (encoded, stream) in read_in_pieces(model, found.batch, both):
        latents.append(over_tokens(encoded, aggregate))
        vectors.append(over_tokens(stream, aggregate))
        fired += (encoded.values[encoded.mask] > 0).sum(dim=0).cpu().numpy()
        tokens += int(encoded.mask.sum())
    rate = (fired / tokens).astype(np.float32)
    return Contrast(torch.cat(latents).numpy(), torch.cat(vectors).numpy(), rate, found.labels)


def discovery_rollouts(config: ExperimentConfig, model: Any, tokenizer: Any, questions: Any) -> Labelled:
    """Sample the untrained model on the discovery questions, and label its rollouts by the verifier."""
    return sample_rollouts(
        model,
        tokenizer,
        questions,
        verifier(config),
        config.discovery.rollouts,
        "data.discovery",
        config.discovery.seed,
        config.evaluation.batch_size,
        **sampling(config),
    )


def _aggregation(pack: FeaturePack) -> str:
    return "mean" if pack.aggregation == "per_token" else pack.aggregation


def untrained(config: ExperimentConfig) -> tuple[Any, Any]:
    """Load the model that training starts from, and its tokenizer."""
    return load_model(config.model, getattr(torch, dtype_of(config)))


def dtype_of(config: ExperimentConfig) -> str:
    """Return the dtype of the weights: bfloat16 only where they are frozen, since small updates vanish in it."""
    return "bfloat16" if config.training.bf16 and config.training.lora_rank else "float32"


def sampling(config: ExperimentConfig) -> dict[str, Any]:
    """Return options for `generate` to sample as the training does, at its temperature."""
    return as_training(config.training.max_completion_length, config.training.temperature)
