"""Attacks on a reward, and the report on what they gain, what they cost, and which detectors notice."""
