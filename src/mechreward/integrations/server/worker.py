"""Worker: a process of its own that holds the model, so that HTTP goes on while it computes and survives its death."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mechreward.errors import MechRewardError, ServiceError
from mechreward.integrations.server.scorer import INITIAL, ModelLimits, Rollout, Score, Scorer, Served

logger = logging.getLogger(__name__)


class WorkerDied(Exception):
    """The worker process ended while it was asked for something."""


class Worker:
    """Asks the worker process, one thing at a time, and starts another where it has died.

    Pushed weights are kept in ``folder``, since a worker that starts anew must go on with them.

    Args:
        served: What it loads.
        folder: For pushed weights.
    """

    def __init__(self, served: Served, folder: Path):
        self.served, self.folder = served, folder
        self.restarts = 0
        self.ready = False
        self.version = INITIAL
        self.limits = ModelLimits(None, 0)
        self._pushed: tuple[Path, str] | None = None
        self._process: Any = None
        self._connection: Connection | None = None
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "worker")

    async def start(self) -> None:
        """Start the process and wait until it has loaded what it serves.

        Raises:
            MechRewardError: It cannot load.
            WorkerDied: It died over it.
        """
        async with self._turn:
            await self._start()

    async def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, self.served), name="mechreward-worker", daemon=True)
        await self._in_thread(self._process.start)
        theirs.close()
        self.limits = await self._answer()
        if self._pushed is not None:
            self._send("load_weights", *self._pushed)
            await self._answer()
        self.ready = True

    async def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Score rollouts in one batch.

        Raises:
            WorkerDied: The process ended meanwhile; another one is being started.
        """
        return await self._ask("score", list(rollouts))

    async def load_weights(self, file: Path, version: str) -> int:
        """Take pushed weights, between two batches.

        Raises:
            MechRewardError: They do not fit.
        """
        tensors = await self._ask("load_weights", file, version)
        before, self._pushed, self.version = self._pushed, (file, version), version
        if before is not None:
            before[0].unlink(missing_ok=True)
        return tensors

    async def _ask(self, what: str, *given: Any) -> Any:
        async with self._turn:
            if not self.ready or not self._process.is_alive():
                await self._start_again()
            try:
                self._send(what, *given)
                return await self._answer()
            except WorkerDied:
                self.ready = False
                raise

    async def _start_again(self) -> None:
        self.restarts += 1
        logger.warning("The worker has died (exit code %s): starting another.", self._process.exitcode)
        self.stop()
        try:
            await self._start()
        except MechRewardError as error:
            raise WorkerDied(str(error)) from error

    def _send(self, what: str, *given: Any) -> None:
        assert self._connection is not None
        try:
            self._connection.send((what, given))
        except OSError as error:
            raise WorkerDied from error

    async def _answer(self) -> Any:
        assert self._connection is not None
        try:
            found = await self._in_thread(self._connection.recv)
        except (EOFError, OSError) as error:
            raise WorkerDied from error
        if isinstance(found, MechRewardError):
            raise found
        return found

    async def _in_thread(self, call: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def stop(self) -> None:
        """End the process."""
        self.ready = False
        if self._process is not None and self._process.is_alive():
            self._process.terminate()
            self._process.join(5)
            self._process.kill()
        if self._connection is not None:
            self._connection.close()


def _work(connection: Connection, served: Served) -> None:
    """The worker process: loads, then answers one question after the other until the server is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server drains first
    logging.basicConfig(level=logging.WARNING)
    try:
        scorer = Scorer(served)
    except MechRewardError as error:
        connection.send(error)
        return
    connection.send(scorer.limits)
    with contextlib.suppress(EOFError, OSError):
        while True:
            what, given = connection.recv()
            try:
                found: Any = getattr(scorer, what)(*given)
            except MechRewardError as error:
                found = error
            except Exception as error:  # whatever is wrong with one batch must not end the worker
                logger.exception("The worker could not %s.", what)
                said = " ".join(str(error).split())[:200]
                found = ServiceError(f"The worker failed with {type(error).__name__}: {said}")
            connection.send(found)
