"""Verifiers: hand-worked verdicts, and that nothing a model writes raises, hangs or leaves a process behind."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from decimal import ROUND_HALF_DOWN, ROUND_HALF_UP, Decimal, localcontext
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechreward.errors import RewardError
from mechreward.verifiers import _sympy, exact_match, gsm8k, math_boxed
from mechreward.verifiers import math as verifiers

SRC = str(Path(verifiers.__file__).parents[2])


def boxed(answer: str) -> str:
    return f"So the answer is $\\boxed{{{answer}}}$."


def one(completion: str, gold: str | None, **options: bool) -> bool | None:
    return math_boxed([completion], [gold], **options)[0]


@pytest.mark.parametrize(
    ("answer", "gold", "verdict"),
    [
        ("15", "15", True),
        ("15", "16", False),
        ("1,234", "1234", True),
        ("1{,}234", "1234", True),
        ("1,234", "1,235", False),
        ("\\$18.00", "18", True),
        ("$18$", "18", True),
        ("18.", "18", True),
        ("-3", "\N{MINUS SIGN}3", True),
        ("-3", "3", False),
        ("0.1", "0.10", True),
        ("0.3333333", "0.333333", True),  # of two decimals the longer one is the value
        ("0.333333", "0.3333333", True),
        ("0.333334", "0.3333333", False),
        ("0.33333", "0.333333", False),  # short ones are exact
        ("3.14", "3.1", False),
        ("3.141593", "3.141592653589793", True),
        ("3.141592", "3.141592653589793", False),
        ("0.12345679", "0.123456789", True),
        (r"\{3.141593,2\}", r"\{2,3.141592653589793\}", True),
        (r"\{3.141592,2\}", r"\{2,3.141592653589793\}", False),
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac12", "1/2", True),
        ("1/2", "0.5", True),
        ("0.5", r"\dfrac{1}{2}", True),
        ("1 1/2", "11/2", False),
        (r"\frac{1}{3}", "0.5", False),
        (r"50\%", "50%", True),
        (r"50\%", "0.5", True),
        (r"5\%", "50", False),
        (r"\{1,2\}", r"\{2,1\}", True),
        (r"\{1,2\}", r"\{1,3\}", False),
        ("[0,1)", "[0, 1)", True),
        ("[0,1)", "[0,1]", False),
        (r"[2,3]\cup[0,1]", r"[0,1]\cup[2,3]", True),
        ("(1,2)", "(2,1)", False),
        ("x=5", "5", True),
        ("(x+1)^2", "x^2+2x+1", True),
        ("(x+1)^2", "x^2+x+1", False),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        (r"2\pi", r"\pi", False),
        (r"18 \text{ dollars}", "18", True),
        ("2^{10}", "1024", True),
        ("2^{3^2}", "512", True),
        ("9^{9^{9^9}}", "9^{9^{9^9}}", True),  # the same text needs no sums
        ("9^{9^{9^9}}", "9^{9^9}", False),
        ("x", "red", False),
        ("Red", "red", True),
        (r"\text{red}", "red", True),
        ("red", r"\text{Red}", True),
        ("(A)", r"\text{(A)}", True),
        ("A", r"\text{(A)}", True),
        ("B", r"\text{(A)}", False),
        ("red", "5", False),
        ("", "5", False),
        (r"\frac{1}", "1", False),
    ],
)
def test_math_boxed_answers(answer, gold, verdict):
    assert one(boxed(answer), gold) is verdict
    assert one(boxed(answer), f"By symmetry the result is \\boxed{{{gold}}}.") is verdict


@pytest.mark.parametrize(
    ("completion", "gold", "verdict"),
    [
        (r"first \boxed{3}, no: \boxed{4}", "4", True),
        (r"first \boxed{3}, no: \boxed{4}", "3", False),
        (r"\boxed{4} and then \boxed{unfinish", "4", True),
        (r"\boxed{4} \boxed{}", "4", False),
        (r"\boxed{\frac{\sqrt{4}}{2}}", "1", True),
        (r"\boxed{a \boxed{7}}", "7", True),
        (r"\boxed{\{1,2\}}", r"\{1,2\}", True),
        (r"\boxed{\left\{3\right.}", "9", False),
        (r"x\\\boxed{5}", "5", True),
        (r"\fbox{5}", "5", True),
        (r"\boxed 5.", "5", True),
        ("\\boxed{5}\n#### 6", "5", True),
        ("12+3=15.\n#### 15", "15", True),
        ("#### 14\n#### 15", "15", True),
        ("#### 15\nI hope this helps.", "15", True),
        ("#### Step 1\nWe add. The answer is 15", "15", True),
        ("so it is #### 1,500", "1500", True),
        (" I am not sure.\n#### unknown", "unknown", True),
        (" I am not sure.\n#### unknown", "15", False),
        ("\n#### 15", "unknown", False),
        ("#### \\frac{1}{2}", "0.5", True),
        ("The answer is 15.", "15", True),
        ("The answer is 15.", "16", False),
        ("We get $x^2=4$, so $x=2$.", "2", True),
        ("15", "15", True),
        ("red", "Red ", True),
        ("The colour is red", "red", False),
        ("", "15", False),
        ("no idea", "15", False),
    ],
)
def test_math_boxed_finds_the_answer(completion, gold, verdict):
    assert one(completion, gold) is verdict


def test_strict_counts_only_a_box():
    completions = ["#### 15", "The answer is 15.", "15", r"\boxed{15}", r"\boxed{15", r"\boxed{16}"]
    assert math_boxed(completions, ["15"] * 6, strict=True) == [False, False, False, True, False, False]
    assert math_boxed(completions, ["15"] * 6) == [True, True, True, True, True, False]
    assert one(r"\boxed{18}", "9+9=18\n#### 18", strict=True) is True


@pytest.mark.parametrize(
    ("gold", "verdict"),
    [
        ("She sells 16 - 3 - 4 = 9 eggs.\nShe makes 9 * 2 = $18.\n#### 18", True),
        ("18 dollars", True),
        ("The total is $18$ dollars.", True),
        ("The total is 19.", False),
        ("", None),
        (None, None),
        ("  \n", None),
        (r"\boxed{}", None),
        ("...", None),
        ("$$", None),
        ("\\boxed{" + "9" * 501 + "}", None),
        (r"The limit is close to \q.", None),  # LaTeX in a sentence, but nothing to compare with
    ],
)
def test_golds(gold, verdict):
    assert one("#### 18", gold) is verdict
    # A gold without an answer has none whatever the completion says.
    assert (one("", gold) is None) == (verdict is None)


@pytest.mark.parametrize(
    ("completion", "gold", "verdict"),
    [
        ("9*2=18.\n#### 18", "She makes $18.\n#### 18", True),
        ("#### 19", "#### 18", False),
        ("#### 18\n#### 19", "#### 19", True),
        ("#### 18\n#### 19", "#### 18", False),
        ("#### 18\n#### done", "#### 18", True),
        ("#### $1,800.00", "#### 1800", True),
        ("#### \\$18", "18", True),
        ("#### 18.", "18", True),
        ("#### 18.00 dollars", "18", True),
        ("#### 50%", "#### 50", True),
        ("#### 50%", "50%", True),
        ("#### 0.5", "#### 50", False),
        ("#### -5", "-5", True),
        ("#### 5", "-5", False),
        ("####5", "5", True),
        ("#### 1.2.3", "1.2", False),
        ("#### five", "5", False),
        ("The answer is 18", "18", False),
        (r"\boxed{18}", "18", False),
        ("#### " + "9" * 1_000_000, "18", False),
        ("#### 18", "$18", True),
        ("#### 18", "unknown", None),
        ("#### 18", "#### unknown", None),
        ("#### 18", "", None),
        ("#### 18", None, None),
    ],
)
def test_gsm8k(completion, gold, verdict):
    assert gsm8k([completion], [gold]) == [verdict]


@pytest.mark.parametrize(
    ("completion", "gold", "verdict"),
    [
        ("I think.\n#### New  York ", "new york", True),
        ("Paris", "#### paris", True),
        (r"\boxed{Paris}", "\\boxed{ PARIS}", True),
        ("It is Paris", "Paris", False),
        ("0.50", "0.5", False),
        ("", "x", False),
        ("x", "", None),
        ("x", None, None),
        ("x", " \n", None),
    ],
)
def test_exact_match(completion, gold, verdict):
    assert exact_match([completion], [gold]) == [verdict]


@pytest.mark.parametrize("verify", [math_boxed, gsm8k, exact_match])
def test_wrong_arguments_are_named(verify):
    assert verify([], []) == []
    with pytest.raises(RewardError, match="2 completions for 1 golds"):
        verify(["a", "b"], ["a"])
    with pytest.raises(RewardError, match=r"golds\[1\] is a int"):
        verify(["a", "b"], ["a", 3])
    with pytest.raises(RewardError, match=r"completions\[0\] is a NoneType"):
        verify([None], ["a"])
    with pytest.raises(RewardError, match="completions is one string"):
        verify("a", ["a"])


BOMBS = [
    boxed("9^{9^{9^9}}"),
    boxed("9^9^9^9"),
    boxed("9**9**9**9"),
    boxed("2^{99999999999}"),
    boxed("x^{9^{99}}"),
    boxed("9^{999,999,999}"),
    boxed("999999999!"),
    boxed("((9!)!)!"),
    boxed("9!!!!"),
    boxed("10^{100!}"),
    boxed("(" * 200 + "1" + ")" * 200),
    boxed("\\frac{1}{" * 100 + "2" + "}" * 100),
    boxed("9" * 1_000_000),
    "\\boxed{" * 140_000,
    "\\boxed{" + "{" * 1_000_000,
    "#### " + "9" * 1_000_000,
    "####\n" * 200_000,
    "9" * 1_000_000,
    "$" * 1_000_000,
    "\\" * 1_000_000,
    "answer is $" + "x" * 1_000_000,
    "The answer is " + "9^" * 5_000,
    " " * 1_000_000,
    "\x00\ud800\N{PILE OF POO}" * 1_000,
]


def test_bombs_are_wrong_and_cheap():
    start = time.monotonic()
    assert math_boxed(BOMBS, ["7919"] * len(BOMBS)) == [False] * len(BOMBS)
    assert math_boxed(BOMBS, [r"\frac{7}{3}"] * len(BOMBS)) == [False] * len(BOMBS)
    assert gsm8k(BOMBS, ["7919"] * len(BOMBS)) == [False] * len(BOMBS)
    assert exact_match(BOMBS, ["7919"] * len(BOMBS)) == [False] * len(BOMBS)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("harmless", ["e^{x^2}", "2^{2^n}", "(x^{10})^{10}", "2^{1000}", "10!", "5!!", "2^{2^{10}}"])
def test_ordinary_powers_are_no_bombs(harmless):
    assert not verifiers._explodes(verifiers._Answer(harmless, False))


@pytest.fixture
def no_filter(monkeypatch):
    """Let bombs through to the worker, with nothing remembered from other tests."""
    monkeypatch.setattr(verifiers, "_explodes", lambda answer: False)
    monkeypatch.setattr(verifiers, "_verdicts", {})


def test_a_hanging_answer_costs_its_time_limit_and_no_more(no_filter, monkeypatch):
    assert one(boxed("1/2"), "0.5") is True
    worker = _sympy._process
    monkeypatch.setattr(verifiers, "ITEM_SECONDS", 1.0)
    start = time.monotonic()
    assert math_boxed([boxed("9^{9^{9^9}}"), boxed(r"\frac{4}{2}")], ["2", "2"]) == [False, True]
    assert 0.9 < time.monotonic() - start < 8  # one second of CPU time, and a busy machine
    assert _sympy._process is worker  # only its child has died
    start = time.monotonic()
    assert one(boxed("9^{9^{9^9}}"), "2") is False
    assert time.monotonic() - start < 0.3  # remembered


def test_a_stuck_worker_is_killed_and_replaced(no_filter, monkeypatch):
    assert one(boxed("1/2"), "0.5") is True
    stuck = _sympy._process
    assert stuck is not None
    monkeypatch.setattr(verifiers, "ITEM_SECONDS", 0.1)
    monkeypatch.setattr(_sympy, "GRACE_SECONDS", 0.5)
    os.killpg(stuck.pid, signal.SIGSTOP)  # its own timers cannot help it now
    assert one(boxed("1/4"), "0.25") is False
    assert stuck.poll() is not None
    monkeypatch.undo()
    assert one(boxed("1/8"), "0.125") is True


def test_a_killed_worker_is_not_held_against_the_answer(no_filter):
    assert one(boxed("1/2"), "0.5") is True
    assert _sympy._process is not None
    os.killpg(_sympy._process.pid, signal.SIGKILL)
    assert math_boxed([boxed("1/4"), boxed("1/8")], ["0.25", "0.125"]) == [True, True]


def test_a_flood_of_hanging_answers_ends_with_a_warning(no_filter, monkeypatch):
    limits = []

    def hang(gold, gold_is_prose, answer, answer_is_prose, seconds):
        limits.append(seconds)
        return "died"

    monkeypatch.setattr(_sympy, "ask", hang)
    completions = [boxed(f"x^{{{n}}}") for n in range(1_000)] + [boxed("5")]
    with pytest.warns(RuntimeWarning, match="210 answers of one batch hung"):
        assert math_boxed(completions, ["5"] * 1_001) == [False] * 1_000 + [True]
    assert limits == [3.0] * 10 + [0.3] * 200


MIXED = [
    (boxed(r"\frac{3}{4}"), "0.75", True),
    (boxed("3/4"), "0.5", False),
    ("The answer is 3/8", "0.375", True),
    (boxed("x+1"), "1+x", True),
    (boxed("7"), "7", True),
    (boxed("red"), "red", True),
    (boxed(r"\sqrt{3}"), r"\sqrt{5}", False),
    (boxed("9^{9^{9^9}}"), "5", False),
    ("anything", "", None),
]


def test_threads_agree_with_one_thread(monkeypatch):
    def call(seed: int) -> bool:
        rows = MIXED * 2
        random.Random(seed).shuffle(rows)
        verifiers._verdicts.clear()  # so that the threads do share the worker
        return math_boxed([c for c, _, _ in rows], [g for _, g, _ in rows]) == [v for _, _, v in rows]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(call, range(40))) == [True] * 40


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_has_its_own_worker(no_filter):
    assert one(boxed("1/2"), "0.5") is True
    assert _sympy._process is not None
    ours = _sympy._process.pid
    asking = threading.Thread(target=math_boxed, args=([boxed(f"{n}/64") for n in range(200)], ["0.3"] * 200))
    asking.start()  # so that the fork may find the lock taken and a question on its way
    child = os.fork()
    if child == 0:
        code = 1
        signal.alarm(60)  # a deadlock must end this test, not outlive it
        try:
            fresh = _sympy._process is None
            verdicts = math_boxed([boxed("3/4"), boxed("3/8")], ["0.75", "0.75"])
            code = 0 if fresh and verdicts == [True, False] and _sympy._process is not None else 1
            _sympy._discard(5)
        finally:
            os._exit(code)  # whatever happens: not a second run of the test suite
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    asking.join()
    assert _sympy._process is not None and _sympy._process.pid == ours
    assert one(boxed("7/8"), "0.875") is True


def run_script(text: str, tmp_path: Path) -> "subprocess.CompletedProcess[str]":
    script = tmp_path / "script.py"
    script.write_text(text)
    environment = {**os.environ, "PYTHONPATH": SRC, "PYTHONWARNINGS": "default"}
    return subprocess.run(
        [sys.executable, "-X", "dev", str(script)], capture_output=True, text=True, env=environment, timeout=120
    )


def test_a_script_without_main_guard_runs_once_and_leaves_nothing(tmp_path):
    done = run_script(
        "print('started')\n"
        "import sys\n"
        "from mechreward.verifiers import math_boxed, _sympy\n"
        "print([name for name in ('torch', 'sympy', 'math_verify', 'subprocess') if name in sys.modules][:3])\n"
        "print(math_boxed([r'\\boxed{1/2}', r'\\boxed{1/3}'], ['0.5', '0.5']))\n"
        "print('sympy' in sys.modules, _sympy._process.pid)\n",
        tmp_path,
    )
    assert done.stderr == "" and done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[:3] == ["started", "['subprocess']", "[True, False]"] and lines[3].startswith("False ")
    with pytest.raises(ProcessLookupError):
        os.killpg(int(lines[3].split()[1]), 0)


def test_the_worker_ends_with_a_parent_that_is_killed(tmp_path):
    done = run_script(
        "import os, signal\n"
        "from mechreward.verifiers import math_boxed, _sympy\n"
        "assert math_boxed([r'\\boxed{1/2}'], ['0.5']) == [True]\n"
        "print(_sympy._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n",
        tmp_path,
    )
    group = int(done.stdout)
    for _ in range(100):
        if not _alive(group):
            return
        time.sleep(0.1)
    pytest.fail("the worker lives on")


def _alive(group: int) -> bool:
    """Whether a process of the group still runs; a zombie that nobody has reaped yet does not."""
    states = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True).stdout.splitlines()
    return any(int(row.split()[0]) == group and not row.split()[1].startswith("Z") for row in states)


def test_a_worker_that_cannot_start_says_so(tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken on purpose')\n")
    done = run_script(
        "from mechreward.errors import RewardError\n"
        "from mechreward.verifiers import math_boxed\n"
        "try:\n    math_boxed([r'\\boxed{1/2}'], ['0.5'])\n"
        "except RewardError as error:\n    print(error)\n",
        tmp_path,
    )
    assert "did not start (failed: ImportError: broken on purpose)" in done.stdout and done.stderr == ""


# Numbers: equal means equal


NUMBERS = [  # gold, answer, verdict
    (r"\frac{2^{100}-1}{2^{100}}", r"\frac{1}{2^{100}}", False),
    (r"\frac{\pi}{2^{100}}", r"\frac{2\pi}{2^{100}}", False),
    (r"\frac{\pi}{2^{100}}", r"\frac{2\pi}{2^{101}}", True),
    ("0", "10^{-30}", False),
    ("0", r"\pi\cdot 10^{-30}", False),
    (r"\sqrt{2}+\sqrt{3}-\sqrt{5+2\sqrt{6}}", "0", True),
    (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}", True),
    ("1/3", "0.333333", True),
    ("0.333333", "1/3", True),
    ("1/3", "0.333334", False),
    ("1/3", "0.3333", False),
    ("1/3", "0.33333", False),
    ("100/3", "33.3333", True),
    (r"\frac{1}{3000000}", r"3.33333\times 10^{-7}", True),
    (r"\frac{1}{3000000}", "0.0000003", False),
    (r"\sqrt{2}", "1.41421", True),
    (r"\sqrt{2}", "1.41422", False),
    (r"\sqrt{2}", "1.414", False),
    (r"\sqrt{3}", "1.732051", True),
    (r"\sqrt{3}", "1.732050", False),
    (r"\pi^{50}", r"\pi^{50}+1", False),  # near is not equal
    ("1-e^{-40}", "1", False),
    (r"\tanh(20)", "1", False),
    (r"\cos(10^{-7})", "1", False),
    (r"(1,\tanh(20))", "(1,1)", False),
    (r"e^{\pi\sqrt{163}}", "262537412640768744", False),
    (r"\frac{1}{\sqrt{5}}\left(\frac{1+\sqrt5}{2}\right)^{60}", "1548008755920", False),
    ("2^{2/3}", r"\sqrt[3]{4}", True),
    (r"x=\sqrt{8}", r"2\sqrt{2}", True),
    (r"\{10^{-20},1\}", r"\{2\cdot10^{-20},1\}", False),
    (r"\{10^{-20},1\}", r"\{1,\frac{1}{10^{20}}\}", True),
    ("(0,10^{-20})", r"(0,2\cdot 10^{-20})", False),
    ("[0,10^{-20}]", "[0,0.00000000000000000001]", True),
    (r"\begin{pmatrix}10^{-20}&1\end{pmatrix}", r"\begin{pmatrix}3\cdot10^{-20}&1\end{pmatrix}", False),
    (r"\begin{pmatrix}10^{-20}&1\end{pmatrix}", r"\begin{pmatrix}\frac{1}{10^{20}}&1\end{pmatrix}", True),
    ("x=10^{-20}", r"2\cdot 10^{-20}", False),
    ("x=10^{-20}", "10^{-20}", True),
    ("x=5", "y=5", False),
    (r"3\pm 1", "2,4", True),
    ("6", "2(3)", True),  # math-verify adds: 2(3) is not the mixed number 2 3/3
    ("5", "2(3)", False),
    (r"-\frac{3}{2}", r"-1\frac12", True),
    ("3/2", "1 1/2", True),
    ("3", "1 2", False),
    ("3", r"1\,2", False),
    ("1 2", "3", None),
    ("1 2", "1 2", True),
    ("1 2 3", "1 2 3", True),
    ("1 2 3", "6", None),
    ("(1 2)(3 4)", "(1 2)(3 4)", True),
    ("555 1234", "555 1234", True),
    (r"\log_2 5", r"\log_2{5}", True),
    (r"\log_2 8", "3", True),
    (r"\log_3 27", "3", True),
    ("3", r"\log_3 27", True),
    (r"\frac 1 2", r"\frac12", True),
    (r"\frac12", r"\frac 1 2", True),
    ("x_1 2", "2x_1", True),
    ("x^2 3", "3x^2", True),
    ("3x^2", "x^2 3", True),
    (r"1+\log_2 3", r"\log_2 3 + 1", True),
    ("e-5", "e-5", True),
    ("0.00001", "e-5", False),
    ("1e-5", "e-5", False),
    ("1e-5", r"\frac{1}{100000}", True),
    ("1e-05", "0.00001", True),
    ("5000", "5e3", True),
    ("5000", "5E+3", True),
    ("0.0000025", "2.5e-6", True),
    ("0.2", "2e-1", True),
    ("2e - 1", "2e-1", True),  # or twice Euler's number, less one
    ("2e - 1", "0.2", False),
    ("7", "1e999999999", False),
    ("7", "10^{999999999}", False),
    ("1e400", r"10^{400}", True),
]

NOTATION = [
    ("-3", "\u22123", True),
    ("-3", "\u20133", True),
    ("3", "\u22123", False),
    ("30", "30\u00b0", True),
    ("30", "30 \u00b0C", True),
    (r"\sqrt{2}", "\u221a2", True),
    (r"\sqrt{5}", "\u221a(5)", True),
    (r"2\sqrt{5}", "2\u221a{5}", True),
    ("2", "\u00b3\u221a8", True),
    ("2", "\u221b8", True),
    (r"\frac{1}{2}", "\u00bd", True),
    ("1.5", "1\u00bd", True),
    ("-1.5", "\u22121 \u00bd", True),
    ("2/3", "\u2154", True),
    ("1/2", "1\u20442", True),
    ("x^2", "x\u00b2", True),
    ("0.00001", "10\u207b\u2075", True),
    ("15", "5\u00d73", True),
    ("15", "5\u00b73", True),
    ("2", "6\u00f73", True),
    (r"\infty", "\u221e", True),
    ("12", "\uff11\uff12", True),
    ("12345", "12\u202f345", True),
    ("12345", "12\u2009345", True),
    ("12345", "12\u00a0345", True),
    ("12345", r"12\,345", True),
    ("12345", r"12\ 345", True),
    ("12345", "12~345", True),
    ("12345", "12{,}345", True),
    ("12345", "12 345", True),
    ("1234567.5", r"1\,234\,567.5", True),
    ("357", r"12\,345", False),  # math-verify's sum
    ("3.141592", r"3.141\,592", True),
    ("5", r"5\text{ million}", False),
    ("5000000", r"5\text{ million}", True),
    ("5000000", r"5\text{ million dollars}", True),
    ("5000000", r"\$5 million", True),
    ("2500000", "2.5 million", True),
    ("2,5 million", "5", False),
    ("5 million", "5,000,000", True),
    ("3", r"3\text{ thousand}", False),
    ("300000", "3 hundred thousand", True),
    ("24", r"2\text{ dozen}", True),
    ("12", r"\text{a dozen}", True),
    ("5000000", "five million", True),
    ("500000", r"\frac{1}{2}\text{ million}", True),
    ("1500000", r"1\frac{1}{2} million", True),
    ("500000", "1/2 million", True),
    ("0.03", r"3\text{ hundredths}", True),
    ("3", r"3\text{ hundredths}", False),
    ("5", r"5\text{ (in millions)}", None),
    (r"5\text{ (in millions)}", "5", None),
    ("5", "5\u2460", None),
    ("5", r"5\text{ cm}", True),
    ("250", "two hundred fifty", None),
    ("200", "2 hundred and fifty", None),
    ("two hundred fifty", "Two hundred fifty", True),
    ("two hundred fifty", "200", None),
    ("25000000", "twenty-five million", None),
    ("5000000", "twenty five million", None),
    ("3200000", "3 million 200 thousand", None),
    ("200000", "3 million 200 thousand", None),
    ("1500", "fifteen hundred", True),
    ("-2", "3\u20135", None),  # a range
    ("-5", "2010\u20132015", None),
    ("2014", "2020\u201301\u201305", None),
    ("-2", "\\$3\u2013\\$5", None),
    ("-10", "10\u201320\\%", None),
    ("3\u20135", "3\u20135", True),
    ("3\u20135", "-2", None),
    ("3-5", "3\u20135", True),
    ("3\u20135", "3-5", True),
    ("-2", "3\u22125", True),
    ("(1,-3)", "(1,\u20133)", True),
    ("x-1", "x\u20131", True),
    ("5-x", "5\u2013x", True),
    ("-1", "1+3\u20135", True),
    ("4", "3^2\u20135", True),
    (r"\pi", "\u03c0", True),
    ("\u03c0", r"\pi", True),
    (r"\frac{\pi}{2}", "\u03c0/2", True),
    (r"\pi r^2", "\u03c0r\u00b2", True),
    (r"\sqrt{\pi}", "\u221a\u03c0", True),
    ("3.14", "\u22483.14", True),
    ("3.14", r"\approx 3.14", True),
    ("5", "\u20ac5", True),
    ("5", "5 \u20ac", True),
    ("\u00a35", "5", True),
    ("500", "\u00a5500", True),
    ("50", "\u20ac5", False),
    ("5.5", r"5\ 1/2", True),
    ("1/3", r"0.\overline{3}", True),
    (r"0.1\overline{6}", "1/6", True),
    ("15/7", r"2.\overline{142857}", True),
    ("0.3", r"0.\overline{3}", False),
    ("10", r"\binom52", True),
    ("thousands", r"\text{thousands}", True),
    ("thousands", r"\text{hundreds}", False),
]

SENTENCES = [
    ("200", "The answer is two hundred fifty.", None),
    ("200", "The total is 2 hundred and fifty dollars.", None),
    ("200000", "There were 3 million 200 thousand people.", None),
    ("5000000", "The answer is twenty-five million.", None),
    ("1000000", "The answer is twenty-five million.", None),
    ("200000", "It is one million, two hundred thousand.", None),
    ("1000000", "That makes two and a half million.", None),
    ("5000000", "It is 5 million and 3 thousand.", None),
    ("12", "They cost 20 a dozen.", None),
    ("7", "There are 2 hundred and fifty cats. The answer is 7.", True),
    ("3", "One in a million, so 3", True),
    (r"2\pi", "The answer is 2\u03c0.", True),
    ("5", "The answer is \u20ac5.", True),
    ("4", "From 3\u20135 we get 4", True),
    ("-3", "So x is \u22123.", True),
    ("-3", "So x is \u20133.", True),
    ("3", "Answer: \u22123", False),
    ("5000000", "The population is 5 million.", True),
    ("5", "The population is 5 million.", False),
    ("5000000", "The answer is $5$ million.", True),
    ("5000000", "It is five million people.", True),
    ("12345", "So there are 12\u202f345 of them.", True),
    ("12345", "The total is 12 345.", True),
    ("1/2", "The answer is \u00bd.", True),
    (r"\sqrt{2}", "The answer is \u221a2.", True),
    ("5000", "The answer is 5e3.", True),
    ("0.00001", "The answer is 1e-05.", True),
    ("0.00001", "The answer is 10\u207b\u2075.", True),
    ("30", "The angle is $30\u00b0$.", True),
    ("15", "The answer is 5\u00d73.", True),
]


@pytest.mark.parametrize(("gold", "answer", "verdict"), [*NUMBERS, *NOTATION])
def test_numbers_and_their_notation(gold, answer, verdict):
    assert one(boxed(answer), boxed(gold)) is verdict
    assert one(boxed(answer), gold) is verdict


@pytest.mark.parametrize(("gold", "sentence", "verdict"), SENTENCES)
def test_notation_in_sentences(gold, sentence, verdict):
    assert one(sentence, gold) is verdict


@pytest.mark.parametrize(
    ("completion", "gold", "verdict"),
    [
        ("#### 5e3", "5000", True),
        ("#### 0.00001", "1e-05", True),
        ("#### 1e-05", "#### 0.00001", True),
        ("#### 1e999999999", "1", False),
        ("#### \u20135", "-5", True),
        ("#### \u22125", "5", False),
        ("#### 12\u202f345", "12345", True),
        (r"#### 12\,345", "12345", True),
        ("#### 5 million", "5000000", True),
        ("#### 5 million", "5", False),
        ("#### $5 million dollars", "#### 5,000,000", True),
        ("#### 5 (in millions)", "5", None),
        ("#### 5", "5 (in millions)", None),
        ("#### 5 (in millions)", "#### 5 (in millions)", True),
        ("#### 3 million 200 thousand", "200000", None),
        ("#### 40 (8*5)", "40", True),
        ("#### 40 (8*5)", "#### 1600", False),
        ("#### 12 (12)", "12", True),
        ("#### 12", "12 (a dozen)", True),
        ("#### $40 (8*5 dollars)", "#### 40", True),
        ("#### 3\u20135", "-2", None),
        ("#### 3-5", "-2", None),
        ("#### 3-5", "3-5", True),
        ("#### 2010-2015", "#### -5", None),
        ("#### -2", "3-5", None),
        ("#### 2^3-1", "7", True),
        ("#### \u20ac5", "5", True),
        ("#### \u00bd", "0.5", True),
        ("#### 1/2", "1", False),
        ("#### 2\u00d710\u00b3", "2000", True),
        ("#### 2 \u00d7 x", "2", True),
        ("#### 30\u00b0", "30", True),
    ],
)
def test_gsm8k_reads_the_same_notation(completion, gold, verdict):
    assert gsm8k([completion], [gold]) == [verdict]


def spelt(number: Fraction, rng: random.Random) -> tuple[str, int | None]:
    """A rational number in LaTeX, in one of several ways; and the places of the decimal, if it is one."""
    a, b = number.numerator, number.denominator
    way = rng.choice(["fraction", "unreduced", "slash", "sum", "product", "tenths", "mixed", "decimal", "scientific"])
    k = rng.randrange(2, 10**6)
    if way == "unreduced":
        return rf"\frac{{{k * a}}}{{{k * b}}}", None
    if way == "slash":
        return f"{a}/{b}", None
    if way == "sum":
        rest = number - Fraction(k, 7)
        return rf"\frac{{{k}}}{{7}}{'-' if rest < 0 else '+'}\frac{{{abs(rest.numerator)}}}{{{rest.denominator}}}", None
    if way == "product":
        return rf"{k}\cdot\frac{{{a}}}{{{k * b}}}", None
    if way == "tenths":
        return rf"\frac{{{a * 10**20}}}{{{b}}} \times 10^{{-20}}", None
    if way == "mixed" and a > b > 1:
        return rf"{a // b}\frac{{{a % b}}}{{{b}}}", None
    places = next((n for n in range(80) if 10**n % b == 0), None)
    if places is None or way not in ("decimal", "scientific"):
        return rf"\frac{{{a}}}{{{b}}}", None
    digits = f"{abs(a) * 10**places // b:0{places + 1}}"
    sign = "-" if a < 0 else ""
    if way == "decimal":
        return sign + digits[: len(digits) - places] + ("." + digits[-places:] if places else ""), places or None
    digits = digits.lstrip("0") or "0"
    exponent = len(digits) - 1 - places
    mantissa = sign + digits[0] + ("." + digits[1:] if digits[1:] else "")
    return rf"{mantissa}\times 10^{{{exponent}}}", places if digits[1:] else None


def rounds(number: Fraction, decimal: Fraction, places: int) -> bool:
    """By the decimal module, not by ours."""
    with localcontext(prec=300):
        if len(f"{abs(decimal) * 10**places}".rstrip()) < 6:
            return False
        return any(
            (Decimal(number.numerator) / number.denominator).quantize(Decimal(1).scaleb(-places), mode)
            == Decimal(decimal.numerator) / decimal.denominator
            for mode in (ROUND_HALF_UP, ROUND_HALF_DOWN)
        )


def number_pair(rng: random.Random) -> tuple[str, str, bool, str]:
    """Gold, answer, whether they are the same number, and what kind of pair it is."""
    denominator = rng.choice(
        [2 ** rng.randrange(1, 150), 10 ** rng.randrange(60), rng.randrange(1, 10 ** rng.randrange(1, 61))]
    )
    size = 10 ** rng.randrange(1, 61)
    gold = Fraction(rng.randrange(-size, size) or 1, denominator)
    b = gold.denominator
    near = [
        gold + Fraction(1, b),
        gold * Fraction(b + 1, b),
        Fraction(gold.numerator, b + 1),
        1 - gold,
        -gold,
        1 / gold,
    ]
    same = rng.random() < 0.5
    answer = gold if same else rng.choice([*near, gold / 2**70, Fraction(rng.randrange(1, size), b)])
    (first, places), (second, other_places) = spelt(gold, rng), spelt(answer, rng)
    equal = gold == answer
    if not equal and places is not None and (other_places is None or places < other_places):
        equal = rounds(answer, gold, places)
    elif not equal and other_places is not None and (places is None or other_places < places):
        equal = rounds(gold, answer, other_places)
    shape = rng.choice(["{}", "{}", "{}", r"{}\text{{ cm}}", r"\{{{},-12345678\}}", r"[{},\infty)"])
    kind = ("equal" if equal else "different") + (" by our reader" if shape == "{}" else " by math-verify, checked")
    return first if "cm" in shape else shape.format(first), shape.format(second), equal, kind


def check_numbers(count: int, seed: int) -> Counter:
    rng, counts, wrong = random.Random(seed), Counter(), []
    pairs = [number_pair(rng) for _ in range(count)]
    verdicts = math_boxed([boxed(answer) for _, answer, _, _ in pairs], [boxed(gold) for gold, _, _, _ in pairs])
    for pair, verdict in zip(pairs, verdicts, strict=True):
        counts[pair[3]] += 1
        if verdict is not pair[2]:
            wrong.append((*pair, verdict))
    assert wrong == []
    return counts


def test_equal_numbers_are_equal_and_no_others():
    assert len(check_numbers(150, seed=3)) == 4


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_equal_numbers_20_000(capsys):
    counts = check_numbers(20_000, seed=4)
    with capsys.disabled():
        print("\npairs of numbers judged, all rightly:", dict(counts))


digits = st.integers(0, 999).map(str)
UNITS = "one two three four five six seven eight nine".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(2, 9), st.sampled_from([" ", " and "]), st.sampled_from(["{}", "It is {}."]))
def test_number_words_are_read_whole_or_not_at_all(unit, ten, joint, sentence):
    words, number = f"{UNITS[unit - 1]} hundred{joint}{TENS[ten - 2]}", 100 * unit + 10 * ten
    for answer in (sentence.format(words), sentence.format(f"{unit} hundred{joint}{10 * ten}")):
        answer = answer if "It" in answer else boxed(answer)
        assert one(answer, str(number)) is not False
        for wrong in (100 * unit, 10 * ten, 100, unit, ten, 100 * unit * 10 * ten):
            assert one(answer, str(wrong)) is not True


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=2, max_size=3), st.sampled_from("\u2010\u2011\u2012\u2013"))
def test_a_range_is_no_difference(ends, dash):
    span = dash.join(map(str, ends))
    assert one(boxed(span), boxed(span)) is True and one(boxed(span), str(ends[0] - sum(ends[1:]))) is None
    assert gsm8k([f"#### {span}"] * 2, [span, str(ends[0] - sum(ends[1:]))]) == [True, None]
    assert one(boxed(dash + str(ends[0])), str(-ends[0])) is True


@settings(max_examples=60, deadline=None)
@given(
    st.lists(digits | st.sampled_from([r"\log_2", r"\frac", r"\sqrt", "x^2", "a_1", "(", ")", ",", "+"]), max_size=5),
    st.lists(digits, min_size=2, max_size=4).map(r"\ ".join) | digits,
    st.sampled_from([" ", r"\ ", "~"]),
)
def test_a_gold_with_digits_accepts_itself(before, after, space):
    answer = space.join([*before, after])
    assert one(boxed(answer), boxed(answer)) is True


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 99), st.integers(8, 12))
def test_an_irrational_number_is_not_the_rational_one_beside_it(n, zeros):
    near, root = rf"{n}\cdot 10^{{{zeros}}}", rf"\sqrt{{{n * n}\cdot 10^{{{2 * zeros}}}+1}}"
    assert one(boxed(near), root) is False and one(boxed(root), near) is False
    assert one(boxed(root), rf"\frac{{2{root}}}{{2}}") is True


# Fuzz

PIECES = (
    "x y n 2 3 ( ) [ ] { } , ; = < ^ _ + - * / ! | % & $ ~ \\frac \\sqrt \\pi \\left( \\right) \\cup \\infty".split()
)
PIECES += r"\text{ \begin{pmatrix} \\ \sum_{ \int \log \binom".split()
JUNK = [*"aeiou \n\t\0\u0660\u00b2\u221e\u00bd\u4e2d\ud800\U0001f600", "\\boxed", "boxed{", "}", "####", "$$", "\\["]
RIGHT = ["7919", "7,919", "7{,}919", "$7919$", "\\$7919", "7919.0", r"\frac{15838}{2}", "+7919"]


def fuzzed(rng: random.Random) -> tuple[str, bool]:
    """A completion for the gold 7919 and whether it is right."""
    kind = rng.randrange(100)
    if kind < 15:
        return "Some steps. " * rng.randrange(9) + boxed(rng.choice(RIGHT)), True
    if kind < 25:
        return f"Some steps.\n#### {rng.choice(RIGHT[:2])}", True
    if kind < 50:
        return boxed(str(rng.randrange(7919))), False
    if kind < 65:
        return "".join(map(chr, rng.choices(range(0x3000), k=rng.randrange(60)))).replace("7919", ""), False
    if kind < 80:
        return "".join(rng.choices(JUNK, k=rng.randrange(60))), False
    if kind < 88:
        a, b, c = (rng.randrange(2, 10) for _ in range(3))
        return boxed(f"{a}^{{{b}^{{{c}^{{{rng.randrange(10**6)}}}}}}}"), False
    if kind < 94:
        return boxed(rng.choice(["{}!", "2^{{{}}}", "({}!)!", "10^{{{}}}"]).format(rng.randrange(10**5, 10**12))), False
    if kind < 95:
        return boxed("12" * rng.choice([200, 300, 1_000])), False
    if kind < 97:
        return f"We get {rng.randrange(10**9, 10**12)} {rng.choice(JUNK[5:8])} done", False
    return boxed("".join(rng.choices(PIECES, k=rng.randrange(1, 12)))), False


def check_fuzz(count: int, seed: int) -> None:
    rng = random.Random(seed)
    rows = [fuzzed(rng) for _ in range(count)]
    completions, golds = [c for c, _ in rows], ["7919"] * count
    verdicts = math_boxed(completions, golds)
    assert [(c, v) for (c, right), v in zip(rows, verdicts, strict=True) if v is not right] == []
    assert all(v is not None for v in gsm8k(completions, golds) + exact_match(completions, golds))


def test_fuzz():
    check_fuzz(5_000, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_fuzz_100_000():
    check_fuzz(100_000, seed=2)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80), st.text(max_size=20))
def test_any_text_has_a_verdict(completion, gold):
    for verify in (math_boxed, gsm8k, exact_match):
        assert verify([completion], [gold])[0] in (True, False, None)


@settings(max_examples=300, deadline=None)
@given(st.decimals(-(10**9), 10**9, places=3), st.decimals(-(10**9), 10**9, places=3))
def test_plain_numbers_compare_exactly(a, b):
    assert one(boxed(f"{a:,}"), str(b)) is (a == b)
    assert one(boxed(f"${a:,}0$"), str(a)) is True
    assert gsm8k([f"#### {a:,}"], [str(b)]) == [a == b]


balanced = st.recursive(
    st.sampled_from(["1", "x", "\\{", "\\}", "\\\\", " "]),
    lambda inner: st.lists(inner).map("".join).map("{{{}}}".format),
)


@settings(max_examples=300, deadline=None)
@given(balanced)
def test_box_content_is_found_whole(content):
    assert verifiers._boxed("{ \\boxed{no} \\boxed{" + content + "} } } \\boxed{ {") == content
