"""Guards against gaming, and what watches for it."""

import importlib
from typing import TYPE_CHECKING, Any

from mechreward.hacking.detectors import Guard, RepetitionDetector, Verdict

if TYPE_CHECKING:
    from mechreward.hacking.dual_verifier import Disagreement, DualVerifier

__all__ = ["Disagreement", "DualVerifier", "Guard", "RepetitionDetector", "Verdict"]


def __getattr__(name: str) -> Any:
    if name in ("Disagreement", "DualVerifier"):  # rewards import guards, and these import rewards
        return getattr(importlib.import_module("mechreward.hacking.dual_verifier"), name)
    raise AttributeError(f"module 'mechreward.hacking' has no attribute '{name}'")
