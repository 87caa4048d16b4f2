"""Linear probes: directions and biases, trained to tell a property of a rollout from its residual vectors.

A probe gives each token a logit; its *pooling* makes one logit of a rollout's, and its *calibration* a probability of
that. The order matters: a mean of the tokens' probabilities is another number, which tells rollouts apart less well.

- ``mean``, ``last``, ``mean_last_{n}_tokens``: linear, so a logistic regression on the residual vector averaged alike;
- ``max``: max_t (w . x_t + b);
- ``attention``: sum_t a_t (v . x_t + b), a = softmax over tokens of q . x_t. Its readout has two columns, score and
  value.

These are the monitors that RL-Obfuscation (arXiv 2506.14261) trains policies against: those of mean pooling were
evaded, those of max and attention pooling much less.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.special import expit
from torch import Tensor

from mechreward.errors import PackError, SAEError, nearest
from mechreward.features.catalog import CATALOGS, load_pack, shipped_packs
from mechreward.features.pack import Count, Share, Text
from mechreward.readout import HookPoint, LogitReadout
from mechreward.schema import Strict, most_telling, sentence
from mechreward.stats import Interval

SCHEMA_VERSION = 1


class Bin(Strict):
    """Rollouts of like probability: how many, what was predicted on average, and how many showed the behaviour."""

    n: Count
    predicted: Share
    observed: Share


class ProbeCalibration(Strict):
    """From a rollout's logit to the probability of the behaviour: sigmoid(slope x logit + intercept) (Platt 1999).

    It holds for rollouts like the held-out ones, with their share of the behaviour.

    Attributes:
        slope, intercept: Fitted to all held-out rollouts, which did not choose the weights.
        brier: Mean squared error of the probability, cross-fitted: each held-out rollout is judged by a calibration
            that was fitted to other held-out questions.
        brier_of_the_share: The same for always predicting the share of the behaviour.
        ece: Expected calibration error, mean over ``bins`` of \\|predicted - observed\\| weighted by n, cross-fitted.
        brier_uncalibrated, ece_uncalibrated: The same for sigmoid(logit).
        bins: Equally many rollouts each, cross-fitted.
    """

    slope: float
    intercept: float
    brier: Interval
    brier_of_the_share: Share
    ece: Share
    brier_uncalibrated: Share
    ece_uncalibrated: Share
    bins: list[Bin]

    def probability(self, logits: ArrayLike) -> NDArray[np.float64]:
        """Logits of rollouts, any shape, to probabilities in [0, 1], float64; NaN stays NaN."""
        return expit(self.slope * np.asarray(logits, dtype=np.float64) + self.intercept)


class ProbeEvidence(Strict):
    """What was measured on rollouts that training never saw.

    Attributes:
        n: How many.
        n_positive: Those among them that show the behaviour.
        questions: How many questions they answer: intervals resample whole questions.
        auc: Probability that a rollout with the behaviour has a higher logit than one without.
        data: One sentence: where they come from.
    """

    n: Count
    n_positive: Count | None = None
    questions: Count | None = None
    auc: Interval
    data: Text


class LayerFigures(Strict):
    """A probe at one layer.

    Attributes:
        layer: Where it reads, ``resid_post``.
        strength: C of scikit-learn's logistic regression (1 / C is the weight of the L2 penalty), which served best in
            cross-validation.
        cross_validated: AUC on the training rollouts, each judged by a probe that saw no rollout of its question. It
            chose strength and layer, and is a little too high for the chosen ones.
        held_out: AUC on the held-out rollouts, which chose nothing.
    """

    layer: Count
    strength: Annotated[float, Field(gt=0)]
    cross_validated: Interval
    held_out: Interval


class ProbeTraining(Strict):
    """How a probe was trained.

    Attributes:
        n, n_positive, questions: The training rollouts.
        strength: C of the L2 penalty, chosen by cross-validation.
        folds: Of the cross-validation, whole questions each.
        cross_validated: AUC on the training rollouts, out of fold.
        pooling_of_sweep: What the layers were compared with.
        layers: The sweep; the one with the highest cross-validated AUC was chosen.
        left_out: Training rollouts that max or attention pooling left out, for memory.
    """

    n: Count
    n_positive: Count
    questions: Count
    strength: Annotated[float, Field(gt=0)]
    folds: Count
    cross_validated: Interval
    pooling_of_sweep: Text
    layers: list[LayerFigures]
    left_out: Count = 0


class ProbeCard(Strict):
    """A probe's JSON file.

    Attributes:
        schema_version: Version of this schema.
        name: What it is called in logs.
        hook_point: Where it reads, e.g. ``blocks.2.hook_resid_post``.
        model: The model that it was trained on.
        description: What a high logit means.
        aggregation: How its tokens make a rollout's logit: the default of :class:`FeatureReward`.
        trained_on: Where the training rollouts come from.
        training: How it was trained.
        evidence: What was measured on held-out rollouts.
        calibration: From a rollout's logit to a probability.
        licence: Licence of the probe.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    name: Text
    hook_point: str
    model: str | None = None
    description: str = ""
    aggregation: Text = "mean"
    trained_on: str = ""
    training: ProbeTraining | None = None
    evidence: ProbeEvidence | None = None
    calibration: ProbeCalibration | None = None
    licence: str | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Probe(LogitReadout):
    """A linear probe as a readout: a logit on each token; for attention pooling, score and value.

    ``FeatureReward(probe)`` pools as the probe was trained, and makes a probability of the rollout's logit where the
    card has a calibration.

    Attributes:
        card: Where it reads, and its evidence.
    """

    card: ProbeCard

    @property
    def probability(self) -> Callable[[ArrayLike], NDArray[np.float64]] | None:
        """The card's calibration, or None."""
        return None if self.card.calibration is None else self.card.calibration.probability

    def calibrated(self, logits: ArrayLike) -> NDArray[np.float64]:
        """The probability that a rollout shows the behaviour.

        Args:
            logits: Of rollouts, any shape, as ``FeatureReward(probe, scale="logit")`` gives them.

        Returns:
            In [0, 1], the same shape, float64; NaN stays NaN.

        Raises:
            PackError: It was never calibrated.
        """
        if self.card.calibration is None:
            raise PackError(f"Probe '{self.name}' has no calibration: train it with 'mechreward probe train'.")
        return self.card.calibration.probability(logits)


def linear_probe(
    name: str,
    weight: Tensor,
    bias: float,
    hook_point: HookPoint,
    model_name: str | None = None,
    logits: bool | None = None,
) -> Probe:
    """A logistic probe as a readout: the logit x . w + b on each token, pooled by its mean.

    Args:
        name: What it is called in logs.
        weight: ``[d_model]``.
        bias: The intercept.
        hook_point: Where it reads.
        model_name: The model that it was trained on.
        logits: As for :func:`load_probe`.

    Raises:
        PackError: ``logits=False``.
    """
    _check_logits(logits)
    card = ProbeCard(name=name, hook_point=str(hook_point), model=model_name)
    return as_probe(card, weight.reshape(-1, 1), torch.tensor([float(bias)]))


def as_probe(card: ProbeCard, weight: Tensor, bias: Tensor) -> Probe:
    """A card and its weights as a readout.

    Args:
        card: Says where it reads and how it pools.
        weight: ``[d_model, 1]``, or for attention pooling ``[d_model, 2]``, score and value.
        bias: ``[1]`` or ``[2]``.
    """
    return Probe(
        name=card.name,
        labels=("score", "value") if card.aggregation == "attention" else (card.name,),
        hook_point=HookPoint.parse(card.hook_point),
        weight=weight.float(),
        bias=bias.float(),
        model_name=card.model,
        aggregation=card.aggregation,
        card=card,
    )


def save_probe(probe: Probe, path: Path, card: Mapping[str, Any] | None = None) -> None:
    """Write ``<path>.safetensors`` (weight, bias) and ``<path>.json`` (where it reads, and its evidence).

    Args:
        probe: What to save.
        path: With or without a suffix.
        card: Keys of :class:`ProbeCard` to add to the probe's own card.

    Raises:
        PackError: The card is not one, or the files cannot be written.
    """
    card_file, weights_file = files_of(path)
    try:
        described = ProbeCard.model_validate({**probe.card.model_dump(), **(card or {})})
    except ValidationError as error:
        raise PackError(f"{card_file}: {sentence(most_telling(error), ProbeCard, 'card')}") from None
    weight = probe.weight if described.aggregation == "attention" else probe.weight[:, 0]
    text = json.dumps(described.model_dump(mode="json", exclude_none=True), indent=2, ensure_ascii=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"weight": weight.contiguous(), "bias": probe.bias.contiguous()}, weights_file)
        card_file.write_text(text + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise PackError(f"{card_file} cannot be written ({error}): choose another place.") from error


def files_of(path: Path) -> tuple[Path, Path]:
    """Card and weights; a dot in a probe's name (``v1.2``) is part of it."""
    stem = path.name.removesuffix(".json").removesuffix(".safetensors")
    return path.with_name(f"{stem}.json"), path.with_name(f"{stem}.safetensors")


def shipped_probes() -> list[str]:
    """Names of the probes in the catalogs, e.g. ``pocket/correctness_probe``."""
    return sorted(f"{file.parent.name}/{file.stem}" for file in CATALOGS.glob("*/*_probe.json"))


def load_probe(name: str, logits: bool | None = None) -> Probe:
    """A probe from the shipped catalogs, from a path, or from the hub: a logit on each token.

    Args:
        name: ``"pocket/fact_retrieval_probe"``; a path to ``.json`` beside ``.safetensors``, with or without suffix; or
            ``"hf:user/repository/name"``.
        logits: Leave it out. It once chose between logits and probabilities of the tokens, whose mean is not what a
            probe was trained to be.

    Raises:
        PackError: There is none (the error says how to train one), its files are damaged, or ``logits=False``.
    """
    _check_logits(logits)
    card_file, weights_file = _fetched(name) if name.startswith("hf:") else _found(name)
    damaged = f"Probe '{name}' is damaged"
    try:
        raw = json.loads(card_file.read_text(encoding="utf-8-sig"))
        version = raw["schema_version"]
        if type(version) is not int or version != SCHEMA_VERSION:
            raise PackError(f"{card_file} has schema_version {version}: this version reads {SCHEMA_VERSION}.")
        card = ProbeCard.model_validate(raw)
        tensors = load_file(weights_file)
        weight, bias = tensors["weight"], tensors["bias"]
        if card.aggregation == "attention":
            if weight.ndim != 2 or weight.shape[1] != 2 or bias.shape != (2,):
                raise ValueError("weight should be [d_model, 2] and bias [2]")
        elif weight.ndim != 1 or bias.shape != (1,):
            raise ValueError("weight should be [d_model] and bias [1]")
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise ValueError("a weight is NaN or infinite")
    except ValidationError as error:
        raise PackError(f"{damaged}: {sentence(most_telling(error), ProbeCard, 'card')}") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise PackError(f"{damaged} ({type(error).__name__}: {said}): fetch it again.") from error
    return as_probe(card, weight.reshape(len(weight), -1), bias)


def _check_logits(logits: bool | None) -> None:
    """Accept what older code passes, as long as it means what is done."""
    if logits:
        warnings.warn("A probe gives logits by default: leave logits=True out.", DeprecationWarning, stacklevel=3)
    elif logits is not None:
        raise PackError(
            "A probe gives logits, and its tokens' probabilities are no longer to be had (logits=False): for the "
            'probability of a rollout, use FeatureReward(probe, scale="probability").'
        )


def _found(name: str) -> tuple[Path, Path]:
    """Files in the catalogs, or at a path."""
    path = CATALOGS / name if name in shipped_probes() else Path(name)
    files = files_of(path) if path.name else (path, path)
    if not all(file.is_file() for file in files):
        raise PackError(
            f"There is no probe '{name}': no catalog has it, and there are no files {files[0].name} and "
            f"{files[1].name} at that path.{nearest(name, shipped_probes())} {_how_to_train(name)}"
        )
    return files


def _fetched(name: str) -> tuple[Path, Path]:
    """Files of a hub repository."""
    from mechreward.sae.registry import download

    parts = name.removeprefix("hf:").split("/")
    if len(parts) < 3 or not all(parts):
        raise PackError(f"'{name}' is no probe on the hub: write hf:user/repository/name.")
    repo, files = "/".join(parts[:2]), files_of(Path(*parts[2:]))
    try:
        card, weights = (download(repo, file.as_posix()) for file in files)
    except SAEError as error:
        kind = type(error.__cause__ or error).__name__
        raise PackError(
            f"Probe '{name}' could not be fetched ({kind}): check the name and the connection to the hub, or copy "
            f"{files[0].name} and {files[1].name} here and give their path. {_how_to_train(parts[-1])}"
        ) from error
    return card, weights


def _how_to_train(name: str) -> str:
    """For a probe that nobody has: how to make one. In a folder of the catalogs, the model is known."""
    folder, stem = name.rpartition("/")[0], files_of(Path(name or "probe"))[0].stem
    model = next((load_pack(pack).model for pack in shipped_packs() if pack.rpartition("/")[0] == folder), "MODEL")
    return (
        "Train it on labelled rollouts: "
        f"mechreward probe train --model {model} --data rollouts.jsonl --out probes/{stem}"
    )
