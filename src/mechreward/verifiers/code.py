"""Verifiers that run code: ``python_exec``, ``humaneval`` and ``unit_tests``.

Each takes a batch of completions and one gold per completion, and returns one verdict each: ``True`` (every test
passes), ``False`` (one does not; no code; a syntax error; too much time, memory or output) or ``None`` (the gold is
empty). What a model writes never raises. A gold that is no test is an error of the data set, and raises.

**The code** of a completion is a Markdown fence's content: of several, the last that defines the wanted function, else
the last one marked as Python, else the last. Without a fence it is the whole text. A text whose first line is indented
continues the prompt, up to a fence.

**A verdict cannot be forged**, short of breaking out of the sandbox: completions run in ``sandbox``, and the tests run
in another one. The completion's process receives the arguments of a call and sends a value back. It has neither the
tests, nor the expected values, nor the pipe that carries the verdict, and the values are rebuilt as exact built-in
types. So tests see plain data (None, numbers, texts, bytes, and lists, tuples, sets and dictionaries of those);
instances of the completion's own classes can be called and their attributes read, but not compared. Arguments are
copies: a test that looks at what a function did to its arguments cannot pass. Only the standard library can be
imported. A weak test stays weak: one that a constant passes is passed by a constant.

A golds column may hold texts, or mappings and lists, which reach these verifiers as they are.
"""

import ast
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from mechreward.errors import RewardError, SandboxError
from mechreward.verifiers import sandbox

SECONDS = 3.0
WALL_PER_CPU_SECOND = 3  # a machine that is busy training must not turn right code into wrong
MOST_WORKERS = 8
MOST_CODE = 200_000

_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+-]*)[^\n]*$", re.MULTILINE)
_PYTHON = ("python", "py", "python3")
_ROLES = Path(__file__).with_name("_roles.py").read_text(encoding="utf-8")

Gold = str | Mapping[str, Any] | Sequence[Any] | None


class _Test(NamedTuple):
    """One gold of ``humaneval`` or ``unit_tests``, ready to run."""

    prompt: str
    helpers: str  # the prompt as a program: its imports and helpers, and the wanted function without a body
    test: str
    entry_point: str | None


def humaneval(
    completions: Sequence[str],
    golds: Sequence[Gold],
    *,
    seconds: float = SECONDS,
    memory_mb: int = 512,
    workers: int | None = None,
    unsafe: bool = False,
) -> list[bool | None]:
    """Whether each completion solves its HumanEval problem.

    A completion either continues the prompt or defines ``entry_point`` itself, after which it is put behind the prompt.
    Helpers that the tests use are the prompt's, even where the completion defines them anew.

    Args:
        completions: n texts.
        golds: n rows with the data set's columns ``prompt``, ``test`` and ``entry_point`` (others are ignored), as
            mappings or as JSON.
        seconds: CPU time of the completion, and of the tests; three times that, and a second, on the clock.
        memory_mb: Memory of each process.
        workers: Completions that are checked at the same time; one per processor, at most 8, by default.
        unsafe: Run the code without a sandbox where there is none: see ``sandbox``.

    Returns:
        n verdicts. ``None`` where the gold is empty.

    Raises:
        RewardError: The arguments are not two equally long batches, or a gold is no HumanEval row, or its test fails
            before it calls the completion.
        SandboxError: There is no sandbox here, and ``unsafe`` is False.
    """

    def prepare(gold: Any, where: str) -> _Test | None:
        gold = _parsed(gold)
        if not isinstance(gold, Mapping) or not {"prompt", "test", "entry_point"} <= gold.keys():
            raise RewardError(f"{where} is no HumanEval row: it needs the keys prompt, test and entry_point.")
        return _test(gold, where)

    return _batch(completions, golds, prepare, _judge, _limits(seconds, memory_mb), workers, unsafe)


def unit_tests(
    completions: Sequence[str],
    golds: Sequence[Gold],
    *,
    seconds: float = SECONDS,
    memory_mb: int = 512,
    workers: int | None = None,
    unsafe: bool = False,
) -> list[bool | None]:
    """Whether each completion passes its tests.

    A test is a script. It passes when it ends without an exception, having called the completion at least once. Names
    that it uses and does not define are the completion's, which it may also import from ``solution``. Functions of it
    that are named ``test...`` and take no arguments are called, and so is ``check(candidate)`` with ``entry_point``.

    Args:
        completions: n texts.
        golds: n tests: a script, a list of statements (MBPP's ``test_list``), or a mapping with the key ``test``
            (either of these) and, if needed, ``setup`` (put before the test), ``entry_point`` (the function's name:
            needed for ``check``, and where it is also a built-in's) and ``prompt`` (what the completion continues).
        seconds, memory_mb, workers, unsafe: As for ``humaneval``.

    Returns:
        n verdicts. ``None`` where the gold is empty.

    Raises:
        RewardError: The arguments are not two equally long batches; a gold is no test, is not Python, or fails before
            it calls the completion.
        SandboxError: There is no sandbox here, and ``unsafe`` is False.
    """

    def prepare(gold: Any, where: str) -> _Test | None:
        gold = _parsed(gold)
        return _test(gold if isinstance(gold, Mapping) else {"test": gold}, where)

    return _batch(completions, golds, prepare, _judge, _limits(seconds, memory_mb), workers, unsafe)


def python_exec(
    completions: Sequence[str],
    golds: Sequence[Gold],
    *,
    seconds: float = SECONDS,
    memory_mb: int = 512,
    workers: int | None = None,
    unsafe: bool = False,
) -> list[bool | None]:
    """Whether each completion, run as a program, prints what it should.

    White space at the ends of lines and of the output does not count; the exit status must be 0. Standard error is
    thrown away. Every case is a run of its own, with the limits of its own.

    Args:
        completions: n texts.
        golds: n expected outputs. For programs that read, a mapping ``{"input": ..., "output": ...}``, a list of such
            mappings, or ``{"inputs": [...], "outputs": [...]}``, as mappings or as JSON.
        seconds, memory_mb, workers, unsafe: As for ``humaneval``.

    Returns:
        n verdicts. ``None`` where no output is expected.

    Raises:
        RewardError: The arguments are not two equally long batches, or a gold cannot be read.
        SandboxError: There is no sandbox here, and ``unsafe`` is False.
    """
    return _batch(completions, golds, _cases, _run_cases, _limits(seconds, memory_mb), workers, unsafe)


for _verifier in (humaneval, unit_tests, python_exec):
    _verifier.structured_golds = True  # pyright: ignore[reportFunctionMemberAccess] (see golds.py)


def extract_code(completion: str, entry_point: str | None = None) -> str:
    """The code of a completion, as described at the top of this module; ``""`` where there is none."""
    fences = list(_FENCE.finditer(completion))
    start = completion[: fences[0].start()] if fences else completion
    if not fences or re.match(r"\s*[ \t]\S", start):
        return start if start.strip() else ""
    blocks: list[tuple[str, str]] = []
    opened: re.Match[str] | None = None
    for fence in fences:
        if opened is None:
            opened = fence
        elif fence[1].startswith(opened[1]) and not fence[2]:
            blocks.append((opened[2].lower(), completion[opened.end() + 1 : fence.start()]))
            opened = None
    if opened is not None:  # cut off
        blocks.append((opened[2].lower(), completion[opened.end() + 1 :]))
    wanted = [code for _, code in blocks if entry_point and _defines(code, entry_point)]
    wanted = wanted or [code for language, code in blocks if language in _PYTHON] or [code for _, code in blocks]
    return wanted[-1] if wanted and wanted[-1].strip() else ""


def _defines(code: str, name: str) -> bool:
    return (
        re.search(rf"^(?:(?:async\s+)?def|class)\s+{re.escape(name)}\b|^{re.escape(name)}\s*=", code, re.M) is not None
    )


def _limits(seconds: float, memory_mb: int) -> sandbox.Limits:
    if not (math.isfinite(seconds) and seconds > 0 and memory_mb >= 64):
        raise RewardError(f"seconds must be positive and memory_mb at least 64, not {seconds} and {memory_mb}.")
    wall = WALL_PER_CPU_SECOND * seconds + 1
    return sandbox.Limits(cpu_seconds=math.ceil(seconds), wall_seconds=wall, memory_bytes=memory_mb << 20)


def _batch(
    completions: Sequence[str],
    golds: Sequence[Gold],
    prepare: Callable[[Any, str], Any],
    check: Callable[[str, Any, sandbox.Limits, sandbox.Engine], bool],
    limits: sandbox.Limits,
    workers: int | None,
    unsafe: bool,
) -> list[bool | None]:
    """Prepare each gold once, check each different pair once, a few at a time, and keep the order."""
    for name, batch in (("completions", completions), ("golds", golds)):
        if isinstance(batch, str | Mapping):
            raise RewardError(f"{name} is one {type(batch).__name__}: pass a list.")
    for i, completion in enumerate(completions):
        if not isinstance(completion, str):
            raise RewardError(f"completions[{i}] is a {type(completion).__name__}: pass it as text.")
    if len(completions) != len(golds):
        raise RewardError(f"{len(completions)} completions for {len(golds)} golds: pass one gold for each completion.")

    prepared: dict[str, Any] = {}
    pairs: list[tuple[str, str] | None] = []
    for i, (completion, gold) in enumerate(zip(completions, golds, strict=True)):
        key = gold if isinstance(gold, str) else repr(gold)
        if not gold or not key.strip():
            pairs.append(None)
            continue
        if key not in prepared:
            prepared[key] = prepare(gold, f"golds[{i}]")
        pairs.append((completion, key) if prepared[key] is not None else None)
    todo = list(dict.fromkeys(pair for pair in pairs if pair is not None))
    if not todo:
        return [None] * len(pairs)
    engine = sandbox.engine(unsafe)

    def verdict(pair: tuple[str, str]) -> bool:
        completion, key = pair
        try:
            return check(completion, prepared[key], limits, engine)
        except SandboxError:  # it has worked, but there was no process to be had just now: once more
            return check(completion, prepared[key], limits, engine)
        except RewardError as error:
            raise RewardError(f"golds[{pairs.index(pair)}] {error}") from error

    most = workers or min(MOST_WORKERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(min(len(todo), most)) as pool:  # an error cancels the checks that have not begun
        verdicts = dict(zip(todo, pool.map(verdict, todo), strict=True))
    return [None if pair is None else verdicts[pair] for pair in pairs]


def _parsed(gold: Any) -> Any:
    """A mapping or a list that is stored as text, as JSON or by ``str``; other text as it is."""
    if not isinstance(gold, str) or gold.lstrip()[:1] not in ("{", "["):
        return gold
    for read in (json.loads, ast.literal_eval):
        try:
            return read(gold.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return gold


# Tests


def _test(gold: Mapping[str, Any], where: str) -> _Test | None:
    test, entry_point = gold.get("test"), gold.get("entry_point")
    prompt, setup = gold.get("prompt") or "", gold.get("setup") or ""
    lines = [test] if isinstance(test, str) else list(test) if isinstance(test, list | tuple) else []
    if test is None or test == "":
        return None
    if not lines or not all(isinstance(text, str) for text in (*lines, prompt, setup)):
        raise RewardError(f"{where} is no test: pass a script, a list of statements, or a mapping with the key test.")
    if entry_point is not None and not (isinstance(entry_point, str) and entry_point.isidentifier()):
        raise RewardError(f"{where} has the entry_point {entry_point!r}, which is no name of a function.")
    script = "\n".join([setup, *lines] if setup else lines)
    # A prompt that ends with a signature needs a body to be a program.
    helpers = next((text for text in (prompt, prompt + "\n    pass\n") if not _syntax_error(text)), None)
    problem = "its prompt is not Python" if helpers is None else _syntax_error(script)
    if helpers is None or problem:
        raise RewardError(f"{where} is a broken test: {problem}.")
    return _Test(prompt, helpers, script, entry_point)


def _syntax_error(script: str) -> str:
    try:
        compile(script, "<test>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _judge(completion: str, test: _Test, limits: sandbox.Limits, engine: sandbox.Engine) -> bool:
    code = extract_code(completion, test.entry_point)
    if not code or len(code) > MOST_CODE:
        return False
    whole = test.entry_point is not None and _defines(code, test.entry_point)
    program = f"{test.prompt}\n{code}" if whole else test.prompt + code
    reply = _judged(program, test, limits, engine)
    if reply.startswith("broken: "):
        raise RewardError(f"is a broken test: {reply.removeprefix('broken: ')}.")
    return reply == "pass"


def _judged(program: str, test: _Test, limits: sandbox.Limits, engine: sandbox.Engine) -> str:
    """Return what the judge says: ``pass``, ``fail``, ``broken: ...``, or ``""`` when it said nothing in time."""
    with (
        sandbox.pipe() as (take_request, put_request),
        sandbox.pipe() as (take_reply, put_reply),
        sandbox.pipe() as (take_result, put_result),
    ):
        fds = f"{put_request.fileno()}, {take_reply.fileno()}, {put_result.fileno()}"
        judge = f"{_ROLES}\njudge({fds}, {test.helpers!r}, {test.test!r}, {test.entry_point!r})\n"
        candidate = f"{_ROLES}\ncandidate({take_request.fileno()}, {put_reply.fileno()}, {program!r})\n"
        judges, candidates = [put_request, take_reply, put_result], [take_request, put_reply]
        with (
            sandbox.started(judge, engine, limits, keep=judges) as first,
            sandbox.started(candidate, engine, limits, keep=candidates) as second,
        ):
            # Our copies would hide from either that the other has gone.
            for file in (*judges, *candidates):
                file.close()
            ready = time.monotonic() + sandbox.START_SECONDS
            first.wait_until_ready(ready)
            second.wait_until_ready(ready)
            reply, ended = sandbox.read(take_result, 1000, time.monotonic() + limits.wall_seconds)
            return reply.decode(errors="replace") if ended else ""


# Programs


def _cases(gold: Any, where: str) -> list[tuple[str, str]] | None:
    """(stdin, expected stdout) of each run; None where nothing is expected."""
    given = _parsed(gold)
    if isinstance(given, Mapping) and isinstance(given.get("outputs"), list):
        outputs = given["outputs"]
        inputs = given.get("inputs") or [""] * len(outputs)
        if isinstance(inputs, list) and len(inputs) == len(outputs):
            given = [{"input": typed, "output": printed} for typed, printed in zip(inputs, outputs, strict=True)]
    cases = list(given) if isinstance(given, list | tuple) else [given]
    if not cases or not all(isinstance(case, Mapping) and "output" in case for case in cases):
        # A text may look like JSON and yet be what is to be printed.
        cases = [{"output": gold}]
    pairs = [(case.get("input") or "", case["output"]) for case in cases]
    if not all(isinstance(text, str) for pair in pairs for text in pair):
        raise RewardError(f"{where} is no expected output: pass a text, or cases with the texts input and output.")
    return pairs if any(_lines(printed) for _, printed in pairs) else None


def _run_cases(completion: str, cases: list[tuple[str, str]], limits: sandbox.Limits, engine: sandbox.Engine) -> bool:
    code = extract_code(completion)
    if not code or len(code) > MOST_CODE:
        return False
    for typed, printed in cases:
        most = max(limits.output_bytes, 2 * len(printed.encode("utf-8", "replace")))
        result = sandbox.run_in(engine, code, typed, limits._replace(output_bytes=most))
        if result.stopped or result.code != 0:
            return False
        if _lines(result.stdout.decode("utf-8", "replace")) != _lines(printed):
            return False
    return True


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
