"""Guards against gaming, and what watches for it."""

from mechreward.hacking.detectors import Guard, RepetitionDetector, Verdict

__all__ = ["Guard", "RepetitionDetector", "Verdict"]
