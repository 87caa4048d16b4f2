"""What engines other than TRL are served: the reward that packs, probes and a verifier make together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mechreward import verifiers
from mechreward.errors import ConfigError
from mechreward.hacking.adversarial import AdversarialSuite
from mechreward.probes.linear_probe import load_probe
from mechreward.reward.base import Reward
from mechreward.reward.composition import CompositeReward
from mechreward.reward.feature_reward import FeatureReward
from mechreward.reward.guards import Guard
from mechreward.reward.outcome import OutcomeReward


@dataclass(frozen=True)
class Served:
    """What a server is asked to serve; crosses to the worker process, where everything is loaded.

    Attributes:
        model: A folder, an id of the hub, or ``mechreward/pocket``.
        packs: Packs, each a reward.
        probes: Probes, each a reward: its pooled logit.
        weights: One per pack, then one per probe; 1 each by default.
        verifier: Name of the verifier that judges outcomes by the requests' labels; None for no outcome.
        mode: How outcome and features are combined: ``"sum"`` or ``"gated"``, as in ``CompositeReward``.
        guard: Preset of the adversarial suite; None for the repetition detector alone.
        aggregation: In place of what each pack and probe was measured with.
        dtype: Of the model's weights.
        vllm: Engine arguments of vLLM, if it is to read; None for Hugging Face's model.
    """

    model: str
    packs: Sequence[str] = ()
    probes: Sequence[str] = ()
    weights: Sequence[float] | None = None
    verifier: str | None = None
    mode: str = "sum"
    guard: str | None = None
    aggregation: str | None = None
    dtype: str = "float32"
    vllm: Mapping[str, Any] | None = None


def build_reward(served: Served) -> CompositeReward:
    """The reward that is served: packs and probes, with the outcome if there is a verifier, behind the guards."""
    parts: list[Reward] = [FeatureReward.from_pack(name, aggregation=served.aggregation) for name in served.packs]
    parts += [FeatureReward(load_probe(p), aggregation=served.aggregation, scale="logit") for p in served.probes]
    if not parts:
        raise ConfigError("There is nothing to serve: give a pack or a probe.")
    weights = [1.0] * len(parts) if served.weights is None else list(served.weights)
    if len(weights) != len(parts):
        raise ConfigError(f"There are {len(weights)} weights for {len(parts)} packs and probes: give one for each.")
    if served.verifier is not None:
        parts.append(OutcomeReward(getattr(verifiers, served.verifier), gold_column="label"))
        weights.append(1.0)
    elif served.mode != "sum":
        raise ConfigError(f"mode '{served.mode}' needs a verifier of outcomes.")
    guards: list[Guard] | None = None if served.guard is None else [AdversarialSuite.from_preset(served.guard)]
    return CompositeReward(parts, weights, mode=served.mode, guards=guards, name="served")  # pyright: ignore
