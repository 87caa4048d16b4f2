"""How published sparse autoencoders lie on disk. Nothing here unpickles."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mechreward.errors import SAEError
from mechreward.readout import HookPoint, InputTransform, Nonlinearity
from mechreward.sae.handle import EncoderColumns, SAEHandle


def open_path(path: Path) -> SAEHandle:
    """Load a local sparse autoencoder: a SAELens folder, or a Gemma Scope ``params.npz`` (or its folder).

    Raises:
        SAEError: There is none, its format is not known, or it is damaged.
    """
    if path.suffix in {".pt", ".pth", ".pkl", ".bin", ".pickle"}:
        raise SAEError(f"{path} is a pickle, which can run code when it is loaded: convert it to safetensors first.")
    if path.suffix == ".npz" or (path / "params.npz").exists():
        return gemma_scope(path if path.suffix == ".npz" else path / "params.npz")
    if (path / "cfg.json").exists():
        return saelens(path)
    raise SAEError(f"No sparse autoencoder in {path}: expected cfg.json with sae_weights.safetensors, or params.npz.")


def saelens(
    folder: Path,
    model_name: str | None = None,
    scale: float | None = None,
    name: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> SAEHandle:
    """SAELens' own format: ``cfg.json`` and ``sae_weights.safetensors`` with W_enc [d, n], b_enc, W_dec [n, d], b_dec.

    Formulas: sae_lens/saes/*.py, version 6 (``encode`` of each class).

    Args:
        folder: Where the two files are.
        model_name: The model whose activations it was trained on, if known better than by ``cfg.json``.
        scale: The norm scaling factor of an SAE with ``expected_average_only_in``; such files do not hold it.
        name: What to call it.
        overrides: Entries that replace those of ``cfg.json`` (SAELens' registry corrects some releases so).
    """
    try:
        config = _version_6(json.loads((folder / "cfg.json").read_text()) | dict(overrides or {}))
        hook_point, norm = HookPoint.parse(config["hook_name"]), config["normalize_activations"]
        d_model, d_sae = int(config["d_in"]), int(config["d_sae"])
        k = int(config["k"]) if config["architecture"] == "topk" else 0
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise SAEError(
            f"{folder / 'cfg.json'} is not a SAELens configuration ({_brief(error)}): fetch it again."
        ) from error
    kind = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk", "gated": "gated"}.get(config["architecture"])
    if kind is None:
        raise SAEError(
            f"{folder} holds a '{config['architecture']}' SAE: standard, jumprelu, topk and gated can be read."
        )
    if kind == "topk" and not 1 <= k <= d_sae:
        raise SAEError(f"{folder / 'cfg.json'} says k={k} of {d_sae} latents: it is damaged.")
    if norm == "expected_average_only_in":
        if scale is None:
            raise SAEError(f"{folder} needs its norm scaling factor, which is not in its files: save it folded.")
        norm = "none"
    else:
        scale = None
    if norm not in ("none", "constant_norm_rescale", "layer_norm"):
        raise SAEError(f"{folder} normalises its input by '{norm}', which can't be read: fold it into the weights.")
    read = _SafetensorsReader(folder / "sae_weights.safetensors")
    _check_shape(folder, read, d_model, d_sae)
    shift = read("b_dec") if config["apply_b_dec_to_input"] else None

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
        return EncoderColumns(weight, bias, Nonlinearity(kind, parameters, k))  # pyright: ignore

    def read_decoder() -> tuple[Tensor, Tensor]:
        w_dec = read("W_dec")
        if config.get("rescale_acts_by_decoder_norm"):
            w_dec = w_dec / w_dec.norm(dim=-1, keepdim=True)
        return w_dec, read("b_dec")

    return SAEHandle(
        name=name or str(folder),
        model_name=model_name or config.get("model_name"),
        hook_point=hook_point,
        d_model=d_model,
        d_sae=d_sae,
        kind=kind,
        read_encoder=read_encoder,
        read_decoder=read_decoder,
        transform=InputTransform(norm, shift, scale or 1.0, config["centered"]),
    )


def _version_6(config: dict[str, Any]) -> dict[str, Any]:
    """``cfg.json`` of any version, flat, with version 6's names (SAELens' ``handle_pre_6_0_config``)."""
    config = {"architecture": "standard", "apply_b_dec_to_input": True} | config | (config.get("metadata") or {})
    config["hook_name"] = config.get("hook_name") or config["hook_point"]
    if config.get("activation_fn", config.get("activation_fn_str")) == "topk":  # once an activation of a standard SAE
        config |= {"architecture": "topk", "k": config["activation_fn_kwargs"]["k"]}
    normalize = config.get("normalize_activations") or "none"
    config["normalize_activations"] = "expected_average_only_in" if normalize is True else normalize
    loading = config.get("model_from_pretrained_kwargs") or {}
    config["centered"] = bool(loading.get("center_writing_weights"))
    for name in ("architecture", "hook_name", "normalize_activations"):
        config[name] = str(config[name])
    return config


def _brief(error: Exception) -> str:
    """An error in one line: some quote the whole file."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


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

    d_sae, d_model = (*read.shape("W_dec"), 0, 0)[:2]
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
    for name, shape in {"W_enc": (d_model, d_sae), "b_dec": (d_model,)}.items():
        if (found := tuple(read.shape(name))) != shape:
            raise SAEError(f"{name} in {where} has shape {found}, not {shape}: the file is damaged.")


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
        except (SafetensorError, OSError) as error:
            raise SAEError(
                f"{self.file} is not a readable safetensors file ({_brief(error)}): fetch it again."
            ) from error

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

    @contextmanager
    def _open(self, name: str):
        try:
            with zipfile.ZipFile(self.file) as members, members.open(f"{name}.npy") as member:
                yield member
        except FileNotFoundError as error:
            raise SAEError(f"{self.file} is missing: fetch the SAE again.") from error
        except KeyError as error:
            raise SAEError(f"{self.file} has no array '{name}': it is not a Gemma Scope params.npz.") from error
        except Exception as error:  # zipfile, zlib and numpy each raise their own on a damaged file
            raise SAEError(f"{self.file} is not a readable npz file ({_brief(error)}): fetch it again.") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """From the member's header alone: W_enc may be gigabytes."""
        with self._open(name) as member:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            return read(member)[0]

    def __call__(self, name: str, ids: list[int] | None = None, axis: int = 0) -> Tensor:
        with self._open(name) as member:
            array = np.lib.format.read_array(member, allow_pickle=False)
            member.read()  # to the end, where zipfile compares the checksum
            return torch.tensor(array if ids is None else array.take(ids, axis=axis), dtype=torch.float32)
