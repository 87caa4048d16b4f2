"""Whether this machine can run what is asked of it: versions, extras, memory, the hub, the sandbox."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

import mechreward
from mechreward.errors import MechRewardError, ModelMismatchError

State = Literal["ok", "warning", "problem"]

SUMMARY = "Mechanistic-interpretability rewards for GRPO: SAE features and probes on the residual stream."
"""What the metadata of this project say, and those of its namesake on the package index do not."""

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ENGINES = ("verl", "openrlhf")  # their extras bring our side alone
LORA_RANK = 16
FEATURES = 20
GIB = 2**30
TIMEOUT = 5  # seconds that the hub may take


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        area: What.
        state: ``"problem"`` where something will not work, ``"warning"`` where something may not.
        says: What was found.
        do: What to do about it; empty where nothing needs to be done.
    """

    area: str
    state: State
    says: str
    do: str = ""


@dataclass(frozen=True)
class Needs:
    """Bytes that a model, an SAE and an optimiser take.

    Attributes:
        weights: The model's, in the chosen dtype.
        lora: A trained adapter: float32 weights, gradients, and Adam's two moments.
        full: All weights trained: gradients and Adam's two moments in the same dtype, and the frozen reference that a
            KL penalty needs.
        encoder: What of the SAE is kept: K columns, or the whole dictionary of a TopK.
    """

    weights: int
    lora: int
    full: int
    encoder: int


def examine(model: str | None = None, sae: str | None = None, dtype: str = "float32") -> Iterator[Finding]:
    """Look at everything, one finding at a time.

    Args:
        model: A folder, an id of the hub, or ``mechreward/pocket``: whether it fits into memory.
        sae: ``release/sae_id``, likewise, and whether it fits the model.
        dtype: In which the model's weights are kept, a key of :data:`BYTES`.
    """
    yield project()
    yield from requirements()
    yield torch_build()
    yield hub()
    yield cache()
    yield sandbox()
    if model is not None:
        yield from fitting(model, sae, dtype)


# -- packages ---------------------------------------------------------------------------------------------------------


def project() -> Finding:
    """Whether what is installed under this name is this project."""
    try:
        metadata = importlib.metadata.metadata("mechreward")
    except importlib.metadata.PackageNotFoundError:
        return Finding("mechreward", "warning", "is imported, but not installed.", "Run pip install . in its checkout.")
    if metadata["Summary"] != SUMMARY or metadata["Version"] != mechreward.__version__:
        return Finding(
            "mechreward",
            "problem",
            f"{metadata['Version']} is installed, and it is not this one ({mechreward.__version__}): the package index "
            "has another project of this name.",
            "Run pip uninstall mechreward, then pip install . in this project's checkout.",
        )
    return Finding("mechreward", "ok", f"{metadata['Version']}, Python {platform.python_version()}")


def requirements() -> Iterator[Finding]:
    """The packages that are always needed, one by one where wrong; and each extra."""
    try:
        asked = [Requirement(line) for line in importlib.metadata.requires("mechreward") or []]
        extras = importlib.metadata.metadata("mechreward").get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return
    always = [need for need in asked if need.marker is None or need.marker.evaluate({"extra": ""})]
    wrong = [said for need in always if (said := lacking(need))]
    for said in wrong:
        yield Finding("packages", "problem", said, "Run pip install . in the checkout of mechreward.")
    if not wrong:
        versions = [f"{need.name} {importlib.metadata.version(need.name)}" for need in always]
        yield Finding("packages", "ok", ", ".join(versions))
    for extra in extras:
        if extra not in ("all", "dev", "docs"):
            yield of_extra(extra, asked)


def of_extra(extra: str, asked: list[Requirement]) -> Finding:
    """Whether an extra is there; a package of it in a version that does not fit is a problem, a missing one is not."""
    needs = list(needs_of(extra, asked))
    missing = [need.name for need in needs if not _installed(need.name)]
    wrong = [said for need in needs if need.name not in missing and (said := lacking(need))]
    install = f"Run pip install '.[{extra}]' in the checkout of mechreward."
    if wrong:
        return Finding(f"extra {extra}", "problem", " ".join(wrong), install)
    if missing:
        return Finding(f"extra {extra}", "ok", f"not installed (lacks {', '.join(missing)})", f"If wanted: {install}")
    says = ", ".join(f"{need.name} {importlib.metadata.version(need.name)}" for need in needs)
    if extra in ENGINES and not _installed(extra):
        return Finding(f"extra {extra}", "ok", says, f"{extra} itself is not installed: recipes/{extra} says how.")
    return Finding(f"extra {extra}", "ok", says)


def needs_of(extra: str, asked: list[Requirement]) -> Iterator[Requirement]:
    """An extra's packages, those of extras that it names included."""
    for need in asked:
        if need.marker is None or need.marker.evaluate({"extra": ""}) or not need.marker.evaluate({"extra": extra}):
            continue
        if need.name == "mechreward":
            for other in sorted(need.extras):
                yield from needs_of(other, asked)
        else:
            yield need


def lacking(need: Requirement) -> str:
    """What is wrong with an installed package, in a sentence, or nothing."""
    if not _installed(need.name):
        return f"{need.name} is not installed ({need.name}{need.specifier} is needed)."
    version = importlib.metadata.version(need.name)
    if need.specifier.contains(version, prereleases=True):
        return ""
    return f"{need.name} is {version}, and {need.name}{need.specifier} is needed."


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


# -- the machine ------------------------------------------------------------------------------------------------------


def torch_build() -> Finding:
    """Whether PyTorch's build fits the machine."""
    import torch

    version = torch.__version__
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        named = ", ".join(f"{card.name} ({card.total_memory / GIB:.0f} GiB)" for card in cards)
        bf16 = "" if torch.cuda.is_bf16_supported() else " Without bfloat16: give TRL's configuration bf16=False."
        return Finding("torch", "warning" if bf16 else "ok", f"{version} on {named}.{bf16}")
    if shutil.which("nvidia-smi"):
        why = "is a build without CUDA" if torch.version.cuda is None else "finds no GPU that it can use"
        return Finding(
            "torch",
            "problem",
            f"{version} {why}, but this machine has NVIDIA's driver.",
            "Install the build of PyTorch for your driver's CUDA version, before mechreward.",
        )
    return Finding(
        "torch",
        "ok",
        f"{version} on the CPU.",
        "TRL's default, bfloat16, needs a GPU: give its configuration bf16=False.",
    )


def hub() -> Finding:
    """Whether the Hugging Face hub can be reached; being offline is no problem for what is on this machine."""
    from huggingface_hub import constants, get_session, get_token

    offline = "Models, SAEs and data then come from folders; pocket needs none of it."
    if constants.HF_HUB_OFFLINE:
        return Finding("hub", "warning", "HF_HUB_OFFLINE is set, so nothing is fetched.", offline)
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:  # of whichever client it uses
        return Finding("hub", "warning", f"The hub cannot be reached ({type(error).__name__}).", offline)
    if get_token() is None:
        return Finding("hub", "ok", "reached, without a token.", "Gated models (Gemma, Llama) need one: hf auth login.")
    return Finding("hub", "ok", "reached, with a token.")


def cache() -> Finding:
    """Whether what is fetched can be kept."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not os.access(there, os.W_OK):
        return Finding("cache", "problem", f"{folder} cannot be written.", "Set HF_HOME to a folder that can.")
    return Finding("cache", "ok", f"{shutil.disk_usage(there).free / GIB:.0f} GiB free for {folder}")


def sandbox() -> Finding:
    """Whether verifiers that run code can."""
    from mechreward.verifiers.sandbox import engine

    try:
        return Finding("sandbox", "ok", f"{engine().name}, for the verifiers that run code.")
    except MechRewardError as error:
        return Finding("sandbox", "warning", str(error), "Only python_exec, unit_tests and humaneval need one.")


# -- what fits --------------------------------------------------------------------------------------------------------


def fitting(model: str, sae: str | None, dtype: str) -> Iterator[Finding]:
    """Whether the model, and an SAE beside it, can be had, belong together, and fit into memory."""
    try:
        skeleton = on_meta(model)
    except Exception as error:  # of transformers, huggingface_hub or the file system
        said = " ".join(str(error).split())[:200]
        yield Finding("model", "problem", f"{model} cannot be read: {said}", "Give a folder, or an id of the hub.")
        return
    encoder = 0
    if sae is not None:
        try:
            encoder, says = _encoder_bytes(skeleton, sae)
        except ModelMismatchError as error:
            yield Finding("sae", "problem", str(error))
            return
        except MechRewardError as error:
            yield Finding("sae", "warning", str(error))
        else:
            yield Finding("sae", "ok", says)
    yield memory(needed(skeleton, BYTES[dtype], encoder), dtype)


def on_meta(model: str) -> Any:
    """The model without weights, from its configuration alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from mechreward import pocket

    config = AutoConfig.from_pretrained(pocket.resolve(model))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def needed(model: Any, size: int, encoder: int) -> Needs:
    """The arithmetic, for a model of P parameters of ``size`` bytes each.

    weights = P size; LoRA of rank r on every linear layer but the head: r (in + out) parameters, of which float32
    weights, gradients and Adam's two moments are kept: 16 bytes each; full = P size (gradients) + 2 P size (moments)
    + P size (the reference).
    """
    import torch

    parameters = sum(p.numel() for p in model.parameters())  # tied weights once
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    adapter = sum(LORA_RANK * (layer.in_features + layer.out_features) for layer in linear)
    return Needs(parameters * size, adapter * 16, 4 * parameters * size, encoder)


def _encoder_bytes(skeleton: Any, sae: str) -> tuple[int, str]:
    """Bytes of what a reward keeps of an SAE, with the arithmetic in words."""
    from mechreward.rollout.capture import check_fits
    from mechreward.sae.registry import load_sae, reference

    handle = load_sae(*reference(sae))
    check_fits([handle.features([0])], skeleton)
    whole = handle.kind in ("topk", "groupmax")
    columns = handle.d_sae if whole else FEATURES
    size = columns * (handle.d_model + 1) * 4
    kept = f"all {columns:,} columns, which {handle.kind} needs" if whole else f"{columns} of {handle.d_sae:,} columns"
    said = f"{handle.name} fits. Kept: {kept}, x ({handle.d_model:,} + 1) x 4 bytes = {_human(size)}"
    return size, f"{said}."


def memory(needs: Needs, dtype: str) -> Finding:
    """Whether that fits. Activations, logits and the cache of a generation come on top, by batch and length."""
    import torch

    if torch.cuda.is_available():
        there, what = torch.cuda.get_device_properties(0).total_memory, "the GPU"
    else:
        there, what = _ram(), "this machine"
    lora = needs.weights + needs.lora + needs.encoder
    full = needs.weights + needs.full + needs.encoder
    says = (
        f"Weights {_human(needs.weights)} ({dtype}), SAE {_human(needs.encoder)}. Training LoRA of rank {LORA_RANK}: + "
        f"{_human(needs.lora)} (16 bytes a parameter) = {_human(lora)}; all weights: + {_human(needs.full)} "
        f"(gradients, Adam, reference) = {_human(full)}; of {_human(there)} that {what} has. Activations and logits "
        "come on top."
    )
    if lora > there:
        return Finding("memory", "problem", says, "Take a smaller model or dtype, or several GPUs (recipes/trl).")
    if full > there:
        return Finding("memory", "warning", says, "Train a LoRA adapter: peft_config, or lora_rank in an experiment.")
    return Finding("memory", "ok", says)


def _ram() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _human(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
