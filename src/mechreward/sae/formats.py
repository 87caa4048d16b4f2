"""How published sparse autoencoders lie on disk. Nothing here unpickles."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mechreward.errors import SAEError
from mechreward.families import centers
from mechreward.readout import RAW_INPUT, HookPoint, InputTransform, Nonlinearity
from mechreward.sae.handle import EncoderColumns, SAEHandle
from mechreward.sae.readers import NpzReader, Reader, Renamed, SafetensorsReader, TorchReader, brief


def open_path(path: Path) -> SAEHandle:
    """Load a local sparse autoencoder; which publisher's format it is shows in the names of its files.

    Raises:
        SAEError: There is none, its format is not known, or it is damaged.
    """
    if path.name.endswith(".sae.pt"):
        return qwen_scope(path)
    if path.suffix in (".pt", ".pth"):
        return topk_checkpoint(path) if TorchReader(path).names & {"W_enc", "W_dec"} else goodfire(path)
    if path.suffix in (".pkl", ".bin", ".pickle"):
        raise SAEError(f"{path} is a pickle, which can run code when it is loaded: convert it to safetensors first.")
    if path.suffix == ".npz":
        return gemma_scope(path)
    for file, load in _BY_FILE.items():
        if (path / file).exists():
            return load(path)
    *others, last = _BY_FILE
    raise SAEError(f"No sparse autoencoder in {path}: expected one of the files {', '.join(others)} or {last}.")


def saelens(
    folder: Path,
    model_name: str | None = None,
    scale: float | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> SAEHandle:
    """SAELens' own format: ``cfg.json`` and ``sae_weights.safetensors`` with W_enc [d, n], b_enc, W_dec [n, d], b_dec.

    Formulas: sae_lens/saes/*.py, version 6 (``encode`` of each class). SAELens folds what it did to the input into the
    weights at the end of training; a checkpoint from before that has the statistics in a file beside it.

    Args:
        folder: Where the two files are.
        model_name: The model whose activations it was trained on, if known better than by ``cfg.json``.
        scale: The norm scaling factor of an SAE with ``expected_average_only_in``; by default the one in
            ``activation_scaler.json``, if there is one.
        overrides: Entries that replace those of ``cfg.json`` (SAELens' registry corrects some releases so).
    """
    try:
        config = _version_6(json.loads((folder / "cfg.json").read_text("utf-8-sig")) | dict(overrides or {}))
        hook_point, norm = HookPoint.parse(config["hook_name"]), config["normalize_activations"]
        d_model, d_sae = int(config["d_in"]), int(config["d_sae"])
        k = int(config.get("k", 0)) if config["architecture"] == "topk" else 0
    except (OSError, ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        raise SAEError(
            f"{folder / 'cfg.json'} is not a SAELens configuration ({brief(error)}): fetch it again."
        ) from error
    model_name = model_name or config.get("model_name")
    kinds: dict[str, Kind] = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk", "gated": "gated"}
    kind = kinds.get(config["architecture"])
    if kind is None:
        raise SAEError(
            f"{folder} holds a '{config['architecture']}' SAE: standard, jumprelu, topk and gated can be read."
        )
    if kind == "topk" and "k" not in config:
        raise SAEError(f"{folder / 'cfg.json'} does not say the 'k' of its topk SAE: add it.")
    if kind == "topk" and not 1 <= k <= d_sae:
        raise SAEError(f"{folder / 'cfg.json'} says k={k} of {d_sae} latents: it is damaged.")
    centered = _is_centered(folder, config, model_name)
    whitening = None
    if norm == "expected_average_only_in":
        scale = _training_scale(folder) if scale is None else scale
        norm = "none"
    else:
        scale = None
    if norm == "covariance_whitening":
        whitening, norm = _whitening(folder, d_model), "none"
    if norm not in ("none", "constant_norm_rescale", "layer_norm"):
        raise SAEError(f"{folder} normalises its input by '{norm}', which can't be read: fold it into the weights.")
    read = SafetensorsReader(folder / "sae_weights.safetensors")
    shift = read("b_dec") if config["apply_b_dec_to_input"] else None
    handle = _handle(
        folder,
        read,
        kind,
        hook_point,
        model_name,
        transform=InputTransform(norm, shift, scale or 1.0, centered),
        k=k,
        with_decoder_norm=bool(config.get("rescale_acts_by_decoder_norm")),  # topk(z ||W_dec||)
        shape=(d_model, d_sae),
    )
    return handle if whitening is None else _whitened(handle, *whitening)


def _whitened(handle: SAEHandle, mean: Tensor, whiten: Tensor, unwhiten: Tensor) -> SAEHandle:
    """An SAE of (x - mean) M as one of x: (x - mean) M - b_dec = (x - (mean + b_dec M^-1)) M."""
    shift = handle.transform.shift

    def read_encoder(ids: list[int] | None) -> EncoderColumns:
        columns = handle.read_encoder(ids)
        return replace(columns, weight=whiten @ columns.weight)

    def read_decoder() -> tuple[Tensor, Tensor]:
        w_dec, b_dec = handle.read_decoder()
        return w_dec @ unwhiten, b_dec @ unwhiten + mean

    return replace(
        handle,
        read_encoder=read_encoder,
        read_decoder=read_decoder,
        transform=replace(handle.transform, shift=mean if shift is None else mean + shift @ unwhiten),
    )


def _training_scale(folder: Path) -> float:
    """What SAELens multiplies the input by until it folds it (``ActivationScaler.save``)."""
    file = folder / "activation_scaler.json"
    scale = _json(file).get("scaling_factor") if file.exists() else None
    if scale is None:
        raise SAEError(f"{folder} needs its norm scaling factor, which is not in its files: save it folded.")
    if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise SAEError(f"{file} says the scaling factor is {str(scale)[:40]}: it is damaged.")
    return float(scale)


def _whitening(folder: Path, d_model: int) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, M and M^-1 of SAELens' whitening (x - mean) M (arXiv 2511.13981) until it folds them into the weights.

    Formula: sae_lens/saes/sae.py, ``fold_activation_whitening``.
    """
    file = folder / "activation_whitening.safetensors"
    if not file.exists():
        raise SAEError(
            f"{folder} normalises its input by 'covariance_whitening', and {file.name} is not there: save it folded."
        )
    read, square = SafetensorsReader(file), (d_model, d_model)
    _check_shapes(file, read, {"mean": (d_model,), "matrix": square, "inverse_matrix": square})
    return read("mean"), read("matrix"), read("inverse_matrix")


def _version_6(config: dict[str, Any]) -> dict[str, Any]:
    """``cfg.json`` of any version, flat, with version 6's names (SAELens' ``handle_pre_6_0_config``), without nulls."""
    defaults = {"architecture": "standard", "apply_b_dec_to_input": True, "normalize_activations": "none"}
    config = defaults | _without_nulls(config) | _without_nulls(config.get("metadata") or {})
    config["hook_name"] = config.get("hook_name") or config["hook_point"]
    # Before version 6, topk was an activation of a standard SAE. Without a k, SAELens goes by the architecture alone.
    k = config.get("activation_fn_kwargs", {}).get("k")
    says_topk = "topk" in (config["architecture"], config.get("activation_fn", config.get("activation_fn_str")))
    if says_topk and k is not None and not re.match(r"[6-9]|\d\d", str(config.get("sae_lens_version"))):
        config |= {"architecture": "topk", "k": k}
    normalize = config["normalize_activations"]
    if isinstance(normalize, bool):
        config["normalize_activations"] = "expected_average_only_in" if normalize else "none"
    config["asks_to_center"] = config.get("model_from_pretrained_kwargs", {}).get("center_writing_weights")
    for name in {"architecture", "hook_name", "normalize_activations", "model_name"} & set(config):
        config[name] = str(config[name])
    return config


def _without_nulls(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if value is not None}


def _is_centered(folder: Path, config: Mapping[str, Any], model_name: str | None) -> bool:
    """Whether the SAE was trained on a stream without its mean: TransformerLens' ``center_writing_weights``.

    None of the other options of TransformerLens' ``from_pretrained`` changes ``resid_pre`` or ``resid_post``: they move
    the norms' weights, the values' biases and the unembedding into other matrices.
    """
    if not config["asks_to_center"]:
        return False
    centered = centers(model_name or "")
    if centered is None:
        raise SAEError(
            f"{folder / 'cfg.json'} says center_writing_weights, which TransformerLens does to models with LayerNorm "
            f"and not to those with RMSNorm, and '{model_name}' is not known to be either: write the name of a known "
            "model as model_name, or false."
        )
    return centered


def gemma_scope(file: Path, hook_point: HookPoint | None = None) -> SAEHandle:
    """Gemma Scope: ``params.npz`` with W_enc [d, n], b_enc, threshold, W_dec [n, d], b_dec.

    f = max(z, 0) 1[z > threshold], z = x W_enc + b_enc; b_dec is not subtracted and the input is not scaled
    (Lieberum et al. 2024, arXiv 2408.05147, section 2).
    """
    if hook_point is None:
        _is_residual(file)
        hook_point = _layer_in(file, r"layer_(\d+)")
    return _handle(file, NpzReader(file), "jumprelu", hook_point)


def gemma_scope_2(folder: Path) -> SAEHandle:
    """Gemma Scope 2: ``params.safetensors`` with w_enc [d, n], b_enc, threshold, w_dec [n, d], b_dec; as Gemma Scope.

    Source: SAELens' ``gemma_3_sae_huggingface_loader``; the technical report gives the same JumpReLU.
    """
    config = _json(folder / "config.json") if (folder / "config.json").exists() else {}
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise SAEError(f"{folder} holds a '{config['architecture']}' SAE: jump_relu can be read.")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.output", str(config.get("hf_hook_point_in", "")))
    if "hf_hook_point_in" in config and layer is None:
        raise SAEError(f"{folder} reads {config['hf_hook_point_in']}, not the residual stream after a layer.")
    if layer is None:
        _is_residual(folder)
    hook_point = HookPoint(int(layer[1])) if layer else _layer_in(folder, r"layer_(\d+)")
    names = {"W_enc": "w_enc", "W_dec": "w_dec"}
    read = Renamed(SafetensorsReader(folder / "params.safetensors"), names)
    return _handle(folder, read, "jumprelu", hook_point, config.get("model_name"))


_LINEAR = {
    "W_enc": "encoder.weight",
    "b_enc": "encoder.bias",
    "W_dec": "decoder.weight",
    "b_dec": "decoder.bias",
}
"""The names that two ``torch.nn.Linear`` give; their weights are [out, in], the other way round from ours."""


def llama_scope(folder: Path) -> SAEHandle:
    """Llama Scope: ``hyperparams.json`` and ``checkpoints/final.safetensors``, trained on scaled activations.

    f = max(z, 0) 1[z > T s],  z = n (W_enc (s x) + b_enc),  s = sqrt(d) / (average norm of x)  (He et al. 2024, arXiv
    2410.20526), where n are the norms of the decoder's columns if ``sparsity_include_decoder_norm`` is set, else 1.

    So do the authors: OpenMOSS/Language-Model-SAEs, ``src/lm_saes/initializer.py``, for inference, first divides
    b_enc by s, then multiplies the encoder by n (``transform_to_unit_decoder_norm``), and T was measured on what comes
    of that; ours is s times theirs, which is SAELens' scale. Their later ``src/lm_saes/models/sae.py`` decides by the
    same n (W_enc s x + b_enc) > T s, and divides n out of the value again. SAELens' loader leaves n out altogether,
    which lets other latents through wherever it is not 1; the published ``hyperparams.json`` sets the option.
    """
    config = _json(folder / "hyperparams.json")
    try:
        d_model, d_sae = int(config["d_model"]), int(config["d_sae"])
        scale = math.sqrt(d_model) / float(config["dataset_average_activation_norm"]["in"])
        threshold = float(config["jump_relu_threshold"]) * scale
        hook_point = HookPoint.parse(str(config["hook_point_in"]))
        with_norm = bool(config.get("sparsity_include_decoder_norm", False))
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise SAEError(
            f"{folder / 'hyperparams.json'} is not Llama Scope's ({brief(error)}): fetch it again."
        ) from error
    read = Renamed(SafetensorsReader(folder / "checkpoints" / "final.safetensors"), _LINEAR, ("W_enc", "W_dec"))
    return _handle(
        folder,
        read,
        "jumprelu",
        hook_point,
        "meta-llama/Llama-3.1-8B",
        transform=InputTransform(scale=scale),
        vectors=(),
        threshold=lambda ids: torch.full((d_sae if ids is None else len(ids),), threshold),
        with_decoder_norm=with_norm,
        shape=(d_model, d_sae),
    )


def llama_scope_r1(folder: Path, scale: float | None = None) -> SAEHandle:
    """Llama Scope R1-Distill: ``config.json`` and ``sae_weights.safetensors``; thresholds are stored as logarithms.

    f = max(z, 0) 1[z > exp(log_jumprelu_threshold)],  z = n (W_enc (s x) + b_enc)  (SAELens' loader of that name); n as
    in :func:`llama_scope` (``encode`` in src/lm_saes/sae.py compares n (W_enc (s x) + b_enc) with the threshold).

    Args:
        folder: Where the two files are.
        scale: s, if known better than by ``config.json`` (SAELens' registry holds it).
    """
    config = _json(folder / "config.json")
    try:
        hook_point = HookPoint.parse(str(config["hook_point_in"]))
        with_norm = bool(config.get("sparsity_include_decoder_norm", False))
        if scale is None:
            norm = float(config["dataset_average_activation_norm"]["in"])
            scale = math.sqrt(int(config["d_model"])) / norm
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise SAEError(
            f"{folder / 'config.json'} does not say where it reads, or how its input is scaled ({brief(error)})."
        ) from error
    read = Renamed(SafetensorsReader(folder / "sae_weights.safetensors"), _LINEAR, ("W_enc", "W_dec"))
    return _handle(
        folder,
        read,
        "jumprelu",
        hook_point,
        transform=InputTransform(scale=scale),
        vectors=("log_jumprelu_threshold",),
        threshold=lambda ids: read("log_jumprelu_threshold", ids).exp(),
        with_decoder_norm=with_norm,
    )


def goodfire(file: Path) -> SAEHandle:
    """Goodfire (and Qresearch, who leave out ``_linear``): two linear layers. f = max(W_enc x + b_enc, 0)."""
    stored = TorchReader(file)
    hook_point = _layer_in(file, r"[-_/]l(\d+)(?:\D|$)")
    suffix = "_linear" if "encoder_linear.weight" in stored.names else ""
    names = {ours: theirs.replace(".", f"{suffix}.") for ours, theirs in _LINEAR.items()}
    return _handle(file, Renamed(stored, names, ("W_enc", "W_dec")), "relu", hook_point)


def qwen_scope(file: Path, k: int | None = None) -> SAEHandle:
    """Qwen Scope: ``layer{n}.sae.pt`` with W_enc [n, d], b_enc, W_dec [d, n], b_dec; topk(W_enc x + b_enc), then ReLU.

    k stands in the repository's name alone (``...-L0_50``).
    """
    if k is None:
        found = re.findall(r"L0_(\d+)", str(file))
        if not found:
            raise SAEError(f"{file} does not say its k: keep Qwen Scope's folder name (SAE-Res-...-L0_50).")
        k = int(found[-1])
    read = Renamed(TorchReader(file), {}, ("W_enc", "W_dec"))
    return _handle(file, read, "topk", _layer_in(file, r"layer(\d+)\.sae\.pt"), k=k)


def topk_checkpoint(file: Path) -> SAEHandle:
    """One ``.pt`` with W_enc [d, n], b_enc, W_dec [n, d], b_dec and the number k.

    topk(z), then ReLU; z = (x - b_dec) W_enc + b_enc.

    So ``caiovicentino1/Qwen3.5-4B-SAE-L18-topk`` is stored (``sae_final.pt``), by scripts/train_sae_qwen35.py of
    OpenInterpretability/mechreward, an earlier project of this name. The layer is the ``layer`` of a ``.json`` beside
    it, if there is one, else the ``L18`` of its path.
    """
    read, beside = TorchReader(file), file.with_suffix(".json")
    config = _json(beside) if beside.exists() else {}
    layer = config.get("layer")
    hook_point = HookPoint(layer) if type(layer) is int else _layer_in(file, r"[-_/]L(\d+)(?:\D|$)")
    k, transform = read.number("k"), InputTransform(shift=read("b_dec"))
    return _handle(file, read, "topk", hook_point, config.get("model"), transform=transform, k=k)


def dictionary_learning(folder: Path) -> SAEHandle:
    """dictionary_learning (Marks et al.): ``config.json`` and ``ae.pt``.

    standard: n max(z, 0), n the norms of the decoder's columns; TopK: topk(max(z, 0)); BatchTopK and Matryoshka at
    inference: max(z, 0) 1[z > threshold], one threshold for all; gated: 1[z + gate_bias > 0]
    max(z exp(r_mag) + mag_bias, 0); in all of these z = W_enc (x - b_dec) + b_enc. JumpReLU: max(z, 0)
    1[z > threshold], z = W_enc x + b_enc.

    Source: saprmarks/dictionary_learning, ``dictionary.py`` (``AutoEncoder``, ``GatedAutoEncoder``,
    ``JumpReluAutoEncoder``) and ``trainers/{top_k,batch_top_k,matryoshka_batch_top_k}.py``. Of its classes
    ``AutoEncoder`` alone moves the decoder's norms into the encoder when it loads a file (``from_pretrained``,
    ``normalize_decoder=True``); SAELens does not, so that its activations are 1/n of these. Thresholds are compared
    strictly, as everywhere here.
    """
    try:
        trainer = _json(folder / "config.json")["trainer"]
        class_name, layer = str(trainer["dict_class"]), int(trainer["layer"])
        k = int(trainer["k"]) if class_name == "AutoEncoderTopK" else 0
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SAEError(
            f"{folder / 'config.json'} is not dictionary_learning's ({brief(error)}): fetch it again."
        ) from error
    if "resid" not in str(trainer.get("submodule_name") or "resid"):
        raise SAEError(f"{folder} reads {trainer['submodule_name']}, not the residual stream.")
    if class_name not in _DICTIONARY_CLASSES:
        raise SAEError(f"{folder} holds a '{class_name}': {', '.join(_DICTIONARY_CLASSES)} can be read.")
    kind, subtracts, names = _DICTIONARY_CLASSES[class_name]
    read = Renamed(TorchReader(folder / "ae.pt"), names, ("W_enc", "W_dec") if "W_enc" in names else ())
    width = (*read.shape("W_enc"), 0, 0)[1]

    def shared(ids: list[int] | None) -> Tensor:
        return read("threshold").expand(width if ids is None else len(ids)).clone()

    one_for_all = kind == "jumprelu" and read.shape("threshold") == ()
    return _handle(
        folder,
        read,
        kind,
        HookPoint(layer),
        trainer.get("lm_name"),
        transform=InputTransform(shift=read("b_dec")) if subtracts else RAW_INPUT,
        vectors=() if one_for_all else None,
        threshold=shared if one_for_all else None,
        k=k,
        with_decoder_norm=class_name == "AutoEncoder",
    )


Kind = Literal["relu", "jumprelu", "topk", "groupmax", "gated"]

_DICTIONARY_CLASSES: dict[str, tuple[Kind, bool, dict[str, str]]] = {
    # nonlinearity; whether b_dec is subtracted from the input; names
    "AutoEncoder": ("relu", True, _LINEAR | {"b_dec": "bias"}),
    "AutoEncoderTopK": ("topk", True, _LINEAR | {"b_dec": "b_dec"}),
    "BatchTopKSAE": ("jumprelu", True, _LINEAR | {"b_dec": "b_dec"}),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True, {}),
    "JumpReluAutoEncoder": ("jumprelu", False, {}),
    "GatedAutoEncoder": (
        "gated",
        True,
        _LINEAR | {"b_dec": "decoder_bias", "b_gate": "gate_bias", "b_mag": "mag_bias"},
    ),
}


def sparsify(folder: Path) -> SAEHandle:
    """EleutherAI's sparsify: ``cfg.json`` and ``sae.safetensors`` with encoder.weight [n, d], W_dec [n, d], b_dec.

    topk(max(z, 0)), or the largest of each of k groups (``groupmax``); z = W_enc (x - b_dec) + b_enc  (its
    ``sparse_coder.py`` and ``fused_encoder.py``). SAELens 6.54 reads these files wrongly: it transposes W_dec, and does
    not subtract b_dec.
    """
    config = _json(folder / "cfg.json")
    activation = str(config.get("activation", "topk"))
    if activation not in ("topk", "groupmax") or config.get("signed") or config.get("transcode"):
        raise SAEError(
            f"{folder} is a signed SAE, a transcoder or a '{activation}' SAE: topk and groupmax can be read."
        )
    if not re.search(r"layers[._]\d+$", folder.name):
        raise SAEError(
            f"{folder} does not name a layer's output: sparsify calls the residual stream after one layers.15."
        )
    read = Renamed(
        SafetensorsReader(folder / "sae.safetensors"), _LINEAR | {"W_dec": "W_dec", "b_dec": "b_dec"}, ("W_enc",)
    )
    try:
        k = int(config["k"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SAEError(f"{folder / 'cfg.json'} has no k ({brief(error)}): fetch it again.") from error
    kind: Kind = "topk" if activation == "topk" else "groupmax"
    hook_point = _layer_in(folder, r"layers[._](\d+)$")
    return _handle(folder, read, kind, hook_point, transform=InputTransform(shift=read("b_dec")), k=k)


_BY_FILE: dict[str, Callable[[Path], SAEHandle]] = {
    "params.npz": lambda folder: gemma_scope(folder / "params.npz"),
    "params.safetensors": gemma_scope_2,
    "hyperparams.json": llama_scope,
    "ae.pt": dictionary_learning,
    "sae.safetensors": sparsify,
    "cfg.json": saelens,
    "config.json": llama_scope_r1,
}


# -- what they have in common ------------------------------------------------------------------------------------------

_VECTORS: dict[Kind, tuple[str, ...]] = {"jumprelu": ("threshold",), "gated": ("b_gate", "r_mag", "b_mag")}
"""The nonlinearity's parameters, one number a latent."""


def _handle(
    where: Path,
    read: Reader,
    kind: Kind,
    hook_point: HookPoint,
    model_name: str | None = None,
    *,
    transform: InputTransform = RAW_INPUT,
    vectors: tuple[str, ...] | None = None,
    threshold: Callable[[list[int] | None], Tensor] | None = None,
    k: int = 0,
    with_decoder_norm: bool = False,
    shape: tuple[int, int] | None = None,
) -> SAEHandle:
    """A handle on tensors that the reader calls W_enc [d, n], b_enc, W_dec [n, d] and b_dec; gated SAEs have no b_enc.

    Args:
        where: For errors, and its name.
        read: The tensors.
        kind: The nonlinearity.
        hook_point: Where it reads.
        model_name: The model whose activations it was trained on, as far as the files say.
        transform: What it does to its input.
        vectors: What else the file holds one number a latent of; by default the nonlinearity's parameters.
        threshold: That of chosen latents or all; by default the file's.
        k: For ``topk`` and ``groupmax``.
        with_decoder_norm: Multiply z by the decoder columns' norms.
        shape: (d_model, d_sae) as the configuration says; by default as W_dec does.
    """
    parameters, has_bias = _VECTORS.get(kind, ()), kind != "gated"
    d_sae, d_model = (*read.shape("W_dec"), 0, 0)[:2] if shape is None else shape[::-1]
    if not 0 < transform.scale < math.inf or hook_point.layer < 0:
        raise SAEError(f"{where} says scale {transform.scale} and layer {hook_point.layer}: it is damaged.")
    expected = {"W_enc": (d_model, d_sae), "W_dec": (d_sae, d_model), "b_dec": (d_model,)}
    expected |= {"b_enc": (d_sae,)} if has_bias else {}
    expected |= dict.fromkeys(parameters if vectors is None else vectors, (d_sae,))
    _check_shapes(where, read, expected)
    if kind in ("topk", "groupmax") and not (1 <= k <= d_sae and (kind != "groupmax" or d_sae % k == 0)):
        raise SAEError(f"{where} says k={k} of {d_sae} latents: it is damaged.")

    def read_encoder(ids: list[int] | None) -> EncoderColumns:
        weight = read("W_enc", ids, axis=1)
        bias = read("b_enc", ids) if has_bias else torch.zeros(weight.shape[1])
        if with_decoder_norm:
            norms = read("W_dec", ids).norm(dim=-1)
            weight, bias = weight * norms, bias * norms
        own = {part: read(part, ids) for part in parameters} if threshold is None else {"threshold": threshold(ids)}
        return EncoderColumns(weight, bias, Nonlinearity(kind, own, k))

    def read_decoder() -> tuple[Tensor, Tensor]:
        w_dec = read("W_dec")
        return w_dec / w_dec.norm(dim=-1, keepdim=True) if with_decoder_norm else w_dec, read("b_dec")

    return SAEHandle(
        name=str(where),
        model_name=model_name,
        hook_point=hook_point,
        d_model=d_model,
        d_sae=d_sae,
        kind=kind,
        read_encoder=read_encoder,
        read_decoder=read_decoder,
        transform=transform,
    )


def _layer_in(path: Path, pattern: str) -> HookPoint:
    """The residual stream after the layer that a path names."""
    found = re.findall(pattern, str(path))
    if not found:
        raise SAEError(f"{path} does not say its layer: keep the publisher's names of folders and files.")
    return HookPoint(int(found[-1]))  # the nearest to the file: folders further up may name others


def _is_residual(path: Path) -> None:
    """Gemma Scope's other dictionaries have the same files; their folders say what they read."""
    if other := re.search(r"pt-(mlp|att|transcoders)\b|(mlp_out|attn_out|transcoder|clt)(_all)?/[^/]*$", str(path)):
        raise SAEError(f"{path} is of {other[0]}, not the residual stream.")


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise SAEError(f"{file} is not a readable configuration ({brief(error)}): fetch it again.") from error
    if not isinstance(content, dict):
        raise SAEError(f"{file} holds a {type(content).__name__}, not a configuration: fetch it again.")
    return content


def _check_shapes(where: Path, read: Reader, expected: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        if (found := tuple(read.shape(name))) != shape:
            raise SAEError(f"{name} in {where} has shape {found}, not {shape}: the file is damaged.")
