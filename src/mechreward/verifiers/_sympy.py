"""One worker process per process of ours, asked one question at a time.

Why a plain ``subprocess`` and not multiprocessing or pebble: ``spawn`` and ``forkserver`` re-import the user's
``__main__``, so a training script without a ``__main__`` guard would start again in the worker; ``fork`` is unsafe once
CUDA or threads are up. A fresh interpreter that speaks lines over pipes has neither trouble, needs no extra package,
and dies by itself at the end of its stdin, even when we are killed.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from mechreward.errors import RewardError

START_SECONDS = 120.0  # importing sympy from a cold network disk
GRACE_SECONDS = 5.0

# The child gets our sys.path, whatever changed it, before it imports anything: an editable checkout, a notebook's
# additions and a user site all stay importable. ``-m`` would import our package first, ``path/to/_worker.py`` would put
# this folder, with its ``math.py``, in front of the standard library.
_BOOT = "import sys; sys.path[:] = sys.argv[2:]; import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"

_lock = threading.Lock()
_process: "subprocess.Popen[bytes] | None" = None


def ask(gold: str, gold_is_prose: bool, answer: str, answer_is_prose: bool, seconds: float) -> str:
    """``"right"``, ``"wrong"``, ``"no gold"``, or ``"died"`` when ``seconds`` of CPU time or the memory did not do.

    Safe in threads, which take turns, and in forked children, which start a worker of their own.

    Raises:
        RewardError: The worker cannot be started at all.
    """
    request = json.dumps([gold, gold_is_prose, answer, answer_is_prose, seconds]).encode() + b"\n"
    with _lock:
        for _ in range(2):
            # The worker kills its own hanging child in time; this limit is for a worker that is itself stuck.
            reply = _exchange(_running(), request, 5 * seconds + GRACE_SECONDS)
            if reply:
                return reply
            # The end of the pipe: somebody killed the whole worker, for which the answer is not to blame.
    return "died"


def _running() -> "subprocess.Popen[bytes]":
    global _process
    if _process is not None and _process.poll() is None:
        return _process
    _discard()
    _process = subprocess.Popen(
        [sys.executable, "-c", _BOOT, str(Path(__file__).with_name("_worker.py")), *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,  # a buffered pipe could be inherited half written, or locked, by a forked child
        start_new_session=True,  # Ctrl-C is for us alone
        env={**os.environ, "PYTHONHASHSEED": "0"},  # the order of sympy's sets must not change a verdict between runs
    )
    reply = _exchange(_process, b"", START_SECONDS)
    if reply != "ready":
        _discard()
        raise RewardError(
            f"The math-verify worker did not start ({reply or 'no reply'}): check that "
            f"`{sys.executable} -c 'import math_verify'` works."
        )
    return _process


def _exchange(process: "subprocess.Popen[bytes]", request: bytes, seconds: float) -> str:
    """Write a request and return the reply; ``""`` when the worker has gone, ``"died"`` when we had to kill it."""
    assert process.stdin and process.stdout
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        _kill(process)

    # A timer and a blocking read work on every platform; select does not know pipes on Windows.
    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    reply = b""
    try:
        left = memoryview(request)
        while left:
            left = left[process.stdin.write(left) :]
        reply = process.stdout.readline()
    except OSError:
        pass  # the worker has died: without a whole reply it is replaced below
    finally:
        timer.cancel()
        # Also on KeyboardInterrupt: a reply nobody has read would be taken for the answer to the next question.
        if not reply.endswith(b"\n") or expired.is_set():
            _discard()
    return "died" if expired.is_set() else reply.decode(errors="replace").strip()


def _kill(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)  # with its forked child
        else:
            process.kill()


def _discard(patience: float = 0.0) -> None:
    """End the worker, if there is one: by the end of its stdin within ``patience`` seconds, otherwise by force."""
    global _process
    process, _process = _process, None
    if process is None:
        return
    assert process.stdin and process.stdout
    process.stdin.close()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        _kill(process)
        process.wait()
    process.stdout.close()


def _at_exit() -> None:
    # A daemon thread may hold the lock for as long as its question takes: do not wait for it.
    _discard(patience=1.0 if _lock.acquire(timeout=0.1) else 0.0)


def _after_fork_in_child() -> None:
    """Forget the parent's worker: let go of its pipes, so that it ends with the parent, and of a lock held there."""
    global _lock, _process
    _lock = threading.Lock()
    if _process is not None:
        assert _process.stdin and _process.stdout
        _process.stdin.close()
        _process.stdout.close()
        _process.returncode = 0  # it is no child of ours: nothing to wait for or to warn about
        _process = None


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
