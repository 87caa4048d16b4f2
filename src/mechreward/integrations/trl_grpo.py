"""MechRewardGRPOTrainer: a `trl.GRPOTrainer` whose rewards read activations from passes that run anyway."""

from __future__ import annotations

import inspect
import json
import logging
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from mechreward import pocket
from mechreward.errors import ConfigError, MechRewardError, MissingExtraError, RewardError, nearest
from mechreward.hacking.monitor import (
    Monitor,
    Observation,
    Report,
    measured,
    rewarded_columns,
    show,
    untouched_randomness,
)
from mechreward.hacking.regularization import adapted, check_options, scheduled
from mechreward.integrations.recording import Recording, Scored
from mechreward.readout import Readings, Readout, ReadoutBank, Request
from mechreward.reward.base import Dense, Reward, Scores
from mechreward.reward.composition import holds_outcome, least_favourable, warn_if_weight_cancels
from mechreward.reward.guards import (
    Guard,
    RepetitionDetector,
    all_within,
    apply_guards,
    attach,
    flag_rates,
    guards_of,
    guards_state,
    load_guards_state,
)
from mechreward.reward.normalization import dense_zscore
from mechreward.reward.spread import SpreadWatch
from mechreward.rollout.batch import Call, RolloutBatch
from mechreward.rollout.capture import (
    GenerationReader,
    ResidualTap,
    SequenceReader,
    check_fits,
    has_absolute_positions,
    has_active_dropout,
    unwrap,
)
from mechreward.rollout.hf import group_requests
from mechreward.rollout.resolve import (
    check_reference,
    describe,
    keep_start,
    read_with_trainer,
    refuse_other_vocabulary,
)

try:
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer
except ModuleNotFoundError as error:
    raise MissingExtraError("trl", "trl") from error

if TYPE_CHECKING:
    from mechreward.integrations.vllm_trl import TRLEngine

logger = logging.getLogger(__name__)

STATE_FILE = "mechreward.json"
"""In each checkpoint: running statistics of rewards and monitors, alarms, and the KL coefficient."""

LOSS_METRICS = ("kl", "entropy")
"""What TRL measures in each micro-batch of the loss, over all processes: nats a token."""


@dataclass
class MechRewardGRPOConfig(GRPOConfig):
    """`trl.GRPOConfig` with a KL penalty by default.

    Attributes:
        beta: KL coefficient. TRL's own default is 0; a feature reward without KL is gamed within tens of steps.
        beta_end: Where beta ends, in a straight line over training. Positive, since without a reference model there is
            no KL.
        kl_target: What the KL should be, in nats a token as TRL logs it (``kl``); after each step, beta moves by up to
            2 % towards it (Ziegler et al. 2019, arXiv 1909.08593). See ``hacking/regularization.py``.
        entropy_floor: Mean token entropy, in nats, below which TRL adds an entropy bonus: short for
            ``use_adaptive_entropy=True, entropy_target=entropy_floor`` (Skywork-OR1, arXiv 2505.22312). Its
            coefficient starts at ``entropy_coef`` and moves by ``entropy_coef_delta`` a step. Look at the logged
            ``entropy`` early in training to choose a floor.
        repetition_guard: Run the repetition detector when the trainer is given no guards.
        vllm_backend: How rollouts are read where vLLM generates them (``use_vllm=True``): ``"aux"``, ``"hook"``,
            ``"second_pass"`` or ``"forward"`` (the trainer's own passes); by default the first that works. See
            `mechreward.rollout.vllm`.
        record: Rollouts to write into the output folder with what was read on them, spread evenly over the training,
            at most 8 per step, for ``mechreward report``; 0 writes the figures alone, None nothing. See
            `mechreward.integrations.recording`.

    Raises:
        ConfigError: A coefficient, target or floor that cannot be.
    """

    beta: float = field(default=0.04, metadata={"help": "KL coefficient."})
    beta_end: float | None = field(default=None, metadata={"help": "KL coefficient at the end of training."})
    kl_target: float | None = field(default=None, metadata={"help": "KL, nats a token, that beta adapts to."})
    entropy_floor: float | None = field(default=None, metadata={"help": "Entropy, nats a token, to keep above."})
    repetition_guard: bool = field(default=True, metadata={"help": "Run the repetition detector by default."})
    vllm_backend: str | None = field(default=None, metadata={"help": "How vLLM's rollouts are read."})
    record: int | None = field(default=500, metadata={"help": "Rollouts to record for the report."})

    def __post_init__(self):
        check_options(self)
        if self.entropy_floor is not None:
            self.use_adaptive_entropy, self.entropy_target = True, self.entropy_floor
        super().__post_init__()


def _naming_unknown_options(init):
    """A mistyped option gets one sentence with the nearest name, not a TypeError from generated code."""

    def checked(self, *args, **kwargs):
        known = {f.name for f in fields(self)}
        unknown = next((name for name in kwargs if name not in known), None)
        if unknown is not None:
            raise ConfigError(f"{type(self).__name__} has no option '{unknown}'.{nearest(unknown, known)}")
        init(self, *args, **kwargs)

    checked.__signature__ = inspect.signature(init)  # pyright: ignore[reportFunctionMemberAccess]
    return checked


MechRewardGRPOConfig.__init__ = _naming_unknown_options(MechRewardGRPOConfig.__init__)


@dataclass
class _Step:
    """What one generation step has gathered so far."""

    batch: RolloutBatch | None = None
    read: dict[Request, Readings] = field(default_factory=dict)
    dense: list[tuple[Reward, Dense]] = field(default_factory=list)
    dropped: Tensor | None = None
    generation: GenerationReader | None = None
    scored: list[Scored] = field(default_factory=list)
    said: dict[Reward, Scores] = field(default_factory=dict)
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
            guards = [RepetitionDetector()] if getattr(args, "repetition_guard", True) else []
        self.guards, self.monitors = list(guards), list(monitors)
        self.stop_on = dict(stop_on or {})
        _check_monitors(self.monitors, self.stop_on)
        self.stopped_because: str | None = None
        self._ringing: dict[str, int] = {}  # alarm -> checks in a row
        self._disabled: set[str] = set()
        self._last_losses: dict[str, float] = {}
        self.taps: dict[str, str] = {}
        self.hook_seconds = 0.0
        self._step_state = _Step()
        self._scoring = False
        self.mechreward_reference: torch.nn.Module | None = None  # see rollout/resolve.py
        self.mechreward_gap: float | None = None
        self._spread = SpreadWatch()
        came_with_adapter = hasattr(model, "peft_config")
        rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        attach(self.guards, rewards)
        self._engine = self._engine_for(args, rewards)
        with (
            nullcontext() if self._engine is None else self._engine.being_built(),
            _needing_a_path(model, args, [*positional, *kwargs.values()]),
        ):
            super().__init__(model, reward_funcs, args, *positional, **kwargs)
        self.rollout_source = _TappedSource(self)
        self._banks = group_requests(self._requests(), self._watched_alone())
        self._check(came_with_adapter)
        self.add_callback(_BetweenSteps(self))
        most = getattr(args, "record", None)
        self.recording = None if most is None else Recording(self, most)
        if self.recording is not None:
            self.add_callback(self.recording)
        self._policy_tap = self._install(self.model, "policy")
        self._reference_tap = self._install(self.ref_model, "reference") if self.ref_model is not None else None
        if self._engine is not None:
            self._engine.connect(self, self._banks["policy", False])

    def _engine_for(self, args: GRPOConfig, rewards: list) -> TRLEngine | None:
        """vLLM, where it generates what is to be read: it must know the hook points when it is started."""
        requests = _requests_of([*rewards, *self.guards, *self.monitors])
        read = [r.readout for r in requests if r.reads == "policy" and not r.read_last]
        if not args.use_vllm or all(readout.summary is not None for readout in read):
            return None
        from mechreward.integrations.vllm_trl import TRLEngine

        return TRLEngine(read, getattr(args, "vllm_backend", None))

    @property
    def _policy(self) -> torch.nn.Module:
        assert self.model is not None  # the base class declares it optional
        return self.model

    @property
    def _options(self) -> Any:
        return self.args  # a GRPOConfig; the base class declares TrainingArguments

    # -- what is to be read -------------------------------------------------------------------------------------------

    def _requests(self) -> list[Request]:
        return list(dict.fromkeys([*self._rewarded(), *_requests_of(self.monitors)]))

    def _rewarded(self) -> list[Request]:
        """What rewards and guards ask for."""
        return _requests_of([*self.reward_funcs, *self.guards])

    def _watched_alone(self) -> set[Readout]:
        rewarded = {request.readout for request in self._rewarded()}
        return {request.readout for request in self._requests()} - rewarded

    def _check(self, came_with_adapter: bool) -> None:
        """Refuse what cannot work before anything is trained."""
        for (reads, _), bank in self._banks.items():
            check_fits(bank.readouts, self._policy)
            if reads == "reference" and self._options.sync_ref_model:
                raise RewardError('reads="reference" needs a frozen reference: set sync_ref_model=False.')
            # A new adapter is switched off instead: it changes nothing yet.
            to_copy = self.beta == 0 and (came_with_adapter or not hasattr(self._policy, "peft_config"))
            if reads == "reference" and to_copy and self.mechreward_reference is None:
                keep_start(self)
        if self.ref_model is not None:
            refuse_other_vocabulary(self._policy, unwrap(self.ref_model))  # pyright: ignore[reportArgumentType]
        dense = any("per_token" in str(getattr(r, "aggregation", "")) for r in all_within(self.reward_funcs))
        if dense and self.importance_sampling_level == "sequence":
            raise RewardError(
                'aggregation="per_token" gives each token its own advantage, which '
                'importance_sampling_level="sequence" cannot use: choose "token".'
            )
        for name, reward, weight in zip(self.reward_func_names, self.reward_funcs, self.reward_weights, strict=True):
            if weight < 0 and getattr(reward, "requests", ()):
                raise RewardError(
                    f"reward_weights gives '{name}' {weight:g}: guards must know the sign of a feature reward, so put "
                    "a negative weight into a CompositeReward."
                )
        guards = [*self.guards, *guards_of(self.reward_funcs)]
        for guard in guards:
            if hasattr(guard, "state_dict") and sum(other is guard for other in guards) > 1:
                raise ConfigError(
                    f"The same {type(guard).__name__} guards twice, and would learn from every rollout twice: give it "
                    "to the trainer, or to one CompositeReward."
                )
        if self.beta == 0 and self._banks:
            logger.warning("beta=0: nothing keeps the policy near its start, and feature rewards are easy to game.")
        for reward in self.reward_funcs:
            warn_if_weight_cancels(reward, self.scale_rewards)
        rewarded = [request.readout for request in _requests_of(self.reward_funcs)]
        for monitor in self.monitors:
            for readout in getattr(monitor, "held_out", ()):
                if shared := rewarded_columns(readout, rewarded):
                    warnings.warn(
                        f"'{_name(monitor)}' holds '{readout.name}' out, but {shared} of its {readout.width} columns "
                        "are rewarded too: what it finds is no longer independent.",
                        stacklevel=3,
                    )

    def _install(self, model: Any, reads: str) -> ResidualTap | None:
        """Hooks for later windows, put in place now: before anything is compiled."""
        with_peft_reference = reads == "policy" and self.ref_model is None
        points = {
            point
            for (who, _), bank in self._banks.items()
            if who == reads or (who == "reference" and with_peft_reference)
            for point in bank.hook_points
        }
        return ResidualTap(unwrap(self.accelerator.unwrap_model(model)), points) if points else None

    # -- which pass serves ---------------------------------------------------------------------------------------------

    def _choose(self, reads: str, read_last: bool) -> str:
        """``vllm``, ``old_logprobs``, ``reference``, ``generation`` or ``forward`` (a pass of our own)."""
        if reads == "policy" and not read_last and self._reads_vllm():
            return "vllm"
        if read_last or has_absolute_positions(self._policy):
            return "forward"
        # TRL masks truncated completions out of the attention of its own passes, which changes what they compute.
        intact = not self.mask_truncated_completions
        if reads == "reference":
            runs = self.beta != 0 and (self.ref_model is not None or not self._reference_drops())
            return "reference" if runs and intact else "forward"
        if has_active_dropout(self._policy):
            return "forward"
        if self._runs_old_logprobs() and intact:
            return "old_logprobs"
        return "generation" if self._generates_token_by_token() else "forward"

    def _reference_drops(self) -> bool:
        """Whether dropout is active in a pass of the policy without its adapter, or with the adapter it came with."""
        policy = self.accelerator.unwrap_model(self._policy)
        if "ref" in policy.peft_config:  # a copy of the adapter it came with, dropout included
            return has_active_dropout(self._policy)
        return has_active_dropout(self._policy, adapters=False)

    def _reads_vllm(self) -> bool:
        if self._engine is None or self.rollout_func is not None or self.tools:
            return False
        return self._engine.backend != "forward"

    def _runs_old_logprobs(self) -> bool:
        # The condition in GRPOTrainer._generate_and_score_completions.
        generate_every = self._options.steps_per_generation * self.num_iterations
        misaligned = self._options.gradient_accumulation_steps % generate_every != 0
        return misaligned or (self.use_vllm and self.vllm_importance_sampling_correction)

    def _generates_token_by_token(self) -> bool:
        if self.use_vllm or self.use_transformers_continuous_batching or self.rollout_func is not None or self.tools:
            return False
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return False  # processes that finish early go on with empty steps
        config = self.generation_config
        if config.use_cache is False:
            return False  # each step feeds the whole sequence
        return config.get_generation_mode().value in ("sample", "greedy_search") and not config.prefill_chunk_size

    def _plan(self) -> None:
        """Decide for this step, and say so when it changes."""
        taps = {reads + (" with last token" if last else ""): self._choose(reads, last) for reads, last in self._banks}
        if taps != self.taps:
            self.taps = taps
            for what, tap in taps.items():
                logger.info("Readings of the %s come from: %s.", what, tap)

    def _bank(self, reads: str, tap: str) -> ReadoutBank | None:
        """What this pass is to read, if anything."""
        return self._banks.get((reads, False)) if self.taps.get(reads) == tap else None

    # -- TRL's passes, with windows ------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._step_state, self._scoring = _Step(), True
        self._plan()
        try:
            output = super()._generate_and_score_completions(inputs)
        except MechRewardError:
            self._save_what_there_is()
            raise
        finally:
            self._scoring = False
        self._record(output["advantages"])
        output["advantages"] = self._dense_advantages(output["advantages"], output["completion_ids"].shape[1])
        return output

    def _record(self, advantages: Tensor) -> None:
        step = self._step_state
        if self.recording is not None and step.batch is not None and step.batch.training and step.rewards is not None:
            self.recording.rollouts(step.batch, step.read, step.scored, step.rewards, advantages)

    def _generate(self, prompts: list):
        bank = self._bank("policy", "generation")
        engine = self._engine if self._bank("policy", "vllm") is not None else None
        if engine is not None:
            engine.begin()
        if bank is None:
            generated = super()._generate(prompts)
        else:
            self._step_state.generation = GenerationReader(bank)
            with self._window(self._policy_tap, bank, self._step_state.generation):
                generated = super()._generate(prompts)
        prompt_ids, completion_ids, tool_mask, completions = generated[:4]
        self._step_state.batch = describe(self, Call(prompts, completions, completion_ids), prompt_ids, tool_mask)
        if bank is not None and self._step_state.generation is not None:
            mask = self._step_state.batch.mask()
            values = self._step_state.generation.values(*mask.shape)
            self._keep("policy", bank, values, mask)
        if engine is not None:
            began = time.perf_counter()
            values = engine.readings(self._step_state.batch)
            self.hook_seconds += time.perf_counter() - began
            self._keep("policy", engine.bank, values, self._step_state.batch.mask())
        return generated

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        # The loss's forward comes through here too, with gradients, on shuffled rows, after the scoring.
        reads = "reference" if self._is_reference(model) else "policy"
        tap = "reference" if reads == "reference" else "old_logprobs"
        bank = self._bank(reads, tap) if self._scoring and not torch.is_grad_enabled() else None
        batch = self._step_state.batch
        if bank is None or batch is None:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        mask = batch.mask()
        positions = torch.zeros(input_ids.shape, dtype=torch.bool)
        start = input_ids.shape[1] - logits_to_keep
        positions[:, start : start + mask.shape[1]] = mask
        reader = SequenceReader(bank, positions)
        tapped = self._reference_tap if model is self.ref_model else self._policy_tap
        with self._window(tapped, bank, reader):
            result = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        mask = mask.to(input_ids.device)
        values = torch.zeros(*mask.shape, len(bank), device=input_ids.device)
        values[mask] = reader.values().to(values.device)
        self._keep(reads, bank, values, mask)
        return result

    def _is_reference(self, model: Any) -> bool:
        if self.ref_model is not None:
            return model is self.ref_model
        policy = self.accelerator.unwrap_model(model)
        if not hasattr(policy, "peft_config"):
            return False
        # On transformers models, `disable_adapters` is a method; on PEFT's layers, a flag.
        switched_off = any(getattr(m, "disable_adapters", None) is True for m in policy.modules())
        return switched_off or "ref" in policy.active_adapters

    @contextmanager
    def _window(self, tap: ResidualTap | None, bank: ReadoutBank, reader: Any) -> Iterator[None]:
        """Read in this block, and count the host's time that reading takes."""
        assert tap is not None  # a bank for this pass implies hooks on its model

        def timed(point, hidden):
            began = time.perf_counter()
            reader(point, hidden)
            self.hook_seconds += time.perf_counter() - began

        with tap.window(timed, bank.hook_points):
            yield

    def _keep(self, reads: str, bank: ReadoutBank, values: Tensor, mask: Tensor) -> None:
        # The generation goes on feeding padding to rows that have ended: what was read there is not kept. With
        # `device_map`, the layer may have been on another card.
        values, mask = values.to(self.accelerator.device), mask.to(self.accelerator.device)
        for readout, readings in bank.split(values.masked_fill(~mask[..., None], 0.0), mask).items():
            self._step_state.read[Request(readout, reads)] = readings  # pyright: ignore[reportArgumentType]

    def readings(self, batch: RolloutBatch, requests: Sequence[Request]) -> Mapping[Request, Readings]:
        """What the taps have read; what they have not is read now, by one truncated forward for each model."""
        read = self._step_state.read
        for (reads, read_last), bank in group_requests(
            [r for r in requests if r not in read], self._watched_alone()
        ).items():
            if {"image", "images"} & set(batch.columns):
                raise RewardError(
                    f"Readings of the {reads} need a forward pass of our own here, which cannot show the model its "
                    "images: choose settings under which TRL's own passes are read (see `taps`)."
                )
            began = time.perf_counter()
            for readout, readings in read_with_trainer(self, batch, bank, reads, read_last).items():
                read[Request(readout, reads, read_last)] = readings  # pyright: ignore[reportArgumentType]
            self.hook_seconds += time.perf_counter() - began
        return read

    def _check_reference(self, batch: RolloutBatch) -> None:
        points = {p for (reads, _), bank in self._banks.items() if reads == "reference" for p in bank.hook_points}
        if points:
            began = time.perf_counter()
            check_reference(self, batch, sorted(points))
            self.hook_seconds += time.perf_counter() - began

    # -- rewards, guards, monitors -------------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        columns = {
            name: [example[name] for example in inputs]
            for name in inputs[0]
            if name not in ("prompt", "completion", "completion_ids")
        }
        step = self._step_state
        assert step.batch is not None  # set by _generate
        batch = replace(step.batch, columns=columns)
        # All models are read here, in one pass each, before the first reward asks.
        wanted = [Request(r, *key) for key, bank in self._banks.items() for r in bank.readouts]  # pyright: ignore
        with untouched_randomness():  # monitors may have a reference model read
            self._check_reference(batch)
            readings = self.readings(batch, wanted)
        clean = batch.guarded(torch.ones(len(batch)), torch.zeros(len(batch), dtype=torch.bool), [[] for _ in prompts])
        began = time.perf_counter()
        step.batch = apply_guards(self.guards, clean, readings)
        self.hook_seconds += time.perf_counter() - began
        step.dropped = step.batch.dropped
        with self._naming_the_reward():
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.accelerator.is_main_process and batch.training:
            own, weights = rewards[: len(batch)], self.reward_weights.tolist()
            self._spread.see(self.reward_funcs, weights, own, step.said, batch.num_generations)
        gather: Any = self.accelerator.gather
        dropped = None if step.dropped is None else gather(step.dropped.to(rewards.device))
        rewards = self._unscored_filled(rewards, step.batch.num_generations, dropped)
        self._run_monitors(step.batch, readings, rewards)
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
        if self.accelerator.num_processes > 1 or not self._policy.training or self.optimizer is None:
            return
        folder = Path(self._options.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.state.global_step > 0 and not folder.exists():
            self._save_checkpoint(self.model, trial=None)
            logger.error("Saved the state before the failed step in %s.", folder)

    def _run_monitors(self, batch: RolloutBatch, readings: Mapping[Request, Readings], rewards: Tensor) -> None:
        """Show the step to every monitor, now that its rewards are known.

        Args:
            batch: The guarded batch.
            readings: All of the step's.
            rewards: ``[B x processes, reward functions]``, NaN where there is none.
        """
        if not self.monitors:
            return
        began = time.perf_counter()
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        total = total.masked_fill(rewards.isnan().all(dim=1), torch.nan)
        asked = {request: readings[request] for request in _requests_of(self.monitors)}
        seen = show(self.state.global_step, batch, asked, batch.local(total), self._rewarded())
        with untouched_randomness(), torch.no_grad():
            for monitor in self.monitors:
                if _name(monitor) in self._disabled:
                    self._log_metric(f"monitor/{_name(monitor)}/disabled", 1.0)
                elif isinstance(monitor, Reward) or batch.training:
                    self._run_monitor(monitor, seen)
        self.hook_seconds += time.perf_counter() - began

    def _run_monitor(self, monitor: Reward | Monitor, seen: Observation) -> None:
        """Measure here, judge everywhere; an error disables the monitor, in all processes alike."""
        rows, error = {}, None
        try:
            rows = measured(monitor, seen)
        except Exception as raised:
            error = raised
        if seen.batch.gather(torch.tensor([float(error is not None)])).any():
            self._disable(monitor, error)
        elif isinstance(monitor, Reward):
            values = rows[""]
            if not values.isnan().all():
                self._log_metric(f"monitor/{_name(monitor)}", float(values.nanmean()))
            self._log_completion_extra(f"monitor/{_name(monitor)}", values.tolist())
        else:
            everyone = {name: seen.batch.grouped(rows[name].cpu().float()).double().numpy() for name in sorted(rows)}
            try:
                report = monitor.judge(everyone, dict(self._last_losses))
                if report is not None:
                    self._take(monitor, report)
            except Exception as raised:
                self._disable(monitor, raised)

    def _take(self, monitor: Monitor, report: Report) -> None:
        """Log a monitor's figures, and count for how many checks in a row its alarms have rung."""
        for name, value in report.metrics.items():
            if not math.isnan(value):
                self._log_metric(f"monitor/{monitor.name}/{name}", value)
        for alarm in monitor.alarms:
            said = report.alarms.get(alarm)
            self._log_metric(f"monitor/alarm/{alarm}", float(said is not None))
            self._ringing[alarm] = 0 if said is None else self._ringing.get(alarm, 0) + 1
            if self._ringing[alarm] == 1:
                logger.warning("Alarm %s at step %d: %s", alarm, self.state.global_step, said)
            if self._ringing[alarm] >= self.stop_on.get(alarm, math.inf) and self.stopped_because is None:
                self.stopped_because = (
                    f"Training ends at step {self.state.global_step + 1}: the alarm {alarm} has rung at "
                    f"{self._ringing[alarm]} checks in a row. {said}"
                )

    def _disable(self, monitor: Reward | Monitor, error: Exception | None) -> None:
        name = _name(monitor)
        self._disabled.add(name)
        stops = any(alarm in self.stop_on for alarm in getattr(monitor, "alarms", ()))
        logger.warning(
            "The monitor '%s' is disabled from step %d on, because it raised %s: %s.%s",
            name,
            self.state.global_step,
            "an error in another process" if error is None else type(error).__name__,
            str(error).rstrip("."),
            " Its alarms can no longer stop training." if stops else "",
        )
        self._log_metric(f"monitor/{name}/disabled", 1.0)

    def _log_step(self, batch: RolloutBatch) -> None:
        if batch.flags is not None:
            for name, rate in flag_rates(batch.flags, self.guards).items():
                self._log_metric(f"guards/{name}", rate)
            self._log_completion_extra("flags", ["; ".join(said) for said in batch.flags])
        self._log_metric("mechreward/hook_seconds", self.hook_seconds)
        held = sum(read.values.numel() * read.values.element_size() for read in self._step_state.read.values())
        self._log_metric("mechreward/reading_bytes", float(held))
        self.hook_seconds = 0.0

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

    # -- between steps -------------------------------------------------------------------------------------------------

    def _before_step(self) -> None:
        end = getattr(self.args, "beta_end", None)
        if end is not None:
            self.beta = scheduled(self._options.beta, end, self.state.global_step, self.state.max_steps)

    def _after_step(self) -> None:
        """Keep what the loss has measured, and let the KL coefficient follow it."""
        # TRL's lists hold one number a micro-batch, since the last time that they were logged.
        last = {
            name: self._metrics["train"][name][-self.current_gradient_accumulation_steps :] for name in LOSS_METRICS
        }
        self._last_losses = {name: sum(values) / len(values) for name, values in last.items() if values}
        target, kl = getattr(self.args, "kl_target", None), self._last_losses.get("kl", math.nan)
        if target is not None or getattr(self.args, "beta_end", None) is not None:
            self._metrics["train"]["beta"].append(self.beta)
        if target is not None and math.isfinite(kl):
            self.beta = adapted(float(self.beta), kl, target)  # pyright: ignore[reportArgumentType]

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
                "monitors": self._monitor_states(),
                "ringing": self._ringing,
                "beta": self.beta,
                # How far apart policy and reference were before training; None where that is not known.
                "reference_gap": None if self.mechreward_gap != self.mechreward_gap else self.mechreward_gap,
            }
            (folder / STATE_FILE).write_text(json.dumps(states))

    def _monitor_states(self) -> dict[str, Any]:
        states = {}
        for monitor in self.monitors:
            if _name(monitor) in self._disabled:
                continue
            try:
                states[_name(monitor)] = json.loads(json.dumps(monitor.state_dict()))
            except Exception as raised:
                self._disable(monitor, raised)
        return states

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
        for monitor in self.monitors:
            state = states.get("monitors", {}).get(_name(monitor))
            try:
                if state:
                    monitor.load_state_dict(state)
            except Exception as raised:
                self._disable(monitor, raised)
        self._ringing = dict(states.get("ringing", {}))
        self.mechreward_gap = states.get("reference_gap")
        if getattr(self.args, "kl_target", None) is not None:
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


def _name(monitor: Reward | Monitor) -> str:
    return monitor.__name__ if isinstance(monitor, Reward) else monitor.name


@contextmanager
def _needing_a_path(model: Any, args: GRPOConfig, given: Sequence[Any]) -> Iterator[None]:
    """TRL loads its reference from where the policy came from, if there is one.

    Raises:
        RewardError: There is none.
    """
    adapted = hasattr(model, "peft_config") or any(hasattr(each, "peft_type") for each in given)
    if args.beta == 0 or adapted or isinstance(model, str):
        yield
        return
    path, so = model.config._name_or_path, "save the policy (save_pretrained) and give the trainer that folder"
    if not path:
        raise RewardError(
            f"The policy has no path from which TRL could load its reference model: {so}, or set beta=0, with which "
            "MechRewardGRPOTrainer copies the policy where it is read."
        )
    try:
        yield
    except OSError as error:
        said = " ".join(str(error).split()).split(". ")[0][:200]
        raise RewardError(
            f'TRL cannot load its reference model from "{path}", where the policy came from ({said}): {so}, or set '
            "beta=0."
        ) from error


def _requests_of(parts: Sequence[Any]) -> list[Request]:
    return list(dict.fromkeys(request for part in parts for request in getattr(part, "requests", ())))


def _check_monitors(monitors: Sequence[Any], stop_on: Mapping[str, int]) -> None:
    """Refuse monitors that cannot be told apart, and alarms that none raises."""
    strange = next((m for m in monitors if not isinstance(m, (Reward, Monitor))), None)
    if strange is not None:
        raise ConfigError(f"{strange!r} is no monitor: pass a reward, or a monitor of mechreward.hacking.")
    names = [_name(monitor) for monitor in monitors]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"Two monitors are called '{twice}': give one of them another name=.")
    known = [alarm for monitor in monitors if isinstance(monitor, Monitor) for alarm in monitor.alarms]
    for alarm, checks in stop_on.items():
        if alarm not in known:
            raise ConfigError(
                f"No monitor raises the alarm '{alarm}': there are {', '.join(known) or 'none'}.{nearest(alarm, known)}"
            )
        if isinstance(checks, bool) or not isinstance(checks, int) or checks < 1:
            raise ConfigError(f"stop_on needs a number of checks from 1 on for '{alarm}', not {checks!r}.")


class _TappedSource:
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
        step.said[reward] = scores
        step.dense += [(reward, part) for part in scores.dense]
        if batch.dropped is not None:
            step.dropped = batch.dropped if step.dropped is None else step.dropped | batch.dropped
