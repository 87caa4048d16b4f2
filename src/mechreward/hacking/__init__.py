"""Guards against gaming, and what watches for it."""

import importlib
from typing import TYPE_CHECKING, Any

from mechreward.reward.guards import Guard, RepetitionDetector, Verdict

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

# Rewards import guards, and these import rewards.
_LATER = {
    "AdversarialSuite": "adversarial",
    "Collapse": "monitor",
    "Disagreement": "dual_verifier",
    "DualVerifier": "dual_verifier",
    "EntropyFloor": "monitor",
    "Flagged": "monitor",
    "HeldOut": "monitor",
    "Monitor": "monitor",
    "Observation": "monitor",
    "OneSidedPenalty": "penalty",
    "ProxyGoldGap": "monitor",
    "Report": "monitor",
    "RepresentationShift": "monitor",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"mechreward.hacking.{_LATER[name]}"), name)
    raise AttributeError(f"module 'mechreward.hacking' has no attribute '{name}'")
