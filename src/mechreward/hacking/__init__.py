"""Guards against gaming, and monitors that watch for it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechreward.hacking.adversarial import AdversarialSuite
    from mechreward.hacking.dual_verifier import Disagreement, DualVerifier
    from mechreward.hacking.monitor import (
        Collapse,
        EntropyFloor,
        Flagged,
        HeldOut,
        Monitor,
        Observation,
        ProxyGoldGap,
        Report,
        RepresentationShift,
    )
    from mechreward.hacking.penalty import OneSidedPenalty
    from mechreward.reward.guards import Guard, RepetitionDetector, Verdict

__all__ = [
    "AdversarialSuite",
    "Collapse",
    "Disagreement",
    "DualVerifier",
    "EntropyFloor",
    "Flagged",
    "Guard",
    "HeldOut",
    "Monitor",
    "Observation",
    "OneSidedPenalty",
    "ProxyGoldGap",
    "RepetitionDetector",
    "Report",
    "RepresentationShift",
    "Verdict",
]

# Imported when they are first used, since the options of `mechreward redteam`, which lie below, must not need torch.
_HOMES = {"AdversarialSuite": "hacking.adversarial", "OneSidedPenalty": "hacking.penalty"}
_HOMES |= dict.fromkeys(["Disagreement", "DualVerifier"], "hacking.dual_verifier")
_HOMES |= dict.fromkeys(["Guard", "RepetitionDetector", "Verdict"], "reward.guards")


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(f"mechreward.{_HOMES.get(name, 'hacking.monitor')}"), name)
    raise AttributeError(f"module 'mechreward.hacking' has no attribute '{name}'")
