"""The first program inside a sandbox: it gives up what bubblewrap has left it, then runs the program it was given.

``sandbox.started`` passes this text to a fresh interpreter, with the number of an open file that holds ``config`` and
the program as JSON. It imports nothing of ours. Only the last line runs untrusted code, and that code cannot undo what
came before: limits are hard limits, and the user id of root is gone.
"""

import glob
import json
import os
import resource
import sys
import types
from contextlib import suppress
from typing import Any


def limit(config: dict[str, Any]) -> None:
    """Set hard limits, or keep those of the machine where they are lower."""
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: config["cpu_seconds"],
        resource.RLIMIT_AS: config["memory_bytes"],
        resource.RLIMIT_FSIZE: config["file_bytes"],
        resource.RLIMIT_NOFILE: config["open_files"],
        resource.RLIMIT_NPROC: config["processes"] + tasks_of_this_user(),
    }
    if sys.platform == "darwin":  # it refuses this one
        del limits[resource.RLIMIT_AS]
    for number, value in limits.items():
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))


def tasks_of_this_user() -> int:
    """Count the tasks that a limit on processes counts too: all of the user's, without isolation.

    Inside bubblewrap the user id, or its namespace, is new, and there is no ``/proc``: none.
    """
    total = 0
    for task in glob.glob("/proc/[0-9]*/task/[0-9]*"):
        with suppress(OSError):
            total += os.stat(task).st_uid == os.getuid()
    return total


def lock_in(config: dict[str, Any]) -> None:
    """Do all of it, in order, and report on the pipe ``ready``. What goes wrong before that is on standard error."""
    uid = config["uid"]
    if uid is not None:  # the kernel takes the capabilities of root away with its user id
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    limit(config)
    with open(os.devnull, "w") as silence:
        os.dup2(silence.fileno(), 2)
    os.write(config["ready"], b"ready")
    os.close(config["ready"])


if __name__ == "__main__":
    with open(int(sys.argv.pop()), encoding="utf-8") as file:
        config, program = json.load(file)
    lock_in(config)
    sys.argv[:] = [""]
    sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(program, "<program>", "exec"), sys.modules["__main__"].__dict__)
