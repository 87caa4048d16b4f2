"""verl's synchronous trainer, which loses no rollout, and adds rewards that are read from the policy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transfer_queue as tq  # pyright: ignore[reportMissingImports]
from tensordict import TensorDict  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer  # pyright: ignore[reportMissingImports]
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer  # pyright: ignore[reportMissingImports]
from verl.utils.model import get_generation_config  # pyright: ignore[reportMissingImports]

from mechreward.errors import CaptureError, RewardError
from mechreward.integrations.served import build_reward
from mechreward.integrations.verl.engine import READ, READINGS
from mechreward.integrations.verl.options import TRAINER, check, dense_in_process, served
from mechreward.readout import Readings, ReadoutBank, Request
from mechreward.reward.base import Reward
from mechreward.rollout.batch import Call, RolloutBatch, Scores
from mechreward.rollout.sampling import end_tokens

STATE_FILE = "mechreward.json"
"""In each checkpoint: what guards have learned."""


class WholeGroups(ReplayBuffer):
    """verl's sampler, which ends the run where a rollout failed: verl logs it, and trains on what is left."""

    def _sync_metadata_from_transfer_queue(self) -> None:
        super()._sync_metadata_from_transfer_queue()
        if failed := sum(map(len, self.failure_keys.values())):
            raise RewardError(
                f"Rollouts of {failed} prompts failed, without which verl would go on: look above for 'Error in "
                "_run_prompt', which says why."
            )


@register_trainer(TRAINER)
class MechRewardTrainer(PPOTrainerSync):
    """verl's synchronous trainer (``trainer.v1.trainer_mode=mechreward``).

    Where ``+mechreward...`` asks for it, the policy is read in the pass that computes its log-probabilities, and the
    reward is added to verl's own ``rm_scores``: at the last token, or dealt out to the tokens (``+mechreward.dense``;
    see ``Reward.per_token``). verl cannot leave a rollout out: one that cannot be scored gets 0, and counts in
    ``mechreward/unscored``. Validation shows verl's own reward alone, since it runs no such pass.

    Raises:
        ConfigError: What cannot work; see :func:`options.check`.
        MechRewardError: A pack or probe cannot be loaded.
    """

    def __init__(self, config: Any):
        check(config)
        self._served, self._dense = served(config), dense_in_process(config)
        self._reward = None if self._served is None else build_reward(self._served)
        super().__init__(config)

    def _build_replay_buffer(self) -> Any:
        self.trainer_mode = "sync"  # by any other name verl goes on as with an asynchronous trainer
        v1 = self.config.trainer.v1
        return WholeGroups(
            trainer_mode=self.trainer_mode,
            trainer_config=v1.sync,
            max_off_policy_threshold=v1.sampler.max_off_policy_threshold,
            max_off_policy_strategy=v1.sampler.max_off_policy_strategy,
            sampler_kwargs=v1.sampler.sampler_kwargs,
        )

    def _init_tokenizer(self) -> None:
        super()._init_tokenizer()
        stops = getattr(get_generation_config(self.config.actor_rollout_ref.model.path), "eos_token_id", None)
        self._ends = end_tokens(None, self.tokenizer, stops)

    def _compute_old_log_prob(self, batch: Any, metrics: dict) -> Any:
        if self._served is not None:
            batch.extra_info[READ] = json.dumps(asdict(self._served))
        batch = super()._compute_old_log_prob(batch, metrics)
        batch.extra_info.pop(READ, None)  # verl 0.9.1 gives back a batch without it; the reference must not be read
        return batch

    def _compute_advantage(self, batch: Any, metrics: dict) -> Any:
        if self._reward is not None:
            self._add_rewards(batch, self._reward, metrics)
        return super()._compute_advantage(batch, metrics)

    def _add_rewards(self, batch: Any, reward: Reward, metrics: dict) -> None:
        """Add what the policy's readings are worth to ``rm_scores``."""
        keys = sorted(_real(batch), key=_group_and_session)
        fields = ["prompts", "responses", "response_mask", "rm_scores", "reward_model", READINGS]
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=fields)
        if READINGS not in data:
            raise CaptureError(
                "The policy's log-prob pass gave no readings: set VERL_USE_EXTERNAL_MODULES="
                "mechreward.integrations.verl in the environment of every node, and train on CUDA devices."
            )
        source = _Step(self._rollouts(data), _response_parts(data, READINGS))
        log = {}
        rewards = reward(
            source.rollouts.prompts,
            source.rollouts.completions,
            source.rollouts.completion_ids,
            source=source,
            log_metric=log.__setitem__,
        )
        metrics |= {f"mechreward/{name.removeprefix('served/')}": value for name, value in log.items()}
        metrics["mechreward/unscored"] = sum(value is None for value in rewards) / len(rewards)
        if self._dense:
            added = reward.per_token(source.rollouts, source.readings).nan_to_num(0.0)
        else:
            added = torch.zeros(len(rewards), max(map(len, source.rollouts.completion_ids)))
            for row, ids in enumerate(source.rollouts.completion_ids):
                added[row, len(ids) - 1] = rewards[row] or 0.0
        added[[value is None for value in rewards]] = 0.0
        total = [own + ours[: len(own)] for own, ours in zip(data["rm_scores"].unbind(), added, strict=True)]
        scores = torch.nested.as_nested_tensor(total, layout=torch.jagged)
        tq.kv_batch_put(
            keys=keys, partition_id=batch.partition_id, fields=TensorDict({"rm_scores": scores}, batch_size=len(keys))
        )

    def _rollouts(self, data: Any) -> RolloutBatch:
        prompts, responses, written = (
            [row.tolist() for row in data[field].unbind()] for field in ("prompts", "responses", "response_mask")
        )
        return RolloutBatch(
            prompts=self.tokenizer.batch_decode(prompts, skip_special_tokens=True),
            completions=[""] * len(responses),
            prompt_ids=prompts,
            completion_ids=responses,
            columns={"label": [(row or {}).get("ground_truth") for row in _objects(data["reward_model"])]},
            num_generations=self.config.actor_rollout_ref.rollout.n,
            eos_token_ids=self._ends,
            tool_mask=None if all(map(all, written)) else written,
            progress=self.global_steps / self.total_training_steps,
        ).decoded(self.tokenizer)

    def _compute_metrics(self, batch: Any, metrics: dict, *timing: Any, **steps: Any) -> None:
        super()._compute_metrics(batch, metrics, *timing, **steps)
        # What the reward manager says of rollouts, verl logs in validation alone.
        data = tq.kv_batch_get(keys=_real(batch), partition_id=batch.partition_id, select_fields=["extra_fields"])
        said = [row.get("reward_extra_info", {}) for row in _objects(data["extra_fields"])]
        for name in ("flagged", "unscored"):
            if all(name in row for row in said):
                metrics[f"mechreward/server_{name}"] = sum(row[name] for row in said) / len(said)

    def _save_checkpoint(self) -> None:
        if self._reward is not None:
            folder = self._checkpoint()
            folder.mkdir(parents=True, exist_ok=True)
            (folder / STATE_FILE).write_text(json.dumps(self._reward.state_dict()))
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        chosen = self.config.trainer.resume_mode == "resume_path"
        folder = Path(self.config.trainer.resume_from_path) if chosen else self._checkpoint()
        if self._reward is not None and (folder / STATE_FILE).exists():
            self._reward.load_state_dict(json.loads((folder / STATE_FILE).read_text()))

    def _checkpoint(self) -> Path:
        return Path(self.config.trainer.default_local_dir, f"global_step_{self.global_steps}")


@dataclass
class _Step:
    """The activation source of one training step: what the policy's pass has read."""

    rollouts: RolloutBatch
    values: Tensor  # [B, T, K] float32

    def batch(self, call: Call) -> RolloutBatch:
        return self.rollouts  # with their columns

    def read(self, batch: RolloutBatch, requests: Sequence[Request]) -> Mapping[Request, Readings]:
        bank = ReadoutBank([request.readout for request in requests])  # as the engine's, with its columns
        split = bank.split(self.values, batch.mask())
        self.readings = {request: split[request.readout] for request in requests}
        return self.readings

    def accept(self, reward: object, batch: RolloutBatch, scores: Scores) -> None:
        self.rollouts = batch  # with the guards' verdicts


def _response_parts(data: Any, field: str) -> Tensor:
    """What was read at the response's tokens, ``[B, T, K]``.

    Not verl's ``response_from_nested``, which is made for log-probabilities: those of a token stand one place before.
    """
    rows = zip(data[field].unbind(), data["prompts"].unbind(), strict=True)
    return pad_sequence([values[len(prompt) :].float() for values, prompt in rows], batch_first=True)


def _real(batch: Any) -> list[str]:
    """The keys of rollouts: verl fills batches up with others."""
    return [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)]


def _group_and_session(key: str) -> tuple[str, int]:
    group, session, _ = key.rsplit("_", 2)
    return group, int(session)


def _objects(column: Any) -> list[Any]:
    """A column that holds no tensors; TransferQueue gives a list, an array or wrapped values."""
    return [getattr(value, "data", value) for value in column]
