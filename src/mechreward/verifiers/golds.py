"""From a dataset's cells to the golds that a verifier takes, and to its verdicts. Golds are data, not text.

A cell is text, a number, or nothing: None, NaN, ``pandas.NA``, NaT and an infinite number are nothing, and so are the
texts "nan", "NaT" and "<NA>". The texts "None" and "inf" may be answers and stay. A number is written out in full: the
float 1e-05 is ``0.00001``, and 3.0 is ``3``. A float that is not an integer is written with the digits that its type
keeps of every decimal (15 of a float64, 6 of a float32; two decimals at least): 0.1 + 0.2 is ``0.3``. A boolean is the
text ``True`` or ``False``, not 1 or 0. A list of one value is that value. Longer lists and mappings mean different
things in different datasets (all of the values, any of them, a script's lines), so they reach only a verifier that says
what they mean, by an attribute ``structured_golds = True``; for all others they are refused.
"""

import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

from mechreward.errors import RewardError

GOLD_COLUMNS = ("answer", "gold", "target", "ground_truth", "solution", "label")
"""Where golds are looked for. ``solution`` follows the values: next to one (NuminaMath, OpenR1-Math) it is prose.

``label`` is last: next to a solution it is a class.
"""

# Longer numbers are no gold: no answer may be that long (math.MAX_ANSWER), and 1E+999999999 would take all memory.
MOST_DIGITS = 1000

# The decimal digits that floats of 2 and 4 bytes keep, whatever the number; those of 8 bytes keep 15. And how many bits
# they have less than these.
_DIGITS = {2: 3, 4: 6}
_LOST_BITS = {3: 42, 6: 29, 15: 0}

_NOTHING = frozenset({"nan", "NaT", "<NA>"})

Verifier = Callable[..., Sequence[bool | float | None]]
"""(completions, golds) -> a verdict for each; None where the gold says nothing.

Golds are text, ``""`` for none; a verifier with the attribute ``structured_golds = True`` also gets lists and mappings.
"""


def gold(cell: Any, column: str, structured: bool = False) -> Any:
    """What a verifier takes for a dataset's cell.

    Args:
        cell: A Python, numpy, pandas, pyarrow or torch value.
        column: Where it comes from, for the error.
        structured: Whether lists and mappings may stay what they are.

    Returns:
        Text, or None where there is no gold; with ``structured`` also lists and dictionaries.

    Raises:
        RewardError: The cell holds several values or a mapping, and ``structured`` is False; or it is of a type that
            is no answer.
    """
    cell = _plain(cell)
    if structured and isinstance(cell, list | dict):
        return cell
    while isinstance(cell, list) and len(cell) == 1:
        cell = cell[0]
    if cell is None or cell == []:
        return None
    if isinstance(cell, str):
        return None if cell.strip() in _NOTHING else cell
    if isinstance(cell, bool | Fraction):
        return str(cell)
    if isinstance(cell, int | float | Decimal):
        return _written_out(cell)
    if isinstance(cell, list):
        raise RewardError(
            f"The gold column '{column}' holds a list of {len(cell)} values, and this verifier cannot know whether an "
            'answer needs all or any of them: keep one, join them into one text such as "3, 4", or set '
            "structured_golds = True on a verifier of your own that takes lists."
        )
    raise RewardError(
        f"The gold column '{column}' holds a value of type {type(cell).__name__}, which this verifier cannot compare: "
        "make it a column of text or numbers, or name another column with the answers."
    )


def golds(verifier: Verifier, cells: Iterable[Any], column: str) -> list[Any]:
    """What a verifier takes for the cells of a dataset's column, as :func:`gold` says.

    Raises:
        RewardError: As for :func:`gold`.
    """
    structured = _takes_structures(verifier)
    return [gold(cell, column, structured) for cell in cells]


def verdicts(
    verifier: Verifier, texts: Sequence[str], golds: Sequence[Any], name: str | None = None, **options: Any
) -> list[Any]:
    """What a verifier says of texts: None wherever there is no gold.

    Args:
        verifier: Of completions and golds.
        texts: n completions.
        golds: n golds, from :func:`golds`. For None the verifier gets empty text, which all can take.
        name: The verifier's, for the error.
        **options: Passed to the verifier.

    Raises:
        RewardError: The verifier does not give one verdict for each completion; or its own.
    """
    said = verifier(texts, ["" if one is None else one for one in golds], **options)
    if len(said) != len(texts):
        name = name or getattr(verifier, "__name__", "verifier")
        raise RewardError(f"'{name}' gave {len(said)} verdicts for {len(texts)} completions.")
    return [None if one is None else verdict for one, verdict in zip(golds, said, strict=True)]


def gold_columns(columns: Collection[str], wanted: str | None = None) -> list[str]:
    """The columns that may hold golds, the one that is taken first; one alone where it is named."""
    return [name for name in (GOLD_COLUMNS if wanted is None else (wanted,)) if name in columns]


def _takes_structures(verifier: Any) -> bool:
    while isinstance(verifier, functools.partial):
        verifier = verifier.func
    return getattr(inspect.unwrap(verifier), "structured_golds", False)


def _plain(cell: Any) -> Any:
    """A cell in Python's own types, through and through; what has none stays what it is."""
    if isinstance(cell, str):
        return str(cell)
    if isinstance(cell, float):
        return float(cell)
    if isinstance(cell, Mapping):
        return {key: _plain(value) for key, value in cell.items()}
    if isinstance(cell, list | tuple):
        return [_plain(value) for value in cell]
    if type(cell).__name__ in ("NAType", "NaTType"):  # of pandas, which we do not import
        return None
    if hasattr(cell, "as_py"):  # pyarrow
        number = cell.as_py()
        digits = {"halffloat": 3, "float": 6}.get(str(cell.type))
        return _plain(number) if number is None or digits is None else float(_rounded(float(number), digits))
    if hasattr(cell, "detach"):  # torch, whose bfloat16 numpy does not know
        cell = cell.detach().cpu()
        cell = (cell.float() if str(cell.dtype) == "torch.bfloat16" else cell).numpy()
    if hasattr(cell, "ndim") and hasattr(cell, "dtype"):  # numpy
        if cell.ndim:
            return [_plain(value) for value in cell]
        return (
            float(_rounded(cell.tolist(), _DIGITS.get(cell.itemsize, 15))) if cell.dtype.kind == "f" else cell.tolist()
        )
    return cell


def _rounded(number: float, digits: int) -> str:
    """A float with the digits that its type keeps of every decimal; two decimals at least, and integers as they are."""
    if not math.isfinite(number) or number.is_integer():
        return repr(number)
    before_point = len(str(int(abs(number))))
    if before_point + 2 > digits:
        return f"{number:.{before_point + 2}g}"
    step = Decimal(math.ulp(number)) * 2 ** _LOST_BITS[digits]
    for size in (digits, digits - 1):
        text = f"{number:.{size - 1}e}"
        half = Decimal(1).scaleb(Decimal(text).adjusted() - size + 1) / 2
        # Between two decimals the float may lie on one side of the middle, and what it was made of on the other.
        if abs(half - abs(Decimal(number) - Decimal(text))) > step:
            break
    return text


def _written_out(number: float | Decimal) -> str | None:
    exact = Decimal(_rounded(number, 15)) if isinstance(number, float) else Decimal(number)
    if not exact.is_finite() or abs(exact.adjusted()) > MOST_DIGITS:
        return None
    text = f"{exact:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text
