"""Linear probes: a direction and a bias, trained to tell a property of a token's residual vector."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechreward.errors import PackError, nearest
from mechreward.features.catalog import CATALOGS
from mechreward.readout import HookPoint, Nonlinearity, Readout

SCHEMA_VERSION = 1


def linear_probe(
    name: str, weight: Tensor, bias: float, hook_point: HookPoint, model_name: str | None = None, logits: bool = False
) -> Readout:
    """A logistic probe as a readout: sigmoid(x . w + b) on each token, or the logit itself.

    Args:
        name: What it is called in logs.
        weight: ``[d_model]``.
        bias: The intercept.
        hook_point: Where it reads.
        model_name: The model that it was trained on.
        logits: Return x . w + b.
    """
    link = Nonlinearity("identity" if logits else "sigmoid", {})
    column = weight.float().reshape(-1, 1)
    return Readout(name, (name,), hook_point, column, torch.tensor([float(bias)]), link, model_name=model_name)


def save_probe(probe: Readout, path: Path, card: dict) -> None:
    """Write ``<path>.safetensors`` (weight, bias) and ``<path>.json`` (where it reads, and its evidence)."""
    card_file, weights_file = _files(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"weight": probe.weight[:, 0].contiguous(), "bias": probe.bias}, weights_file)
    described = {
        "schema_version": SCHEMA_VERSION,
        "name": probe.name,
        "hook_point": str(probe.hook_point),
        "model": probe.model_name,
        **card,
    }
    card_file.write_text(json.dumps(described, indent=2) + "\n")


def _files(path: Path) -> tuple[Path, Path]:
    """Card and weights; a dot in a probe's name (``v1.2``) is part of it."""
    stem = path.name.removesuffix(".json").removesuffix(".safetensors")
    return path.with_name(f"{stem}.json"), path.with_name(f"{stem}.safetensors")


def shipped_probes() -> list[str]:
    """Names of the probes in the catalogs, e.g. ``pocket/correctness_probe``."""
    return sorted(f"{file.parent.name}/{file.stem}" for file in CATALOGS.glob("*/*_probe.json"))


def load_probe(name: str, logits: bool = False) -> Readout:
    """A probe from the shipped catalogs, or from a path.

    Args:
        name: ``"pocket/fact_retrieval_probe"``, or a path to ``.json`` beside ``.safetensors``, with or without suffix.
        logits: Return logits instead of probabilities.

    Raises:
        PackError: There is none, or its files are damaged.
    """
    path = CATALOGS / name if name in shipped_probes() else Path(name)
    card_file, weights_file = _files(path)
    if not card_file.exists() or not weights_file.exists():
        raise PackError(
            f"There is no probe '{name}': no catalog has it, and there are no files {card_file.name} and "
            f"{weights_file.name} at that path.{nearest(name, shipped_probes())}"
        )
    try:
        card = json.loads(card_file.read_text())
        if card["schema_version"] != SCHEMA_VERSION:
            raise PackError(f"{card_file} has schema_version {card['schema_version']}: this version reads 1.")
        tensors = load_file(weights_file)
        if tensors["weight"].ndim != 1 or tensors["bias"].shape != (1,):
            raise ValueError("weight should be [d_model] and bias [1]")
        hook_point = HookPoint.parse(card["hook_point"])
        return linear_probe(
            card["name"], tensors["weight"], float(tensors["bias"][0]), hook_point, card.get("model"), logits
        )
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PackError(f"Probe '{name}' is damaged ({type(error).__name__}: {error}): fetch it again.") from error
