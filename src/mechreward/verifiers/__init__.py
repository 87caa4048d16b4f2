"""Verifiers: is a completion right? Text only; math-verify and sandboxes start when first needed."""

from mechreward.verifiers.code import humaneval, python_exec, unit_tests
from mechreward.verifiers.math import exact_match, gsm8k, math_boxed

__all__ = ["exact_match", "gsm8k", "humaneval", "math_boxed", "python_exec", "unit_tests"]
