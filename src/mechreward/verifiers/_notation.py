r"""Signs and number words that math-verify does not know, or reads wrongly, as LaTeX or plain digits that it does.

Minus signs and dashes; thousands set with thin spaces; the signs of degrees, roots, fractions, powers, products, pi and
money; repeating decimals; scale words (it takes ``5\text{ million}`` for 5 of a unit); and ``5e3``, whose e it takes
for Euler's number.
"""

import re
import unicodedata
from decimal import Context, Decimal

SCALES = {
    "dozen": "12",
    "hundred": "100",
    "thousand": "1000",
    "lakh": "100000",
    "million": "1000000",
    "crore": "10000000",
    "billion": "1000000000",
    "trillion": "1000000000000",
    "quadrillion": "1000000000000000",
    "tenth": "0.1",
    "hundredth": "0.01",
    "thousandth": "0.001",
    "millionth": "0.000001",
    "billionth": "0.000000001",
}
_COUNTS = "one two three four five six seven eight nine ten eleven twelve".split()
COUNTS = {word: str(n) for n, word in enumerate(_COUNTS, 1)} | {"a": "1", "an": "1", "half a": "0.5"}
COUNTS |= {
    word: str(n) for n, word in enumerate("thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split(), 13)
}
COUNTS |= {
    word: str(10 * n) for n, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)
}

RANGE = "\u2013"
_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"), "-")
_SPACES = "\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_PRODUCTS = {ord(a): b for a, b in zip("×∗·⋅∙÷∕⁄", "*****///", strict=True)}
_BOXED = {ord(a): b for a, b in zip("∞∪∩±π", (r"\infty ", r"\cup ", r"\cap ", r"\pm ", r"\pi "), strict=True)}
_DIGITS = "⁰¹²³⁴⁵⁶⁷⁸⁹"
_POWERS = {ord(a): b for a, b in zip(_DIGITS + "⁺⁻ⁿ", "0123456789+-n", strict=True)}
_ROOTS = {"√": "", "∛": "3", "∜": "4"}

_UNARY_DASH = re.compile(r"(?<![\w)\]}%\u2010-\u2014])[\u2010-\u2013](?=\s?[\d.$\\])")
# 3–5 and 2010–2015 are no differences.
_BETWEEN = re.compile(
    r"(?<![\w.,^*/+=\u2010-\u2013)}\]-])(?<![*/+=] )"
    r"(?:\\?\$)?-?[0-9]++(?:[.,][0-9]++)*+(?:\\?%)?"
    r"(?:\s?[\u2010-\u2013]\s?(?:\\?\$)?[0-9]++(?:[.,][0-9]++)*+(?:\\?%)?)++(?![\w^]|\s?[*/+(^=])"
)
_CURRENCY = re.compile(r"[€£¥₹]\s?(?=[-+]?[0-9.])|(?<=[0-9])\s?[€£¥₹]")
_REPEATING = re.compile(
    r"(?<![\w.,}])([0-9]{0,30})\.([0-9]{0,30})\\(?:overline|bar|dot)\s*(?:\{([0-9]{1,30})\}|([0-9]))"
)
_BINOMIAL = re.compile(r"\\([dt]?binom)\s*([0-9])\s*([0-9])")
_VULGAR = re.compile(r"(?:(?<![\w.,])([0-9]+)\s?)?([\u00bc-\u00be\u2150-\u215e\u2189])")
_POWER = re.compile(rf"(?<=[\w)}}\]])([{_DIGITS}⁺⁻ⁿ]{{1,8}})(?![√{_DIGITS}])")
_ROOT = re.compile(
    rf"([{_DIGITS}]{{0,3}})([√∛∜])\s*(?:\{{([^{{}}]*)\}}|(\([^()]*\))|([0-9]+(?:\.[0-9]+)?|[^\W\d_]|\\pi(?![A-Za-z])))"
)
# Math-verify looks for LaTeX between dollars.
_LATEX = re.compile(
    r"(?<![\w^])(-?(?:[0-9.]+/?)?\\sqrt(?:\[[0-9]+\])?\{[^{}]*\}(?:/[0-9]+)?"
    r"|-?[0-9.]+(?:\s?\*\s?[0-9]+)?\^\{[-0-9]+\}|-?(?:[0-9.]+/?)?\\pi(?:\s*/\s*[0-9]+)?)"
)

_THIN = rf"(?:[{_SPACES}]|\\[,;:! ]|\\thinspace\s?|~|,\\!|\{{,\}}|\{{\\[,;:! ]\}})"
_GROUPS = re.compile(rf"(?<![\d.,\w])([0-9]{{1,3}})((?:{_THIN}[0-9]{{3}})+)(?!\d)")
_SPACED_GROUPS = re.compile(r"(?<![\d.,\w^])([1-9][0-9]{0,2})((?: [0-9]{3})+)(?![\d/]|\s*/)")
_AFTER_POINT = re.compile(rf"(?<=[0-9])\.([0-9]{{3}}(?:{_THIN}[0-9]{{3}})*{_THIN}[0-9]{{1,3}})(?!\d)")
_SEPARATOR = re.compile(rf"{_THIN}| ")
# Digits, space, digits: only "1 1/2" is a number (math-verify would add them up). Not where the first digits belong to
# what stands before them: x^2 3, \log_2 5, \frac 1 2, \sqrt 2 3.
_ARGUMENT = re.compile(
    r"\\[dtc]?(?:frac|binom)\s*(?:[0-9]|\{[^{}]*\})\s*[0-9]|\\(?:sqrt(?:\[[^][]*\])?|[a-z]*(?:log|ln|sin|cos|tan))\s*[0-9]+"
)
_TORN = re.compile(rf"(?<![\w^.,])(?<!\^\s)[0-9]++(?:[.,][0-9]++)*+(?:[{_SPACES}]|\\[,;: ]|~|\s)+[0-9]++(?!\s*/)")

_SCALE_WORD = rf"(?:{'|'.join(sorted(SCALES, key=len, reverse=True))})s?"
_SCALE = rf"{_SCALE_WORD}(?:\s+{_SCALE_WORD})*+(?![\w-])"
_COUNT_WORDS = {*COUNTS, "half", "quarter", "third"} - {"a", "an", "half a"}
_COUNT_WORD = rf"(?:{'|'.join(sorted(_COUNT_WORDS, key=len, reverse=True))})(?!\w)"
# "Two hundred fifty", "3 million 200 thousand", "twenty-five million": numbers that nothing here puts together.
_NO_MORE = rf"(?!,?\s*(?:and\s+)?(?:a\s+)?(?:(?<!,)\\?\$?[0-9]|{_COUNT_WORD}))"
_NOT_ALONE = re.compile(
    rf"(?:[0-9]|(?<!\w){_COUNT_WORD}|{_SCALE_WORD})(?:\s|,|-|\\[,;:! ]|~)+(?:and\s+)?(?:an?\s+)?$", re.IGNORECASE
)
_PIECES = re.compile(
    rf"(?:[0-9]|(?<!\w){_COUNT_WORD}|(?<![A-Za-z]){_SCALE_WORD})(?:\s|,|-)+(?:and\s+)?(?:an?\s+)?{_SCALE_WORD}(?!\w)"
    rf"|(?<![A-Za-z]){_SCALE_WORD}(?!\w)\s*(?:and\s+)?(?:a\s+)?(?:[0-9]|{_COUNT_WORD})",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
SCALE = re.compile(rf"(?<![A-Za-z]){_SCALE_WORD}(?![A-Za-z])", re.IGNORECASE)
_TEXT = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{"
_SCALE_TEXT = re.compile(rf"{_TEXT}\s*((?:[0-9][0-9.,]*\s*)?{_SCALE})([^{{}}]*)\}}", re.IGNORECASE)
_COUNT = re.compile(rf"(?<![\w\\-])({'|'.join(sorted(COUNTS, key=len, reverse=True))})\s+(?={_SCALE})", re.IGNORECASE)
_NUMERAL = r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
_SCALED = re.compile(rf"(?<![\w.^/])({_NUMERAL})(\$?\**(?:\s|\\[,;:! ]|~)*)({_SCALE}){_NO_MORE}", re.IGNORECASE)
_TIMES_SCALE = re.compile(rf"(?<=[0-9}})])(\$?)(?:\s|\\[,;:! ]|~)*({_SCALE}){_NO_MORE}", re.IGNORECASE)

_E = r"(?<![\w.\\])([0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE]([+-]?[0-9]+)(?![\w^]|\.[0-9])"
_SCIENTIFIC = re.compile(_E)
# 2e-1 may be twice Euler's number, less one; 1e-5, 2.5e-1 and 2e-01 may not.
EULERS = re.compile(r"(?<![\w.\\])(?!1e)[0-9]+e[+-][1-9][0-9]?(?![\w^]|\.[0-9])")
# An ASCII digit among signs and LaTeX; superscripts, and relations that math-verify knows, are no numbers.
_DIGITS_AND_SIGNS = re.compile(r"(?=.*[0-9])(?:\\[A-Za-z]+|[^A-Za-z\\]|\\[^A-Za-z])*", re.DOTALL)
_KNOWN = frozenset(_DIGITS + "⁺⁻ⁿ≤≥≠∈<>≈")
_MOST_EXPONENT = 400
_EXACTLY = Context(prec=10_000)

_INTERESTING = re.compile(
    rf"[^\x00-\x7f]|\\(?:overline|bar|dot|binom|approx)|[0-9.][eE][-+0-9]|[0-9]\s|[0-9{{]\\?[,;:! ~]|\\thin|[0-9]~"
    rf"|{_SCALE_WORD}",
    re.IGNORECASE,
)


def readable(text: str, prose: bool = False, euler: bool = False) -> str:
    """An answer, or a sentence with one, with the signs and words above spelt for math-verify.

    Args:
        text: Without the box or the mark around it.
        prose: Whether math-verify will look for the answer in it, partly outside LaTeX.
        euler: Whether to leave the e of ``2e-1`` to be Euler's number.
    """
    if not _INTERESTING.search(text):
        return text
    if not text.isascii():
        text = _signs(text, prose)
    text = _BINOMIAL.sub(r"\\\1{\2}{\3}", _REPEATING.sub(_repeating, text))
    text = _GROUPS.sub(_joined, text)
    text = _AFTER_POINT.sub(lambda found: "." + _SEPARATOR.sub("", found[1]), text)
    if not prose:
        text = re.sub(r"^\s*(?:≈|\\approx(?![a-z]))\s*", "", text)
        text = _SPACED_GROUPS.sub(_joined, text)
    if not (euler and EULERS.search(text)):
        text = _SCIENTIFIC.sub(_positional, text)
    return _without_scales(text) if SCALE.search(text) else text


def unread(text: str, read: str, prose: bool = False) -> bool:
    """Whether an answer holds a scale word, or next to digits a numeral or mathematical sign, that was not read.

    Args:
        text: The answer.
        read: What :func:`readable` made of it.
        prose: Whether it is a sentence: then only a scale word beside a number counts, and only in the last sentence
            that has numbers.
    """
    if prose:
        last = next(
            (one for one in reversed(_SENTENCE.split(read)) if re.search(r"\d", one) or _PIECES.search(one)), ""
        )
        return bool(_PIECES.search(last))
    if SCALE.search(read) or RANGE in read:
        return True
    if read.isascii() or not _DIGITS_AND_SIGNS.fullmatch(text):
        return False
    kinds = {c: unicodedata.category(c) for c in read if c > "\x7f" and c not in _KNOWN}
    return bool(kinds) and all(kind in ("Sm", "No", "Nl") for kind in kinds.values())


def torn(text: str) -> bool:
    """Whether an answer holds two numbers with only space between them."""
    return bool(_TORN.search(text) and _TORN.search(_ARGUMENT.sub("x", text)))


def _joined(found: re.Match[str]) -> str:
    return found[1] + _SEPARATOR.sub("", found[2])


def _repeating(found: re.Match[str]) -> str:
    whole, fixed, again = found[1], found[2], found[3] or found[4]
    above = int(whole + fixed + again) - int(whole + fixed or "0")
    return rf"\frac{{{above}}}{{{(10 ** len(again) - 1) * 10 ** len(fixed)}}}"


def _signs(text: str, prose: bool) -> str:
    text = "".join(str(unicodedata.decimal(c)) if c > "\x7f" and c.isdecimal() else c for c in text)
    text = _ROOT.sub(_root, _CURRENCY.sub("", text))
    text = _POWER.sub(lambda found: f"^{{{found[1].translate(_POWERS)}}}", text)
    text = _VULGAR.sub(lambda found: _fraction(found, prose), text).translate(_PRODUCTS)
    if prose:
        # A dash in a sentence may join two words or numbers; a minus sign is a minus sign.
        text = _UNARY_DASH.sub("-", text).translate({ord(c): "-" for c in "\u2212\ufe63\uff0d"} | {ord("π"): r"\pi "})
        if "$" not in text and "\\(" not in text and "\\[" not in text:
            text = _LATEX.sub(r"$\1$", text)
        return re.sub(r"°(?=\s*(?:\$|\\[\])]))", r"^\\circ", text)
    text = _BETWEEN.sub(lambda found: re.sub("[\u2010-\u2013]", "\ufffc", found[0]), text)
    text = re.sub(r"(?:°\s?([CF])|([℃℉]))(?!\w)", r"^\\circ", text).translate(_DASHES).translate(_BOXED)
    return text.replace("°", r"^\circ ").replace("\ufffc", RANGE)


def _root(found: re.Match[str]) -> str:
    index = found[1].translate(_POWERS) or _ROOTS[found[2]]
    return rf"\sqrt{f'[{index}]' if index else ''}{{{found[3] or found[4] or found[5] or ''}}}"


def _fraction(found: re.Match[str], prose: bool) -> str:
    above, _, below = unicodedata.normalize("NFKC", found[2]).partition("\u2044")
    above = str(int(above) + int(found[1] or 0) * int(below))
    return f"{above}/{below}" if prose else rf"\frac{{{above}}}{{{below}}}"


def _positional(found: re.Match[str]) -> str:
    exponent = found[2]
    if len(exponent) > 5 or abs(int(exponent)) > _MOST_EXPONENT:
        return rf"{found[1]}\cdot 10^{{{exponent.lstrip('+')}}}"
    return f"{Decimal(found[0]):f}"


def _without_scales(text: str) -> str:
    text = _SCALE_TEXT.sub(lambda found: f" {found[1]}" + (rf" \text{{{found[2]}}}" if found[2].strip() else ""), text)

    def alone(found: re.Match[str]) -> bool:
        return not _NOT_ALONE.search(found.string, max(0, found.start() - 30), found.start())

    def count(found: re.Match[str]) -> str:
        return COUNTS[" ".join(found[1].lower().split())] + " " if alone(found) else found[0]

    text = _COUNT.sub(count, text)

    def product(found: re.Match[str]) -> str:
        if not alone(found):
            return found[0]
        number = _EXACTLY.multiply(Decimal(found[1].replace(",", "")), _scale(found[3]))
        return f"{number:f}{found[2].rstrip()}"

    return _TIMES_SCALE.sub(lambda found: f"*{_scale(found[2]):f}{found[1]}", _SCALED.sub(product, text))


def _scale(words: str) -> Decimal:
    value = Decimal(1)
    for word in words.lower().split():
        value = _EXACTLY.multiply(value, Decimal(SCALES.get(word) or SCALES[word.removesuffix("s")]))
    return value
