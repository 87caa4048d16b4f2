"""How published sparse autoencoders lie on disk. Nothing here unpickles."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mechreward.errors import SAEError
from mechreward.readout import RAW_INPUT, HookPoint, InputTransform, Nonlinearity
from mechreward.sae.handle import EncoderColumns, SAEHandle


def open_path(path: Path, **known: Any) -> SAEHandle:
    """Load a local sparse autoencoder: a SAELens folder, or a Gemma Scope ``params.npz`` (or its folder).

    Raises:
        SAEError: There is none, its format is not known, or it is damaged.
    """
    if path.suffix in {".pt", ".pth", ".pkl", ".bin", ".pickle"}:
        raise SAEError(f"{path} is a pickle, which can run code when it is loaded: convert it to safetensors first.")
    if path.suffix == ".npz" or (path / "params.npz").exists():
        return gemma_scope(path if path.suffix == ".npz" else path / "params.npz", **known)
    if (path / "cfg.json").exists():
        return saelens(path, **known)
    raise SAEError(f"No sparse autoencoder in {path}: expected cfg.json with sae_weights.safetensors, or params.npz.")


def saelens(folder: Path, model_name: str | None = None, scale: float = 1.0, name: str | None = None) -> SAEHandle:
    """SAELens' own format: ``cfg.json`` and ``sae_weights.safetensors`` with W_enc [d, n], b_enc, W_dec [n, d], b_dec.

    Formulas: sae_lens/saes/*.py, version 6 (``encode`` of each class).
    """
    try:
        config = json.loads((folder / "cfg.json").read_text())
        metadata = config.get("metadata") or {}
        hook_name = metadata.get("hook_name") or config.get("hook_name") or config["hook_point"]
        d_model, d_sae = int(config["d_in"]), int(config["d_sae"])
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise SAEError(f"{folder / 'cfg.json'} is not a SAELens configuration ({error!r}): fetch it again.") from error
    read = _SafetensorsReader(folder / "sae_weights.safetensors")
    normalize = config.get("normalize_activations", "none")
    if normalize == "expected_average_only_in" and scale == 1.0:
        raise SAEError(f"{folder} needs its norm scaling factor, which is not in its files: save it folded.")
    if normalize == "covariance_whitening":
        raise SAEError(f"{folder} whitens its input: fold the whitening into the weights with SAELens first.")
    shift = read("b_dec") if config.get("apply_b_dec_to_input", True) else None
    norm = normalize if normalize in {"constant_norm_rescale", "layer_norm"} else "none"
    architecture = config.get("architecture", "standard")
    kind = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk", "gated": "gated"}.get(architecture)
    if kind is None:
        raise SAEError(f"{folder} holds a '{architecture}' SAE: standard, jumprelu, topk and gated can be read.")

    def read_encoder(ids: list[int] | None) -> EncoderColumns:
        weight = read("W_enc", ids, axis=1)
        if kind == "gated":
            names = ("b_gate", "r_mag", "b_mag")
            gates = Nonlinearity("gated", {n: read(n, ids) for n in names})
            return EncoderColumns(weight, torch.zeros(weight.shape[1]), gates)
        bias = read("b_enc", ids)
        if config.get("rescale_acts_by_decoder_norm"):
            norms = read("W_dec", ids).norm(dim=-1)  # topk(z ||W_dec||): folded into the encoder
            weight, bias = weight * norms, bias * norms
        parameters = {"threshold": read("threshold", ids)} if kind == "jumprelu" else {}
        return EncoderColumns(weight, bias, Nonlinearity(kind, parameters, int(config.get("k", 0))))  # pyright: ignore

    def read_decoder() -> tuple[Tensor, Tensor]:
        w_dec = read("W_dec")
        if config.get("rescale_acts_by_decoder_norm"):
            w_dec = w_dec / w_dec.norm(dim=-1, keepdim=True)
        return w_dec, read("b_dec")

    _check_shape(folder, read, d_model, d_sae)
    return SAEHandle(
        name=name or str(folder),
        model_name=model_name or metadata.get("model_name") or config.get("model_name"),
        hook_point=HookPoint.parse(hook_name),
        d_model=d_model,
        d_sae=d_sae,
        kind=kind,
        read_encoder=read_encoder,
        read_decoder=read_decoder,
        transform=InputTransform(norm, shift, scale)
        if shift is not None or norm != "none" or scale != 1
        else RAW_INPUT,
    )


def gemma_scope(
    file: Path, hook_point: HookPoint | None = None, model_name: str | None = None, name: str | None = None
) -> SAEHandle:
    """Gemma Scope: ``params.npz`` with W_enc [d, n], b_enc, threshold, W_dec [n, d], b_dec.

    f = max(z, 0) 1[z > threshold], z = x W_enc + b_enc; b_dec is not subtracted and the input is not scaled
    (Lieberum et al. 2024, arXiv 2408.05147, section 2).
    """
    if hook_point is None:
        layer = re.search(r"layer_(\d+)", str(file))
        if layer is None:
            raise SAEError(f"{file} does not say its layer: keep Gemma Scope's folders (layer_22/width_16k/...).")
        hook_point = HookPoint(int(layer[1]))
    read = _NpzReader(file)

    def read_encoder(ids: list[int] | None) -> EncoderColumns:
        threshold = Nonlinearity("jumprelu", {"threshold": read("threshold", ids)})
        return EncoderColumns(read("W_enc", ids, axis=1), read("b_enc", ids), threshold)

    d_sae, d_model = read.shape("W_dec")
    _check_shape(file, read, d_model, d_sae)
    return SAEHandle(
        name=name or str(file),
        model_name=model_name,
        hook_point=hook_point,
        d_model=d_model,
        d_sae=d_sae,
        kind="jumprelu",
        read_encoder=read_encoder,
        read_decoder=lambda: (read("W_dec"), read("b_dec")),
    )


def _check_shape(where: Path, read: Reader, d_model: int, d_sae: int) -> None:
    found = read.shape("W_enc")
    if tuple(found) != (d_model, d_sae):
        raise SAEError(f"W_enc in {where} has shape {tuple(found)}, not ({d_model}, {d_sae}): the file is damaged.")


class Reader(Protocol):
    """Reads named tensors, or some of their rows (axis 0) or columns (axis 1), as float32."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def __call__(self, name: str, ids: list[int] | None = None, axis: int = 0) -> Tensor: ...


class _SafetensorsReader:
    """Memory-maps the file: only the slices that are asked for are read."""

    def __init__(self, file: Path):
        self.file = file
        with self._open() as tensors:
            self.names = set(tensors.keys())

    @contextmanager
    def _open(self):
        if not self.file.exists():
            raise SAEError(f"{self.file} is missing: fetch the SAE again.")
        try:
            with safe_open(self.file, framework="pt") as tensors:
                yield tensors
        except SafetensorError as error:
            raise SAEError(f"{self.file} is not a readable safetensors file ({error}): fetch it again.") from error

    def _slice(self, tensors: Any, name: str) -> Any:
        if name not in self.names:
            raise SAEError(f"{self.file} has no tensor '{name}' (it has {', '.join(sorted(self.names))}).")
        return tensors.get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        with self._open() as tensors:
            return tuple(self._slice(tensors, name).get_shape())

    def __call__(self, name: str, ids: list[int] | None = None, axis: int = 0) -> Tensor:
        with self._open() as tensors:
            stored = self._slice(tensors, name)
            if ids is None:
                return stored[:].float()
            pieces = [stored[i : i + 1] if axis == 0 else stored[:, i : i + 1] for i in ids]
            return torch.cat(pieces, dim=axis).float()


class _NpzReader:
    """numpy archives; a member is decompressed whole, one at a time, and never unpickled."""

    def __init__(self, file: Path):
        self.file = file
        self.shapes: dict[str, tuple[int, ...]] = {}

    def _array(self, name: str) -> np.ndarray:
        try:
            with np.load(self.file, allow_pickle=False) as arrays:
                return arrays[name]
        except KeyError as error:
            raise SAEError(f"{self.file} has no array '{name}': it is not a Gemma Scope params.npz.") from error
        except (OSError, ValueError, BadZipFile, EOFError) as error:
            raise SAEError(f"{self.file} is not a readable npz file ({error}): fetch it again.") from error

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.shapes:
            self.shapes[name] = self._array(name).shape
        return self.shapes[name]

    def __call__(self, name: str, ids: list[int] | None = None, axis: int = 0) -> Tensor:
        array = self._array(name)
        return torch.tensor(array if ids is None else array.take(ids, axis=axis), dtype=torch.float32)
