"""The program of the math-verify worker process. It is run as a script and imports nothing of ours but ``_exact``.

It reads one JSON line ``[gold, gold_is_prose, answer, answer_is_prose, seconds]`` at a time from stdin and writes one
line of text to stdout: ``ready`` or ``failed: ...`` at the start, then ``right``, ``wrong``, ``no gold`` or ``died``.

Sympy is imported once, in a process that then only forks and waits; the forked child does the sums under timers whose
default action is death. A child that hangs, even inside one big-integer operation in C where no Python handler would
run, therefore costs its time limit plus a fork of about 10 ms, not another second of imports.

math-verify takes what is below 1e-15 for zero, in products too, and rounds at six decimal places whatever the number's
size. So two rational numbers are read by ``_exact``; and where it pairs two numbers, which may be elements of lists,
sets, intervals or matrices, they are compared here once more: rational ones exactly; others are not equal where twelve
digits differ. Of all else (irrational numbers that agree so far, free symbols, relations, percent, text) it has the
last word.
"""

import importlib.util
import json
import logging
import mmap
import os
import signal
import sys
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

MEMORY_BYTES = 2 << 30
WALL_PER_CPU_SECOND = 5  # a machine busy with training must not turn right answers into wrong ones
RECYCLE_AFTER = 5_000  # sympy's caches grow: start afresh before the memory limit hits an innocent answer
AT_END, RECYCLED = 0, 7

# Run once before the first fork, so that every child inherits compiled patterns and the parser's learnt tables.
WARM_UP = (
    ("5", r"\frac{1}{2}"),
    (r"\sqrt{2}+x^2", "x=3"),
    ("[0,1)", r"(0,1]\cup\{2\}"),
    (r"\pi", r"50\%"),
    ("(1,2)", r"2^{3}"),
)


_spec = importlib.util.spec_from_file_location("_exact", Path(__file__).with_name("_exact.py"))
assert _spec and _spec.loader
_exact = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_exact)


def _parse(text: str, prose: bool) -> list[Any]:
    from math_verify import parse

    # math-verify reads LaTeX only inside delimiters; a bare answer gets the one that it trusts most.
    return parse(text if prose else f"\\boxed{{{text}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def _judge(gold: str, gold_is_prose: bool, answer: str, answer_is_prose: bool) -> str:
    from math_verify import verify

    numbers = [
        None if prose else _exact.read(text) for text, prose in ((gold, gold_is_prose), (answer, answer_is_prose))
    ]
    if numbers[0] is not None and numbers[1] is not None:
        return "right" if _exact.equal(numbers[0], numbers[1]) else "wrong"
    _decimals.clear()
    _decimals.update(_exact.decimals(gold) | _exact.decimals(answer))
    expected = _parse(gold, gold_is_prose)
    if not expected:
        return "no gold"
    given = _parse(answer, answer_is_prose) if answer else []
    return "right" if given and verify(expected, given, timeout_seconds=None) else "wrong"


# How the decimals of the question under way are written, since sympy forgets zeros at their ends.
_decimals: dict[Fraction, Fraction] = {}


def _check_numbers() -> None:
    """Have every comparison of math-verify's, its own recursive ones included, checked by :func:`_same_number`."""
    from math_verify import grader

    compare = grader.sympy_expr_eq

    def checked(gold: Any, answer: Any, *options: Any, **more: Any) -> bool:
        told = compare(gold, answer, *options, **more)
        # x = 5 is paired with 5, but is no number by itself: there a yes can become a no alone.
        left, right = grader.unwrap_eq(gold), grader.unwrap_eq(answer)
        same = _same(left, right)
        return told if same is None else same and (told or (left is gold and right is answer))

    grader.sympy_expr_eq = checked


def _same(a: Any, b: Any) -> bool | None:
    """Whether two numbers are the same, or a matrix's all; None where it is not for us to say."""
    from sympy import Expr, MatrixBase, MatrixExpr

    if isinstance(a, MatrixBase | MatrixExpr) and isinstance(b, MatrixBase | MatrixExpr):
        a, b = a.doit(), b.doit()
        if not (isinstance(a, MatrixBase) and isinstance(b, MatrixBase) and a.shape == b.shape):
            return None
        each = [_same(x, y) for x, y in zip(a.flat(), b.flat(), strict=True)]
        return False if False in each else None
    if not (isinstance(a, Expr) and isinstance(b, Expr)) or isinstance(a, MatrixExpr) or isinstance(b, MatrixExpr):
        return None
    return _same_number(a, b)


def _same_number(a: Any, b: Any) -> bool | None:
    from sympy import N, Rational, UnevaluatedExpr

    if a.free_symbols or b.free_symbols or a.has(UnevaluatedExpr) or b.has(UnevaluatedExpr):  # the latter are percent
        return None
    (a, a_unit), (b, b_unit) = _without_floats(a), _without_floats(b)
    if isinstance(a, Rational) and isinstance(b, Rational):
        return _exact.equal(_exact.Exact(Fraction(a.p, a.q), a_unit), _exact.Exact(Fraction(b.p, b.q), b_unit))
    x, y = N(a, 30), N(b, 30)
    if {x.is_infinite, y.is_infinite} == {True, False}:
        return False
    if not (x.is_finite and y.is_finite and x.is_number and y.is_number):
        return None
    for unit, decimal, other in ((a_unit, a, y), (b_unit, b, x)):
        if unit is not None and other.is_real:
            seen = Fraction(str(other))  # to 30 digits
            return _exact.rounds_to(seen, _exact.Exact(Fraction(decimal.p, decimal.q), unit))
    x, y = (0 if getattr(z, "_prec", 2) < 2 else z for z in (x, y))  # no digit of it can be told from zero
    # Near is not equal: a yes of math-verify's stands, and so does a no.
    return None if abs(x - y) <= max(abs(x), abs(y)) * Rational(1, 10**12) else False


def _without_floats(number: Any) -> tuple[Any, Fraction | None]:
    """A number with the decimals of its text as fractions, evaluated; and the last place's value if it is a decimal."""
    from sympy import Float, Integer, Mul, Pow, Rational

    exact = number.xreplace({one: Rational(str(one)) for one in number.atoms(Float)}).doit()
    mantissa, scale = number, Fraction(1)
    if isinstance(number, Mul) and len(number.args) == 2:  # 2.5 10^-6
        floats, powers = ([one for one in number.args if isinstance(one, kind)] for kind in (Float, Pow))
        if floats and powers and powers[0].args[0] == 10 and isinstance(powers[0].args[1], Integer):
            mantissa, power = floats[0], cast(Any, powers[0].doit())
            scale = Fraction(power.p, power.q)
    if not isinstance(mantissa, Float):
        return exact, None
    written: Any = Rational(str(mantissa))
    value = abs(Fraction(written.p, written.q))
    places = len(str(mantissa).rstrip("0").partition(".")[2])
    return exact, _decimals.get(value, Fraction(1, 10**places)) * scale


def _set_timers(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, seconds * WALL_PER_CPU_SECOND)


def _serve(replies: int, busy: mmap.mmap, count: int | None) -> int:
    """Answer ``count`` requests (None: no limit) and return the exit code."""
    while count is None or count > 0:
        # At most one request is ever under way, so this buffer holds no second one that would die with the child.
        line = sys.stdin.buffer.readline()
        if not line:
            return AT_END
        busy[0] = 1
        *pair, seconds = json.loads(line)
        _set_timers(seconds)
        try:
            reply = _judge(*pair)
        except Exception:
            reply = "wrong"
        _set_timers(0)
        busy[0] = 0
        os.write(replies, reply.encode() + b"\n")
        count = None if count is None else count - 1
    return RECYCLED


def _fork_and_serve(replies: int) -> None:
    busy = mmap.mmap(-1, 1)
    while True:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = _serve(replies, busy, RECYCLE_AFTER)
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == AT_END:
            return
        # A child that somebody killed between two questions owes nobody a reply.
        if busy[0]:
            busy[0] = 0
            os.write(replies, b"died\n")


def _limit_process() -> None:
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    if hasattr(signal, "setitimer"):
        # A parent may have ignored or blocked these, which survives exec; then no timer would kill anything.
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())


def main() -> None:
    # The LaTeX parser prints to stdout, which here carries the replies.
    replies = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    logging.disable(logging.CRITICAL)
    try:
        _limit_process()
        _check_numbers()
        for gold, answer in WARM_UP:
            _judge(gold, False, answer, False)
            _judge(f"The answer is ${gold}$.", True, f"The answer is {answer}", True)
    except BaseException as error:
        os.write(replies, f"failed: {type(error).__name__}: {error}".replace("\n", " ").encode() + b"\n")
        return
    os.write(replies, b"ready\n")
    if hasattr(os, "fork"):
        _fork_and_serve(replies)
    else:
        _serve(replies, mmap.mmap(-1, 1), None)


if __name__ == "__main__":
    main()
