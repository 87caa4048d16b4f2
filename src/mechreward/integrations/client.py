"""RewardClient: asks a reward server, retries with backoff, and fails in one sentence."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from mechreward.errors import RewardError, ServiceError
from mechreward.extras import require
from mechreward.integrations.protocol import (
    Detail,
    OpenRLHFReply,
    OpenRLHFRequest,
    ScoreReply,
    ScoreRequest,
    WeightsReply,
)
from mechreward.retry import BUSY, Busy, retry_after
from mechreward.schema import most_telling, sentence

BYTES = {"Content-Type": "application/octet-stream"}


class RewardClient:
    """An asynchronous client of the reward server.

    A request that the server cannot take now (it is busy, restarts, or is not to be reached) is sent again, after the
    server's ``Retry-After`` or, without one, after waits that double from ``FIRST_WAIT`` up to ``LONGEST_WAIT`` s and
    are shortened at random, so that many clients do not come back at once. Scoring has no side effects but what
    guards learn.

    Args:
        url: The server's address, e.g. ``"http://127.0.0.1:8000"``.
        token: Its bearer token.
        deadline: Seconds from the call to the last attempt's end.
        timeout: Seconds for one attempt.

    Raises:
        MissingExtraError: httpx is not installed.
    """

    FIRST_WAIT = 0.25
    LONGEST_WAIT = 15.0

    def __init__(self, url: str, token: str | None = None, deadline: float = 300.0, timeout: float = 120.0):
        httpx = require("httpx", "client")
        self.url, self.deadline = url.rstrip("/"), deadline
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.AsyncClient(headers=headers, timeout=timeout, limits=httpx.Limits(max_connections=None))

    async def __aenter__(self) -> RewardClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def score_tokens(
        self,
        prompt_ids: Sequence[Sequence[int]],
        response_ids: Sequence[Sequence[int]],
        labels: Sequence[str | None] | None = None,
        num_generations: int = 1,
        include: Sequence[Detail] = (),
        response_mask: Sequence[Sequence[int]] | None = None,
    ) -> ScoreReply:
        """Score B rollouts by their token ids; see :class:`ScoreRequest` and :class:`ScoreReply`.

        Raises:
            RewardError: The rollouts are no request: rows are missing, say.
            ServiceError: No answer came before the deadline, or the server refuses the request.
        """
        asked = _checked(
            ScoreRequest,
            prompt_ids=list(map(list, prompt_ids)),
            response_ids=list(map(list, response_ids)),
            response_mask=None if response_mask is None else list(map(list, response_mask)),
            labels=None if labels is None else list(labels),
            num_generations=num_generations,
            include=list(include),
        )
        return await self._ask("/score_tokens", ScoreReply, len(response_ids), json=asked)

    async def get_reward(
        self, query: Sequence[str], prompts: Sequence[str], labels: Sequence[str | None] | None = None
    ) -> OpenRLHFReply:
        """Score B rollouts by their text; see :class:`OpenRLHFRequest` and :class:`OpenRLHFReply`.

        Raises:
            RewardError, ServiceError: As for :meth:`score_tokens`.
        """
        asked = _checked(
            OpenRLHFRequest,
            query=list(query),
            prompts=list(prompts),
            labels=None if labels is None else list(labels),
        )
        return await self._ask("/get_reward", OpenRLHFReply, len(query), json=asked)

    async def push_weights(self, safetensors: bytes, version: str) -> WeightsReply:
        """Push a policy's weights, as ``safetensors.torch.save`` writes its ``state_dict()`` without a tied head.

        Raises:
            ServiceError: The server does not take them.
        """
        return await self._ask(
            "/weights", WeightsReply, content=safetensors, headers=BYTES, params={"version": version}
        )

    async def _ask(self, route: str, kind: type[Any], rollouts: int | None = None, **sent: Any) -> Any:
        """The answer as a ``kind``, with a reward for each of ``rollouts``."""
        found = await self._post(route, sent)
        try:
            reply = kind.model_validate_json(found)
        except ValidationError as error:
            said = error.errors()[0]["msg"]
            raise ServiceError(f"{self.url} does not answer as a reward server of this version ({said}).") from None
        if rollouts is not None and len(reply.rewards) != rollouts:
            raise ServiceError(f"{self.url} answered {len(reply.rewards)} rewards for {rollouts} rollouts.")
        return reply

    async def _post(self, route: str, sent: dict[str, Any]) -> bytes:
        """The answer's body, after as many attempts as fit the deadline."""
        until, wait, attempts = time.monotonic() + self.deadline, self.FIRST_WAIT, 0
        while True:
            attempts += 1
            try:
                return await self._attempt(route, until - time.monotonic(), sent)
            except Busy as busy:
                pause, reason = wait * random.uniform(0.5, 1.0) if busy.wait is None else busy.wait, busy.reason
            if time.monotonic() + pause > until:
                raise ServiceError(
                    f"{self.url}{route} gave no reward within {self.deadline:g} s ({attempts} attempts, the last: "
                    f"{reason}): see whether the server runs and keeps pace (/readyz, /metrics)."
                )
            await asyncio.sleep(pause)
            wait = min(2 * wait, self.LONGEST_WAIT)

    async def _attempt(self, route: str, left: float, sent: dict[str, Any]) -> bytes:
        """The body of one attempt's answer.

        Raises:
            Busy: Another attempt may succeed.
        """
        httpx = require("httpx", "client")
        try:
            async with asyncio.timeout(max(left, 0.0)):
                answer = await self._http.post(f"{self.url}{route}", **sent)
        except TimeoutError:
            raise Busy("the deadline") from None
        except (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError) as error:
            raise Busy(f"{type(error).__name__} {error}".strip()) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:  # asking again would not help
            raise ServiceError(f"{self.url}{route} cannot be asked ({error}).") from None
        if answer.status_code == 200:
            return answer.content
        said = _detail(answer)
        # 500 says that this request cannot be scored: another attempt would fail as well.
        if answer.status_code in BUSY - {500}:
            raise Busy(f"status {answer.status_code}, {said}", retry_after(answer.headers))
        raise ServiceError(f"{self.url}{route} refuses the request (status {answer.status_code}): {said}")


def _checked(kind: type[BaseModel], **fields: Any) -> dict[str, Any]:
    """A request as it is sent.

    Raises:
        RewardError: It is none.
    """
    try:
        return kind(**fields).model_dump()
    except ValidationError as error:
        said = sentence(most_telling(error), kind, "request")
        raise RewardError(f"This cannot be scored: {said}") from None


def _detail(answer: Any) -> str:
    try:
        return str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return " ".join(answer.text.split())[:200] or "without a reason"
