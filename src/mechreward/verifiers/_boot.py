"""The first program inside a sandbox: it locks itself in and then runs the program that it was given.

A fresh interpreter reads its text, ``config`` and ``program`` from a file without a name (see ``sandbox._start``); it
imports nothing of ours. Everything above the last line is trusted. Nothing that it does can be undone by the program
that it then runs: limits are hard limits, privileges are gone, and its file system, network and processes are those of
its namespaces.
"""

import ctypes
import os
import resource
import signal
import sys
import types
from contextlib import suppress
from typing import Any, NoReturn

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 36, 38
NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE, DETACH = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18, 2
DEVICES = ("null", "zero", "random", "urandom")

# System calls that a program of this kind has no use for, and that reach other processes, the network (sockets of some
# families know no namespaces), memory that no limit counts, or the more fragile parts of the kernel.
DENIED = {
    "x86_64": [
        29, 41, 64, 68, 101, 135, 154, 155, 161, 165, 166, 175, 176, 240, 246, 248, 249, 250, 272, 298, 303, 304, 308,
        310, 311, 313, 319, 320, 321, 323,
    ],
    "aarch64": [
        39, 40, 41, 51, 92, 97, 104, 105, 106, 117, 180, 186, 190, 194, 198, 217, 218, 219, 241, 264, 265, 268, 270,
        271, 273, 279, 280, 282, 294,
    ],
}  # fmt: skip
DENIED_EVERYWHERE = [
    425,
    426,
    427,
    *range(428, 434),
    438,
    442,
    447,
]  # io_uring, the new mount calls, pidfd_getfd, memfd_secret
ARCHITECTURES = {"x86_64": (0xC000003E, 56), "aarch64": (0xC00000B7, 220)}  # AUDIT_ARCH, clone
CLONE3 = 435

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> None:
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def prctl(option: int, value: int) -> None:
    call("prctl", option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    call(
        "mount",
        source.encode(),
        target.encode(),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        data.encode() if data else None,
    )


def close_all(keep: tuple[int, ...] = ()) -> None:
    """Close every descriptor from 3 on but those: a process that waits and holds a pipe would hide its end of file."""
    start = 3
    for fd in sorted(keep):
        os.closerange(start, fd)
        start = max(start, fd + 1)
    os.closerange(start, 65_536)


def wait_for(child: int) -> NoReturn:
    """Let go of all pipes, wait for one child, and end as it ended."""
    close_all()
    for number in (0, 1):
        os.dup2(2, number)
    while True:
        try:
            ended, status = os.wait()
        except InterruptedError:
            continue
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def unshare(user: bool) -> None:
    """Leave the host's namespaces. Returns in a child that is process 2 of its own, under a minimal process 1."""
    uid, gid = os.getuid(), os.getgid()
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    call("unshare", NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWPID | NEWNET | (NEWUSER if user else 0))
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    init = os.fork()
    if init:
        wait_for(init)
    # When process 1 ends, the kernel kills every process of the namespace, whatever session it is in.
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def build_root(config: dict[str, Any]) -> None:
    """Make a file system of nothing but what is listed, read-only, with one small temporary folder."""
    mount("none", "/", None, REC | PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, "size=65536,mode=755")
    os.mkdir("/tmp/old")
    call("pivot_root", b"/tmp", b"/tmp/old")
    os.chdir("/")
    os.mkdir("/tmp")
    mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, f"size={config['temp_bytes']},nr_inodes=4096,mode=1777")
    for link, target in config["links"]:
        os.symlink(target, link)
    os.mkdir("/dev")
    paths = [(path, RDONLY | NODEV) for path in config["binds"]] + [(f"/dev/{name}", RDONLY) for name in DEVICES]
    for path, flags in paths:
        if os.path.isdir("/old" + path):
            os.makedirs(path, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            open(path, "w").close()
        mount("/old" + path, path, None, BIND | REC)
        # A remount inside a user namespace must keep the flags that the host has set.
        # (statvfs knows read-only, nosuid, nodev, noexec, noatime, nodiratime and relatime.)
        known = os.statvfs(path).f_flag
        kept = (known & 0b1111) | (known & 1024) | (known & 2048) | ((known & 4096) and 1 << 21)
        mount("none", path, None, REMOUNT | BIND | NOSUID | flags | kept)
    for path in config["masks"]:
        mount("tmpfs", path, "tmpfs", RDONLY | NOSUID | NODEV, "size=4096,mode=555")
    call("umount2", b"/old", DETACH)
    os.rmdir("/old")
    mount("none", "/", None, REMOUNT | BIND | RDONLY | NOSUID | NODEV)
    os.chdir("/tmp")


def start_init() -> None:
    """Leave process 1 behind to wait; only it, and not what it waits for, holds the namespace open."""
    child = os.fork()
    if child:
        wait_for(child)


def supervise() -> None:
    """Without namespaces: leave a process behind that ends what the program leaves behind, as far as it can."""
    if sys.platform != "linux":
        return
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    prctl(PR_SET_SUBREAPER, 1)
    child = os.fork()
    if child == 0:
        return
    close_all()
    for number in (0, 1):
        os.dup2(2, number)
    signal.signal(signal.SIGTERM, lambda number, frame: end_descendants(137))
    while True:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            end_descendants(code if code >= 0 else 128 - code)


def end_descendants(code: int) -> NoReturn:
    """Stop them all before killing any: a fork bomb that is still running would outrun us."""
    stopped: set[int] = set()
    for _ in range(200):
        new = descendants() - stopped
        for pid in new:
            send(pid, signal.SIGSTOP)
        stopped |= new
        if not new:
            break
    for pid in stopped:
        send(pid, signal.SIGKILL)
    os._exit(code)


def send(pid: int, number: int) -> None:
    with suppress(OSError):
        os.kill(pid, number)


def descendants() -> set[int]:
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        try:
            with open(f"/proc/{int(name)}/stat") as file:
                parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
        except (ValueError, OSError):
            continue
    found, grew = {os.getpid()}, True
    while grew:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        found, grew = found | more, bool(more)
    return found - {os.getpid()}


def tasks_of_this_user() -> int:
    """RLIMIT_NPROC counts the tasks of the user in the whole user namespace: without one of our own, all of them."""
    total = 0
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.getuid():
                total += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue
    return total


def limit(config: dict[str, Any]) -> None:
    processes = config["processes"]
    if config["engine"] == "none" and os.path.isdir("/proc/self/task"):
        processes += tasks_of_this_user()
    limits = {
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": config["cpu_seconds"],
        "RLIMIT_AS": config["memory_bytes"],
        "RLIMIT_FSIZE": config["file_bytes"],
        "RLIMIT_NOFILE": config["open_files"],
        "RLIMIT_NPROC": processes,
        "RLIMIT_MSGQUEUE": 0,
    }
    for name, value in limits.items():
        number = getattr(resource, name, {"RLIMIT_MSGQUEUE": 12}.get(name) if sys.platform == "linux" else None)
        if number is None:
            continue
        hard = resource.getrlimit(number)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        try:
            resource.setrlimit(number, (value, value))
        except (ValueError, OSError):
            if config["engine"] != "none":  # macOS has no RLIMIT_AS worth the name
                raise


def drop_privileges(config: dict[str, Any]) -> None:
    uid = config["uid"]
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    if sys.platform != "linux":
        return
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    if config["engine"] != "none":
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        call("capset", header, (ctypes.c_uint32 * 6)())
    prctl(PR_SET_DUMPABLE, 0)  # no /proc/<pid>/mem for others of the same user


def filter_system_calls() -> None:
    """Install a seccomp filter: on x86-64 and arm64, whose numbers are known."""
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in ARCHITECTURES or sys.maxsize < 1 << 32:
        return
    arch, clone = ARCHITECTURES[machine]
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, refuse, unknown, allow = 0x80000000, 0x00050001, 0x00050026, 0x7FFF0000
    lines = [(load, 0, 0, 4), (equal, 1, 0, arch), (answer, 0, 0, kill), (load, 0, 0, 0)]
    lines += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, refuse)]  # x32
    lines += [(equal, 0, 1, CLONE3), (answer, 0, 0, unknown)]  # its flags cannot be read here: libc falls back to clone
    for number in DENIED[machine] + DENIED_EVERYWHERE:
        lines += [(equal, 0, 1, number), (answer, 0, 0, refuse)]
    namespaces = NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
    lines += [(equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 0, 1, namespaces), (answer, 0, 0, refuse)]
    lines += [(answer, 0, 0, allow)]

    class Line(ctypes.Structure):
        _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32)]

    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint16), ("lines", ctypes.POINTER(Line))]

    table = (Line * len(lines))(*lines)
    text = Filter(len(lines), ctypes.cast(table, ctypes.POINTER(Line)))
    call("prctl", 22, ctypes.c_ulong(2), ctypes.byref(text), ctypes.c_ulong(0), ctypes.c_ulong(0))


def lock_in(config: dict[str, Any]) -> None:
    """Everything, in order."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if config["engine"] == "namespaces":
        unshare(config["user_namespace"])
        build_root(config)
        start_init()
    elif config["engine"] == "none":
        supervise()
    close_all((config["ready"], *config["keep"]))
    drop_privileges(config)
    limit(config)
    filter_system_calls()


def boot(config: dict[str, Any]) -> None:
    sys.argv[:] = [""]
    try:
        lock_in(config)
    except BaseException as error:
        os.write(config["ready"], f"{type(error).__name__}: {error}"[:500].encode())
        os._exit(1)
    os.write(config["ready"], b"ready")
    os.close(config["ready"])


if __name__ == "__main__":
    boot(globals()["config"])
    sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(globals()["program"], "<program>", "exec"), sys.modules["__main__"].__dict__)
