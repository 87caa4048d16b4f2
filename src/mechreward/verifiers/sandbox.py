"""A sandbox for Python programs that nobody trusts.

A program runs in an interpreter of its own. With Linux namespaces, set up by bubblewrap (``bwrap``) where it is
installed and otherwise by ourselves, it has

- no network, no other process of the machine in sight, no shared memory with any;
- a file system of its own: the interpreter, its standard library and the system's libraries, read-only, and an empty
  temporary folder of bounded size. No home folder, no data sets, no site-packages, no shell, no ``/proc``;
- an empty environment and no open files but those it is given;
- hard limits on memory, CPU time, processes, file size and open files, and no privileges; under root, another user id;
- an end: when its time is up, or when its first process ends, the kernel kills everything that it started.

On x86-64 and arm64 a seccomp filter also refuses sockets, ptrace, new namespaces and other system calls that such a
program has no use for. Which engine works is tried once per process, by running a program that tests these claims.
Where none does, ``SandboxError`` is raised; ``unsafe=True`` goes on with limits, the filter and a process group alone.

Not covered: bugs of the kernel; side channels such as timing; the sum of the memory of several processes, which may
reach ``processes`` times ``memory_bytes``; the share of the processors that others get meanwhile.
"""

import functools
import glob
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from mechreward.errors import SandboxError

START_SECONDS = 60.0  # a fresh interpreter on a machine that is busy training
UNSAFE = "none"
HOW = "Install bubblewrap and allow user namespaces, or run in a container without credentials and pass unsafe=True."

_LOADER = (
    "import json, sys\nwith open(int(sys.argv[1])) as file:\n    boot, config, program = json.load(file)\nexec(boot)"
)
_BOOT = Path(__file__).with_name("_boot.py")
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


class Engine(NamedTuple):
    """A way of making a sandbox on this machine."""

    name: str
    """``"bwrap"``, ``"namespaces"``, or ``"none"``."""
    user_namespace: bool = True
    """False under root, who needs none and takes another user id inside."""


class Running:
    """A program in its sandbox."""

    def __init__(self, process: "subprocess.Popen[bytes]", ready: int, engine: Engine, folder: str | None):
        self.process, self.engine = process, engine
        self._ready, self._folder = ready, folder

    def wait_until_ready(self, deadline: float) -> None:
        """Wait until the program begins; from then on nothing that it writes is ours.

        Raises:
            SandboxError: The sandbox was not ready at ``deadline`` (of ``time.monotonic``).
        """
        try:
            said, _ = read(self._ready, 1000, deadline)
        finally:
            os.close(self._ready)
            self._ready = -1
        if said != b"ready":
            text = said.decode(errors="replace") or "it did not start"
            raise SandboxError(f"The sandbox '{self.engine.name}' failed: {text}.")

    def kill(self) -> None:
        """End the program and everything that it started."""
        if self._ready >= 0:
            os.close(self._ready)
            self._ready = -1
        if self.process.returncode is None:
            if self.engine.name == UNSAFE:
                # Its supervisor knows of processes that have left the group.
                self.process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(2.0)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def run(program: str, stdin: str = "", limits: Limits | None = None, *, unsafe: bool = False) -> Result:
    """Run a Python program as ``__main__`` in a sandbox and return its output.

    Its standard error is thrown away. Third-party packages cannot be imported.

    Args:
        program: Python source text.
        stdin: What it reads.
        limits: The defaults of ``Limits``.
        unsafe: Go on without a sandbox where there is none.

    Raises:
        SandboxError: There is no sandbox on this machine, or it did not start.
    """
    return run_in(engine(unsafe), program, stdin, limits or Limits())


def run_in(engine: Engine, program: str, stdin: str, limits: Limits) -> Result:
    """``run``, in an engine that is known."""
    with tempfile.TemporaryFile() as typed:
        typed.write(stdin.encode("utf-8", "surrogatepass"))
        typed.seek(0)
        output, theirs = os.pipe()
        try:
            with started(program, engine, limits, stdin=typed.fileno(), stdout=theirs) as running:
                os.close(theirs)
                theirs = -1
                running.wait_until_ready(time.monotonic() + START_SECONDS)
                deadline = time.monotonic() + limits.wall_seconds
                text, ended = read(output, limits.output_bytes + 1, deadline)
                if len(text) > limits.output_bytes:
                    return Result(text[: limits.output_bytes], None, "output")
                try:
                    code = running.process.wait(max(0.0, deadline - time.monotonic())) if ended else None
                except subprocess.TimeoutExpired:
                    code = None
                if code is None:
                    return Result(text, None, "time")
                return Result(text, code if code >= 0 else 128 - code, "")
        finally:
            os.close(output)
            if theirs >= 0:
                os.close(theirs)


def read(fd: int, most: int, deadline: float) -> tuple[bytes, bool]:
    """Up to ``most`` bytes, and whether the end of the file came before ``deadline``."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    text = bytearray()
    while len(text) < most:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            return bytes(text), False
        more = os.read(fd, min(65_536, most - len(text)))
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
    keep: Sequence[int] = (),
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    stderr: int = subprocess.DEVNULL,
) -> Iterator[Running]:
    """Start a program; on leaving the ``with``, it and all that it started are dead.

    Args:
        program: Python source text. It never is on a command line or in a file that the program could find.
        keep: File descriptors that it may use, by the same numbers.
    """
    running = _start(program, engine, limits, keep, stdin, stdout, stderr)
    try:
        yield running
    finally:
        running.kill()


def _start(
    program: str, engine: Engine, limits: Limits, keep: Sequence[int], stdin: int, stdout: int, stderr: int
) -> Running:
    binds, links, masks = _files()
    ready, theirs = os.pipe()
    uid = _stranger() if os.geteuid() == 0 and engine.name != UNSAFE else None
    config = {
        **limits._asdict(),
        "engine": engine.name,
        "user_namespace": engine.user_namespace,
        "ready": theirs,
        "keep": list(keep),
        "uid": None if engine.user_namespace else uid,
        "binds": binds,
        "links": links,
        "masks": masks,
    }
    folder = tempfile.mkdtemp(prefix="mechreward-") if engine.name == UNSAFE else None
    home = folder or "/tmp"
    # Root without the right to make namespaces may still take another user id first, and make them as that user.
    switch = uid if engine.user_namespace else None
    try:
        with tempfile.TemporaryFile() as file:  # it has no name, and is closed inside before the program begins
            file.write(json.dumps([_boot_text(), config, program]).encode())
            file.seek(0)
            # No -E and no -I: the environment is ours, and a fixed hash seed keeps verdicts the same between runs.
            command = [_interpreter(), "-s", "-S", "-P", "-c", _LOADER, str(file.fileno())]
            if engine.name == "bwrap":
                command = [*_bubblewrap(engine, limits), "--", *command]
            process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=(file.fileno(), theirs, *keep),
                start_new_session=True,  # a process group of its own, and no terminal
                cwd=folder or "/",
                env={"HOME": home, "TMPDIR": home, **_ENVIRONMENT},
                user=switch,
                group=switch,
                extra_groups=None if switch is None else [],
            )
    except OSError as error:
        os.close(ready)
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        raise SandboxError(f"The sandbox '{engine.name}' cannot be started: {error}.") from error
    finally:
        os.close(theirs)
    return Running(process, ready, engine, folder)


@functools.cache
def _boot_text() -> str:
    return _BOOT.read_text(encoding="utf-8")


def _interpreter() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)


def _stranger() -> int:
    """A user id that owns nothing, most likely used by no other sandbox: process limits are counted per user."""
    return random.SystemRandom().randrange(50_000, 60_000)


@functools.cache
def _files() -> tuple[list[str], list[tuple[str, str]], list[str]]:
    """Paths that a program may read, links among them, and folders in them that it must not see.

    Site-packages are hidden, since packages may contain the answers: data sets, and tests with them.
    """
    folders = [f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib64", sysconfig.get_path("stdlib")]
    folders += [str(sysconfig.get_config_var("LIBDIR") or "/usr/lib"), *_SYSTEM]
    links, binds = [], []
    for path in dict.fromkeys(folders):
        if os.path.islink(path) and os.path.dirname(path) == "/":
            links.append((path, os.readlink(path)))  # /lib -> usr/lib
        elif os.path.isdir(path) and not any(os.path.realpath(path).startswith(known + "/") for known in binds):
            binds.append(os.path.realpath(path) if path not in binds else path)
    binds = list(dict.fromkeys(binds))
    masks = [
        path
        for folder in binds
        for pattern in ("python*/site-packages", "python*/dist-packages", "site-packages", "dist-packages")
        for path in glob.glob(f"{glob.escape(folder)}/{pattern}")
        if os.path.isdir(path) and not os.path.islink(path)
    ]
    files = [_interpreter(), "/etc/ld.so.cache"]
    binds += [path for path in files if os.path.exists(path) and not any(path.startswith(f"{b}/") for b in binds)]
    return binds, links, list(dict.fromkeys(masks))


def _bubblewrap(engine: Engine, limits: Limits) -> list[str]:
    binds, links, masks = _files()
    command = [shutil.which("bwrap") or "bwrap", "--die-with-parent", "--cap-drop", "ALL"]
    command += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    # As root the boot takes another user id inside, where its limit on processes is its own; it needs to be able to.
    root = ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    command += ["--unshare-user"] if engine.user_namespace else root
    command += ["--perms", "1777", "--size", str(limits.temp_bytes), "--tmpfs", "/tmp"]
    for link, target in links:
        command += ["--symlink", target, link]
    for path in binds:
        for above in reversed(Path(path).parents[:-1]):
            command += ["--perms", "0755", "--dir", str(above)]  # bwrap's own choice may be closed to another user id
        command += ["--ro-bind", path, path]
    command += ["--perms", "0755", "--dir", "/dev"]
    for name in ("null", "zero", "random", "urandom"):
        command += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for path in masks:
        command += ["--perms", "0555", "--size", "4096", "--tmpfs", path, "--remount-ro", path]
    return [*command, "--remount-ro", "/", "--chdir", "/tmp"]


def engine(unsafe: bool = False) -> Engine:
    """The sandbox that works here, found out once per process.

    Raises:
        SandboxError: None does, and ``unsafe`` is False.
    """
    found, why = _detect()
    if found is not None:
        return found
    if os.name != "posix":
        raise SandboxError("Code can be run only on Linux (with a sandbox) or another POSIX system (without).")
    if not unsafe:
        raise SandboxError(f"There is no sandbox on this machine, and code is not run without one ({why}). {HOW}")
    warnings.warn(f"Code runs without a sandbox, as you asked ({why}).", RuntimeWarning, stacklevel=3)
    return Engine(UNSAFE)


@functools.cache
def _detect() -> tuple[Engine | None, str]:
    if sys.platform != "linux":
        return None, f"it needs Linux, and this is {sys.platform}"
    user_namespaces = [False, True] if os.geteuid() == 0 else [True]
    names = ["bwrap", "namespaces"] if shutil.which("bwrap") else ["namespaces"]
    why = [] if shutil.which("bwrap") else ["bwrap is not installed"]
    for name in names:
        for user_namespace in user_namespaces:
            candidate = Engine(name, user_namespace)
            failure = examine(candidate)
            if not failure:
                return candidate, ""
            why.append(f"{name}{' in a user namespace' if user_namespace else ''}: {failure}")
    return None, "; ".join(why)


_EXAMINATION = """
import json, os, socket, time
try:
    network = sorted(name for _, name in socket.if_nameindex())
except OSError:
    network = []
children = 0
try:
    while children < 40:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        children += 1
except OSError:
    pass
print(json.dumps({
    "pid": os.getpid(),
    "network": network,
    "root": sorted(os.listdir("/")),
    "writable": [path for path in ("/", os.path.dirname(os.__file__), os.__file__) if os.access(path, os.W_OK)],
    "temporary": os.access("/tmp", os.W_OK) and os.access("/dev/null", os.W_OK),
    "children": children,
    "environment": sorted(os.environ),
}), flush=True)
"""


BROKEN = (
    "processes of the machine are visible",
    "there is a network",
    "files of the machine are visible",
    "the file system can be written",
    "there is no temporary folder or no /dev/null",
    "processes are not limited",
    "the environment leaks",
)
"""Promises that an engine may not keep, in the order in which ``examine`` tests them."""


def examine(candidate: Engine) -> str:
    """Run a program in a sandbox that tests what it promises; ``""``, or the first promise that is not kept."""
    limits = Limits(processes=8)
    output, theirs = os.pipe()
    text = b""
    with tempfile.TemporaryFile() as errors:
        try:
            with started(_EXAMINATION, candidate, limits, stdout=theirs, stderr=errors.fileno()) as running:
                os.close(theirs)
                theirs = -1
                running.wait_until_ready(time.monotonic() + START_SECONDS)
                text, _ = read(output, 100_000, time.monotonic() + START_SECONDS)
        except SandboxError as error:
            errors.seek(0)
            said = errors.read(2000).decode(errors="replace").strip().splitlines()
            return said[-1] if said else str(error)
        finally:
            os.close(output)
            if theirs >= 0:
                os.close(theirs)
    try:
        seen = json.loads(text)
    except ValueError:
        return "a program in it gave no output"
    visible = {path.split("/")[1] for path in (*_files()[0], *(link for link, _ in _files()[1]))} | {"tmp", "dev"}
    tests = (
        seen["pid"] > 9,
        bool(set(seen["network"]) - {"lo"}),
        bool(set(seen["root"]) - visible),
        bool(seen["writable"]),
        not seen["temporary"],
        seen["children"] > limits.processes,
        bool(set(seen["environment"]) - {"HOME", "TMPDIR", "LC_CTYPE", "PWD", *_ENVIRONMENT}),
    )
    return next((sentence for sentence, failed in zip(BROKEN, tests, strict=True) if failed), "")
