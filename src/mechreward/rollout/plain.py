"""Who calls a reward, and where its activations are: under a plain `trl.GRPOTrainer`, ours, or none.

TRL passes reward functions bound methods of the trainer (``log_metric``, ``log_extra``), so that
``log_metric.__self__`` is the trainer, and with it the live policy. This is the one place that knows a plain trainer
from the inside; it imports nothing of TRL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from mechreward.errors import RewardError
from mechreward.readout import Readings, Readout, ReadoutBank, Request
from mechreward.rollout.batch import Call, RolloutBatch, Scores, holds_others_turns, own_text
from mechreward.rollout.capture import check_fits, unwrap
from mechreward.rollout.reference import check_reference, reference_model
from mechreward.rollout.source import Source, TextOnly, group_requests, read_forward, refuse_dense


def find_source(source: Source | None, log_metric: Callable | None, needs_model: bool) -> Source:
    """Return the activation source behind a call of a reward.

    Raises:
        RewardError: Nobody gave one.
    """
    if source is not None:
        return source
    trainer = getattr(log_metric, "__self__", None)
    if hasattr(trainer, "rollout_source"):  # ours
        return trainer.rollout_source  # pyright: ignore
    if hasattr(trainer, "accelerator") and hasattr(trainer, "_tokenize_prompts"):
        return PlainTrainer(trainer, needs_model)
    if needs_model:
        raise RewardError(
            "This reward reads activations and was called without a trainer: pass source=HFSource(model, tokenizer) "
            "(from mechreward.rollout.hf)."
        )
    return TextOnly()


class PlainTrainer:
    """A plain `trl.GRPOTrainer`: prompts are tokenised by its own method, readings cost one truncated forward."""

    def __init__(self, trainer: Any, needs_model: bool = True):
        self.trainer, self.needs_model = trainer, needs_model

    def batch(self, call: Call) -> RolloutBatch:
        """The rollouts that the trainer is scoring.

        Raises:
            RewardError: Their token ids cannot be had exactly.
        """
        trainer, prompt_ids = self.trainer, [[]] * len(call.prompts)
        if call.completion_ids is None:
            raise RewardError("The trainer passes no completion_ids: TRL 1.0 or newer is needed.")
        if getattr(trainer, "rollout_func", None) is not None:
            raise RewardError(
                "A rollout_func has prompt ids of its own, and may add text that the model did not write, and TRL "
                "shows a reward function neither: use MechRewardGRPOTrainer."
            )
        if self.needs_model:
            if getattr(trainer, "tools", None) or "images" in call.columns or "image" in call.columns:
                raise RewardError(
                    "With tools or images a reward function cannot see the exact tokens: use MechRewardGRPOTrainer."
                )
            prompt_ids = trainer._tokenize_prompts(list(call.prompts))[0]
        elif any(map(holds_others_turns, call.completions)):
            # TRL does not say which tokens its tools wrote. Guards look at the model's own text, encoded anew.
            texts = [own_text(completion) for completion in call.completions]
            tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
            call = replace(call, completion_ids=tokenizer(texts, add_special_tokens=False).input_ids)
        return describe(trainer, call, prompt_ids)

    def read(self, batch: RolloutBatch, requests: Sequence[Request]) -> dict[Request, Readings]:
        """One truncated forward for each model that is read.

        Raises:
            RewardError: The reference is not the model that training started from.
        """
        points = sorted({r.readout.hook_point for r in requests if r.reads == "reference"})
        if points:
            check_reference(self.trainer, batch, points)
        return {
            Request(readout, reads, read_last): readings  # pyright: ignore
            for (reads, read_last), bank in group_requests(requests).items()
            for readout, readings in read_with_trainer(self.trainer, batch, bank, reads, read_last).items()
        }

    def accept(self, reward: object, batch: RolloutBatch, scores: Scores) -> None:
        refuse_dense(scores)


def describe(
    trainer: Any,
    call: Call,
    prompt_ids: Sequence[Sequence[int]],
    tool_mask: Sequence[Sequence[int]] | None = None,
) -> RolloutBatch:
    """A rollout batch with the trainer's groups, progress and processes."""
    state, training = trainer.state, trainer.model.training
    batch = RolloutBatch(
        prompts=call.prompts,
        completions=call.completions,
        prompt_ids=prompt_ids,
        completion_ids=call.completion_ids or [],
        columns=call.columns,
        num_generations=trainer.num_generations if training else trainer.num_generations_eval,
        eos_token_ids=frozenset(trainer.eos_token_ids),
        tool_mask=tool_mask,
        training=training,
        progress=min(1.0, state.global_step / state.max_steps) if state.max_steps else 0.0,
        gather=lambda rows: _gathered(trainer.accelerator, rows),
        process_index=trainer.accelerator.process_index,
    )
    # TRL decodes all that a rollout_func returns, its environment's tokens too; of tools it keeps the messages apart.
    masked = tool_mask is not None and getattr(trainer, "rollout_func", None) is not None
    return batch.decoded(trainer.processing_class) if masked else batch


def _gathered(accelerator: Any, rows: Tensor) -> Tensor:
    """The rows of all processes; one process moves nothing, since Apple's GPU could not take float64."""
    if accelerator.num_processes == 1:
        return rows
    return accelerator.gather(rows.to(accelerator.device)).to(rows.device)


def read_with_trainer(
    trainer: Any, batch: RolloutBatch, bank: ReadoutBank, reads: str, read_last: bool
) -> dict[Readout, Readings]:
    """A truncated forward of the trainer's policy, or of the model that it started from."""
    autocast = trainer.accelerator.autocast
    if reads == "policy":
        model = unwrap(trainer.model)
        check_fits(bank.readouts, model)
        return read_forward(model, batch, bank, read_last, autocast)
    with reference_model(trainer) as model:
        check_fits(bank.readouts, model)
        return read_forward(model, batch, bank, read_last, autocast)
