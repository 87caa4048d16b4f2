"""A worker process that loads nothing, for tests of how it is asked: it obeys what it is served."""

import contextlib
import os
import time

from mechreward.errors import ConfigError


def work(connection, served, _folder):
    """In the place of the server's `_work`; ``served`` is a folder, where each start leaves a file."""
    starts = len(os.listdir(served))
    (served / str(starts)).touch()
    if (served / "broken").exists():
        connection.send(ConfigError("It cannot be loaded."))
        return
    connection.send(f"limits of {starts}")
    weights = "initial"
    with contextlib.suppress(EOFError):
        while True:
            what, given = connection.recv()
            if what == "load_weights":
                weights = given[1]
                connection.send(1)
                continue
            (command,) = given[0]
            if command == "die":
                os._exit(3)
            if command == "dawdle":
                time.sleep(0.5)
            connection.send(ConfigError("Refused.") if command == "refuse" else (command, weights))
