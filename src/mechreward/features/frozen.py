"""Frozen packs: a pack that carries its own encoder columns, so that training needs no sparse autoencoder.

Exact for encoders of which a column can be computed alone (ReLU, JumpReLU, gated): the columns are those that
`sae.features` slices, and the readings are bit-identical. TopK and GroupMax need every pre-activation, so their whole
encoder is carried; or a threshold in its place, calibrated on residual vectors and marked with its measured error.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechreward.errors import PackError
from mechreward.features.pack import Approximation, FeaturePack, FrozenEncoder
from mechreward.readout import HookPoint, InputTransform, Nonlinearity, Readout
from mechreward.sae.handle import SAEHandle
from mechreward.sae.registry import load_sae

PARAMETERS = ("threshold", "b_gate", "r_mag", "b_mag")


def freeze(
    pack: FeaturePack,
    folder: Path,
    sae: SAEHandle | None = None,
    approximate_on: Tensor | None = None,
    stem: str | None = None,
) -> Path:
    """Write ``<stem>.json`` and ``<stem>.safetensors`` with the encoder columns that the pack needs.

    Args:
        pack: With features.
        folder: Where to.
        sae: Its sparse autoencoder, loaded already.
        approximate_on: For TopK and GroupMax: residual vectors ``[N, d_model]`` on which a threshold is calibrated, so
            that K columns are enough; without, the whole encoder is written.
        stem: Of the files; by default the last part of the pack's name.

    Returns:
        The JSON file.

    Raises:
        PackError: A recipe, another SAE, or an approximation that is not needed.
    """
    if not pack.features:
        raise PackError(f"{pack.name} is a recipe without features: there is nothing to freeze yet.")
    sae = load_sae(pack.sae.release, pack.sae.sae_id) if sae is None else sae
    check_sae(pack, sae)
    readout = sae.features([f.id for f in pack.features], name=pack.name.split("/")[-1])
    approximation = None
    if approximate_on is not None:
        if readout.nonlinearity.sliceable:
            raise PackError(
                f"The encoder of {sae.name} is exact on its columns alone: freeze without an approximation."
            )
        readout, approximation = _with_threshold(readout, approximate_on)
    name = stem or pack.name.split("/")[-1]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.safetensors"
    tensors = {"weight": readout.weight, "bias": readout.bias, **readout.nonlinearity.parameters}
    if readout.transform.shift is not None:
        tensors["shift"] = readout.transform.shift
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    frozen = FrozenEncoder(
        file=file.name,
        sha256=_digest(file),
        kind=readout.nonlinearity.kind,  # pyright: ignore[reportArgumentType] (an encoder's)
        k=readout.nonlinearity.k,
        norm=readout.transform.norm,
        scale=readout.transform.scale,
        center=readout.transform.center,
        approximation=approximation,
    )
    card = folder / f"{name}.json"
    pack.model_copy(update={"frozen": frozen}).write(card)
    return card


def frozen_readout(pack: FeaturePack) -> Readout:
    """The readout that a frozen pack carries.

    Raises:
        PackError: Its file is missing, is not the one that was frozen, or does not fit the pack.
    """
    frozen, ids = pack.frozen, [f.id for f in pack.features]
    if frozen is None or pack.folder is None:
        raise PackError(f"{pack.name} is not frozen: make it so with 'mechreward packs freeze'.")
    file = pack.folder / frozen.file
    if file.parent != pack.folder or not file.exists():
        raise PackError(f"{pack.name} is frozen, but its file {frozen.file} is not beside its JSON: fetch both again.")
    if _digest(file) != frozen.sha256:
        raise PackError(f"{file} is not the file that {pack.name} was frozen with (another checksum): fetch it again.")
    try:
        tensors = load_file(file)
        weight, bias = tensors["weight"], tensors["bias"]
        parameters = {name: tensors[name] for name in PARAMETERS if name in tensors}
        transform = InputTransform(frozen.norm, tensors.get("shift"), frozen.scale, frozen.center)
    except (SafetensorError, KeyError) as error:
        raise PackError(f"{file} is damaged ({type(error).__name__}: {error}): freeze {pack.name} again.") from error
    nonlinearity = Nonlinearity(frozen.kind, parameters, frozen.k)
    expected = (pack.d_model, len(ids) if nonlinearity.sliceable else pack.d_sae)
    if tuple(weight.shape) != expected:
        raise PackError(f"{file} holds an encoder of shape {tuple(weight.shape)}, not {expected}: freeze it again.")
    return Readout(
        name=pack.name.split("/")[-1],
        labels=tuple(f"feature_{i}" for i in ids),
        hook_point=HookPoint.parse(pack.hook_point),
        weight=weight,
        bias=bias,
        nonlinearity=nonlinearity,
        transform=transform,
        keep=None if nonlinearity.sliceable else torch.tensor(ids),
        model_name=pack.model,
    )


def write_pack(pack: FeaturePack, file: Path) -> None:
    """Write a pack's JSON, and take the encoder of a frozen one along.

    Raises:
        PackError: The encoder that it was frozen with is gone.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if pack.frozen is not None and pack.folder is not None and pack.folder.resolve() != file.parent.resolve():
        try:
            shutil.copy2(pack.folder / pack.frozen.file, file.parent)
        except OSError as error:
            raise PackError(f"{pack.name} is frozen, but {pack.frozen.file} cannot be copied ({error}).") from error
    pack.write(file)


def check_sae(pack: FeaturePack, sae: SAEHandle) -> None:
    """Refuse another sparse autoencoder than the pack's: feature ids do not carry over.

    Raises:
        PackError: Its place, its shape or its name is another.
    """
    if (str(sae.hook_point), sae.d_model, sae.d_sae) != (pack.hook_point, pack.d_model, pack.d_sae):
        raise PackError(
            f"{pack.name} was made for {pack.sae.release}/{pack.sae.sae_id} ({pack.hook_point}, {pack.d_model} x "
            f"{pack.d_sae}), but {sae.name} reads {sae.hook_point}, {sae.d_model} x {sae.d_sae}."
        )
    named = f"{pack.sae.release}/{pack.sae.sae_id}"
    # An SAE in a local folder is called by its path, and taken at its word.
    if sae.name != named and "/" in sae.name and not Path(sae.name).exists():
        raise PackError(f"{pack.name} was made for {named}, not for {sae.name}: feature ids do not carry over.")


def _with_threshold(readout: Readout, x: Tensor) -> tuple[Readout, Approximation]:
    """K columns with one threshold in the place of a selection among all latents, and what that costs.

    The threshold is the mean over tokens of the smallest activation that the selection lets through.
    """
    z = torch.cat([readout.transform(part.float()) @ readout.weight + readout.bias for part in x.split(1024)])
    kept = torch.cat([readout.nonlinearity(part) for part in z.split(1024)])
    smallest = kept.masked_fill(kept <= 0, torch.inf).amin(dim=1)
    threshold = float(smallest[smallest.isfinite()].mean())
    ids = readout.keep
    assert ids is not None  # what is not sliceable has it
    exact, near = kept[:, ids], z[:, ids].relu() * (z[:, ids] > threshold)
    sliced = replace(
        readout,
        weight=readout.weight[:, ids].contiguous(),
        bias=readout.bias[ids].contiguous(),
        nonlinearity=Nonlinearity("jumprelu", {"threshold": torch.full((len(ids),), threshold)}),
        keep=None,
    )
    return sliced, Approximation(
        of=readout.nonlinearity.kind,  # pyright: ignore[reportArgumentType] (not sliceable: one of two)
        threshold=threshold,
        tokens=len(x),
        changed=float(((exact > 0) != (near > 0)).float().mean()),
        relative_error=float((exact - near).norm() / exact.norm().clamp(min=1e-12)),
    )


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
