"""mechreward: mechanistic-interpretability rewards for GRPO.

The names below are imported when they are first used, so that `import mechreward` needs neither torch nor time.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechreward import hacking, pocket, verifiers
    from mechreward.features.catalog import load_pack
    from mechreward.integrations.trl_grpo import MechRewardGRPOConfig, MechRewardGRPOTrainer
    from mechreward.probes.linear_probe import load_probe
    from mechreward.readout import HookPoint, direction
    from mechreward.reward import schedule
    from mechreward.reward.composition import CompositeReward, Hero
    from mechreward.reward.feature_reward import FeatureReward
    from mechreward.reward.outcome import OutcomeReward
    from mechreward.rollout.source import HFSource
    from mechreward.sae.registry import load_sae

__version__ = "0.1.0.dev0"

_MODULES = {"hacking": "hacking", "pocket": "pocket", "schedule": "reward.schedule", "verifiers": "verifiers"}
_NAMES = {
    "CompositeReward": "reward.composition",
    "FeatureReward": "reward.feature_reward",
    "HFSource": "rollout.hf",
    "Hero": "reward.composition",
    "HookPoint": "readout",
    "MechRewardGRPOConfig": "integrations.trl_grpo",
    "MechRewardGRPOTrainer": "integrations.trl_grpo",
    "OutcomeReward": "reward.outcome",
    "direction": "readout",
    "load_pack": "features.catalog",
    "load_probe": "probes.linear_probe",
    "load_sae": "sae.registry",
}

__all__ = [
    "CompositeReward",
    "FeatureReward",
    "HFSource",
    "Hero",
    "HookPoint",
    "MechRewardGRPOConfig",
    "MechRewardGRPOTrainer",
    "OutcomeReward",
    "direction",
    "hacking",
    "load_pack",
    "load_probe",
    "load_sae",
    "pocket",
    "schedule",
    "verifiers",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"mechreward.{_MODULES[name]}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"mechreward.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'mechreward' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
