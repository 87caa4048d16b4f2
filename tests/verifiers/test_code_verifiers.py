"""Verifiers that run code: right code passes, wrong code and attacks on the harness do not, and nothing gets out."""

import ctypes
import gzip
import http.server
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import mechreward as mr
from mechreward.errors import RewardError, SandboxError
from mechreward.verifiers import code, humaneval, python_exec, sandbox, unit_tests
from mechreward.verifiers.sandbox import Engine, Limits

HERE = Path(__file__).parents[1]
TOKEN = uuid.uuid4().hex
ENGINES = [Engine.ROOT, Engine.USER] if hasattr(os, "geteuid") and os.geteuid() == 0 else [Engine.USER]
INSTALLED = shutil.which("bwrap") is not None
FAILURES = {engine: sandbox.examine(engine) if INSTALLED else "bwrap is not installed" for engine in ENGINES}
WORKING = [engine for engine, failure in FAILURES.items() if not failure]

needs_sandbox = pytest.mark.bwrap  # conftest.py leaves these out, with a warning, where there is none


def each_engine(test: Callable[..., None]) -> Callable[..., None]:
    return needs_sandbox(pytest.mark.parametrize("engine", WORKING, ids=lambda engine: engine.name.lower())(test))


@pytest.fixture(autouse=True)
def marked_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give our sandboxes a command line that ``left_over`` can tell from those of other test runs."""
    monkeypatch.setattr(sandbox, "_BOOT", f"{sandbox._BOOT}\n# {TOKEN}")
    yield
    assert not left_over()


def left_over(patience: float = 3.0) -> list[str]:
    """Processes of our sandboxes that are still there after a while."""
    until = time.monotonic() + patience
    while True:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if TOKEN.encode() in (folder / "cmdline").read_bytes():
                    found.append(folder.name)
            except OSError:
                continue
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.02)


def use(monkeypatch: pytest.MonkeyPatch, engine: Engine | None, why: str = "for a test") -> None:
    monkeypatch.setattr(sandbox, "_detect", lambda: (engine, why))


def rows() -> list[dict[str, str]]:
    with gzip.open(HERE / "data" / "humaneval.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def fenced(text: str, language: str = "python") -> str:
    return f"Here is the code:\n\n```{language}\n{text}\n```\n\nIt works."


def one(completion: str, gold: object, **options: float) -> bool | None:
    return unit_tests([completion], [gold], **options)[0]  # pyright: ignore[reportArgumentType]


# HumanEval


@needs_sandbox
def test_all_canonical_solutions_pass_and_keep_their_order():
    problems = rows()
    completions = [row["canonical_solution"] for row in problems]
    assert len(problems) == 164
    assert humaneval(completions, problems) == [True] * 164


@needs_sandbox
@pytest.mark.slow
def test_all_empty_bodies_fail():
    problems = rows()
    assert humaneval([""] * 164, problems) == [False] * 164
    assert humaneval(["    pass\n"] * 164, problems) == [False] * 164


@needs_sandbox
def test_humaneval_takes_continuations_whole_functions_and_fences_and_every_form_of_gold():
    row = next(row for row in rows() if row["entry_point"] == "decode_cyclic")  # its test uses a helper of the prompt
    body = row["canonical_solution"]
    whole = "def decode_cyclic(s: str):\n" + body
    wrong = "def decode_cyclic(s: str):\n    return s"
    no_helper = whole.replace("encode_cyclic(encode_cyclic(s))", "missing(s)")
    liar = "def encode_cyclic(s):\n    return s\n\n" + wrong  # makes its helper agree with it
    completions = [wrong, body, whole, fenced(whole), fenced(body), body + "```\nDone.", no_helper, liar, "I cannot."]
    right = [False, True, True, True, True, True, False, False, False]
    assert humaneval(completions, [row] * 9) == right
    assert humaneval(completions[:2], [json.dumps(row), str(row)]) == right[:2]


@needs_sandbox
def test_in_an_outcome_reward():
    row = rows()[0]
    reward = mr.OutcomeReward(humaneval, gold_column="row")
    texts = [row["canonical_solution"], "    return 3\n", row["canonical_solution"]]
    assert reward(["p"] * 3, texts, row=[row, json.dumps(row), None]) == [1.0, 0.0, None]


# Unit tests

RIGHT = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return a - b\n"
ADD = "assert add(2, 3) == 5\nassert add(-1, 1) == 0"
CHECK = "def check(candidate):\n    assert candidate(2, 3) == 5"

STACK = """
class Stack:
    def __init__(self, items=()):
        self.items = list(items)
    def push(self, item):
        self.items.append(item)
        return self
    def pop(self):
        if not self.items:
            raise IndexError("empty")
        return self.items.pop()
    def __len__(self):
        return len(self.items)
    def __getitem__(self, i):
        return self.items[i]
    def __repr__(self):
        return f"Stack({self.items})"
    def __eq__(self, other):
        return True
"""
STACK_TEST = """
from solution import Stack
def test_push():
    stack = Stack([1])
    stack.push(2).push((3, "x"))
    assert len(stack) == 3 and stack[1] == 2 and list(stack) == [1, 2, (3, "x")]
    assert stack.items == [1, 2, (3, "x")] and repr(stack) == "Stack([1, 2, (3, 'x')])"
    assert stack.pop() == (3, "x")
    assert hasattr(stack, "push") and not hasattr(stack, "peek")
def test_empty():
    try:
        Stack().pop()
    except IndexError as error:
        assert str(error) == "empty"
    else:
        assert False
"""
DATACLASS = "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int'\n"
IMPORTS = "import asyncio, collections, re, decimal, threading, heapq, bisect, itertools, multiprocessing\n"


@needs_sandbox
@pytest.mark.parametrize(
    ("completion", "gold", "verdict"),
    [
        (RIGHT, ADD, True),
        (WRONG, ADD, False),
        (fenced(RIGHT), ADD, True),
        (fenced(RIGHT, ""), ADD, True),
        (fenced(WRONG) + fenced(RIGHT, "py"), ADD, True),
        (fenced(RIGHT) + fenced("print(add(1, 2))"), {"test": ADD, "entry_point": "add"}, True),
        (fenced(RIGHT) + fenced("pip install x", "bash"), ADD, True),
        (fenced(RIGHT).partition("\n```\n")[0], ADD, True),  # cut off
        (RIGHT, ADD.splitlines(), True),
        (RIGHT, str(ADD.splitlines()), True),
        (RIGHT, {"test": ADD.splitlines(), "setup": "import math"}, True),
        (RIGHT, json.dumps({"test": ADD}), True),
        (RIGHT, {"test": CHECK, "entry_point": "add"}, True),
        (WRONG, {"test": CHECK, "entry_point": "add"}, False),
        ("def sum(xs):\n    return 7", {"test": "assert sum([1, 2]) == 7", "entry_point": "sum"}, True),
        (STACK, STACK_TEST, True),
        (STACK.replace("append(item)", "insert(0, item)"), STACK_TEST, False),
        (STACK, "assert Stack() == Stack()", False),  # instances cannot be compared
        (STACK, "assert not Stack() != 3", False),
        ("", ADD, False),
        ("```python\n```", ADD, False),
        ("I do not know.", ADD, False),
        ("def add(a, b:\n", ADD, False),
        ("x" * 300_000, ADD, False),
        (RIGHT + "\x00", ADD, False),
        (RIGHT + "# \ud800 \U0001f600", ADD, False),  # no text in UTF-8: Python does not take it either
        ("import numpy\n" + RIGHT, ADD, False),  # the standard library alone
        (DATACLASS + RIGHT, ADD, True),
        (IMPORTS + RIGHT, ADD, True),
        ("import sys\nprint('noise', 'more', file=sys.stderr)\n" + RIGHT, ADD, True),
        (RIGHT, "", None),
        (RIGHT, None, None),
        (RIGHT, [], None),
        (RIGHT, {"test": ""}, None),
        (RIGHT, {"tests": ADD}, None),
    ],
)
def test_unit_tests(completion: str, gold: object, verdict: bool | None):
    assert one(completion, gold) is verdict


@needs_sandbox
def test_plain_values_come_back_as_they_are():
    values = r"""[None, True, -1, 2**53, -2**70, 10**5000, 0.1, -0.0, float("inf"), 1e-320, "a\ud800\u00e9\U0001f600",
    b"x\x00", bytearray(b"y"), 1 + 2j, (1, [2, (3,)]), {1, 2}, frozenset({(1, 2)}), {(1, 2): {"a": [None]}, 3: 4}, [],
    (), {}, set(), [["o", 1]], ["i", "ff"]]"""
    test = f"values = {values}\nfor value in values:\n    back = same(value)\n    assert type(back) is type(value)\n"
    test += "    assert back == value\nassert repr(same(-0.0)) == '-0.0' and same(float('nan')) != same(float('nan'))\n"
    test += "assert repr(same(a=[(1, {2: 3})])) == repr([(1, {2: 3})])\n"
    assert one("def same(value=None, a=None):\n    return value if a is None else a", test) is True
    assert one("def same(value=None, a=None):\n    return a", test) is False
    generous = "import collections\ndef f():\n    return collections.Counter('aab'), iter([1, 2])"
    assert one(generous, "c, i = f()\nassert type(c) is dict and c == {'a': 2, 'b': 1} and list(i) == [1, 2]") is True


@needs_sandbox
def test_arguments_are_copies():
    cheat = "def double(xs):\n    xs.clear()\n    return []"  # would pass where the test reads its list afterwards
    assert one(cheat, "xs = [1, 2]\nassert double(xs) == [x * 2 for x in xs]") is False


@needs_sandbox
def test_a_failure_that_the_test_catches_is_still_a_failure():
    gone = "import os\ndef add(a, b):\n    if a == 9:\n        os._exit(0)\n    return a + b"
    test = f"{ADD}\ntry:\n    add(9, 9)\nexcept BaseException:\n    pass"
    assert one(gone, test) is False
    assert one(RIGHT, test) is True


@needs_sandbox
@pytest.mark.parametrize(
    ("gold", "says"),
    [
        ("assert add(1, 2 == 3", "SyntaxError"),
        ("return 3", "SyntaxError"),
        ("import pytest\nassert add(1, 2) == 3", "ModuleNotFoundError"),
        ("assert 1 + 1 == 2", "it never calls the completion"),
        (CHECK, "it never calls the completion"),
        ("assert 1 + 1 == 3\nadd(1, 2)", "AssertionError"),
        ("assert add(lambda: 1, 2) == 3", "a function cannot be passed"),
        ({"test": 7}, "is no test"),
        ({"test": ADD, "prompt": "def add(a, b"}, "its prompt is not Python"),
        ({"test": ADD, "entry_point": "a b"}, "entry_point"),
        ([1, 2], "is no test"),
    ],
)
def test_a_broken_test_raises_one_sentence(gold: object, says: str):
    with pytest.raises(RewardError, match=rf"golds\[1\] .*{says}"):
        unit_tests([RIGHT, RIGHT], [ADD, gold])  # pyright: ignore[reportArgumentType]


def test_arguments_that_are_no_batches_raise():
    for verifier in (unit_tests, humaneval, python_exec):
        for completions, golds in (("x", ["x"]), (["x"], "x"), ([None], ["x"]), (["x"], []), (["x"], {"test": "x"})):
            with pytest.raises(RewardError):
                verifier(completions, golds)  # pyright: ignore[reportArgumentType]
        assert verifier([], []) == []
        for options in ({"seconds": 0}, {"seconds": float("nan")}, {"memory_mb": 1}):
            with pytest.raises(RewardError, match="seconds must be"):
                verifier(["x"], ["x"], **options)
    with pytest.raises(RewardError, match=r"golds\[0\] is no HumanEval row"):
        humaneval(["x"], ["assert f() == 1"])


@needs_sandbox
def test_equal_pairs_are_checked_once_and_the_order_is_kept(monkeypatch: pytest.MonkeyPatch):
    real, seen = code._judged, []
    monkeypatch.setattr(code, "_judged", lambda *given: seen.append(given[0]) or real(*given))
    slow = "import time\ntime.sleep(0.5)\n" + RIGHT
    completions = [slow, WRONG, RIGHT, "", WRONG, slow, "def add(a, b):\n    return 5 * (a > 0)"]
    assert unit_tests(completions, [ADD] * 7, workers=3) == [True, False, True, False, False, True, True]
    assert len(seen) == 4


# Programs


@needs_sandbox
@pytest.mark.parametrize(
    ("completion", "gold", "verdict"),
    [
        ("print('hello')", "hello", True),
        ("print('hello ')\nprint()", "hello\n", True),
        ("print('Hello')", "hello", False),
        ("print('a')\nprint('b')", "a\nb", True),
        ("print('a b')", "a\nb", False),
        ("print('[1, 2]')", "[1, 2]", True),
        ("print('{}')", "{}", True),
        ("print('\u00e9\U0001f600')", "\u00e9\U0001f600", True),
        ("print(int(input()) * 2)", {"input": "4", "output": "8"}, True),
        ("print(int(input()) * 2)", [{"input": "4", "output": "8"}, {"input": "5\n", "output": "10\n"}], True),
        ("print(8)", json.dumps({"inputs": ["4", "5"], "outputs": ["8", "10"]}), False),
        ("if __name__ == '__main__':\n    print(1)", "1", True),
        ("print('hello')\n1 / 0", "hello", False),
        ("print('hello')\nimport sys; sys.exit(0)", "hello", True),
        ("import os; os._exit(0)", "hello", False),
        ("import os; os.write(1, b'hello'); os._exit(0)", "hello", True),
        ("print('hello', flush=True)\nimport os; os.kill(os.getpid(), 9)", "hello", False),
        ("import sys\nprint('hello', file=sys.stderr)", "hello", False),
        (fenced("print('hello')"), "hello", True),
        ("", "hello", False),
        ("print()", " \n", None),
        ("print()", None, None),
        ("print()", [{"output": ""}], None),
    ],
)
def test_python_exec(completion: str, gold: object, verdict: bool | None):
    assert python_exec([completion], [gold]) == [verdict]  # pyright: ignore[reportArgumentType]


def test_a_gold_of_other_types_is_no_output():
    for gold in ({"output": 3}, {"inputs": ["a"], "outputs": []}, [3]):
        with pytest.raises(RewardError, match="is no expected output"):
            python_exec(["print(3)"], [gold])  # pyright: ignore[reportArgumentType]


# Attacks on the harness

GOLD = """
cases = [((2, 3), 5), ((12000, 345), 12345), ((0.5, 0.25), 0.75)]
assert all(map(lambda case: add(*case[0]) == case[1], cases)) and not abs(add(1, 2) - 3) > 1e-6
assert add(12000, 345) == 12345
assert 5 == add(2, 3) and add(2, 3) in [5] and not add(2, 3) != 5
try:
    assert isinstance(add(1, 1), int), "not a number"
    assert add(1, 1) == 2
except (ValueError, TypeError):
    assert False
"""


def attacks() -> dict[str, str]:
    _, *parts = (HERE / "data" / "harness_attacks.txt").read_text(encoding="utf-8").split("\n=== ")
    return {name: text.replace("CANARY", TOKEN) for name, _, text in (part.partition("\n") for part in parts)}


@needs_sandbox
def test_the_attacked_test_can_be_passed():
    assert one(RIGHT, GOLD) is True
    assert len(attacks()) >= 20


@needs_sandbox
@pytest.mark.parametrize(
    "test",
    [
        "assert add(2, 3) == 5",
        "assert 5 == add(2, 3)",
        "assert add(2, 3) in (5,)",
        "assert not add(2, 3) != 5",
        "assert add(2, 3)",
        "assert all(map(lambda pair: add(*pair) == sum(pair), [(2, 3), (4, 5)]))",
        "for pair in map(lambda pair: add(*pair), [(2, 3)]):\n    assert pair == 5",
        "assert isinstance(add(2, 3), int)\nassert add(2, 3) == 5",
        "assert {5: True}[add(2, 3)]",
        "assert sorted([add(2, 3), 5]) == [5, 5]",
    ],
)
def test_attacks_fail_on_the_weakest_of_tests(test: str):
    names = ["equal to everything", "a lying class", "a metaclass", "stop iteration ends a map early"]
    names += ["generator exit", "exit in the call", "an object with a length"] + ["a number equal to everything"] * (
        test != "assert add(2, 3)"
    )
    assert unit_tests([*(attacks()[name] for name in names), RIGHT], [test] * (len(names) + 1)) == [
        *[False] * len(names),
        True,
    ]


@needs_sandbox
@pytest.mark.parametrize("name", attacks())
def test_attacks_fail_and_leave_nothing(name: str):
    assert one(attacks()[name], GOLD, seconds=1) is False
    assert not left_over()
    library = os.path.dirname(os.__file__)
    for folder in (tempfile.gettempdir(), "/dev/shm", os.getcwd(), "/", "/var/tmp", library):
        assert not (Path(folder) / f"mechreward-{TOKEN}").exists()


@needs_sandbox
def test_attacks_do_not_disturb_their_neighbours():
    hostile = [attacks()[name] for name in ("fork bomb", "kill everything", "the verdict on every pipe", "crash")]
    completions = [text for attack in hostile for text in (attack, f"# {len(attack)}\n{RIGHT}")]
    assert unit_tests(completions, [GOLD] * 8, workers=4, seconds=1.5) == [False, True] * 4


# The sandbox


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_an_engine_that_starts_keeps_its_promises(engine: Engine):
    # Without this, a sandbox that has lost one of them would only be passed over, and the tests with it.
    assert FAILURES[engine] in ("", "bwrap is not installed") or "did not start" in FAILURES[engine]


@each_engine
def test_engines_give_the_same_verdicts(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    use(monkeypatch, engine)
    problems = rows()[:3]
    bodies = [row["canonical_solution"] for row in problems]
    assert humaneval([*bodies, "    pass"], [*problems, problems[0]]) == [True, True, True, False]
    names = ["fork bomb", "leave a child and go", "kill everything", "search the files", "a way out", "crash"]
    names += ["other processes", "new namespaces", "another user"]
    assert unit_tests([attacks()[name] for name in names], [GOLD] * 9, seconds=1) == [False] * 9
    assert python_exec(["print(input())"], [{"input": "x", "output": "x"}]) == [True]


@each_engine
def test_no_network(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"reached")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/x"
    program = (
        "import urllib.request\ntry:\n"
        f"    print(urllib.request.urlopen({address!r}, timeout=5).read().decode())\n"
        "except OSError as error:\n    print('blocked')"
    )
    try:
        use(monkeypatch, engine)
        assert python_exec([program], ["blocked"]) == [True]
        assert not asked
        # The server is there, and the program finds it, where nothing is in its way.
        told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert told.stdout.strip() == "reached" and asked == ["/x"]
    finally:
        server.shutdown()
        server.server_close()


@each_engine
def test_nothing_of_the_machine_to_talk_to(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    key, libc = random.randrange(1 << 20, 1 << 30), ctypes.CDLL(None)
    program = (
        f"import ctypes, socket\nprint(ctypes.CDLL(None).shmget({key}, 0, 0) >= 0)\n"
        f"print(socket.socket(socket.AF_UNIX).connect_ex('\\x00{TOKEN}') == 0)"
    )
    segment = libc.shmget(key, 4096, 0o1666)
    try:
        with socket.socket(socket.AF_UNIX) as abstract:
            abstract.bind(f"\0{TOKEN}")
            abstract.listen()
            use(monkeypatch, engine)
            assert python_exec([program], ["False\nFalse"]) == [True]
            found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
            assert found.stdout.split() == ["True", "True"]
    finally:
        libc.shmctl(segment, 0, None)


LOOK_AROUND = """
import json, os, sys
def attempt(function):
    try:
        return function()
    except OSError:
        return None
def write(path):
    with open(path, "w") as file:
        file.write("x")
    return path
PLACES = ("/x", "/usr/x", os.path.dirname(os.__file__) + "/x", sys.executable, "/dev/x", "/etc/x", SECRET)
print(json.dumps({
    "secret": attempt(lambda: open(SECRET).read()),
    "environment": dict(os.environ),
    "home": attempt(lambda: os.listdir(HOME)),
    "written": [p for p in PLACES if attempt(lambda: write(p))],
    "tmp": [os.listdir("/tmp"), os.getcwd(), attempt(lambda: write("/tmp/x"))],
    "programs": [p for p in ("/bin/sh", "/usr/bin/env", "/usr/bin/id") if os.path.exists(p)],
    "packages": [p for p in sys.path if "-packages" in p] + [p for p in PACKAGES if attempt(lambda: os.listdir(p))],
    "proc": os.path.exists("/proc/self"),
    "user": os.getuid(),
    "fds": [fd for fd in range(64) if attempt(lambda: os.fstat(fd))],
}))
"""


@each_engine
def test_files_and_environment(engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    use(monkeypatch, engine)
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    secret = tmp_path / "file"
    secret.write_text("secret-text")
    names = {"SECRET": str(secret), "HOME": os.path.expanduser("~"), "PACKAGES": sandbox._files()[1]}
    found = sandbox.run("".join(f"{name} = {value!r}\n" for name, value in names.items()) + LOOK_AROUND)
    seen = json.loads(found.stdout)
    assert seen["secret"] is None and "secret" not in json.dumps({**seen, "secret": ""}).replace('"secret"', "")
    assert "HF_TOKEN" not in seen["environment"] and seen["environment"]["HOME"] == "/tmp"
    # Of the home folder, at most the way to an interpreter that is installed there.
    inside = [Path(path) for path in sandbox._files()[0]]
    for name in seen["home"] or []:
        assert any(path.is_relative_to(Path.home() / name) for path in inside)
    assert seen["written"] == [] and secret.read_text() == "secret-text"
    assert seen["tmp"] == [[], "/tmp", "/tmp/x"]
    assert seen["programs"] == [] and seen["packages"] == [] and not seen["proc"]
    assert seen["user"] != 0
    assert seen["fds"] == [0, 1, 2]


LIMITS = {
    "enough memory": ("print(len(bytearray(100 << 20)))", {}, (b"104857600\n", 0, "")),
    "memory": ("print(len(bytearray(100 << 20)))", {"memory_bytes": 90 << 20}, (b"", 1, "")),
    "cpu": ("while True:\n    pass", {"cpu_seconds": 1, "wall_seconds": 60.0}, (b"", 137, "")),
    "wall": ("import time\nprint(1, flush=True)\ntime.sleep(60)", {"wall_seconds": 0.5}, (b"1\n", None, "time")),
    "wall, silent": ("import os, time\nos.close(1)\ntime.sleep(60)", {"wall_seconds": 0.5}, (b"", None, "time")),
    "output": ("while True:\n    print('x' * 99)", {"output_bytes": 500}, ((b"x" * 99 + b"\n") * 5, None, "output")),
    "enough output": ("print('x' * 499)", {"output_bytes": 500}, (b"x" * 499 + b"\n", 0, "")),
    "file": (
        "f = open('/tmp/x', 'wb', 0)\nprint(f.write(b'x' * 5000))\ntry:\n    f.write(b'x')\n"
        "except OSError as error:\n    print(error.errno)",
        {"file_bytes": 4096},
        (b"4096\n27\n", 0, ""),
    ),
    "folder": (
        "n = 0\ntry:\n    for n in range(99):\n        open(f'/tmp/{n}', 'wb', 0).write(bytes(1 << 20))\n"
        "except OSError:\n    pass\nimport os\nsize = sum(os.stat(f'/tmp/{i}').st_size for i in range(n))\n"
        "print(n < 9 and size <= 4 << 20)",
        {"temp_bytes": 4 << 20},
        (b"True\n", 0, ""),
    ),
    "processes": (
        "import os, time\nn = 0\ntry:\n    while n < 99:\n        if not os.fork():\n            time.sleep(60)\n"
        "        n += 1\nexcept OSError:\n    print(n <= 5, flush=True)\n    os._exit(3)",
        {"processes": 5},
        (b"True\n", 3, ""),
    ),
    "open files": (
        "a = []\ntry:\n    while True:\n        a.append(open('/dev/null'))\nexcept OSError:\n    print(len(a))",
        {"open_files": 20},
        (b"17\n", 0, ""),
    ),
    "raised": (
        "import resource as r\ntry:\n    r.setrlimit(r.RLIMIT_CPU, (99, 99))\nexcept ValueError:\n    print(1)",
        {},
        (b"1\n", 0, ""),
    ),
}


@each_engine
@pytest.mark.parametrize("name", LIMITS)
def test_limits(engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch):
    use(monkeypatch, engine)
    program, limits, result = LIMITS[name]
    assert sandbox.run(program, limits=Limits(**limits)) == result


GRANDCHILD = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
time.sleep({})
"""


@each_engine
@pytest.mark.parametrize("seconds", [0.1, 600])
def test_grandchildren_die(engine: Engine, seconds: float, monkeypatch: pytest.MonkeyPatch):
    use(monkeypatch, engine)
    found = sandbox.run(GRANDCHILD.format(seconds), limits=Limits(wall_seconds=1.0))
    assert found.stopped == ("time" if seconds > 1 else "")
    assert not left_over()


@each_engine
def test_a_sandbox_dies_with_the_trainer(engine: Engine, tmp_path: Path):
    script = tmp_path / "trainer.py"
    script.write_text(
        "from mechreward.verifiers import sandbox\n"
        f"sandbox._BOOT += '\\n# {TOKEN}'\n"
        f"program = {GRANDCHILD.format(600)!r}\n"
        f"sandbox.run_in(sandbox.Engine.{engine.name}, program, '', sandbox.Limits(wall_seconds=600))\n"
    )
    source = str(Path(mr.__file__).parents[1])
    trainer = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": source})
    try:
        until, seen = time.monotonic() + 60, list[str]()
        while len(seen) < 4 and time.monotonic() < until:
            seen = left_over(0.0)
        assert len(seen) >= 4  # of one look: a second one may meet a process that is just gone
    finally:
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
    assert not left_over()


def test_no_sandbox_means_a_refusal(monkeypatch: pytest.MonkeyPatch):
    use(monkeypatch, None, "bwrap is not installed")
    for verifier, gold in ((unit_tests, ADD), (python_exec, "1"), (humaneval, rows()[0])):
        with pytest.raises(SandboxError, match=r"no sandbox on this machine.*bwrap is not installed.*unsafe=True"):
            verifier([RIGHT], [gold])
    with pytest.raises(SandboxError):
        sandbox.run("print(1)")


def test_detection_refuses_what_does_not_keep_its_promises(monkeypatch: pytest.MonkeyPatch):
    detect = sandbox._detect.__wrapped__
    monkeypatch.setattr(sandbox, "examine", lambda candidate: "there is a network")
    monkeypatch.setattr(sandbox.sys, "platform", "linux")
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: "/usr/bin/bwrap")
    found, why = detect()
    assert found is None and "bubblewrap in a user namespace: there is a network" in why
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    assert detect() == (None, "bwrap is not installed")
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    assert detect() == (None, "it needs Linux, and this is darwin")


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_an_examination_sees_that_there_is_no_sandbox():
    assert sandbox.examine(Engine.UNSAFE) == "processes of the machine are visible"
    assert not left_over()


BREAK = {
    "processes of the machine are visible": ("--unshare-pid", ""),
    "files of the machine are visible": ("--remount-ro / --chdir", "--ro-bind /var /var --remount-ro / --chdir"),
    "the file system can be written": ("--remount-ro / --chdir", "--chmod 0777 / --chdir"),
    "there is no temporary folder": ("--chdir /tmp", "--remount-ro /tmp --chdir /tmp"),
}


@each_engine
@pytest.mark.parametrize("promise", BREAK)
def test_an_examination_sees_a_broken_promise(engine: Engine, promise: str, monkeypatch: pytest.MonkeyPatch):
    kept, broken = BREAK[promise]
    command = " ".join(sandbox._bubblewrap(engine, Limits()))
    assert command.count(kept) == 1
    monkeypatch.setattr(sandbox, "_bubblewrap", lambda *_: command.replace(kept, broken).split())
    assert sandbox.examine(engine) == promise


@each_engine
def test_an_examination_sees_that_processes_are_not_limited(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    assert sandbox._BOOT.count("    limit(config)\n") == 1
    monkeypatch.setattr(sandbox, "_BOOT", sandbox._BOOT.replace("    limit(config)\n", ""))
    assert sandbox.examine(engine) == "processes are not limited"


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
def test_unsafe_still_limits_and_ends_the_group(monkeypatch: pytest.MonkeyPatch):
    use(monkeypatch, None)
    before = set(Path(tempfile.gettempdir()).glob("mechreward-*"))
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    with pytest.warns(RuntimeWarning, match="without a sandbox, as you asked"):
        assert unit_tests([RIGHT, WRONG], [ADD, ADD], unsafe=True) == [True, False]
        assert python_exec(["import os\nprint('HF_TOKEN' in os.environ)"], ["False"], unsafe=True) == [True]
        names = ["exit in the call", "equal to everything", "the verdict on every pipe", "busy for ever"]
        assert unit_tests([attacks()[name] for name in names], [GOLD] * 4, seconds=1, unsafe=True) == [False] * 4
        memory = Limits(memory_bytes=90 << 20)
        assert sandbox.run("x = bytearray(100 << 20)", limits=memory, unsafe=True).code == 1
        for seconds in (0.1, 600):
            grandchild = GRANDCHILD.format(seconds).replace("os.setsid()", "pass")  # one that leaves the group lives on
            sandbox.run(grandchild, limits=Limits(wall_seconds=1.0), unsafe=True)
            assert sys.platform != "linux" or not left_over()
    assert set(Path(tempfile.gettempdir()).glob("mechreward-*")) <= before


@needs_sandbox
def test_a_sandbox_that_fails_to_start_is_no_verdict(monkeypatch: pytest.MonkeyPatch):
    sandbox.engine()
    monkeypatch.setattr(sandbox, "_BOOT", "import sys; sys.exit(1)")
    with pytest.raises(SandboxError, match="did not start"):
        one(RIGHT, ADD)


@needs_sandbox
def test_many_threads_at_once():
    results: list[list[bool | None]] = []
    batch = [RIGHT, WRONG, "import os; os._exit(0)"]
    threads = [threading.Thread(target=lambda: results.append(unit_tests(batch, [ADD] * 3))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[True, False, False]] * 4


@needs_sandbox
def test_no_file_descriptor_is_left_open():
    unit_tests([RIGHT], [ADD])
    before = len(os.listdir("/proc/self/fd"))
    unit_tests([RIGHT, WRONG, "import os; os._exit(1)"], [ADD] * 3)
    python_exec(["print(1)", "while True: print(1)"], ["1", "1"])
    assert len(os.listdir("/proc/self/fd")) == before


def test_importing_the_verifiers_stays_light():
    source = str(Path(mr.__file__).parents[1])
    heavy = "torch numpy sympy ctypes".split()
    program = f"import sys, mechreward.verifiers\nprint([m for m in {heavy} if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": source}
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert found.stdout.strip() == "[]", found.stderr
