"""Rollouts by vLLM, read in its worker while it generates: no second pass, K floats a token.

Ways to read, the first that the engine allows unless one is named:

* ``"aux"``: the model returns its residual stream, as drafters of speculative decoding need it; runs compiled.
* ``"hook"``: forward hooks in the worker, only with ``enforce_eager=True``.
* ``"second_pass"``: the same worker, over the finished rollouts, one prefill each.
* ``"forward"``: one truncated forward of a Hugging Face copy of the model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechreward import pocket
from mechreward.errors import ConfigError, ModelMismatchError, nearest
from mechreward.extras import require
from mechreward.readout import HookPoint, Readings, Readout, ReadoutBank, Request
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.hf import end_tokens, group_requests, load_model, read_forward
from mechreward.rollout.wire import match, receive_fed, send_bank

logger = logging.getLogger(__name__)

BACKENDS = ("aux", "hook", "second_pass", "forward")

WORKER = "mechreward.integrations.vllm_worker.ReadingWorker"


def choose_backend(engine: Mapping[str, Any], returns_states: bool, forced: str | None = None) -> str:
    """How an engine can be read.

    Args:
        engine: vLLM's engine arguments.
        returns_states: Whether vLLM's class of the model can return its hidden states.
        forced: The way that the user wants.

    Raises:
        ConfigError: That way cannot work here.
    """
    obstacles = _obstacles(engine, returns_states)
    if forced is None:
        return next(way for way in BACKENDS if obstacles[way] is None)
    if forced not in BACKENDS:
        raise ConfigError(f"There is no backend '{forced}': use {', '.join(BACKENDS)}.{nearest(forced, BACKENDS)}")
    if obstacles[forced] is not None:
        raise ConfigError(f"backend='{forced}' cannot read this engine: {obstacles[forced]}.")
    return forced


def _obstacles(engine: Mapping[str, Any], returns_states: bool) -> dict[str, str | None]:
    """For each way, why it cannot be gone."""
    drafts = engine.get("speculative_config") is not None
    no_aux = None if returns_states else "vLLM's class of this model cannot return its hidden states"
    no_hook = None if engine.get("enforce_eager") else "a compiled model never runs hooks; set enforce_eager=True"
    if drafts:
        no_aux = "the drafter has the hidden states for itself"
    if engine.get("pipeline_parallel_size", 1) > 1:
        no_aux = no_hook = "the layers lie in several processes; use backend='forward'"
    rejected = "drafts that it rejects are fed to the model too; use backend='second_pass'" if drafts else None
    return {"aux": no_aux or rejected, "hook": no_hook or rejected, "second_pass": no_aux and no_hook, "forward": None}


def reading_options(model: str, engine: Mapping[str, Any], points: Sequence[HookPoint], backend: str) -> dict:
    """The engine arguments that make vLLM's worker read these hook points."""
    capture = backend
    if backend == "second_pass":
        capture = "aux" if _obstacles(engine, returns_states(model, engine))["aux"] is None else "hook"
    ours = {"backend": capture, "points": [str(point) for point in points]}
    return {"worker_cls": WORKER, "additional_config": {**(engine.get("additional_config") or {}), "mechreward": ours}}


def returns_states(model: str, engine: Mapping[str, Any]) -> bool:
    """Whether vLLM's class of this model can return its hidden states."""
    require("vllm", "vllm")
    from vllm.engine.arg_utils import EngineArgs  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.models import ModelRegistry  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.models.interfaces import supports_eagle3  # pyright: ignore[reportMissingImports]
    from vllm.plugins import load_general_plugins  # pyright: ignore[reportMissingImports]

    load_general_plugins()
    known = {key: engine[key] for key in ("model_impl", "trust_remote_code", "max_model_len") if key in engine}
    config = EngineArgs(model=model, **known).create_model_config()
    return supports_eagle3(ModelRegistry.resolve_model_cls(config.architectures, config)[0])


class VLLMRollout:
    """Generates with vLLM, and reads features meanwhile.

    Args:
        model: A folder, an id of the Hugging Face hub, or ``mechreward/pocket``.
        readouts: What to read.
        backend: How; by default the first way that works, which is logged.
        **engine: vLLM's engine arguments, such as ``dtype="float32"`` or ``enforce_eager=True``.

    Attributes:
        llm: The `vllm.LLM`.
        backend: How readings are taken while generating.
        ends: Tokens that end a completion.

    Raises:
        ConfigError: The backend cannot read this engine.
        ModelMismatchError: A readout was made for another model.
        MissingExtraError: vLLM is not installed.
    """

    def __init__(self, model: str, readouts: Sequence[Readout], backend: str | None = None, **engine: Any):
        vllm = require("vllm", "vllm")
        self.model, self._engine = str(pocket.resolve(model)), engine
        self.bank = ReadoutBank(readouts)
        self.backend = choose_backend(engine, returns_states(self.model, engine), backend)
        logger.info("Readings of %s come from: vLLM, %s.", model, self.backend)
        if self.backend != "forward":
            engine = {**engine, **reading_options(self.model, engine, self.bank.hook_points, self.backend)}
        self.llm = vllm.LLM(model=self.model, **engine)
        self._fits()
        chosen = self.llm.llm_engine.model_config.try_get_generation_config().get("eos_token_id")
        self.ends = end_tokens(None, self.llm.get_tokenizer(), chosen)
        self._copy: Any = None
        if self.backend != "forward":
            self._call("mechreward_attach", send_bank(self.bank))

    def _fits(self) -> None:
        config = self.llm.llm_engine.model_config.hf_text_config
        for readout in self.bank.readouts:
            if readout.d_model != config.hidden_size or readout.hook_point.layer >= config.num_hidden_layers:
                raise ModelMismatchError(
                    f"'{readout.name}' reads {readout.hook_point} of width {readout.d_model}, but the model has "
                    f"{config.num_hidden_layers} layers of width {config.hidden_size}: use an SAE or probe of it."
                )

    def _call(self, method: str, *args: str) -> str:
        return self.llm.collective_rpc(method, args=args)[0]

    def generate(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], num_generations: int = 1, **sampling: Any
    ) -> tuple[RolloutBatch, dict[Readout, Readings]]:
        """Sample ``num_generations`` rollouts a prompt, groups contiguous, and read them.

        Args:
            prompts: Texts, or token ids.
            num_generations: Rollouts a prompt.
            **sampling: For vLLM's SamplingParams, such as ``max_tokens=64``; or ``lora_request``.

        Returns:
            The B rollouts, and for each readout values ``[B, T, K']`` and mask ``[B, T]``, on the CPU.

        Raises:
            CaptureError: Not every sampled token was read.
        """
        vllm = require("vllm", "vllm")
        lora = sampling.pop("lora_request", None)
        asked = [{"prompt": p} if isinstance(p, str) else {"prompt_token_ids": list(p)} for p in prompts]
        during = self.backend in ("aux", "hook")
        if during:
            self._call("mechreward_open")
        outputs = self.llm.generate(
            asked, vllm.SamplingParams(n=num_generations, **sampling), use_tqdm=False, lora_request=lora
        )
        tokenizer = self.llm.get_tokenizer()
        each = [(output, completion) for output in outputs for completion in output.outputs]
        batch = RolloutBatch(
            prompts=[output.prompt or tokenizer.decode(output.prompt_token_ids) for output, _ in each],
            completions=[completion.text for _, completion in each],
            prompt_ids=[list(output.prompt_token_ids) for output, _ in each],
            completion_ids=[list(completion.token_ids) for _, completion in each],
            num_generations=num_generations,
            eos_token_ids=self.ends,
        )
        if during:
            values = match(receive_fed(self._call("mechreward_drain")), batch, len(self.bank))
            return batch, self.bank.split(values, batch.mask())
        requests = [Request(readout) for readout in self.bank.readouts]
        return batch, {request.readout: read for request, read in self.read(batch, requests, lora).items()}

    def read(
        self, batch: RolloutBatch, requests: Sequence[Request], lora_request: Any = None
    ) -> dict[Request, Readings]:
        """Read rollouts that are there already: one prefill each, or a forward of a copy (``backend="forward"``).

        Raises:
            ConfigError: A request for readouts that this engine was not started with.
            CaptureError: Not every token could be read.
        """
        found: dict[Request, Readings] = {}
        for (reads, read_last), bank in group_requests(requests).items():
            if unknown := [r.name for r in bank.readouts if r not in self.bank.columns]:
                raise ConfigError(f"This engine was not started to read '{unknown[0]}': give it to VLLMRollout.")
            if self.backend == "forward":
                by_readout = read_forward(self._hf_copy(), batch, bank, read_last)
            else:
                values, mask = prefill(self.llm, batch, len(self.bank), read_last, lora_request), batch.mask(read_last)
                by_readout = self.bank.split(values, mask)
            found |= {Request(r, reads, read_last): by_readout[r] for r in bank.readouts}  # pyright: ignore
        return found

    def _hf_copy(self) -> Any:
        if self._copy is None:
            logger.warning("backend='forward': loading a second copy of %s to read it.", self.model)
            self._copy, _ = load_model(self.model)
            if getattr(self._copy.config.get_text_config(), "attn_logit_softcapping", None) is not None:
                self._copy.set_attn_implementation("eager")  # Hugging Face's SDPA leaves it out, and vLLM does not
        return self._copy

    def load_weights(self, folder: str | Path) -> None:
        """Go on with the weights of a checkpoint of the same model, a folder that `save_pretrained` wrote."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self.llm.reset_prefix_cache()
        self.model, self._copy = str(folder), None


def prefill(llm: Any, batch: RolloutBatch, columns: int, read_last: bool = False, lora_request: Any = None) -> Tensor:
    """Read finished rollouts in a second pass of an engine with our worker: one prefill each.

    Returns:
        ``[B, T, K]`` float32 on the CPU; what the batch's mask leaves out is 0.

    Raises:
        CaptureError: Not every token was read.
    """
    mask = batch.mask(read_last)
    ends = [int(row.nonzero().max()) + 1 if row.any() else 0 for row in mask]  # what lies behind need not be fed
    rows = [row for row, end in enumerate(ends) if end]
    fed = [list(batch.prompt_ids[row]) + list(batch.completion_ids[row])[: ends[row]] for row in rows]
    once = require("vllm", "vllm").SamplingParams(max_tokens=1, skip_reading_prefix_cache=True, detokenize=False)
    llm.collective_rpc("mechreward_open", args=("too",))
    asked = [{"prompt_token_ids": ids} for ids in fed]
    llm.generate(asked, once, use_tqdm=False, lora_request=lora_request)
    whole = RolloutBatch([""] * len(rows), [""] * len(rows), [[]] * len(rows), fed)
    read = match(receive_fed(llm.collective_rpc("mechreward_drain")[0]), whole, columns, read_last=True)
    values = torch.zeros(*mask.shape, columns)
    for k, row in enumerate(rows):
        start = len(batch.prompt_ids[row])
        values[row, : ends[row]] = read[k, start : start + ends[row]]
    return values * mask[..., None]
