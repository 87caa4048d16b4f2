"""Verifiers: is the final answer of a completion right? Text only; math-verify starts when first needed."""

from mechreward.verifiers.math import exact_match, gsm8k, math_boxed

__all__ = ["exact_match", "gsm8k", "math_boxed"]
