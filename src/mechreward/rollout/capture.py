"""Hooks on HF models: where the decoder layers are, and windows in which their residual stream is read."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from mechreward.errors import CaptureError, ModelMismatchError
from mechreward.families import UNNAMED, families, model_types
from mechreward.readout import HookPoint, Readout, ReadoutBank

logger = logging.getLogger(__name__)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, DeepSpeed's engine, torch.compile and the like.

    PEFT stays, since its adapters are part of the forward, and so does FSDP, which gathers the weights for it.
    """
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # pyright: ignore[reportAssignmentType]
        elif isinstance(model, nn.parallel.DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine":
            model = model.module  # pyright: ignore[reportAssignmentType]
        else:
            return model


def transformer(model: nn.Module) -> nn.Module:
    """The HF model under FSDP1 and PEFT. (FSDP2 wraps nothing: it changes the class.)"""
    model = _inside_fsdp(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore


def _inside_fsdp(model: nn.Module) -> Any:
    model = unwrap(model)
    return getattr(model, "_fsdp_wrapped_module", model)


def has_adapters(model: object) -> bool:
    """Whether PEFT's adapters are part of a model."""
    return hasattr(model, "peft_config")


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of the weights (FSDP, DeepSpeed ZeRO-3), so that all must run each pass."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return True
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())


def text_config(model: nn.Module):
    """The configuration of the (text) decoder.

    Raises:
        CaptureError: The model is not one of Hugging Face's.
    """
    inner = transformer(model)
    if not isinstance(inner, PreTrainedModel):
        raise CaptureError(f"{type(model).__name__} has no Hugging Face config, so its decoder layers can't be found.")
    return inner.config.get_text_config()


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers, found by structure: the one ModuleList of ``num_hidden_layers`` inside the text model.

    Raises:
        CaptureError: There is none, or several.
    """
    count = text_config(model).num_hidden_layers
    inner: Any = transformer(model)
    # A vision tower may have as many layers as the decoder: look inside the text model only.
    decoder = inner.get_decoder()
    found = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(found) != 1:
        raise CaptureError(
            f"{type(inner).__name__} holds {len(found)} lists of {count} layers where one was expected: "
            "its layout is not supported."
        )
    return found[0]


def input_device(model: nn.Module) -> torch.device:
    """Where the inputs of a model go, one that ``device_map`` has spread over several devices too.

    Weights that accelerate keeps in the CPU's memory or on disk are ``meta`` until they run, and accelerate's hooks
    move the inputs to them.
    """
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def leaves_out_softcap(model: nn.Module) -> bool:
    """Whether the model caps its attention logits (Gemma-2) and its attention implementation does not.

    Eager, flex and flash attention cap them, SDPA cannot: transformers 5.17, whose default it is, leaves the cap out
    without a word (20 % of the residual's norm where logits are large); 5.23 defaults to eager and refuses the pass.
    """
    config = text_config(model)
    return caps_attention(config) and "sdpa" in (config._attn_implementation or "")


def caps_attention(config: PretrainedConfig) -> bool:
    """Whether a text model of this configuration caps its attention logits (Gemma-2)."""
    return config.to_dict().get("attn_logit_softcapping") is not None


def refuse_uncapped(model: nn.Module) -> None:
    """Refuse a model whose attention leaves its soft-capping out.

    Raises:
        ModelMismatchError: It does.
    """
    if leaves_out_softcap(model):
        raise ModelMismatchError(
            f"{type(transformer(model)).__name__} caps its attention logits, which attn_implementation="
            f'"{text_config(model)._attn_implementation}" leaves out, so that all readings would be off: load it with '
            'attn_implementation="eager", "flash_attention_2" or "flex_attention" (in a trainer: model_init_kwargs).'
        )


def has_absolute_positions(model: nn.Module) -> bool:
    """Whether positions are looked up in a table (GPT-2, OPT): such models misread left-padded rows in TRL."""
    return any(
        isinstance(module, nn.Embedding) and ("wpe" in name or "position" in name)
        for name, module in transformer(model).named_modules()
    )


def has_active_dropout(model: nn.Module, adapters: bool = True) -> bool:
    """Whether a forward pass in the present mode would drop anything; ``adapters=False``: with LoRA switched off."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.training and module.p > 0 and (adapters or "lora" not in name):
            return True
    # Attention drops by a function, not by a module. (A classifier's dropout is in Pythia's configuration, unused.)
    options = {name: p for name, p in text_config(model).to_dict().items() if not name.startswith("classifier")}
    return model.training and any("dropout" in name and isinstance(p, float) and p > 0 for name, p in options.items())


def check_fits(readouts: Iterable[Readout], model: nn.Module) -> None:
    """Refuse readouts that were made for another model, and models whose tokens are not those that they are given.

    Raises:
        ModelMismatchError: Layer, width or architecture disagree.
        CaptureError: An adapter puts virtual tokens before the text.
    """
    _check_no_virtual_tokens(model)
    config, layers = text_config(model), len(decoder_layers(model))
    whole: Any = transformer(model).config
    for readout in readouts:
        made_for = f" (made for {readout.model_name})" if readout.model_name else ""
        if readout.d_model != config.hidden_size:
            raise ModelMismatchError(
                f"'{readout.name}'{made_for} reads vectors of width {readout.d_model}, but the model's residual stream "
                f"has width {config.hidden_size}: use an SAE or probe of this model."
            )
        if readout.hook_point.layer >= layers:
            raise ModelMismatchError(
                f"'{readout.name}'{made_for} reads {readout.hook_point}, but the model has layers 0 to {layers - 1}: "
                "use an SAE or probe of this model."
            )
        check_family(readout, (config.model_type, whole.model_type), whole._name_or_path)


def check_family(readout: Readout, types: Collection[str], model_name: str) -> None:
    """Refuse a readout that was made for a model of another architecture, as far as its name tells.

    Args:
        readout: With the name of the model that it was made for.
        types: The ``model_type`` of the model's text configuration, and of the whole.
        model_name: What the model was loaded from: of the same name, or of a name of the same family (which some
            publish under another ``model_type``), it is the right one.

    Raises:
        ModelMismatchError: No model of that name has one of these types.
    """
    if readout.model_name in (None, "", UNNAMED, model_name):
        return
    fitting = model_types(readout.model_name)
    if not fitting:
        _say_unknown(readout.model_name)
    elif fitting.isdisjoint(types) and families(readout.model_name) != families(model_name):
        raise ModelMismatchError(
            f"'{readout.name}' was made for {readout.model_name}, but the model is a {next(iter(types))}: "
            "use an SAE or probe of this model."
        )


@functools.cache
def _say_unknown(name: str) -> None:
    logger.warning(
        "'%s' is not the name of a model family known here, so whether its readouts fit was checked by width and layer "
        "alone: make sure that the model is '%s' or was fine-tuned from it.",
        name,
        name,
    )


def _check_no_virtual_tokens(model: nn.Module) -> None:
    """PEFT's prompt learning lengthens the sequence, so that readings would belong to other tokens.

    Prefix tuning is no such case: it adds keys and values, and no positions.
    """
    adapted = _inside_fsdp(model)
    config = getattr(adapted, "active_peft_config", None)
    if config is None or not config.is_prompt_learning or getattr(adapted, "_adapters_disabled", False):
        return
    if (kind := str(config.peft_type).removeprefix("PeftType.")) != "PREFIX_TUNING":
        raise CaptureError(
            f"The model's adapter is prompt tuning ({kind}): it puts {config.num_virtual_tokens} virtual tokens before "
            "the text, which readings do not take into account. Train LoRA or prefix tuning instead."
        )


class Reader(Protocol):
    """What happens with the residual stream while a window is open."""

    def __call__(self, point: HookPoint, hidden: Tensor) -> None: ...


class _Stop(Exception):
    """Ends a truncated forward after its deepest hook."""


class ResidualTap:
    """Forward hooks on decoder layers, which read only while a window is open.

    Install it before the model is compiled: a hook that is added later is never called. Generation, the loss's
    forward, recomputation under gradient checkpointing and evaluation cannot pollute each other, since each reads into
    a window of its own or into none.
    """

    def __init__(self, model: nn.Module, points: Iterable[HookPoint]):
        self.points = sorted(set(points))
        self._reader: Reader | None = None
        self._stop_at: HookPoint | None = None
        self._wanted: set[HookPoint] = set()
        self._fired: set[HookPoint] = set()
        layers = decoder_layers(model)
        refuse_uncapped(model)  # here, since all that is read passes through here
        self._handles = [self._install(layers[point.layer], point) for point in self.points]

    def _install(self, layer: nn.Module, point: HookPoint):
        # Under torch.compile the hook runs as it stands, between two compiled pieces: a traced one would bake in
        # whether the window was open.
        fire: Any = torch.compiler.disable(self._read)
        if point.site == "resid_pre":

            def before(_module, args, kwargs):
                fire(point, args[0] if args else kwargs["hidden_states"])

            return layer.register_forward_pre_hook(before, with_kwargs=True)

        def after(_module, _args, output):
            fire(point, output[0] if isinstance(output, tuple) else output)

        return layer.register_forward_hook(after)

    def _read(self, point: HookPoint, hidden: Tensor) -> None:
        if self._reader is None or point not in self._wanted:
            return
        self._fired.add(point)
        self._reader(point, hidden.detach())
        if point == self._stop_at:
            raise _Stop

    @contextmanager
    def window(self, reader: Reader, points: Iterable[HookPoint] | None = None, stop: bool = False) -> Iterator[None]:
        """Hand the residual stream to ``reader`` inside the ``with`` block.

        Args:
            reader: Called with a hook point and its ``[rows, tokens, d_model]``, layer by layer.
            points: Which of the tap's hook points to read; all by default.
            stop: End the forward pass after the deepest of them.

        Raises:
            CaptureError: A window is open already, or some hook never fired.
        """
        if self._reader is not None:
            raise CaptureError("A capture window is open already: windows do not nest.")
        self._reader, self._fired = reader, set()
        self._wanted = set(self.points if points is None else points)
        # resid_post sorts after resid_pre of the same layer, as it runs.
        self._stop_at = max(self._wanted, key=lambda p: (p.layer, p.site == "resid_post")) if stop else None
        try:
            yield
        finally:
            self._reader, self._stop_at = None, None
        if missing := self._wanted - self._fired:
            raise CaptureError(
                f"Nothing was read at {', '.join(map(str, sorted(missing)))}: the forward pass did not run these "
                "layers, or the model was compiled before the hooks were installed."
            )

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


class SequenceReader:
    """Reads chosen positions of full-sequence passes that see the rows in order, in chunks of any size.

    Args:
        bank: What to read.
        positions: ``[B, S]`` bool, the positions to read; best on the CPU, where looking at them waits for nothing.
    """

    def __init__(self, bank: ReadoutBank, positions: Tensor):
        self.bank, self.positions = bank, positions
        self._values: Tensor | None = None
        self._row = dict.fromkeys(bank.hook_points, 0)
        self._filled = dict.fromkeys(bank.hook_points, 0)

    def __call__(self, point: HookPoint, hidden: Tensor) -> None:
        row = self._row[point]
        chosen = self.positions[row : row + hidden.shape[0]]
        if chosen.shape != hidden.shape[:2]:
            raise CaptureError(
                f"{point} saw a pass of shape {tuple(hidden.shape[:2])} where {tuple(chosen.shape)} was expected: "
                "another forward pass ran inside the capture window."
            )
        rows = chosen.reshape(-1).nonzero()[:, 0].to(hidden.device)
        if self._values is None:
            self._values = hidden.new_zeros(int(self.positions.sum()), len(self.bank), dtype=torch.float32)
        start = self._filled[point]
        self.bank.encode(point, hidden.reshape(-1, hidden.shape[-1]), self._values[start : start + len(rows)], rows)
        self._row[point], self._filled[point] = row + hidden.shape[0], start + len(rows)

    def values(self) -> Tensor:
        """``[positions.sum(), K]`` float32, in row-major order of the positions.

        Raises:
            CaptureError: Not all rows came by.
        """
        if set(self._row.values()) != {len(self.positions)} or self._values is None:
            raise CaptureError(
                f"{min(self._row.values())} of {len(self.positions)} rows were read: the pass broke off."
            )
        return self._values


class GenerationReader:
    """Reads every token as `generate` feeds it back, K floats each: one prefill, then one call a token."""

    def __init__(self, bank: ReadoutBank):
        self.bank = bank
        self._steps: dict[HookPoint, list[Tensor]] = {point: [] for point in bank.hook_points}
        self._prefilled: set[HookPoint] = set()

    def __call__(self, point: HookPoint, hidden: Tensor) -> None:
        if point not in self._prefilled:
            self._prefilled.add(point)  # the prompt: not read
            return
        if hidden.shape[1] != 1:
            raise CaptureError(
                f"{point} saw {hidden.shape[1]} tokens in one decoding step: this way of generating feeds back more "
                "than one token at a time and cannot be tapped."
            )
        values = hidden.new_zeros(hidden.shape[0], len(self.bank), dtype=torch.float32)
        self.bank.encode(point, hidden[:, 0], values)
        self._steps[point].append(values)

    def values(self, rows: int, width: int) -> Tensor:
        """``[rows, width, K]`` float32 for the completion tokens, on the model's device; those never fed back are 0.

        Raises:
            CaptureError: The decoding steps are neither one fewer than the longest completion's tokens nor as many.
        """
        fed, total = max(width - 1, 0), None
        for point, steps in self._steps.items():
            # Where transformers looks a step late whether all rows have ended (`DeferredStopCheck`: on mps), it feeds
            # back the last token too, and undoes that step.
            if len(steps) not in (fed, width):
                raise CaptureError(f"{point} saw {len(steps)} decoding steps for completions of up to {width} tokens.")
            if fed:
                total = steps[0].new_zeros(rows, width, len(self.bank)) if total is None else total
                total[:, :-1] += torch.stack(steps[:fed], dim=1).to(total.device)  # other points' columns are 0
        return torch.zeros(rows, width, len(self.bank)) if total is None else total


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode restored after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def truncated_forward(model: nn.Module, tap: ResidualTap, reader: Reader, inputs: Mapping[str, Any]) -> None:
    """Run the model once on ``inputs``, uncompiled and in eval mode, and stop after the tap's deepest hook.

    A sharded model runs to its end: one that broke off would keep the weights that it had gathered, and read old ones
    after the next optimiser step. Its wrapper is the whole model's, so the decoder cannot be run without the head,
    which is kept to one token instead.
    """
    inner, whole = unwrap(model), is_sharded(model)
    if whole:
        inputs = {**inputs, **_one_logit(inner)}
        _say_whole(type(transformer(model)).__name__)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(inner))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(tap.window(reader, stop=not whole))
        stack.enter_context(suppress(_Stop))
        inner(**inputs)
    if whole:
        _reshard(inner)


def _reshard(model: nn.Module) -> None:
    """Give back what FSDP2 keeps gathered after a forward pass: without a backward pass, nothing else does.

    The next optimiser step would change the shards alone, and later passes would run with the old weights.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _one_logit(model: nn.Module) -> dict[str, int]:
    """For those heads that can be told so: only the last token's logits."""
    takes = inspect.signature(type(transformer(model)).forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in takes else {}


@functools.cache
def _say_whole(name: str) -> None:
    logger.warning(
        "%s is sharded over processes (FSDP or ZeRO-3): our own forward passes run all of its layers, not only those "
        "up to the deepest that is read, since breaking off would leave its weights gathered.",
        name,
    )
