"""MechRewardGRPOTrainer: a `trl.GRPOTrainer` whose rewards read activations from passes that run anyway.

The trip of a rollout batch through one generation step, in the order in which TRL calls what is overridden here::

    _generate_and_score_completions    Passes.step decides which pass serves which readings
      _generate                        TRL samples; Passes.while_generating reads the policy token by token
        describe                       -> RolloutBatch: exact ids, whose tokens they are, groups, progress
        Passes.take_generated          -> Readings of the generation, or vLLM's
      _get_per_token_logps_and_...     TRL's passes of policy and reference; Passes.while_computing_logprobs reads them
      _calculate_rewards
        Passes.all_readings            whatever no pass has read is read now, by one truncated forward per model
        apply_guards                   -> the batch with trust, flags and what is dropped
        each reward function           Reward.__call__ asks RolloutsInTraining for batch and readings, runs the guards
                                       that it brings itself, scores, and hands its Scores back (accept)
        _unscored_filled               what could not be scored counts as the group's least favourable value
        Watch.look                     monitors see copies of all that
      (TRL turns rewards into advantages: z-scores within groups)
      Recording.rollouts               some rollouts are written down for the report
      _dense_advantages                A_t = A + lambda z(r_t) for per-token rewards

Around optimiser steps: `_BetweenSteps` moves the KL coefficient and ends training where an alarm asks for it; `log`,
`_save_checkpoint` and `_load_optimizer_and_scheduler` carry along what guards, rewards and monitors have learned.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from mechreward import pocket
from mechreward.errors import MechRewardError, MissingExtraError, RewardError
from mechreward.hacking.monitor import Monitor, show
from mechreward.hacking.regularization import adapted, scheduled
from mechreward.integrations.trl.checks import check_training, needing_a_path
from mechreward.integrations.trl.config import MechRewardGRPOConfig, our_options
from mechreward.integrations.trl.monitors import Watch
from mechreward.integrations.trl.passes import Passes, readouts_in_generation, requests_of
from mechreward.integrations.trl.vllm import TRLEngine
from mechreward.readout import Readings, Request
from mechreward.recording import Recording, Scored
from mechreward.reward.base import Reward
from mechreward.reward.composition import holds_outcome, least_favourable
from mechreward.reward.guards import (
    Guard,
    RepetitionDetector,
    apply_guards,
    attach,
    flag_rates,
    guards_state,
    load_guards_state,
)
from mechreward.reward.normalization import dense_zscore
from mechreward.reward.spread import SpreadWatch
from mechreward.rollout.batch import Call, Dense, RolloutBatch, Scores
from mechreward.rollout.capture import has_adapters
from mechreward.rollout.plain import describe
from mechreward.rollout.sampling import untouched_randomness

try:
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer
except ModuleNotFoundError as error:
    raise MissingExtraError("trl", "trl") from error

logger = logging.getLogger(__name__)

STATE_FILE = "mechreward.json"
"""In each checkpoint: running statistics of rewards and monitors, alarms, and the KL coefficient."""

LOSS_METRICS = ("kl", "entropy")
"""What TRL measures in each micro-batch of the loss, over all processes: nats per token."""


@dataclass
class Step:
    """What one generation step has gathered so far.

    Attributes:
        batch: The step's rollouts, guarded once guards have run.
        scored: What each reward function of ours made of them, in the order in which TRL called them.
        scores: The same, by reward.
        dense: Their per-token parts.
        dropped: ``[B]`` bool, what guards have removed from training.
        rewards: ``[B x processes, reward functions]``, NaN where there is none.
    """

    batch: RolloutBatch | None = None
    scored: list[Scored] = field(default_factory=list)
    scores: dict[Reward, Scores] = field(default_factory=dict)
    dense: list[tuple[Reward, Dense]] = field(default_factory=list)
    dropped: Tensor | None = None
    rewards: Tensor | None = None


class MechRewardGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer`, with readings from the cheapest pass that yields them, guards, monitors, dense advantages.

    Any script that uses GRPOTrainer runs after changing the class's name. Where a reading comes from is decided anew
    for each step and logged (``taps``):

    * policy: vLLM's own generation (``use_vllm=True``) where it can be read; else TRL's old-logprob pass where it runs
      one, else the generation, else one truncated forward;
    * reference: TRL's reference pass where ``beta > 0``, else one truncated forward of a copy of the policy as it
      starts, or of the policy with its adapter switched off. Policy and reference are compared before training.

    Args:
        model, reward_funcs, args, ...: As for `trl.GRPOTrainer`; ``"mechreward/pocket"`` is the shipped model. Without
            ``args``, a :class:`MechRewardGRPOConfig`.
        guards: What may lower feature rewards; by default the repetition detector.
        monitors: What is computed and logged (``monitor/...``) and never enters the reward: plain rewards, and the
            monitors of `mechreward.hacking`. One that raises is disabled with a warning; training goes on.
        stop_on: For an alarm's name, such as ``"proxy_gold_gap/grown"``, at how many checks in a row it must ring to
            end training: after the step under way, with a checkpoint, and with ``stopped_because`` saying why.

    Attributes:
        taps: Which pass serves which readings.
        stopped_because: One sentence, where an alarm has ended training.

    Raises:
        ConfigError: Monitors of one name, or ``stop_on`` an alarm that no monitor raises.
        ModelMismatchError: An SAE or probe was made for another model.
        RewardError: Per-token rewards with sequence-level importance sampling; a moving reference, or one that TRL
            cannot load.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *positional: Any,
        guards: Sequence[Guard] | None = None,
        monitors: Sequence[Reward | Monitor] = (),
        stop_on: Mapping[str, int] | None = None,
        **kwargs: Any,
    ):
        model = pocket.resolve(model) if isinstance(model, str) else model
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = MechRewardGRPOConfig(f"{str(name).split('/')[-1]}-GRPO")
        if guards is None:
            guards = [RepetitionDetector()] if our_options(args).repetition_guard else []
        self.guards, self.monitors, self.stop_on = list(guards), list(monitors), dict(stop_on or {})
        self.watch = Watch(self.monitors, self.stop_on, self)
        self.stopped_because: str | None = None
        self.mechreward_reference: torch.nn.Module | None = None  # see rollout/reference.py
        self.mechreward_gap: float | None = None
        self._step_state = Step()
        self._spread = SpreadWatch()

        came_with_adapter = has_adapters(model)
        rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        attach(self.guards, rewards)
        # vLLM must know the hook points when it is started, which TRL does while it is made.
        engine = self._engine_for(args, requests_of([*rewards, *self.guards, *self.monitors]))
        with (
            nullcontext() if engine is None else engine.being_built(),
            needing_a_path(model, args, [*positional, *kwargs.values()]),
        ):
            super().__init__(model, reward_funcs, args, *positional, **kwargs)

        self.rollout_source = RolloutsInTraining(self)
        self.passes = Passes(self, self._rewarded(), requests_of(self.monitors), engine)
        check_training(self, self.passes, came_with_adapter)
        self.add_callback(_BetweenSteps(self))
        most = our_options(args).record
        self.recording = None if most is None else Recording(self, most)
        if self.recording is not None:
            self.add_callback(self.recording)
        self.passes.install()

    @staticmethod
    def _engine_for(args: GRPOConfig, requests: list[Request]) -> TRLEngine | None:
        """Return vLLM, where it generates what is to be read."""
        read = readouts_in_generation(requests)
        if not args.use_vllm or all(readout.summary is not None for readout in read):
            return None
        return TRLEngine(read, our_options(args).vllm_backend)

    def _rewarded(self) -> list[Request]:
        """What rewards and guards need read."""
        return requests_of([*self.reward_funcs, *self.guards])

    @property
    def _options(self) -> Any:
        return self.args  # a GRPOConfig; the base class declares TrainingArguments

    @property
    def taps(self) -> dict[str, str]:
        """Which pass serves which readings in this step."""
        return self.passes.chosen

    def readings(self, batch: RolloutBatch, requests: Sequence[Request]) -> Mapping[Request, Readings]:
        """Return what the passes have read of the step's rollouts; what they have not is read now."""
        return self.passes.readings(batch, requests)

    # -- one generation step, in the order of its calls ----------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        step = self._step_state = Step()
        try:
            with self.passes.step():
                output = super()._generate_and_score_completions(inputs)
        except MechRewardError:
            self._save_what_there_is()
            raise
        advantages = output["advantages"]
        if self.recording is not None and step.batch is not None and step.batch.training and step.rewards is not None:
            self.recording.rollouts(step.batch, self.passes.read, step.scored, step.rewards, advantages)
        output["advantages"] = self._dense_advantages(advantages, output["completion_ids"].shape[1])
        return output

    def _generate(self, prompts: list):
        with self.passes.while_generating():
            generated = super()._generate(prompts)
        prompt_ids, completion_ids, tool_mask, completions = generated[:4]
        batch = describe(self, Call(prompts, completions, completion_ids), prompt_ids, tool_mask)
        self._step_state.batch = batch
        self.passes.take_generated(batch)
        return generated

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        with self.passes.while_computing_logprobs(model, self._step_state.batch, input_ids, logits_to_keep):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        columns = {
            name: [example[name] for example in inputs]
            for name in inputs[0]
            if name not in ("prompt", "completion", "completion_ids")
        }
        step = self._step_state
        assert step.batch is not None  # set by _generate
        batch = replace(step.batch, columns=columns)

        # All models are read here, in one pass each, before the first reward asks. Randomness stays as it was, since
        # monitors may have a reference model read.
        with untouched_randomness():
            readings = self.passes.all_readings(batch)
        clean = batch.guarded(torch.ones(len(batch)), torch.zeros(len(batch), dtype=torch.bool), [[] for _ in prompts])
        with self.passes.timed():
            step.batch = apply_guards(self.guards, clean, readings)
        step.dropped = step.batch.dropped

        # TRL calls the reward functions, and gathers what they return from all processes.
        with self._naming_the_reward():
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.accelerator.is_main_process and batch.training:
            own, weights = rewards[: len(batch)], self.reward_weights.tolist()
            self._spread.see(self.reward_funcs, weights, own, step.scores, batch.num_generations)
        gather: Any = self.accelerator.gather
        dropped = None if step.dropped is None else gather(step.dropped.to(rewards.device))
        rewards = self._unscored_filled(rewards, step.batch.num_generations, dropped)

        # Monitors see what training sees, before rollouts that guards have dropped lose their rewards.
        self._show_monitors(step.batch, readings, rewards)
        self._log_step(step.batch)
        if dropped is not None:
            rewards = rewards.masked_fill(dropped[:, None], torch.nan)
        step.rewards = rewards
        return rewards

    def _unscored_filled(self, rewards: Tensor, num_generations: int, dropped: Tensor | None) -> Tensor:
        """Rewards ``[B x processes, F]`` with what our functions could not score, as in a :class:`CompositeReward`.

        TRL adds the functions' rewards and leaves out what is missing, which would be the way out of a penalty.
        """
        pairs = enumerate(zip(self.reward_funcs, self.reward_weights.tolist(), strict=True))
        ours = [i for i, (f, weight) in pairs if isinstance(f, Reward) and not holds_outcome(f) and weight]
        if len(self.reward_funcs) == 1 or not ours:
            return rewards
        before = rewards[:, ours]
        groups = before.view(-1, num_generations, len(ours))
        filled = least_favourable(groups, self.reward_weights[ours].to(rewards.device)).flatten(0, 1)
        if dropped is not None:  # taken out of training: that is not for want of a reading
            filled = torch.where(dropped[:, None], before, filled)
        for i, unscored in zip(ours, (before.isnan() & ~filled.isnan()).sum(dim=0).tolist(), strict=True):
            self._log_metric(f"{self.reward_func_names[i]}/unscored", float(unscored))
        rewards[:, ours] = filled
        return rewards

    def _show_monitors(self, batch: RolloutBatch, readings: Mapping[Request, Readings], rewards: Tensor) -> None:
        """Show the guarded batch, its readings and its rewards ``[B x processes, F]`` to every monitor."""
        if not self.monitors:
            return
        with self.passes.timed():
            total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
            total = total.masked_fill(rewards.isnan().all(dim=1), torch.nan)
            asked = {request: readings[request] for request in requests_of(self.monitors)}
            self.watch.look(show(self.state.global_step, batch, asked, batch.local(total), self._rewarded()))

    def _log_step(self, batch: RolloutBatch) -> None:
        if batch.flags is not None:
            for name, rate in flag_rates(batch.flags, self.guards).items():
                self._log_metric(f"guards/{name}", rate)
            self._log_completion_extra("flags", ["; ".join(reasons) for reasons in batch.flags])
        self._log_metric("mechreward/hook_seconds", self.passes.seconds)
        self._log_metric("mechreward/reading_bytes", float(self.passes.bytes))
        self.passes.seconds = 0.0

    def _dense_advantages(self, advantages: Tensor, width: int) -> Tensor:
        """A_t = A + sum_j lambda_j z(r_t); lambda is the weight in the composite times TRL's reward weight."""
        step = self._step_state
        # The branch must be the same on every process: all have the same rewards, so all have dense parts or none.
        if not step.dense or step.batch is None:
            return advantages
        dense = advantages[:, None].repeat(1, width)
        for reward, part in step.dense:
            lam = part.weight * float(self.reward_weights[self.reward_funcs.index(reward)])
            z = dense_zscore(part.values.to(dense.device), part.mask.to(dense.device), step.batch)
            dense[:, : z.shape[1]] += lam * z
        if step.dropped is not None:
            dense[step.dropped.to(dense.device)] = 0.0
        return dense

    # -- where a step fails --------------------------------------------------------------------------------------------

    @contextmanager
    def _naming_the_reward(self) -> Iterator[None]:
        """A reward that raises ends the step with one sentence; what was trained so far is saved."""
        try:
            yield
        except MechRewardError:
            raise
        except Exception as error:
            raise RewardError(
                f"A reward function raised {type(error).__name__}: {error} (step {self.state.global_step}). Mend it "
                f"and resume from the last checkpoint in {self.args.output_dir}."
            ) from error

    def _save_what_there_is(self) -> None:
        """A checkpoint of the weights before the failed step, where one process can write it alone."""
        if self.accelerator.num_processes > 1 or self.optimizer is None or not (self.model and self.model.training):
            return
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.state.global_step > 0 and not folder.exists():
            self._save_checkpoint(self.model, trial=None)
            logger.error("Saved the state before the failed step in %s.", folder)

    # -- between steps -------------------------------------------------------------------------------------------------

    def _before_step(self) -> None:
        end = our_options(self._options).beta_end
        if end is not None:
            self.beta = scheduled(self._options.beta, end, self.state.global_step, self.state.max_steps)

    def _after_step(self) -> None:
        """Keep what the loss has measured, and let the KL coefficient follow it."""
        # TRL's lists hold one number a micro-batch, since the last time that they were logged.
        last = {
            name: self._metrics["train"][name][-self.current_gradient_accumulation_steps :] for name in LOSS_METRICS
        }
        self.watch.losses = {name: sum(values) / len(values) for name, values in last.items() if values}
        ours, kl = our_options(self._options), self.watch.losses.get("kl", math.nan)
        if ours.kl_target is not None or ours.beta_end is not None:
            self._metrics["train"]["beta"].append(self.beta)
        if ours.kl_target is not None and math.isfinite(kl):
            self.beta = adapted(float(self.beta), kl, ours.kl_target)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log as TRL does, with the reason where an alarm ends training."""
        if self.stopped_because is not None:
            logs["stopped_because"] = self.stopped_because
        super().log(logs, start_time)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            states = {
                "rewards": [r.state_dict() if isinstance(r, Reward) else {} for r in self.reward_funcs],
                "guards": guards_state(self.guards),
                "monitors": self.watch.state_dict(),
                "ringing": self.watch.ringing,
                "beta": self.beta,
                # How far apart policy and reference were before training; None where that is not known.
                "reference_gap": None if self.mechreward_gap != self.mechreward_gap else self.mechreward_gap,
            }
            (folder / STATE_FILE).write_text(json.dumps(states))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        file = Path(checkpoint or "") / STATE_FILE
        if checkpoint is None or not file.exists():
            return
        saved = json.loads(file.read_text())
        # The first checkpoints of version 0.1 hold a list: the rewards' states alone.
        states: dict[str, Any] = {"rewards": saved} if isinstance(saved, list) else saved
        for reward, state in zip(self.reward_funcs, states["rewards"], strict=True):
            if isinstance(reward, Reward) and state:
                reward.load_state_dict(state)
        load_guards_state(self.guards, states.get("guards", {}))
        self.watch.load_state_dict(states.get("monitors", {}))
        self.watch.ringing = dict(states.get("ringing", {}))
        self.mechreward_gap = states.get("reference_gap")
        if our_options(self._options).kl_target is not None:
            self.beta = states.get("beta", self.beta)


class _BetweenSteps(TrainerCallback):
    """Tells the trainer when an optimiser step begins and ends, and ends training where an alarm asks for it."""

    def __init__(self, trainer: MechRewardGRPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.stopped_because = None

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer._before_step()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._after_step()
        if self.trainer.stopped_because is not None:
            logger.error(self.trainer.stopped_because)
            # The flags act whatever the strategies for saving and logging are.
            control.should_save = control.should_log = control.should_training_stop = True


class RolloutsInTraining:
    """What rewards see of the trainer: its rollouts, and what its passes have read."""

    def __init__(self, trainer: MechRewardGRPOTrainer):
        self.trainer = trainer

    def batch(self, call: Call) -> RolloutBatch:
        batch = self.trainer._step_state.batch
        assert batch is not None  # set by _generate
        # A function around a reward may change the texts. TRL tells it nothing of a rollout_func's mask.
        masked = batch.tool_mask is not None and self.trainer.rollout_func is not None
        completions = batch.completions if masked else call.completions
        return replace(batch, prompts=call.prompts, completions=completions, columns=call.columns)

    def read(self, batch: RolloutBatch, requests: Sequence[Request]) -> Mapping[Request, Readings]:
        return self.trainer.readings(batch, requests)

    def accept(self, reward: Reward, batch: RolloutBatch, scores: Scores) -> None:
        step = self.trainer._step_state
        step.scored.append(Scored(reward.__name__, batch, scores))
        step.scores[reward] = scores
        step.dense += [(reward, part) for part in scores.dense]
        if batch.dropped is not None:
            step.dropped = batch.dropped if step.dropped is None else step.dropped | batch.dropped
