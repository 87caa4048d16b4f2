"""Attacks on a reward, and the report on what they gain, what they cost, and who notices."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechreward.hacking.redteam.campaign import (
        Ground,
        by_best_of_n,
        by_policy,
        by_suffix,
        by_templates,
        cue_tokens,
        prepare,
    )
    from mechreward.hacking.redteam.policy import Aware, Training, attack_policy
    from mechreward.hacking.redteam.report import Attack, Clean, RedTeam
    from mechreward.hacking.redteam.search import best_of_n, search_suffix
    from mechreward.hacking.redteam.target import Judged, Target
    from mechreward.hacking.redteam.templates import attacks

_PLACES = {
    "attacks": "templates",
    **dict.fromkeys(["Judged", "Target"], "target"),
    **dict.fromkeys(["best_of_n", "search_suffix"], "search"),
    **dict.fromkeys(["Aware", "Training", "attack_policy"], "policy"),
    **dict.fromkeys(["Attack", "Clean", "RedTeam"], "report"),
    **dict.fromkeys(
        ["Ground", "by_best_of_n", "by_policy", "by_suffix", "by_templates", "cue_tokens", "prepare"], "campaign"
    ),
}

__all__ = [
    "Attack",
    "Aware",
    "Clean",
    "Ground",
    "Judged",
    "RedTeam",
    "Target",
    "Training",
    "attack_policy",
    "attacks",
    "best_of_n",
    "by_best_of_n",
    "by_policy",
    "by_suffix",
    "by_templates",
    "cue_tokens",
    "prepare",
    "search_suffix",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:  # policies need TRL, and rewards import guards
        return getattr(importlib.import_module(f"mechreward.hacking.redteam.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'mechreward.hacking.redteam' has no attribute '{name}'")
