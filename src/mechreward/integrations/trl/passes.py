"""Which of the trainer's forward passes serves which readings, and the hooks with which they are read there."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mechreward.errors import RewardError
from mechreward.integrations.trl.vllm import TRLEngine
from mechreward.readout import HookPoint, Readings, Readout, ReadoutBank, Request
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.capture import (
    GenerationReader,
    Reader,
    ResidualTap,
    SequenceReader,
    has_absolute_positions,
    has_active_dropout,
    has_adapters,
    unwrap,
)
from mechreward.rollout.plain import read_with_trainer
from mechreward.rollout.reference import check_reference
from mechreward.rollout.source import group_requests

logger = logging.getLogger(__name__)


class Passes:
    """The passes of one trainer, and what they have read of the rollouts of the step under way.

    Hooks are put in place when this is made, before anything is compiled; they read only inside a window.

    Args:
        trainer: Whose passes.
        rewarded: What rewards and guards need read.
        watched: What monitors need read. Its products are kept apart: adding a monitor must not change, by rounding,
            the values that are rewarded.
        engine: vLLM, where it generates.

    Attributes:
        banks: What is read together, for each (reads, read_last).
        chosen: Which pass serves which readings in this step: ``vllm``, ``generation``, ``old_logprobs``,
            ``reference``, or ``forward``, a pass of our own.
        read: What has been read in this step.
        seconds: The host's time that reading has taken since it was last logged.
    """

    def __init__(self, trainer: Any, rewarded: Sequence[Request], watched: Sequence[Request], engine: TRLEngine | None):
        self.trainer, self.engine = trainer, engine
        self.apart = {r.readout for r in watched} - {r.readout for r in rewarded}
        self.banks = group_requests(list(dict.fromkeys([*rewarded, *watched])), self.apart)
        self.chosen: dict[str, str] = {}
        self.read: dict[Request, Readings] = {}
        self.seconds = 0.0
        self._scoring = False
        self._generation: GenerationReader | None = None

    def install(self) -> None:
        """Put the hooks in place, and tell vLLM what to read."""
        trainer = self.trainer
        self.policy_tap = self._hooked(trainer.model, "policy")
        self.reference_tap = None if trainer.ref_model is None else self._hooked(trainer.ref_model, "reference")
        if self.engine is not None:
            self.engine.connect(trainer, self.banks["policy", False])

    def _hooked(self, model: Any, reads: str) -> ResidualTap | None:
        # Without a model of its own, the reference is the policy with its adapter switched off.
        with_peft_reference = reads == "policy" and self.trainer.ref_model is None
        points = {
            point
            for (who, _), bank in self.banks.items()
            if who == reads or (who == "reference" and with_peft_reference)
            for point in bank.hook_points
        }
        return ResidualTap(unwrap(self.trainer.accelerator.unwrap_model(model)), points) if points else None

    # -- which pass serves ---------------------------------------------------------------------------------------------

    @contextmanager
    def step(self) -> Iterator[None]:
        """Decide anew for one generation step, and say so when the decision changes."""
        chosen = {reads + (" with last token" if last else ""): self._choose(reads, last) for reads, last in self.banks}
        if chosen != self.chosen:
            self.chosen = chosen
            for what, tap in chosen.items():
                logger.info("Readings of the %s come from: %s.", what, tap)
        self.read, self._generation, self._scoring = {}, None, True
        try:
            yield
        finally:
            self._scoring = False

    def bank(self, reads: str, tap: str) -> ReadoutBank | None:
        """Return what a pass is to read, if anything."""
        return self.banks.get((reads, False)) if self.chosen.get(reads) == tap else None

    def _choose(self, reads: str, read_last: bool) -> str:
        trainer = self.trainer
        if reads == "policy" and not read_last and self._reads_vllm():
            return "vllm"
        if read_last or has_absolute_positions(trainer.model):
            return "forward"
        # TRL masks truncated completions out of the attention of its own passes, which changes what they compute.
        intact = not trainer.mask_truncated_completions
        if reads == "reference":
            runs = trainer.beta != 0 and (trainer.ref_model is not None or not self._reference_drops())
            return "reference" if runs and intact else "forward"
        if has_active_dropout(trainer.model):
            return "forward"
        if self._runs_old_logprobs() and intact:
            return "old_logprobs"
        return "generation" if self._generates_token_by_token() else "forward"

    def _reference_drops(self) -> bool:
        """Whether dropout is active in a pass of the policy without its adapter, or with the adapter it came with."""
        model = self.trainer.model
        if "ref" in self.trainer.accelerator.unwrap_model(model).peft_config:  # a copy of it, dropout included
            return has_active_dropout(model)
        return has_active_dropout(model, adapters=False)

    def _reads_vllm(self) -> bool:
        if self.engine is None or self.trainer.rollout_func is not None or self.trainer.tools:
            return False
        return self.engine.backend != "forward"

    def _runs_old_logprobs(self) -> bool:
        # The condition in GRPOTrainer._generate_and_score_completions.
        trainer = self.trainer
        generate_every = trainer.args.steps_per_generation * trainer.num_iterations
        misaligned = trainer.args.gradient_accumulation_steps % generate_every != 0
        return misaligned or (trainer.use_vllm and trainer.vllm_importance_sampling_correction)

    def _generates_token_by_token(self) -> bool:
        trainer = self.trainer
        if trainer.use_vllm or trainer.use_transformers_continuous_batching or trainer.rollout_func is not None:
            return False
        if trainer.tools or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            return False  # sharded, processes that finish early go on with empty steps
        config = trainer.generation_config
        if config.use_cache is False:
            return False  # each step feeds the whole sequence
        return config.get_generation_mode().value in ("sample", "greedy_search") and not config.prefill_chunk_size

    # -- reading in TRL's passes ---------------------------------------------------------------------------------------

    @contextmanager
    def while_generating(self) -> Iterator[None]:
        """Read in TRL's generation, or have vLLM read in its own; :meth:`take_generated` fetches what was read."""
        bank = self.bank("policy", "generation")
        if self.engine is not None and self.bank("policy", "vllm") is not None:
            self.engine.begin()
        if bank is None:
            yield
            return
        self._generation = GenerationReader(bank)
        with self._window(self.policy_tap, bank, self._generation):
            yield

    def take_generated(self, batch: RolloutBatch) -> None:
        """Keep what was read while this batch was generated."""
        mask = batch.mask()
        bank = self.bank("policy", "generation")
        if bank is not None and self._generation is not None:
            self.keep("policy", bank, self._generation.values(*mask.shape), mask)
        if self.engine is not None and self.bank("policy", "vllm") is not None:
            with self.timed():
                values = self.engine.readings(batch)
            self.keep("policy", self.engine.bank, values, mask)

    @contextmanager
    def while_computing_logprobs(
        self, model: Any, batch: RolloutBatch | None, input_ids: Tensor, logits_to_keep: int
    ) -> Iterator[None]:
        """Read in TRL's pass of the policy before the loss, or of the reference, over the rollouts of the step.

        The loss's own forward comes through here too, with gradients, on shuffled rows, after the scoring: nothing is
        read there.

        Args:
            model: Whose pass it is.
            batch: The step's B rollouts.
            input_ids: ``[B, prompt + completion]``, prompts padded on the left, completions on the right.
            logits_to_keep: Length of the padded completions.
        """
        reads = "reference" if self._is_reference(model) else "policy"
        bank = self.bank(reads, "reference" if reads == "reference" else "old_logprobs")
        if bank is None or batch is None or not self._scoring or torch.is_grad_enabled():
            yield
            return
        mask = batch.mask()
        positions = torch.zeros(input_ids.shape, dtype=torch.bool)
        start = input_ids.shape[1] - logits_to_keep
        positions[:, start : start + mask.shape[1]] = mask
        reader = SequenceReader(bank, positions)
        with self._window(self.reference_tap if model is self.trainer.ref_model else self.policy_tap, bank, reader):
            yield
        values = torch.zeros(*mask.shape, len(bank), device=input_ids.device)
        values[mask.to(values.device)] = reader.values().to(values.device)
        self.keep(reads, bank, values, mask)

    def _is_reference(self, model: Any) -> bool:
        if self.trainer.ref_model is not None:
            return model is self.trainer.ref_model
        policy = self.trainer.accelerator.unwrap_model(model)
        if not has_adapters(policy):
            return False
        # On transformers models, `disable_adapters` is a method; on PEFT's layers, a flag.
        switched_off = any(getattr(m, "disable_adapters", None) is True for m in policy.modules())
        return switched_off or "ref" in policy.active_adapters

    @contextmanager
    def _window(self, tap: ResidualTap | None, bank: ReadoutBank, reader: Reader) -> Iterator[None]:
        """Read in this block, and count the host's time that reading takes."""
        assert tap is not None  # a bank for this pass implies hooks on its model

        def timed(point: HookPoint, hidden: Tensor) -> None:
            with self.timed():
                reader(point, hidden)

        with tap.window(timed, bank.hook_points):
            yield

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count this block's time as ours."""
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began

    def keep(self, reads: str, bank: ReadoutBank, values: Tensor, mask: Tensor) -> None:
        """Keep a pass's readings, values ``[B, T, K]`` float32 and mask ``[B, T]``, for the rewards of this step."""
        # The generation goes on feeding padding to rows that have ended: what was read there is not kept. With
        # `device_map`, the layer may have been on another card.
        device = self.trainer.accelerator.device
        values, mask = values.to(device), mask.to(device)
        for readout, readings in bank.split(values.masked_fill(~mask[..., None], 0.0), mask).items():
            self.read[Request(readout, reads)] = readings  # pyright: ignore[reportArgumentType]

    # -- reading what no pass has served -------------------------------------------------------------------------------

    def readings(self, batch: RolloutBatch, requests: Sequence[Request]) -> Mapping[Request, Readings]:
        """Return what the passes have read; what they have not is read now, by one truncated forward per model."""
        missing = [request for request in requests if request not in self.read]
        for (reads, read_last), bank in group_requests(missing, self.apart).items():
            if {"image", "images"} & set(batch.columns):
                raise RewardError(
                    f"Readings of the {reads} need a forward pass of our own here, which cannot show the model its "
                    "images: choose settings under which TRL's own passes are read (see `taps`)."
                )
            with self.timed():
                for readout, readings in read_with_trainer(self.trainer, batch, bank, reads, read_last).items():
                    self.read[Request(readout, reads, read_last)] = readings  # pyright: ignore[reportArgumentType]
        return self.read

    def all_readings(self, batch: RolloutBatch) -> Mapping[Request, Readings]:
        """Return all that rewards, guards and monitors need, after comparing policy and reference once."""
        points = {p for (reads, _), bank in self.banks.items() if reads == "reference" for p in bank.hook_points}
        if points:
            with self.timed():
                check_reference(self.trainer, batch, sorted(points))
        wanted: list[Any] = [Request(r, *key) for key, bank in self.banks.items() for r in bank.readouts]  # pyright: ignore
        return self.readings(batch, wanted)

    @property
    def bytes(self) -> int:
        """Bytes of the readings that this step holds."""
        return sum(read.values.numel() * read.values.element_size() for read in self.read.values())


@runtime_checkable
class Reads(Protocol):
    """A reward, guard or monitor: it may need something read."""

    @property
    def requests(self) -> list[Request]: ...


def requests_of(parts: Sequence[Any]) -> list[Request]:
    """Return what rewards, guards and monitors need read; functions that are not ours need nothing."""
    return list(dict.fromkeys(request for part in parts if isinstance(part, Reads) for request in part.requests))


def readouts_in_generation(requests: Sequence[Request]) -> list[Readout]:
    """Return what could be read of the policy while it generates."""
    return [r.readout for r in requests if r.reads == "policy" and not r.read_last]
