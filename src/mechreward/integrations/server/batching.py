"""Batcher: requests wait in a bounded queue, and go to the worker as many at a time as a batch holds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from mechreward.errors import MechRewardError
from mechreward.integrations.server.refusal import RESTART, Refused
from mechreward.integrations.server.scorer import Rollout, Score


@dataclass(frozen=True, eq=False)
class _Asked:
    rollouts: Sequence[Rollout]
    tokens: int
    answer: asyncio.Future[list[Score]]


class Batcher:
    """Joins requests to batches.

    Nothing waits for company: a batch is what has arrived while the one before was computed, first come, first served,
    up to ``batch_tokens``. A request is never split, so that its groups stay whole, and one whose client has gone is
    not computed.

    Args:
        score: Scores a batch.
        batch_tokens: Tokens in a batch, prompts included; a larger request is a batch by itself.
        queue_tokens: Tokens that may wait; more are refused.
    """

    def __init__(
        self,
        score: Callable[[Sequence[Rollout]], Awaitable[list[Score]]],
        batch_tokens: int,
        queue_tokens: int,
    ):
        self._score, self.batch_tokens, self.queue_tokens = score, batch_tokens, queue_tokens
        self._waiting: dict[_Asked, None] = {}  # in the order in which they came; any can leave at once
        self._open: set[asyncio.Future[list[Score]]] = set()
        self._running: asyncio.Task[None] | None = None
        self._speed = 0.0
        self.draining = False
        self.waiting_tokens = 0

    async def submit(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Wait in the queue, be scored. Cancelling the call takes the request out of the queue.

        Raises:
            Refused: The queue is full, or the server is stopping.
            WorkerDied: The worker died with this batch in its hands.
            MechRewardError: The batch cannot be scored.
        """
        if self.draining:
            raise Refused(503, "The server is stopping: ask another one.", RESTART)
        asked = _Asked(rollouts, sum(map(len, rollouts)), asyncio.get_running_loop().create_future())
        if self._waiting and self.waiting_tokens + asked.tokens > self.queue_tokens:
            wait = self.waiting_tokens / self._speed if self._speed else 1.0
            raise Refused(429, "The queue is full: try again later, or start more servers.", wait)
        self._waiting[asked] = None
        self.waiting_tokens += asked.tokens
        self._open.add(asked.answer)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        try:
            return await asked.answer
        finally:
            self._leave(asked)  # at once where it was cancelled, or those who give up would fill the memory
            self._open.remove(asked.answer)

    async def drain(self) -> None:
        """Take no more, and wait until all that was taken has its answer."""
        self.draining = True
        if self._open:
            await asyncio.wait(self._open)
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def _run(self) -> None:
        """Compute batches until nothing waits."""
        while batch := self._next():
            await self._answer(batch)

    def _leave(self, asked: _Asked) -> None:
        """Take a request out of the queue, if it still waits."""
        if asked in self._waiting:
            del self._waiting[asked]
            self.waiting_tokens -= asked.tokens

    def _next(self) -> list[_Asked]:
        """The requests at the head of the queue that fit one batch; those that were given up are left out."""
        batch: list[_Asked] = []
        tokens = 0
        for head in list(self._waiting):
            if batch and tokens + head.tokens > self.batch_tokens:
                break
            self._leave(head)
            if not head.answer.done():
                batch.append(head)
                tokens += head.tokens
        return batch

    async def _answer(self, batch: Sequence[_Asked]) -> None:
        rollouts = [rollout for asked in batch for rollout in asked.rollouts]
        began = time.monotonic()
        try:
            scores = await self._score(rollouts)
        except Exception as error:
            apart = isinstance(error, MechRewardError) and len(batch) > 1  # one request's fault is not the others'
            for asked in batch:
                if asked.answer.done():
                    continue
                if apart:
                    await self._answer([asked])
                else:
                    asked.answer.set_exception(error)
            return
        speed = sum(map(len, rollouts)) / max(time.monotonic() - began, 1e-6)
        self._speed = 0.8 * self._speed + 0.2 * speed if self._speed else speed
        rows = iter(scores)
        for asked in batch:
            own = list(islice(rows, len(asked.rollouts)))
            if not asked.answer.done():
                asked.answer.set_result(own)
