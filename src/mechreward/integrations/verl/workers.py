"""What verl's reward workers and agent loops do for us: ask a reward server, by rollout or by token, or nothing."""

from __future__ import annotations

import os
from typing import Any

import torch
from verl.experimental.agent_loop.agent_loop import (  # pyright: ignore[reportMissingImports]
    AgentLoopOutput,
    register,
)
from verl.experimental.agent_loop.single_turn_agent_loop import (  # pyright: ignore[reportMissingImports]
    SingleTurnAgentLoop,
)
from verl.experimental.reward_loop.reward_manager.base import (  # pyright: ignore[reportMissingImports]
    RewardManagerBase,
)

from mechreward.errors import ConfigError, RewardError
from mechreward.integrations.client import RewardClient
from mechreward.integrations.verl.options import DENSE, check, dense_over_http
from mechreward.verifiers.golds import gold


class RewardManager(RewardManagerBase):
    """Has the very tokens scored that were sampled, by ``mechreward serve``.

    The server's address is ``+reward.reward_kwargs.url`` or the environment variable MECHREWARD_URL; its token comes
    from MECHREWARD_TOKEN alone. ``+reward.reward_kwargs.deadline`` says for how many seconds to ask for one reward.

    verl has no way to leave a rollout out: one that the server cannot score (no token to read, dropped by a guard, no
    label behind a gate) gets 0, and 1 as ``unscored`` in the logs.

    Raises:
        ConfigError: There is no address, or :func:`options.check` finds what cannot work.
    """

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, **_: Any):
        super().__init__(config, tokenizer, compute_score)
        check(config)
        asked = config.reward.get("reward_kwargs") or {}
        url = asked.get("url") or os.environ.get("MECHREWARD_URL")
        if not url:
            raise ConfigError(
                "There is no reward server: start 'mechreward serve' and give its address, e.g. "
                "+reward.reward_kwargs.url=http://127.0.0.1:8000, or MECHREWARD_URL in the environment."
            )
        self.client = RewardClient(url, os.environ.get("MECHREWARD_TOKEN"), deadline=asked.get("deadline", 300.0))
        self.dense = dense_over_http(config)

    async def run_single(self, data: Any) -> dict[str, Any]:
        """One rollout's reward, with ``token_rewards`` for :class:`DenseAgentLoop`.

        Raises:
            RewardError: A rollout of several turns, or a right answer that is a mapping or a list of several values.
            ServiceError: The server gave no reward.
        """
        if len(data) > 1 or data.non_tensor_batch["__num_turns__"][0] > 2:
            raise RewardError(
                "This rollout has several turns, and verl does not tell a reward manager which tokens tools wrote: use "
                "a single-turn agent loop, or rewards read in process (+mechreward.packs)."
            )
        row = data.batch[0]
        real = row["attention_mask"].bool()
        asked, answered = real[: len(row["prompts"])], real[len(row["prompts"]) :]
        truth = (data.non_tensor_batch["reward_model"][0] or {}).get("ground_truth")
        reply = await self.client.score_tokens(
            [row["prompts"][asked].tolist()],
            [row["responses"][answered].tolist()],
            [gold(truth, "reward_model.ground_truth")],
            include=["token_rewards", "flags"],
        )
        (reward,), (tokens,), (flags,) = reply.rewards, reply.token_rewards or [[]], reply.flags or [[]]
        said: dict[str, Any] = {"flagged": float(bool(flags)), "unscored": float(reward is None)}
        if self.dense:
            said["token_rewards"] = tokens
        return {"reward_score": reward or 0.0, "reward_extra_info": said}


class NoReward(RewardManagerBase):
    """For runs in which all of the reward is read from the policy: verl wants a reward manager.

    Raises:
        ConfigError: As for :class:`RewardManager`.
    """

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, **_: Any):
        super().__init__(config, tokenizer, compute_score)
        check(config)

    async def run_single(self, data: Any) -> dict[str, Any]:
        """0, to which the trainer adds."""
        return {"reward_score": 0.0, "reward_extra_info": {}}


class DenseOutput(AgentLoopOutput):
    """A rollout whose ``rm_scores`` are the server's rewards per token, where verl puts one number at the end."""

    def as_dict(self) -> dict[str, Any]:
        """What verl stores of it."""
        output = super().as_dict()
        tokens = output["extra_fields"].get("reward_extra_info", {}).pop("token_rewards", None)
        if tokens is None:
            raise ConfigError(
                f"The agent loop {DENSE} found no rewards per token: set reward.reward_manager to "
                "mechreward.integrations.verl's RewardManager."
            )
        output["rm_scores"] = torch.tensor([0.0 if token is None else token for token in tokens], dtype=torch.float32)
        return output


@register(DENSE)
class DenseAgentLoop(SingleTurnAgentLoop):
    """verl's single-turn agent loop, with rewards per token."""

    async def run(self, sampling_params: dict[str, Any], **asked: Any) -> DenseOutput:
        """One rollout."""
        output = await super().run(sampling_params, **asked)
        return DenseOutput(**{name: getattr(output, name) for name in output.model_fields_set})
