"""Run Python programs that nobody trusts, isolated by bubblewrap (``bwrap``).

Each program runs in an interpreter of its own, on Linux, with

- no network interface but an empty loopback, no other process of the machine in sight, and no IPC with any;
- a file system of its own: the interpreter, its standard library and the system's libraries, read-only, and an empty
  temporary folder of bounded size. No home folder, no data sets, no site-packages, no shell, no ``/proc``;
- an empty environment and no open files but those it is given;
- hard limits on address space, CPU time, processes, file size and open files, and no privileges; under root, another
  user id;
- an end: when its time is up, or when its first process ends, the kernel kills everything that it started.

The first use in a process runs a program that tests these claims. Where bubblewrap is missing, or does not keep them,
``SandboxError`` is raised. ``unsafe=True`` then runs the program without isolation: with the limits, an empty
environment, and a process group that is killed at the end.

Not covered, since bubblewrap filters no system calls: bugs of the kernel; vsock, which reaches the host of a virtual
machine; the kernel's keyrings; System V shared memory, which no limit counts. Also not covered: side channels such as
timing; the sum of the memory of several processes, which may reach ``processes`` times ``memory_bytes``; the share of
the processors that others get meanwhile. SECURITY.md has the details.
"""

import functools
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, NamedTuple

from mechreward.errors import SandboxError

START_SECONDS = 60.0  # a fresh interpreter on a machine that is busy training

_BOOT = Path(__file__).with_name("_boot.py").read_text(encoding="utf-8")
_INTERPRETER = os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)
_ENVIRONMENT = {"LANG": "C.UTF-8", "PYTHONUTF8": "1", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
_SYSTEM = ("/usr/lib", "/usr/lib32", "/usr/lib64", "/lib", "/lib32", "/lib64", "/nix/store")


class Limits(NamedTuple):
    """What one program may use. All are hard limits that it cannot raise."""

    cpu_seconds: int = 3
    """CPU time of each process."""
    wall_seconds: float = 10.0
    """Time from when the program begins; the start of its interpreter does not count."""
    memory_bytes: int = 512 << 20
    """Address space of each process."""
    processes: int = 16
    """Processes and threads at the same time."""
    file_bytes: int = 8 << 20
    """Size of each file that it writes."""
    temp_bytes: int = 32 << 20
    """Size of its temporary folder, which is gone afterwards."""
    output_bytes: int = 1 << 20
    """Output that is read; one byte more ends the program."""
    open_files: int = 64
    """Open files of each process."""


class Result(NamedTuple):
    """How a program ended."""

    stdout: bytes
    """Its output, up to the limit."""
    code: int | None
    """Its exit status, 128 + n after signal n; None where it was stopped by us."""
    stopped: str
    """``""``, ``"time"`` or ``"output"``: the limit at which it was stopped."""


class Engine(StrEnum):
    """How a program is isolated."""

    ROOT = "bubblewrap as root"
    """Root needs no user namespace, and takes another user id inside."""
    USER = "bubblewrap in a user namespace"
    """For any user. Root takes another user id before."""
    UNSAFE = "no isolation"
    """Limits and a process group alone."""


class Running(NamedTuple):
    """A program in its sandbox."""

    process: "subprocess.Popen[bytes]"
    ready: IO[bytes]
    errors: IO[bytes]

    def wait_until_ready(self, deadline: float) -> None:
        """Wait until the program begins; from then on nothing that it writes is ours.

        Raises:
            SandboxError: The sandbox was not ready at ``deadline`` (of ``time.monotonic``).
        """
        message, _ = read(self.ready, 1000, deadline)
        if message != b"ready":
            self.errors.seek(0)
            lines = self.errors.read(10_000).decode(errors="replace").strip().splitlines()
            raise SandboxError(f"The sandbox did not start: {lines[-1] if lines else 'it gave no reason'}")


def run(program: str, stdin: str = "", limits: Limits | None = None, *, unsafe: bool = False) -> Result:
    """Run a Python program as ``__main__`` in a sandbox and return its output.

    Its standard error is thrown away. Third-party packages cannot be imported.

    Args:
        program: Python source text.
        stdin: What it reads.
        limits: The defaults of ``Limits``.
        unsafe: Run it without isolation where there is no sandbox.

    Raises:
        SandboxError: There is no sandbox on this machine, or it did not start.
    """
    return run_in(engine(unsafe), program, stdin, limits or Limits())


def run_in(engine: Engine, program: str, stdin: str, limits: Limits) -> Result:
    """Run a program as ``run`` does, with a given engine."""
    with TemporaryFile() as typed, pipe() as (output, theirs):
        typed.write(stdin.encode("utf-8", "surrogatepass"))
        typed.seek(0)
        with started(program, engine, limits, stdin=typed, stdout=theirs) as running:
            theirs.close()
            running.wait_until_ready(time.monotonic() + START_SECONDS)
            deadline = time.monotonic() + limits.wall_seconds
            text, ended = read(output, limits.output_bytes + 1, deadline)
            if len(text) > limits.output_bytes:
                return Result(text[: limits.output_bytes], None, "output")
            code = None
            if ended:  # a program may close its output and stay
                with suppress(subprocess.TimeoutExpired):
                    code = running.process.wait(max(0.0, deadline - time.monotonic()))
            if code is None:
                return Result(text, None, "time")
            return Result(text, code if code >= 0 else 128 - code, "")


@contextmanager
def pipe() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a pipe (reading end, writing end), and close what is still open of it at the end."""
    take, put = os.pipe()
    with open(take, "rb", 0) as reading, open(put, "wb", 0) as writing:
        yield reading, writing


def read(file: IO[bytes], most: int, deadline: float) -> tuple[bytes, bool]:
    """Read up to ``most`` bytes; return them, and whether the end of the file came before ``deadline``."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    text = bytearray()
    while len(text) < most:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            return bytes(text), False
        more = os.read(file.fileno(), min(65_536, most - len(text)))
        if not more:
            return bytes(text), True
        text += more
    return bytes(text), False


@contextmanager
def started(
    program: str,
    engine: Engine,
    limits: Limits,
    *,
    keep: Sequence[IO[bytes]] = (),
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int | IO[bytes] = subprocess.DEVNULL,
) -> Iterator[Running]:
    """Start a program; on leaving the ``with``, it and all that it started are dead.

    Args:
        program: Python source text. It never is on a command line or in a file that the program could find.
        keep: Files that it may use, by the same descriptors.
        stdin, stdout: As for ``subprocess.Popen``.

    Raises:
        SandboxError: The first process cannot be started.
    """
    isolated = engine is not Engine.UNSAFE
    # A user id that owns nothing, and most likely no other sandbox has: process limits are counted per user. Seeds must
    # not repeat it.
    uid = random.SystemRandom().randrange(50_000, 60_000) if isolated and os.geteuid() == 0 else None
    folder = nullcontext("/tmp") if isolated else TemporaryDirectory(prefix="mechreward-", ignore_cleanup_errors=True)
    with folder as home, TemporaryFile() as text, TemporaryFile() as errors, pipe() as (ready, theirs):
        # The program travels in a file without a name, which is closed inside before it begins.
        config = {**limits._asdict(), "uid": uid if engine is Engine.ROOT else None, "ready": theirs.fileno()}
        text.write(json.dumps([config, program]).encode())
        text.seek(0)
        # No -E and no -I: the environment is ours, and a fixed hash seed keeps verdicts the same between runs.
        command = [_INTERPRETER, "-s", "-S", "-P", "-c", _BOOT, str(text.fileno())]
        # Root without the right to make namespaces may still become another user, and make them as that user.
        switch = uid if engine is Engine.USER else None
        try:
            process = subprocess.Popen(
                [*_bubblewrap(engine, limits), *command] if isolated else command,
                stdin=stdin,
                stdout=stdout,
                stderr=errors,
                pass_fds=[file.fileno() for file in (text, theirs, *keep)],
                start_new_session=True,  # a process group of its own, and no terminal
                cwd="/" if isolated else home,
                env={"HOME": home, "TMPDIR": home, **_ENVIRONMENT},
                user=switch,
                group=switch,
                extra_groups=None if switch is None else [],
            )
        except OSError as error:
            raise SandboxError(f"The sandbox did not start: {error}") from error
        theirs.close()
        try:
            yield Running(process, ready, errors)
        finally:
            # bwrap is told to take its namespaces with it: --die-with-parent.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@functools.cache
def _files() -> tuple[list[str], list[str]]:
    """Return the paths that a program may read, and folders in them that it must not see.

    Site-packages are hidden, since packages may contain the answers: data sets, and tests with them.
    """
    folders = [f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib64", sysconfig.get_path("stdlib")]
    folders += [str(sysconfig.get_config_var("LIBDIR") or "/usr/lib"), *_SYSTEM]
    named = [each for path in folders for each in (path, os.path.realpath(path)) if os.path.isdir(path)]
    binds = list(dict.fromkeys(named))
    masks = [
        str(path)
        for folder in binds
        for pattern in ("*-packages", "python*/*-packages")
        for path in Path(folder).glob(pattern)
        if path.is_dir() and not path.is_symlink()
    ]
    binds += [path for path in (_INTERPRETER, "/etc/ld.so.cache") if os.path.exists(path)]
    return binds, list(dict.fromkeys(masks))


def _bubblewrap(engine: Engine, limits: Limits) -> list[str]:
    """Return the command line that is put in front of a program's own."""
    binds, masks = _files()
    command = [shutil.which("bwrap") or "bwrap", "--die-with-parent", "--cap-drop", "ALL"]
    command += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    if engine is Engine.USER:
        command += ["--unshare-user"]
    else:  # to take another user id inside, where its limit on processes is its own
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    command += ["--perms", "1777", "--size", str(limits.temp_bytes), "--tmpfs", "/tmp"]
    devices = [f"/dev/{name}" for name in ("null", "zero", "random", "urandom")]
    for path in (*binds, *devices):
        for above in reversed(Path(path).parents[:-1]):  # bwrap would give some of them to root alone
            command += ["--perms", "0755", "--dir", str(above)]
        command += ["--dev-bind" if path in devices else "--ro-bind", path, path]
    for path in masks:
        command += ["--tmpfs", path, "--remount-ro", path]
    return [*command, "--remount-ro", "/", "--chdir", "/tmp", "--"]


def engine(unsafe: bool = False) -> Engine:
    """Return the engine that works here, found out once per process.

    Raises:
        SandboxError: None does, and ``unsafe`` is False.
    """
    found, why = _detect()
    if found is not None:
        return found
    if os.name != "posix":
        raise SandboxError("Code can be run only on Linux (with a sandbox) or another POSIX system (without).")
    if not unsafe:
        raise SandboxError(
            f"There is no sandbox on this machine, and code is not run without one ({why}). Install bubblewrap "
            "(apt-get install bubblewrap) on a Linux machine that allows namespaces; or pass unsafe=True to run code "
            "with limits but without isolation, in a container or virtual machine that has nothing to lose."
        )
    warnings.warn(f"Code runs without a sandbox, as you asked ({why}).", RuntimeWarning, stacklevel=3)
    return Engine.UNSAFE


@functools.cache
def _detect() -> tuple[Engine | None, str]:
    """Return the first engine that keeps its promises, or None and why there is none."""
    if sys.platform != "linux":
        return None, f"it needs Linux, and this is {sys.platform}"
    if not shutil.which("bwrap"):
        return None, "bwrap is not installed"
    why = []
    for candidate in [Engine.ROOT, Engine.USER] if os.geteuid() == 0 else [Engine.USER]:
        failure = examine(candidate)
        if not failure:
            return candidate, ""
        why.append(f"{candidate}: {failure}")
    return None, "; ".join(why)


_EXAMINATION = """
import json, os, socket, sys, time
from contextlib import suppress

root, processes = json.load(sys.stdin)


def broken_promises():
    if os.getpid() > 9:
        yield "processes of the machine are visible"
    if {name for _, name in socket.if_nameindex()} - {"lo"}:
        yield "there is a network"
    if set(os.listdir("/")) - set(root):
        yield "files of the machine are visible"
    if any(os.access(path, os.W_OK) for path in ("/", os.path.dirname(os.__file__), os.__file__)):
        yield "the file system can be written"
    if not os.access("/tmp", os.W_OK):
        yield "there is no temporary folder"
    with suppress(OSError):
        for _ in range(processes):  # with this one, one too many
            if os.fork() == 0:
                time.sleep(60)
        yield "processes are not limited"


print(next(broken_promises(), "all kept"), flush=True)
"""


def examine(candidate: Engine) -> str:
    """Run a program that tests what a sandbox promises; return ``""``, or the first promise that is not kept."""
    limits = Limits(processes=8, wall_seconds=START_SECONDS)
    root = [*(path.split("/")[1] for path in _files()[0]), "tmp", "dev"]
    try:
        result = run_in(candidate, _EXAMINATION, json.dumps([root, limits.processes]), limits)
    except SandboxError as error:
        return str(error)
    answer = result.stdout.decode().strip()
    return "" if answer == "all kept" else answer or "a program in it gave no output"
