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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechreward import pocket
from mechreward.errors import CaptureError, ConfigError, ModelMismatchError, nearest
from mechreward.extras import require
from mechreward.readout import HookPoint, Readings, Readout, ReadoutBank, Request
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.capture import check_family
from mechreward.rollout.sampling import end_tokens, load_model
from mechreward.rollout.source import group_requests, read_forward
from mechreward.rollout.wire import match, receive_fed, send_bank

logger = logging.getLogger(__name__)

BACKENDS = ("aux", "hook", "second_pass", "forward")

WORKER = "mechreward.rollout.vllm_worker.ReadingWorker"

ADDING = ("gemma", "gemma2", "gemma3", "llama", "qwen2", "qwen3")
"""vLLM's modules whose decoder layers hand on two tensors that add up to the residual stream, which hooks rely on:
gemma2 and llama by test, the others by their source. In commandr, exaone4, phimoe and others the first alone is the
stream."""


@dataclass(frozen=True)
class Anatomy:
    """What vLLM makes of a model.

    Attributes:
        returns_states: Its class can return its hidden states.
        adds: Its decoder layers are of those that hooks can read; see :data:`ADDING`.
        layers: How many decoder layers it has.
        width: Of the residual stream.
        longest: Tokens, prompt and completion together.
        name: What it is loaded from.
        model_types: The ``model_type`` of its Hugging Face configuration, of the text model and of the whole.
    """

    returns_states: bool
    adds: bool
    layers: int
    width: int
    longest: int
    name: str = ""
    model_types: tuple[str, ...] = ()


def anatomy(model: str, engine: Mapping[str, Any]) -> Anatomy:
    """What vLLM would make of a model, without loading it.

    Raises:
        ConfigError: vLLM does not take the model.
    """
    require("vllm", "vllm")
    from vllm.engine.arg_utils import EngineArgs  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.models import ModelRegistry  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.models.interfaces import supports_eagle3  # pyright: ignore[reportMissingImports]
    from vllm.plugins import load_general_plugins  # pyright: ignore[reportMissingImports]

    load_general_plugins()
    known = ("model_impl", "trust_remote_code", "max_model_len", "revision", "hf_overrides")
    try:
        config = EngineArgs(model=model, **{key: engine[key] for key in known if key in engine}).create_model_config()
        kind = ModelRegistry.resolve_model_cls(config.architectures, config)[0]
    except (ValueError, OSError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"vLLM does not take the model {model} ({type(error).__name__}: {said[:200]}).") from error
    text = config.hf_text_config
    return Anatomy(
        returns_states=supports_eagle3(kind),
        adds=kind.__module__.split(".")[-1] in ADDING,
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        longest=config.max_model_len,
        name=model,
        model_types=(text.model_type, config.hf_config.model_type),
    )


def check_anatomy(readouts: Sequence[Readout], found: Anatomy) -> None:
    """Refuse readouts of another model, before an engine is built.

    Raises:
        ModelMismatchError: Layer, width or architecture disagree.
    """
    for readout in readouts:
        if readout.d_model != found.width or readout.hook_point.layer >= found.layers:
            raise ModelMismatchError(
                f"'{readout.name}' reads {readout.hook_point} of width {readout.d_model}, but the model has "
                f"{found.layers} layers of width {found.width}: use an SAE or probe of it."
            )
        if found.model_types:
            check_family(readout, found.model_types, found.name)


def choose_backend(engine: Mapping[str, Any], found: Anatomy, forced: str | None = None) -> str:
    """How an engine can be read.

    Args:
        engine: vLLM's engine arguments.
        found: What vLLM makes of its model.
        forced: The way that the user wants.

    Raises:
        ConfigError: That way cannot work here.
    """
    obstacles = _obstacles(engine, found)
    if forced is None:
        return next(way for way in BACKENDS if obstacles[way] is None)
    if forced not in BACKENDS:
        raise ConfigError(f"There is no backend '{forced}': use {', '.join(BACKENDS)}.{nearest(forced, BACKENDS)}")
    if obstacles[forced] is not None:
        raise ConfigError(f"backend='{forced}' cannot read this engine: {obstacles[forced]}.")
    return forced


def _obstacles(engine: Mapping[str, Any], found: Anatomy) -> dict[str, str | None]:
    """Return why each backend is unavailable."""
    drafts = engine.get("speculative_config") is not None
    no_aux = None if found.returns_states else "vLLM's class of this model cannot return its hidden states"
    no_hook = None if found.adds else f"hooks are known to be right for {', '.join(ADDING)} alone"
    if not engine.get("enforce_eager"):
        no_hook = "a compiled model never runs hooks; set enforce_eager=True"
    if drafts:
        no_aux = "the drafter has the hidden states for itself"
    if engine.get("pipeline_parallel_size", 1) > 1 or engine.get("data_parallel_size", 1) > 1:
        no_aux = no_hook = "its readings would lie in several processes; use backend='forward'"
    rejected = "drafts that it rejects are fed to the model too; use backend='second_pass'" if drafts else None
    return {"aux": no_aux or rejected, "hook": no_hook or rejected, "second_pass": no_aux and no_hook, "forward": None}


def reading_options(engine: Mapping[str, Any], found: Anatomy, points: Sequence[HookPoint], backend: str) -> dict:
    """The engine arguments that make vLLM's worker read these hook points."""
    capture = backend
    if backend == "second_pass":
        capture = "aux" if _obstacles(engine, found)["aux"] is None else "hook"
    ours = {"backend": capture, "points": [str(point) for point in points]}
    return {"worker_cls": WORKER, "additional_config": {**(engine.get("additional_config") or {}), "mechreward": ours}}


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
        anatomy: What vLLM makes of the model.
        ends: Tokens that end a completion.

    Raises:
        ConfigError: The backend cannot read this engine.
        ModelMismatchError: A readout was made for another model.
        MissingExtraError: vLLM is not installed.
    """

    def __init__(self, model: str, readouts: Sequence[Readout], backend: str | None = None, **engine: Any):
        vllm = require("vllm", "vllm")
        self.model, self.bank = str(pocket.resolve(model)), ReadoutBank(readouts)
        self.anatomy = anatomy(self.model, engine)
        check_anatomy(readouts, self.anatomy)
        self.backend = choose_backend(engine, self.anatomy, backend)
        logger.info("Readings of %s come from: vLLM, %s.", model, self.backend)
        if self.backend != "forward":
            engine = {**engine, **reading_options(engine, self.anatomy, self.bank.hook_points, self.backend)}
        self.llm = vllm.LLM(model=self.model, **engine)
        chosen = self.llm.llm_engine.model_config.try_get_generation_config().get("eos_token_id")
        self.ends = end_tokens(None, self.llm.get_tokenizer(), chosen)
        self._copy: Any = None
        if self.backend != "forward":
            self._call("mechreward_attach", send_bank(self.bank))

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
            ConfigError: A LoRA with ``backend="forward"``.
        """
        vllm = require("vllm", "vllm")
        lora = sampling.pop("lora_request", None)
        self._refuse_lora(lora)
        asked = [{"prompt": p} if isinstance(p, str) else {"prompt_token_ids": list(p)} for p in prompts]
        during = self.backend in ("aux", "hook")
        chosen = vllm.SamplingParams(n=num_generations, **sampling)
        if during:
            self._call("mechreward_open")
        outputs = self.llm.generate(asked, chosen, use_tqdm=False, lora_request=lora)
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
            ConfigError: A request for readouts that this engine was not started with, or for a reference, which it
                does not have; a LoRA with ``backend="forward"``.
            CaptureError: Not every token could be read.
        """
        self._refuse_lora(lora_request)
        if any(request.reads == "reference" for request in requests):
            raise ConfigError('This engine has one model, the policy: a reward with reads="reference" needs another.')
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

    def _refuse_lora(self, lora_request: Any) -> None:
        if lora_request is not None and self.backend == "forward":
            raise ConfigError("backend='forward' reads a copy without the LoRA: choose another, or merge the adapter.")

    def _hf_copy(self) -> Any:
        if self._copy is None:
            logger.warning("backend='forward': loading a second copy of %s to read it.", self.model)
            self._copy, _ = load_model(self.model)
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
    longest = llm.llm_engine.model_config.max_model_len
    if any(len(ids) >= longest for ids in fed):
        raise CaptureError(
            f"A rollout fills all of max_model_len={longest}, and a second pass needs a token more: raise it, or read "
            "with backend='forward'."
        )
    asked = [{"prompt_token_ids": ids} for ids in fed]
    llm.collective_rpc("mechreward_open", args=("too",))
    llm.generate(asked, once, use_tqdm=False, lora_request=lora_request)
    whole = RolloutBatch([""] * len(rows), [""] * len(rows), [[]] * len(rows), fed)
    read = match(receive_fed(llm.collective_rpc("mechreward_drain")[0]), whole, columns, read_last=True)
    values = torch.zeros(*mask.shape, columns)
    for k, row in enumerate(rows):
        start = len(batch.prompt_ids[row])
        values[row, : ends[row]] = read[k, start : start + ends[row]]
    return values.masked_fill(~mask[..., None], 0.0)
