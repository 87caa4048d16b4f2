"""Worker: a process of its own that holds the model, so that HTTP goes on while it computes and survives its death."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import logging.config
import multiprocessing
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import transformers

from mechreward.errors import MechRewardError, ServiceError
from mechreward.integrations.served import Served
from mechreward.integrations.server.log import CONFIG
from mechreward.integrations.server.models import ModelLimits
from mechreward.integrations.server.scorer import INITIAL, Rollout, Score, Scorer

logger = logging.getLogger(__name__)

PAUSE = 5.0
"""Seconds between two attempts to start a worker that cannot be started."""

ENDING = {signal.SIGINT, signal.SIGTERM}
"""What a worker does not listen to: it may reach the whole group, and the server drains, then ends the worker."""


class WorkerDied(Exception):
    """The worker process ended while it was asked for something."""


class Worker:
    """Asks the worker process, one thing at a time, and starts another where it has died.

    Pushed weights and what guards have learned are kept in ``folder``: a worker that starts anew goes on with them.

    Args:
        served: What it loads.
        folder: For what is kept.
    """

    def __init__(self, served: Served, folder: Path):
        self.served, self.folder = served, folder
        self.restarts = 0
        self.failure: MechRewardError | None = None
        self.ready = False
        self.version = INITIAL
        self.limits = ModelLimits(None, 0, 0)
        self._pushed: tuple[Path, str] | None = None
        self._process: Any = None
        self._connection: Any = None
        self._reviving: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "worker")

    async def start(self) -> None:
        """Start the process and wait until it has loaded what it serves.

        Raises:
            MechRewardError: It cannot load.
            WorkerDied: It died over it.
        """
        async with self._turn:
            try:
                await self._start()
            except MechRewardError as error:
                self.failure = error
                raise

    async def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        process = context.Process(
            target=_work, args=(theirs, self.served, self.folder), name="mechreward-worker", daemon=True
        )
        await self._in_thread(_start_deaf, process)
        theirs.close()
        self._process = process
        self.limits = await self._in_thread(self._exchange)
        if self._pushed is not None:
            await self._in_thread(self._exchange, ("load_weights", self._pushed))
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
            try:
                if not self.ready or not self._process.is_alive():
                    await self._start_again()
                return await self._in_thread(self._exchange, (what, given))
            except WorkerDied:
                self.ready = False
                self._reviving = asyncio.create_task(self._revive())
                raise

    async def _revive(self) -> None:
        """Start the worker although nobody asks: while ``/readyz`` says no, nobody will."""
        while True:
            async with self._turn:
                if self.ready:
                    return
                with contextlib.suppress(WorkerDied):
                    return await self._start_again()
            await asyncio.sleep(PAUSE)

    async def _start_again(self) -> None:
        self.restarts += 1
        self._end()
        logger.warning("The worker has died (exit code %s): starting another.", self._process.exitcode)
        try:
            await self._start()
        except MechRewardError as error:
            raise WorkerDied(str(error)) from error

    def _exchange(self, question: tuple[str, Sequence[Any]] | None = None) -> Any:
        """Send, and wait for the answer: both in the thread, so that they are never parted, whoever gives up."""
        try:
            if question is not None:
                self._connection.send(question)
            found = self._connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied from error
        if isinstance(found, MechRewardError):
            raise found
        return found

    async def _in_thread(self, call: Any, *given: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *given)

    def stop(self) -> None:
        """End the process, for good."""
        if self._reviving is not None:
            self._reviving.cancel()
        self._end()
        self._thread.shutdown(wait=False)

    def _end(self) -> None:
        self.ready = False
        if self._process is not None:
            self._process.kill()  # there is nothing that it would have to save
            self._process.join(5)
        if self._connection is not None:
            self._connection.close()


def _start_deaf(process: Any) -> None:
    """Start a process that inherits blocked signals: it imports for seconds before :func:`_work` can ignore any."""
    resource_tracker.ensure_running()  # which unblocks them where it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: Connection, served: Served, folder: Path) -> None:
    """The worker process: loads, then answers one question after the other until the server is gone."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    logging.config.dictConfig(CONFIG)
    logging.captureWarnings(True)
    transformers.utils.logging.disable_progress_bar()  # it is no line of JSON
    try:
        scorer = Scorer(served, folder / "guards.json")
    except MechRewardError as error:
        connection.send(error)
        return
    connection.send(scorer.model.limits)
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
