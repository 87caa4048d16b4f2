"""OpenRLHF 0.11: rewards from a reward server, by token ids.

OpenRLHF has no way to see the policy's activations, so a server (``mechreward serve``) reads a copy: frozen, or live
where weights are pushed to it. Three ways to ask it:

- :class:`AgentExecutor`, named with ``--train.agent_func_path``: sends token ids. The default.
- :func:`reward_func`, in a file named with ``--reward.remote_url``: sends text, which is encoded anew.
- ``--reward.remote_url http://HOST:8000/get_reward``: the same without a line of Python.

The address comes from the environment variable MECHREWARD_URL, the token from MECHREWARD_TOKEN: OpenRLHF gives such
files no arguments. ``recipes/openrlhf/`` has a launch script.
"""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Sequence
from typing import Any

from openrlhf.utils.agent import SingleTurnAgentExecutor  # pyright: ignore[reportMissingImports]

from mechreward.errors import ConfigError
from mechreward.integrations.client import RewardClient
from mechreward.verifiers.golds import gold


class AgentExecutor(SingleTurnAgentExecutor):
    """Generates as OpenRLHF does, and has the very tokens scored.

    A server that gives no answer within the client's deadline ends the training: OpenRLHF would go on without the
    reward. A response in which no token can be read (none, or a lone end token) gets 0, and ``unscored`` 1 in the logs.

    Args:
        dense: Refused, and why.

    Raises:
        ConfigError: ``dense``, or there is no MECHREWARD_URL.
    """

    def __init__(self, dense: bool = False):
        if dense:
            raise ConfigError(
                "OpenRLHF 0.11 takes one number a rollout, which it puts at the last token, so that rewards per token "
                "would be lost: choose another aggregation, or train with TRL or verl."
            )
        super().__init__(remote_rm_url=None)
        _url()

    async def execute(self, prompt: Any, label: Any, *generation: Any, **options: Any) -> dict[str, Any]:
        """One rollout with its reward.

        Raises:
            ServiceError: The server gave none.
        """
        output = await super().execute(prompt, label, *generation, **options)
        ((start, end),) = output["action_ranges"]
        ids = list(output["observation_tokens"])
        reward, flags = None, []
        if start < end:
            async with _client() as client:
                reply = await client.score_tokens([ids[:start]], [ids[start:end]], _labels([label]), include=["flags"])
            (reward,), (flags,) = reply.rewards, reply.flags or [[]]
        logs = {"flagged": float(bool(flags)), "unscored": float(reward is None)}
        output.update(reward=reward or 0.0, scores=reward or 0.0, extra_logs=logs)
        return output


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any]) -> dict[str, Any]:
    """Rewards by text: what OpenRLHF calls in a Python file. Decoding and encoding may change tokens, and warns so.

    Raises:
        ServiceError: The server gave none.
    """
    warnings.warn(
        "reward_func sends text, which is encoded anew and may come out as other tokens than were sampled: prefer "
        "AgentExecutor, which sends the token ids.",
        stacklevel=2,
    )

    async def ask() -> dict[str, Any]:
        async with _client() as client:
            return (await client.get_reward(queries, prompts, _labels(labels))).model_dump()

    return asyncio.run(ask())


def _client() -> RewardClient:
    return RewardClient(_url(), os.environ.get("MECHREWARD_TOKEN"))


def _url() -> str:
    url = os.environ.get("MECHREWARD_URL")
    if not url:
        raise ConfigError(
            "MECHREWARD_URL is not set: start 'mechreward serve' and give its address, e.g. http://127.0.0.1:8000."
        )
    return url


def _labels(labels: Sequence[Any]) -> list[str | None]:
    return [gold(label, "label") for label in labels]
