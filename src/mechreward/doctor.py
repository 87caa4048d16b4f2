"""Check whether this machine can run what is asked of it: versions, extras, GPU, sandbox, memory."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from packaging.requirements import Requirement

from mechreward.errors import MechRewardError

LORA_RANK = 16
FEATURES = 20
GIB = 2**30


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
        area: What was checked.
        state: ``"problem"`` where something will not work, ``"warning"`` where something may not.
        says: What was found.
        do: What to do about it; empty where nothing needs to be done.
    """

    area: str
    state: Literal["ok", "warning", "problem"]
    says: str
    do: str = ""


def examine(model: str | None = None, sae: str | None = None, dtype: torch.dtype = torch.float32) -> Iterator[Finding]:
    """Run all checks, one finding at a time.

    Args:
        model: A folder, an id of the hub, or ``mechreward/pocket``: whether it fits into memory.
        sae: ``release/sae_id``: whether it fits the model, and into memory beside it.
        dtype: The type of the model's weights.
    """
    yield from packages()
    yield gpu()
    yield sandbox()
    if model is not None:
        yield from fitting(model, sae, dtype)


# -- packages ---------------------------------------------------------------------------------------------------------


def packages() -> Iterator[Finding]:
    """Compare what is installed with what mechreward needs, and with what each of its extras needs."""
    try:
        asked = [Requirement(line) for line in importlib.metadata.requires("mechreward") or []]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("packages", "warning", "mechreward is not installed.", "Run pip install . in its checkout.")
        return
    extras = importlib.metadata.metadata("mechreward").get_all("Provides-Extra") or []
    yield from (of_extra(extra, asked) for extra in ["", *extras] if extra not in ("all", "dev", "docs"))


def of_extra(extra: str, asked: list[Requirement]) -> Finding:
    """Compare what is installed with an extra, or with what is always needed, which is the extra ``""``.

    A version that does not fit is a problem; an extra that is not installed is not.
    """
    area, install = (f"extra {extra}", f"'.[{extra}]'") if extra else ("packages", ".")
    install = f"Run pip install {install} in the checkout of mechreward."
    versions = {need: _version(need.name) for need in needs_of(extra, asked)}
    missing = [need.name for need, version in versions.items() if not version]
    wrong = [need for need, v in versions.items() if v and not need.specifier.contains(v, prereleases=True)]
    if wrong or (missing and not extra):
        says = [f"{need.name} is {versions[need]}, and {need.name}{need.specifier} is needed." for need in wrong]
        return Finding(area, "problem", " ".join([*says, *(f"{name} is not installed." for name in missing)]), install)
    if missing:
        return Finding(area, "ok", f"not installed (lacks {', '.join(missing)})", f"If wanted: {install}")
    return Finding(area, "ok", ", ".join(f"{need.name} {version}" for need, version in versions.items()))


def needs_of(extra: str, asked: list[Requirement]) -> Iterator[Requirement]:
    """Yield an extra's packages, those of the extras that it names included."""
    for need in asked:
        if need.marker.evaluate({"extra": extra}) if need.marker else not extra:
            if need.name == "mechreward":
                for other in sorted(need.extras):
                    yield from needs_of(other, asked)
            else:
                yield need


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# -- the machine ------------------------------------------------------------------------------------------------------


def gpu() -> Finding:
    """Check whether PyTorch's build can use the machine's GPUs."""
    version, bf16 = torch.__version__, "TRL's default, bfloat16, does not work here: give its configuration bf16=False."
    if torch.cuda.is_available():
        says = f"{version} on {torch.cuda.device_count()} x {torch.cuda.get_device_name()}."
        return Finding("torch", "ok", says, "" if torch.cuda.is_bf16_supported() else bf16)
    if shutil.which("nvidia-smi"):
        says = f"{version} cannot use a GPU, but this machine has NVIDIA's driver."
        return Finding("torch", "problem", says, "Install the build of PyTorch for your driver's CUDA version.")
    return Finding("torch", "ok", f"{version} on the CPU.", bf16)


def sandbox() -> Finding:
    """Check whether verifiers that run code can."""
    from mechreward.verifiers.sandbox import engine

    try:
        return Finding("sandbox", "ok", f"{engine().name}, for the verifiers that run code.")
    except MechRewardError as error:
        return Finding("sandbox", "warning", str(error), "Only python_exec, unit_tests and humaneval need one.")


# -- what fits --------------------------------------------------------------------------------------------------------


def fitting(model: str, sae: str | None, dtype: torch.dtype) -> Iterator[Finding]:
    """Check whether the model can be read, an SAE belongs to it, and both fit into memory."""
    area, encoder = "model", 0
    try:
        skeleton = on_meta(model)
        if sae is not None:
            area = "sae"
            encoder, says = encoder_bytes(skeleton, sae)
            yield Finding("sae", "ok", says)
    except Exception as error:  # ours, or of transformers, huggingface_hub or the file system
        message = " ".join(str(error).split())[:300]
        yield Finding(area, "problem", message, f"Give {area}s as a folder, or as the hub names them.")
    else:
        yield memory(*needed(skeleton, dtype.itemsize), encoder, dtype)


def on_meta(model: str) -> Any:
    """Return the model without weights, from its configuration alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from mechreward import pocket

    config = AutoConfig.from_pretrained(pocket.resolve(model))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def encoder_bytes(skeleton: Any, sae: str) -> tuple[int, str]:
    """Return the bytes that a reward keeps of an SAE, and the arithmetic in words.

    Raises:
        ModelMismatchError: It was made for another model.
        SAEError: It cannot be read.
    """
    from mechreward.rollout.capture import check_fits
    from mechreward.sae.registry import load_sae, reference

    handle = load_sae(*reference(sae))
    check_fits([handle.features([0])], skeleton)
    columns = handle.d_sae if handle.kind in ("topk", "groupmax") else FEATURES  # these compare all latents
    size = columns * (handle.d_model + 1) * 4
    kept = f"{columns:,} of {handle.d_sae:,} columns x ({handle.d_model:,} + 1) x 4 bytes = {_human(size)}"
    return size, f"{handle.name} ({handle.kind}) fits. Kept: {kept}."


def needed(model: Any, size: int) -> tuple[int, int, int]:
    """Return the bytes of a model of P parameters of ``size`` bytes each, and what training adds.

    Returns:
        The weights, P size; a LoRA of rank r on every linear layer but the head, r (in + out) parameters each, of which
        float32 weights, gradients and Adam's two moments are kept, 16 bytes; or gradients, moments and the reference
        that a KL penalty needs, for all weights, 4 P size.
    """
    weights = size * sum(p.numel() for p in model.parameters())  # tied weights once
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    adapter = sum(LORA_RANK * (layer.in_features + layer.out_features) for layer in linear)
    return weights, 16 * adapter, 4 * weights


def memory(weights: int, lora: int, full: int, encoder: int, dtype: torch.dtype) -> Finding:
    """Compare what training needs with the memory of the GPU, or of the machine where there is none."""
    there, where = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine"
    if torch.cuda.is_available():
        there, where = torch.cuda.get_device_properties(0).total_memory, "the GPU"
    smallest, largest = weights + encoder + lora, weights + encoder + full
    says = (
        f"Weights {_human(weights)} ({dtype}), SAE {_human(encoder)}. Training LoRA of rank {LORA_RANK}: + "
        f"{_human(lora)} (16 bytes a parameter) = {_human(smallest)}; all weights: + {_human(full)} (gradients, Adam, "
        f"reference) = {_human(largest)}; of {_human(there)} that {where} has. Activations and logits come on top."
    )
    if smallest > there:
        return Finding("memory", "problem", says, "Take a smaller model or dtype, or several GPUs (recipes/trl).")
    if largest > there:
        return Finding("memory", "warning", says, "Train a LoRA adapter: peft_config, or lora_rank in an experiment.")
    return Finding("memory", "ok", says)


def _human(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
