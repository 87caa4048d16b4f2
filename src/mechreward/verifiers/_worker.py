"""The program of the math-verify worker process. It is run as a script and imports nothing of ours.

It reads one JSON line ``[gold, gold_is_prose, answer, answer_is_prose, seconds]`` at a time from stdin and writes one
line of text to stdout: ``ready`` or ``failed: ...`` at the start, then ``right``, ``wrong``, ``no gold`` or ``died``.

Sympy is imported once, in a process that then only forks and waits; the forked child does the sums under timers whose
default action is death. A child that hangs, even inside one big-integer operation in C where no Python handler would
run, therefore costs its time limit plus a fork of about 10 ms, not another second of imports.
"""

import json
import logging
import mmap
import os
import signal
import sys
from contextlib import suppress
from typing import Any

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


def _parse(text: str, prose: bool) -> list[Any]:
    from math_verify import parse

    # math-verify reads LaTeX only inside delimiters; a bare answer gets the one that it trusts most.
    return parse(text if prose else f"\\boxed{{{text}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def _judge(gold: str, gold_is_prose: bool, answer: str, answer_is_prose: bool) -> str:
    from math_verify import verify

    expected = _parse(gold, gold_is_prose)
    if not expected:
        return "no gold"
    given = _parse(answer, answer_is_prose) if answer else []
    return "right" if given and verify(expected, given, timeout_seconds=None) else "wrong"


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
