r"""Rational numbers, read exactly from text or LaTeX: ``\frac{1}{3}``, ``2^{-40}``, ``1 1/2``, ``2.5\times10^{-6}``.

What is read is read as math-verify and its reader would, without their floating point. All else (roots, letters, lists,
percent, units, what is ambiguous, and numbers of more than 20,000 bits) is left to them. Standard library only: the
worker loads this file by its path.
"""

import functools
import re
from fractions import Fraction
from typing import NamedTuple

MOST_BITS = 20_000
MOST_DEPTH = 25
SIGNIFICANT = 6  # digits from which on a decimal may stand for what rounds to it

_SPACE = re.compile(r"(?:\s|\\[,;:! ]|~|\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z]))*")
_LITERAL = r"[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
_NUMBER = re.compile(_LITERAL)
_DECIMAL = re.compile(r"(?<![\w.])[0-9]*\.[0-9]+")
_ALLOWED = re.compile(
    r"(?:[0-9.,+\-*/^(){}\s~]|\\[,;:! ]|\\(?:[dtc]?frac|times|cdot|div|left|right|[bB]igg?[lr]?)(?![A-Za-z]))+"
)
_MIXED = re.compile(
    r"(?:\s|\\[,;:! ]|~)*\\[dtc]?frac\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))"
    r"|(?:\s|\\[,;: ]|~)+([0-9]+)\s*/\s*([0-9]+)"
)


class Exact(NamedTuple):
    """A rational number, and the last place's value where it is written as one decimal (1/100 for 0.25)."""

    value: Fraction
    unit: Fraction | None = None


class _Unreadable(Exception):
    pass


@functools.lru_cache(4096)
def read(text: str) -> Exact | None:
    """The number that a whole text stands for; None where this reader cannot say."""
    if not _ALLOWED.fullmatch(text) or ("(" in text and "," in text.replace("{,}", "")):
        return None
    reader = _Reader(text)
    try:
        number = reader.sum()
        reader.space()
    except _Unreadable:
        return None
    return number if reader.at == len(text) else None


def equal(a: Exact, b: Exact) -> bool:
    """Whether two numbers are the same, or one is a decimal of at least six digits to which the other rounds.

    Of two decimals the one with fewer places is the rounded one. Two fractions are only equal when they are the same.
    """
    if a.value == b.value or a.unit == b.unit:
        return a.value == b.value
    if b.unit is None or (a.unit is not None and a.unit > b.unit):
        return rounds_to(b.value, a)
    return rounds_to(a.value, b)


def decimal(digits: str) -> Exact:
    """Plain digits, which may have a sign and a point."""
    if "." not in digits:
        return Exact(Fraction(digits))
    return Exact(Fraction(digits), Fraction(1, 10 ** (len(digits) - digits.index(".") - 1)))


def rounds_to(value: Fraction, decimal: Exact) -> bool:
    """Whether a number, rounded at a decimal's last place, is that decimal; never if it has fewer than six digits."""
    if decimal.unit is None or abs(decimal.value / decimal.unit) < 10 ** (SIGNIFICANT - 1):
        return False
    return abs(value - decimal.value) <= decimal.unit / 2


def decimals(text: str) -> dict[Fraction, Fraction]:
    """The decimals in a text, without their signs, each with the value of its last place: 0.250 has 1/1000."""
    found: dict[Fraction, Fraction] = {}
    for one in _DECIMAL.findall(text):
        value, unit = Fraction(one), Fraction(1, 10 ** (len(one) - one.index(".") - 1))
        found[value] = max(unit, found.get(value, unit))
    return found


class _Reader:
    """Recursive descent: sum > product > sign > power > atom. Every method reads from ``at`` on, and moves it."""

    def __init__(self, text: str):
        self.text, self.at, self.depth = text, 0, 0

    def space(self) -> None:
        found = _SPACE.match(self.text, self.at)
        self.at = found.end() if found else self.at

    def sign(self, *signs: str) -> str:
        """The first of the signs that comes next, read; or nothing."""
        self.space()
        for one in signs:
            if self.text.startswith(one, self.at):
                self.at += len(one)
                return one
        return ""

    def sum(self) -> Exact:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise _Unreadable
        total = self.product()
        while sign := self.sign("+", "-"):
            term = self.product().value
            total = _small(total.value + term if sign == "+" else total.value - term)
        self.depth -= 1
        return total

    def product(self) -> Exact:
        left, divided = self.signed(), False
        while True:
            sign = self.sign("\\times", "\\cdot", "\\div", "/", "**", "*")
            if sign == "**":
                raise _Unreadable
            if not sign:
                if not self.text.startswith("(", self.at):
                    return left
                if divided:  # 1/2(3)
                    raise _Unreadable
            self.space()
            of_ten = self.text.startswith(("10^", "10**"), self.at)
            right = self.signed()
            if sign in ("/", "\\div"):
                if right.value == 0:
                    raise _Unreadable
                left, divided = _small(left.value / right.value), True
            else:
                unit = left.unit * right.value if left.unit is not None and of_ten and sign else None
                left = Exact(_small(left.value * right.value).value, unit)

    def signed(self) -> Exact:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise _Unreadable
        sign = self.sign("+", "-")
        number = self.signed() if sign else self.power()
        self.depth -= 1
        return Exact(-number.value, number.unit) if sign == "-" else number

    def power(self) -> Exact:
        base, mixed = self.atom()
        if not self.sign("^", "**"):
            return base
        if mixed:
            raise _Unreadable
        self.space()
        if self.text.startswith(("{", "("), self.at):
            exponent = self.atom()[0].value
        else:
            negative, found = self.sign("-"), re.compile(r"[0-9]+(?![0-9.,])").match(self.text, self.at)
            if not found:
                raise _Unreadable
            self.at = found.end()
            exponent = Fraction(-int(found[0]) if negative else int(found[0]))
        size = max(base.value.numerator.bit_length(), base.value.denominator.bit_length())
        if exponent.denominator != 1 or abs(exponent) * size > MOST_BITS or (base.value == 0 and exponent <= 0):
            raise _Unreadable
        if self.sign("^", "**"):
            raise _Unreadable
        return Exact(base.value**exponent.numerator)

    def atom(self) -> tuple[Exact, bool]:
        """A number, fraction or bracket, and whether it is a mixed number."""
        if self.sign("("):
            return self.closed(")"), False
        if self.sign("{"):
            return self.closed("}"), False
        if self.sign("\\frac", "\\dfrac", "\\tfrac", "\\cfrac"):
            above, below = self.argument(), self.argument()
            if below == 0:
                raise _Unreadable
            return _small(above / below), False
        found = _NUMBER.match(self.text, self.at)
        if not found:
            raise _Unreadable
        self.at = found.end()
        if self.text[self.at : self.at + 1].isdigit():  # 1,2345
            raise _Unreadable
        digits = found[0].replace("{,}", "").replace(",", "")
        number = decimal(digits)
        if number.unit is not None:
            return number, False
        if mixed := _MIXED.match(self.text, self.at):
            above, below = (int(part) for part in mixed.groups() if part)
            if above >= below:  # 2\frac{3}{2} may be a product
                raise _Unreadable
            self.at = mixed.end()
            return Exact(number.value + Fraction(above, below)), True
        return number, False

    def closed(self, sign: str) -> Exact:
        number = self.sum()
        if not self.sign(sign):
            raise _Unreadable
        return number

    def argument(self) -> Fraction:
        if self.sign("{"):
            return self.closed("}").value
        if not self.text[self.at : self.at + 1].isdigit():
            raise _Unreadable
        self.at += 1
        return Fraction(int(self.text[self.at - 1]))


def _small(value: Fraction) -> Exact:
    if value.numerator.bit_length() > MOST_BITS or value.denominator.bit_length() > MOST_BITS:
        raise _Unreadable
    return Exact(value)
