"""Verifiers for final answers: ``math_boxed``, ``gsm8k`` and ``exact_match``.

Each takes a batch of completions and one gold per completion, and returns one verdict each: ``True`` (right), ``False``
(wrong, unreadable, or too costly to read) or ``None`` (nothing can be said: the gold has no answer, or a number's sign
or word is unknown). What a model writes never raises.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from mechreward.errors import RewardError
from mechreward.verifiers import _exact, _notation, _sympy
from mechreward.verifiers._notation import readable

MAX_ANSWER = 500
MAX_PROSE = 2_000
ITEM_SECONDS = 3.0

# A flood of answers that hang must not cost ITEM_SECONDS each. The first few get all of it; then the limit drops to
# what is still many times a normal answer's cost; then the batch is declared broken, with a warning. At most about
# 100 s of CPU time are lost to one call.
FULL_TIMEOUTS, SHORT_TIMEOUTS, SHORT_SECONDS = 10, 200, 0.3

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?P<bare>[-+]?[0-9][0-9.,]*))|\\[{}]|\\\\(?!boxed|fbox)|[{}]")
_MARK = re.compile(r"(?<!#)####(?!#)([^\n]*)")
_DELIMITERS = re.compile(r"\s*(?:(?<!\\)\$+|\\\(|\\\[)?(.*?)(?:(?<!\\)\$+|\\\)|\\\])?\s*", re.DOTALL)
_NUMBER = re.compile(r"(?:\\?\$)?([-+]?)(?:\\?\$)?([0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_GSM8K = re.compile(r"[ \t]*\\?\$?([-+]?)\\?\$?([0-9.,]+)(?P<sum>\s*(?:[*/^]|\\(?:times|cdot|div))\s*[0-9({\\])?")
_NUMERAL = re.compile(r"[ \t]*\\?\$?[-+]?\\?\$?(?:[.,]*[0-9]|\\[dt]?frac)")
_GSM8K_GOLD = re.compile(r"\s*\\?\$?([-+]?)\\?\$?([0-9.,]+)(?P<sum>)\s*(?:\\?%)?\.?\s*")

_RANGE = re.compile(rf"\s*[^\w({{]*[0-9][0-9.,]*%?\s?[-{_notation.RANGE}]\s?[^\w({{]?[0-9]")
_REMARK = re.compile(r"(?<=[0-9%])\s+\(.*", re.DOTALL)

_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_MATH_WORD = re.compile(
    r"(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|exp|sqrt|and|mod|max|min|gcd|lcm|det|lim|inf|deg|[pbvBV]?matrix"
)
_WORD = re.compile(r"[^\W\d_]{3,}|(?<![^\W\d_])(?i:so|is|it|we|he|be|as|to|of|at|by)(?![^\W\d_])")
# A hyphen joins words ("non-zero") or is a minus ("x-y"); every other sign here is mathematics.
_MATH_SIGN = re.compile(r"[\d\\^=+*/<>|$]|(?<![^\W\d_]{2})-|-(?![^\W\d_]{2})")

# Shapes whose evaluation explodes. Cheap to see here; in sympy each would cost a time limit.
_HUGE_EXPONENT = re.compile(r"(?:\^|\*\*)[\s{(]*-?(?:[0-9]{5,}|[0-9]{1,3}(?:,[0-9]{3}){2,})")
_TOWER = re.compile(r"(?:\^|\*\*)[\s{(]*-?([0-9]+)\s*(?:\^|\*\*)[\s{(]*-?([0-9]*)\s*(\^|\*\*)?")
_FACTORIAL = re.compile(r"[0-9]{5,}[\s)}]*!|[0-9]!\s*[)}][\s)}]*!|[0-9]!\s*!\s*!|(?:\^|\*\*)[\s{(]*[0-9]{2,}[\s)}]*!")
_BRACKET = re.compile(r"[({\[]|[)}\]]")
_DEEP = 25

_verdicts: dict[tuple["_Answer", "_Answer"], str] = {}


class _Answer(NamedTuple):
    text: str
    prose: bool  # a sentence in which math-verify has to look for the answer, rather than the answer itself
    unread: bool = False  # it holds a number's sign or word that nothing here knows
    euler: str = ""  # the text where an e may also be Euler's number: 2e-1


def math_boxed(completions: Sequence[str], golds: Sequence[str | None], *, strict: bool = False) -> list[bool | None]:
    r"""Whether each final answer is mathematically equal to its gold.

    The answer is the content of the last complete ``\boxed{}``; without one, the last ``#### N`` line; without either,
    what math-verify finds in the last 2,000 characters. The gold is read in the same way and may be a whole solution or
    only the answer. A gold without digits, LaTeX or operators ("unknown", "red") is compared as text.

    Equal means equal: rational numbers are compared exactly, in lists, sets, intervals and matrices too. Other real and
    complex numbers are not equal where their first twelve digits differ. A decimal of at least six significant digits
    (0.333333) is also equal to what rounds to it (1/3, or 0.33333333). For all else math-verify has the last word.
    Signs and words of numbers (a dash for a minus, thin spaces between thousands, 5e3, "5 million") are read: see
    ``_notation``.

    Args:
        completions: n texts.
        golds: n golds.
        strict: Count only a box; a completion without one is wrong.

    Returns:
        n verdicts. ``None`` where the gold has no answer, or cannot be read and is not the same text, and where the
        answer holds a sign or word of a number that cannot be read ("5 (in millions)", "two hundred fifty"). ``False``
        also for answers over 500 characters and for those that math-verify cannot read within 3 s of CPU time.

    Raises:
        RewardError: The arguments are not two equally long batches of text, or math-verify cannot be started.
    """
    _check(completions, golds)
    batch = _Batch()
    return [batch.verdict(completion, gold or "", strict) for completion, gold in zip(completions, golds, strict=True)]


def gsm8k(completions: Sequence[str], golds: Sequence[str | None]) -> list[bool | None]:
    """Whether the number on the last ``#### N`` equals that of the gold, as GSM8K's own scripts read it.

    Thousands commas, ``$``, a trailing dot and what follows the number (``%``, units, a remark in brackets) are
    dropped; 18.00 equals 18. Its signs and words are read as ``math_boxed`` reads them, and so are ``1/2`` and
    ``2*10^3``.

    Args:
        completions: n texts; one without ``#### N`` is wrong.
        golds: n golds, each with ``#### N`` or only a number.

    Returns:
        n verdicts, ``None`` where the gold has no number, and where a scale word ("in millions") or a range ("3-5")
        cannot be read and the texts differ.

    Raises:
        RewardError: The arguments are not two equally long batches of text.
    """

    def verdict(completion: str, gold: str) -> bool | None:
        expected = _gsm8k_number(gold) if "####" in gold else _gsm8k_value(gold, _GSM8K_GOLD.fullmatch)
        if expected is None:
            return None
        given = _gsm8k_number(completion)
        if isinstance(expected, str) or isinstance(given, str):
            return True if given == expected else None
        return given == expected

    return _each(verdict, completions, golds)


def exact_match(completions: Sequence[str], golds: Sequence[str | None]) -> list[bool | None]:
    r"""Whether the final answers are the same text, whatever the case and the amount of white space.

    The final answer is the content of the last ``\boxed{}``, else the last ``####`` line, else the whole text.

    Args:
        completions: n texts.
        golds: n golds.

    Returns:
        n verdicts, ``None`` where the gold is empty.

    Raises:
        RewardError: The arguments are not two equally long batches of text.
    """

    def verdict(completion: str, gold: str) -> bool | None:
        expected = _normal(_final_text(gold))
        return _normal(_final_text(completion)) == expected if expected else None

    return _each(verdict, completions, golds)


def _check(completions: Sequence[str], golds: Sequence[str | None]) -> None:
    for name, batch in (("completions", completions), ("golds", golds)):
        if isinstance(batch, str):
            raise RewardError(f"{name} is one string: pass a list of strings.")
        for i, item in enumerate(batch):
            if not isinstance(item, str) and not (item is None and batch is golds):
                raise RewardError(f"{name}[{i}] is a {type(item).__name__}: pass it as text.")
    if len(completions) != len(golds):
        raise RewardError(f"{len(completions)} completions for {len(golds)} golds: pass one gold for each completion.")


def _each(
    verdict: Callable[[str, str], bool | None], completions: Sequence[str], golds: Sequence[str | None]
) -> list[bool | None]:
    _check(completions, golds)
    return [verdict(completion, gold or "") for completion, gold in zip(completions, golds, strict=True)]


# Reading the answer


def _boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{}`` that is closed, in one pass: a megabyte of open boxes costs no square of it."""
    if "\\boxed" not in text and "\\fbox" not in text:
        return None
    best, content = -1, None
    opened: list[tuple[int, int]] = []  # where the box began (-1: a plain brace), and where its content does
    for token in _BOX.finditer(text):
        sign = token[0]
        if token["bare"] is not None:
            best, content = token.start(), token["bare"]
        elif sign == "}":
            start, inner = opened.pop() if opened else (-1, 0)
            if start > best:
                best, content = start, text[inner : token.start()]
        elif sign.endswith("{") and sign != "\\{":
            opened.append((token.start() if len(sign) > 1 else -1, token.end()))
    return content


def _marked(text: str) -> str | None:
    """What follows the last ``####`` that marks an answer.

    Models also write ``#### Step 2`` as a heading: what is not a number counts only at the very end of the text.
    """
    end = len(text.rstrip())
    for mark in reversed(list(_MARK.finditer(text))):
        content = mark[1].strip()
        if content and (
            mark.end() >= end or _number(readable(content[: MAX_ANSWER + 1]).removesuffix("%")) is not None
        ):
            return content
    return None


def _final_text(text: str) -> str:
    for find in (_boxed, _marked):
        found = find(text)
        if found is not None:
            return found
    return text


def _answer(text: str, strict: bool = False) -> _Answer:
    """The answer of a completion or gold; empty text when there is none."""
    found = _boxed(text)
    if found is None and not strict:
        found = _marked(text)
    if found is not None or strict:
        return _bare(found or "")
    text = text.strip()
    words = _WORD.findall(_COMMAND.sub(" ", _TEXT_COMMAND.sub(" ", _notation.SCALE.sub(" ", text[:MAX_ANSWER]))))
    if len(text) > MAX_ANSWER or any(not _MATH_WORD.fullmatch(word) for word in words):
        text = text[-MAX_PROSE:]
        euler = readable(text, prose=True, euler=True) if _notation.EULERS.search(text) else ""
        read = readable(text, prose=True)
        return _Answer(read, True, _notation.unread(text, read, prose=True), euler)
    return _bare(text)


def _bare(answer: str) -> _Answer:
    """An answer that stands alone. Too long an answer stays as it is."""
    if len(answer) > MAX_ANSWER:
        return _Answer(answer, False)
    if _integer(answer):
        return _Answer(answer.strip(), False)
    text = _tidy(answer)
    read = readable(text)
    if read == text:
        return _Answer(text, False, _notation.unread(text, text))
    euler = readable(text, euler=True) if _notation.EULERS.search(text) else ""
    return _Answer(read, False, _notation.unread(text, read), euler)


def _tidy(answer: str) -> str:
    """The answer without math delimiters and a final full stop."""
    bare = _DELIMITERS.fullmatch(answer.strip().removesuffix("."))
    return bare[1].strip().removesuffix(".") if bare else ""


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def _plain_text(answer: str) -> str:
    r"""For golds that are words: ``\text{(A)}`` and ``A`` are the same."""
    text = _normal(_TEXT_COMMAND.sub(r"\1", answer).rstrip(". "))
    return re.sub(r"^\((\w)\)$", r"\1", text)


def _integer(text: str) -> bool:
    """Whether a text is plain digits, as most answers are, and there is nothing more to read."""
    return text.isascii() and text.strip().removeprefix("-").isdigit()


def _number(answer: str) -> _exact.Exact | None:
    found = _NUMBER.fullmatch(answer.strip()) if len(answer) <= MAX_ANSWER else None
    return _exact.decimal(found[1] + found[2].replace(",", "")) if found else None


def _gsm8k_number(text: str) -> Fraction | str | None:
    # Only the last thing that looks like a number counts; one that cannot be read ("1.2.3") is not skipped. The limit
    # is for floods of marks without one.
    for line in reversed(text.rsplit("####", 2_000)[1:]):
        line = line.partition("\n")[0][: MAX_ANSWER + 100]
        if _integer(line) or _NUMERAL.match(readable(line)):
            return _gsm8k_value(line, _GSM8K.match)
    return None


def _gsm8k_value(text: str, match: Callable[[str], re.Match[str] | None]) -> Fraction | str | None:
    """The number at the start of a text; the text itself where it is a range, or a word that scales cannot be read."""
    if len(text) > MAX_ANSWER + 100:
        return None
    if _integer(text):
        return Fraction(int(text)) if len(text) <= MAX_ANSWER else None
    text = readable(text).replace("^\\circ", "")
    if _notation.SCALE.search(text) or _RANGE.match(text):
        return " ".join(text.split())
    text = _REMARK.sub("", text)
    whole = _exact.read(text.strip().removesuffix("."))
    if whole is not None:
        return whole.value
    found = match(text)
    if found is None or found["sum"] or len(found[2]) > MAX_ANSWER:
        return None
    try:
        return Fraction(found[1] + found[2].replace(",", "").rstrip("."))
    except ValueError:
        return None


# Comparing answers


def _explodes(answer: _Answer) -> bool:
    """Whether evaluating this is likely to take all the time or memory there is. Judged by its shape alone."""
    text = answer.text
    # In a sentence an exclamation mark is most often just that.
    if _HUGE_EXPONENT.search(text) or (not answer.prose and _FACTORIAL.search(text)):
        return True
    for base, exponent, third in _TOWER.findall(text):
        # A numeric tower is harmless while the whole exponent stays near what _HUGE_EXPONENT lets through.
        if third or len(base) > 4 or len(exponent) > 2 or (exponent and int(base) ** int(exponent) > 20_000):
            return True
    depth = 0
    for bracket in _BRACKET.findall(text):
        depth = depth + 1 if bracket in "({[" else max(0, depth - 1)
        if depth > _DEEP:
            return True
    return False


def _same_text(gold: _Answer, answer: _Answer) -> bool:
    one, other = gold.text, answer.text
    if _notation.RANGE in one or _notation.RANGE in other:
        one, other = one.replace(_notation.RANGE, "-"), other.replace(_notation.RANGE, "-")
    return one.split() == other.split()


def _without_sympy(gold: _Answer, answer: _Answer) -> bool | None:
    """The verdict where text or exact arithmetic can give it; None where math-verify has to be asked."""
    if not answer.text or (not answer.prose and len(answer.text) > MAX_ANSWER):
        return False
    if _same_text(gold, answer):
        return True
    gold_text = _plain_text(gold.text)
    if not _MATH_SIGN.search(gold_text) or _explodes(gold):
        return gold_text == _plain_text(answer.text)
    expected, given = _number(gold.text), _number(answer.text)
    if expected is not None and given is not None:
        return _exact.equal(expected, given)
    if not answer.prose and _notation.torn(answer.text):
        return False
    if expected is not None and not re.search(r"[\d\\]", answer.text):
        return False
    return False if _explodes(answer) else None


class _Batch:
    """The verdicts of one call, which share an allowance for answers that hang."""

    def __init__(self) -> None:
        self.timeouts = 0
        self.answers: dict[str, _Answer | None] = {}

    def verdict(self, completion: str, gold: str, strict: bool) -> bool | None:
        # Groups of completions share a gold.
        if gold not in self.answers:
            self.answers[gold] = self.gold_answer(gold)
        expected = self.answers[gold]
        if expected is None:
            return None
        answer = _answer(completion, strict)
        if expected.unread:
            same = _same_text(expected, answer) or _plain_text(expected.text) == _plain_text(answer.text)
            return True if same else None
        right = self.right(expected, answer)
        if not right and (expected.euler or answer.euler):
            readings = [[one, one._replace(text=one.euler)] if one.euler else [one] for one in (expected, answer)]
            right = any(self.right(gold, given) for gold in readings[0] for given in readings[1])
        # A number that we cannot read is not a wrong one; nor a right one, as the "5" of "5 (in millions)".
        if answer.unread and _MATH_SIGN.search(expected.text) and not _same_text(expected, answer):
            return None
        return right

    def right(self, gold: _Answer, answer: _Answer) -> bool:
        known = _without_sympy(gold, answer)
        return self.ask(gold, answer) == "right" if known is None else known

    def gold_answer(self, gold: str) -> _Answer | None:
        answer = _answer(gold)
        if not re.search(r"[^\W_]", answer.text) or (not answer.prose and len(answer.text) > MAX_ANSWER):
            return None
        # Only the same text can be said to be equal to a number that we cannot read.
        unread = answer.unread and (answer.prose or re.search(r"\d", answer.text))
        answer = answer._replace(unread=bool(unread or (not answer.prose and _notation.torn(answer.text))))
        if answer.unread:
            return answer
        # Whether a sentence holds an answer must not depend on the completion that it is compared with.
        sum_in_words = answer.prose and _MATH_SIGN.search(answer.text)
        if sum_in_words and (_explodes(answer) or self.ask(answer, _Answer("", False)) != "wrong"):
            return None
        return answer

    def ask(self, gold: _Answer, answer: _Answer) -> str:
        known = _verdicts.get((gold, answer))
        if known is not None:
            return known
        if self.timeouts >= FULL_TIMEOUTS + SHORT_TIMEOUTS:
            return "died"
        seconds = ITEM_SECONDS if self.timeouts < FULL_TIMEOUTS else SHORT_SECONDS
        reply = _sympy.ask(gold.text, gold.prose, answer.text, answer.prose, seconds)
        if reply == "died":
            self.timeouts += 1
            if self.timeouts == FULL_TIMEOUTS + SHORT_TIMEOUTS:
                message = f"{self.timeouts} answers of one batch hung: all others in it that need sympy count as wrong."
                warnings.warn(message, RuntimeWarning, stacklevel=4)
        if reply != "died" or seconds == ITEM_SECONDS:
            if len(_verdicts) >= 50_000:
                _verdicts.clear()
            _verdicts[gold, answer] = reply
        return reply
