"""Training linear probes on labelled rollouts, and saying honestly what they can do.

The residual vectors of all layers are read in one forward pass. A probe is fitted at each layer, the layer and the
strength of the penalty are chosen by cross-validation over questions among the training rollouts, and held-out rollouts
say what came out: they choose nothing.

Max and attention pooling are trained at the layer that mean pooling chose, since they need every token's residual
vector, and those of one layer are all that is kept.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor

from mechreward import progress
from mechreward.aggregation import aggregation, attention_over
from mechreward.errors import CaptureError, ConfigError, DataError, nearest
from mechreward.extras import require
from mechreward.probes.linear_probe import (
    Bin,
    LayerFigures,
    Probe,
    ProbeCalibration,
    ProbeCard,
    ProbeEvidence,
    ProbeTraining,
    as_probe,
)
from mechreward.readout import HookPoint, ReadoutBank, residual
from mechreward.reward.feature_reward import FeatureReward
from mechreward.rollout.capture import decoder_layers, text_config
from mechreward.rollout.labelled import Labelled
from mechreward.rollout.source import over_tokens, pooled, read_forward, read_in_pieces
from mechreward.stats import Interval, auc, bootstrap

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]
Splits = list[tuple[NDArray[np.int64], NDArray[np.int64]]]

LINEAR = ("mean", "last")  # and mean_last_{n}_tokens: pooling the residual vectors pools the logits
OVER_TOKENS = ("max", "attention")

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Values of C that are tried, on standardised residuals: the objective is |w|^2 / 2 + C x the summed log loss."""

FOLDS = 5

LEAST = 10
"""Rollouts of either kind without which nothing can be trained or judged."""

BINS = 10

MAX_NUMBERS = 1 << 30
"""Residual numbers kept for max and attention pooling: 4 GiB in float32."""

CHUNK_TOKENS = 8192
"""Tokens whose residual vectors are in float64 at once."""


@dataclass(frozen=True)
class Trained:
    """What training gives.

    Attributes:
        probe: With its card.
        held_out: The rollouts that judged it, m of them.
        logits: Their logits, ``[m]`` float64, as ``FeatureReward(probe, scale="logit")`` scores them.
    """

    probe: Probe
    held_out: Labelled
    logits: Floats


def train_probe(
    model: Any,
    data: Labelled,
    layers: Sequence[int],
    pooling: str = "mean",
    held_out: Labelled | None = None,
    name: str = "probe",
    model_name: str | None = None,
    description: str = "",
    licence: str | None = None,
) -> Trained:
    """Train a probe, choose its layer and penalty, calibrate it, and measure it on held-out rollouts.

    Args:
        model: Any HF causal language model, whose activations are read.
        data: To train on; without ``held_out``, on half of its questions.
        layers: Those whose output is tried.
        pooling: ``mean``, ``last``, ``max``, ``attention`` or ``mean_last_{n}_tokens``; see
            :mod:`mechreward.probes.linear_probe`.
        held_out: Rollouts of other questions; by default the other half of ``data``.
        name: What the probe is called.
        model_name: What the model is called.
        description: What a high logit means.
        licence: Licence of the probe.

    Raises:
        ConfigError: An unknown pooling, or a layer that the model does not have.
        DataError: Too few rollouts or questions, held-out questions that were trained on, or tokens that the model
            does not have.
        CaptureError: The model's activations are not finite.
        PackError: The held-out rollouts are too few for an interval.
    """
    linear = _is_linear(pooling)
    _check_layers(layers, model)
    train, test = data.halves() if held_out is None else (data, held_out)
    for part, use in ((train, "train on"), (test, "judge by")):
        _check_enough(part, use)
        _check_tokens(part, model)
    if held_out is not None:
        _check_apart(train, test)

    swept, left_out = pooling if linear else "mean", 0
    figures, fits = _sweep(model, train, test, layers, swept)
    best = int(np.argmax([each.cross_validated.value for each in figures]))
    chosen = figures[best]
    point, strength, cross_validated = HookPoint(chosen.layer), chosen.strength, chosen.cross_validated
    weight, bias = (np.asarray(part)[..., None] for part in fits[best])
    if not linear:
        kept = _within_memory(train, text_config(model).hidden_size)
        left_out = len(train) - len(kept)
        _check_enough(kept, "train on")
        strength, cross_validated, (weight, bias) = _fit_over_tokens(model, kept, point, pooling, strength)

    card = ProbeCard(
        name=name,
        hook_point=str(point),
        model=model_name,
        description=description,
        aggregation=pooling,
        trained_on=_described(train, data, held_out),
        training=ProbeTraining(
            **_counts(train),
            strength=strength,
            folds=FOLDS,
            cross_validated=cross_validated,
            pooling_of_sweep=swept,
            layers=figures,
            left_out=left_out,
        ),
        licence=licence,
    )
    probe = as_probe(card, torch.tensor(weight), torch.tensor(bias))
    logits = rollout_logits(model, test, probe)
    card = card.model_copy(
        update={
            "evidence": ProbeEvidence(
                **_counts(test),
                auc=bootstrap(auc, logits, test.labels, groups=test.groups),
                data=f"{_described(test, data, held_out)}, which training never saw",
            ),
            "calibration": calibrate(logits, test.labels, test.groups),
        }
    )
    return Trained(replace(probe, card=card), test, logits)


def _fit_over_tokens(
    model: Any, data: Labelled, point: HookPoint, pooling: str, near: float
) -> tuple[float, Interval, tuple[Floats, Floats]]:
    """Max or attention pooling at one layer: the strength that was chosen, its AUC, and weight and bias."""
    with progress.stage("Reading one layer's tokens", len(data)):
        tokens = _read_tokens(model, data, point)
    splits, strengths = _splits(data), [near / 10, near, near * 10]  # near mean pooling's: these fits take longer
    with progress.stage(f"Fitting {pooling} pooling", len(strengths) * len(splits)):
        strength, out_of_fold = _choose(
            lambda c, inside: _pooled_logits(tokens, _fit_tokens(tokens, data.labels, inside, pooling, c), pooling),
            data.labels,
            splits,
            strengths,
        )
    cross_validated = bootstrap(auc, out_of_fold, data.labels, groups=data.groups)
    return strength, cross_validated, _fit_tokens(tokens, data.labels, np.arange(len(data)), pooling, strength)


def rollout_logits(model: Any, data: Labelled, probe: Probe) -> Floats:
    """A logit for each rollout, ``[n]`` float64: what a :class:`FeatureReward` of the probe pools."""
    reward = FeatureReward(probe, scale="logit")
    readings = read_forward(model, data.batch, ReadoutBank([probe]))
    return reward.score(data.batch, {reward.request: readings[probe]}).values.double().numpy()


def parse_layers(text: str, model: Any) -> list[int]:
    """``"all"``, ``"2"`` or ``"1,2,3"``.

    Raises:
        ConfigError: It is none of these, or the model has no such layer.
    """
    if text == "all":
        return list(range(len(decoder_layers(model))))
    try:
        layers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ConfigError(f"layers is '{text}': write all, one number, or numbers with commas between.") from None
    _check_layers(layers, model)
    return layers


def check_writable(file: Path) -> None:
    """Find out before the work, not after it, that a file cannot be written.

    Raises:
        ConfigError: It cannot.
    """
    try:
        if file.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({error.strerror}): choose another place.") from None


# Checks --------------------------------------------------------------------------------------------------------------


def _is_linear(pooling: str) -> bool:
    """Whether pooling residual vectors pools the logits alike."""
    if pooling in OVER_TOKENS:
        return False
    if pooling in LINEAR or (pooling.startswith("mean_last_") and aggregation(pooling)):
        return True
    known = (*LINEAR, *OVER_TOKENS)
    raise ConfigError(
        f"There is no pooling '{pooling}': use {', '.join(known)} or mean_last_{{n}}_tokens.{nearest(pooling, known)}"
    )


def _check_layers(layers: Sequence[int], model: Any) -> None:
    count = len(decoder_layers(model))
    if not layers or min(layers) < 0 or max(layers) >= count:
        asked = ", ".join(map(str, layers)) or "none"
        raise ConfigError(f"layers is {asked}, but the model has layers 0 to {count - 1}: choose among them.")


def _check_enough(data: Labelled, use: str) -> None:
    positive, questions = int(data.labels.sum()), len(np.unique(data.groups))
    if min(positive, len(data) - positive) < LEAST or questions < FOLDS:
        raise DataError(
            f"{positive} of the {len(data)} rollouts to {use} ({questions} questions) show the behaviour: a probe "
            f"needs {LEAST} that do and {LEAST} that do not, of {FOLDS} questions or more, both to train on and to be "
            "judged by; sample more questions."
        )


def _check_tokens(data: Labelled, model: Any) -> None:
    known, batch = model.get_input_embeddings().weight.shape[0], data.batch
    highest = max(max(ids, default=0) for ids in (*batch.prompt_ids, *batch.completion_ids))
    if highest >= known:
        raise DataError(
            f"The rollouts hold token {highest}, but the model knows tokens 0 to {known - 1}: they were sampled from "
            "another model; sample from this one, or leave completion_ids out."
        )


def _check_apart(train: Labelled, test: Labelled) -> None:
    """A probe must not be judged by questions that it was trained on."""
    asked = set(_questions(train))
    shared = sum(question in asked for question in _questions(test))
    if shared:
        raise DataError(
            f"{shared} of the {len(test)} held-out rollouts answer a prompt that was trained on: hold out other "
            "questions, or leave them out and half of the questions will be held out."
        )


def _questions(data: Labelled) -> list[str]:
    """Prompts; a text without a prompt stands for itself."""
    return [
        json.dumps(prompt or [completion])
        for prompt, completion in zip(data.batch.prompts, data.batch.completions, strict=True)
    ]


def _counts(data: Labelled) -> dict[str, int]:
    return {
        "n": len(data),
        "n_positive": int(data.labels.sum()),
        "questions": len(np.unique(data.groups)),
    }


def _described(part: Labelled, data: Labelled, held_out: Labelled | None) -> str:
    if held_out is not None:
        return part.source
    return f"{len(part)} rollouts, of half of the questions of {data.source}"


# Choosing ------------------------------------------------------------------------------------------------------------


def _splits(data: Labelled) -> Splits:
    """Rollouts to train on and to test on, whole questions at a time, the labels spread evenly."""
    from sklearn.model_selection import StratifiedGroupKFold

    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    splits = list(folds.split(data.labels, data.labels, data.groups))
    if any(data.labels[inside].all() or not data.labels[inside].any() for inside, _ in splits):
        raise DataError(
            f"One question holds all rollouts of {data.source} with (or without) the behaviour, so it cannot be "
            "learnt from the others: sample more questions."
        )
    return splits


def _choose(
    predict: Callable[[float, NDArray[np.int64]], Floats],
    labels: NDArray[np.bool_],
    splits: Splits,
    strengths: Sequence[float],
) -> tuple[float, Floats]:
    """The strength that predicts other questions best (AUC; of equals the strongest penalty), and its predictions.

    Args:
        predict: (strength, rows to train on) -> logits of all rollouts [n].
        labels: [n].
        splits: Of the rows.
        strengths: Those that are tried, the strongest penalty first.
    """
    tried = []
    for strength in strengths:
        logits = np.empty(len(labels))
        for inside, outside in splits:
            logits[outside] = predict(strength, inside)[outside]
            progress.advance()
        tried.append((strength, logits))
    return max(tried, key=lambda each: auc(each[1], labels))  # the first of equals


def _sweep(
    model: Any, train: Labelled, test: Labelled, layers: Sequence[int], how: str
) -> tuple[list[LayerFigures], list[tuple[Floats, float]]]:
    """For each layer, figures of the best probe on pooled residual vectors, and its weight [d] and bias."""
    width, splits = text_config(model).hidden_size, _splits(train)
    readouts = [residual(HookPoint(layer), width) for layer in layers]
    vectors = []  # [n, L, d] of the training rollouts, and of the held-out ones
    for part, use in ((train, "training"), (test, "held-out")):
        with progress.stage(f"Reading {use} rollouts", len(part)):
            read = torch.cat(list(pooled(model, part.batch, readouts, how)))
        vectors.append(read.view(len(part), len(layers), width).numpy())

    figures, fits = [], []
    for place, layer in enumerate(progress.track(layers, "Layers", len(layers))):
        x, x_held_out = (each[:, place].astype(np.float64) for each in vectors)
        _check_finite(bool(np.isfinite(x).all() and np.isfinite(x_held_out).all()), layer)

        def predict(strength: float, inside: NDArray[np.int64], x: Floats = x) -> Floats:
            weight, bias = _fit_linear(x[inside], train.labels[inside], strength)
            return x @ weight + bias

        strength, out_of_fold = _choose(predict, train.labels, splits, STRENGTHS)
        weight, bias = _fit_linear(x, train.labels, strength)
        fits.append((weight, bias))
        figures.append(
            LayerFigures(
                layer=layer,
                strength=strength,
                cross_validated=bootstrap(auc, out_of_fold, train.labels, groups=train.groups),
                held_out=bootstrap(auc, x_held_out @ weight + bias, test.labels, groups=test.groups),
            )
        )
    return figures, fits


def _check_finite(finite: bool, layer: int) -> None:
    if not finite:
        raise CaptureError(f"The model's activations at layer {layer} are NaN or infinite: load it in float32.")


# Fitting -------------------------------------------------------------------------------------------------------------


def _fit_linear(x: Floats, labels: NDArray[np.bool_], strength: float) -> tuple[Floats, float]:
    """Logistic regression on pooled residual vectors [n, d], standardised; the scaling is folded into the result."""
    from sklearn.linear_model import LogisticRegression

    mean, scale = x.mean(axis=0), _usable(x.std(axis=0), x.mean(axis=0))
    fitted = LogisticRegression(C=strength, max_iter=1000).fit((x - mean) / scale, labels)
    weight = fitted.coef_[0] / scale
    return weight, float(fitted.intercept_[0] - weight @ mean)


def _usable(scale: Floats, mean: Floats) -> Floats:
    """What to divide by: 1 where a number does not vary beyond rounding, whose noise would be blown up."""
    return np.where(scale > 1e-6 * np.abs(mean), scale, 1.0)


class _Tokens(NamedTuple):
    """Residual vectors of n rollouts' tokens, N in all.

    Attributes:
        x: ``[N, d]`` float32, or float64 where there are few.
        mask: ``[n, T]`` bool; its True entries, in row-major order, are the N tokens.
        mean, last: A rollout's mean vector, and its last, ``[n, d]``.
    """

    x: Tensor
    mask: Tensor
    mean: Floats
    last: Floats


def _read_tokens(model: Any, data: Labelled, point: HookPoint) -> _Tokens:
    """The residual vectors at one layer, on the model's device where that has float64."""
    vectors, counts, means, lasts = [], [], [], []
    stream = residual(point, text_config(model).hidden_size)
    for _, (readings,) in read_in_pieces(model, data.batch, [stream]):
        vectors.append(readings.values[readings.mask])
        counts.append(readings.mask.sum(dim=1))
        means.append(over_tokens(readings, aggregation("mean")))
        lasts.append(over_tokens(readings, aggregation("last")))
    x, lengths = torch.cat(vectors), torch.cat(counts)
    if x.device.type == "mps":  # which has no float64
        x, lengths = x.cpu(), lengths.cpu()
    _check_finite(bool(x.isfinite().all()), point.layer)
    if x.numel() <= MAX_NUMBERS >> 4:
        x = x.double()  # once, and not at each step
    mask = torch.arange(int(lengths.max()), device=x.device) < lengths[:, None]
    return _Tokens(x, mask, *(torch.cat(each).double().numpy() for each in (means, lasts)))


def _within_memory(data: Labelled, width: int) -> Labelled:
    """As many whole questions as can be kept: dropping tokens instead would change what a maximum is."""
    tokens = data.batch.mask().sum(dim=1).numpy() * width
    if tokens.sum() <= MAX_NUMBERS:
        return data
    questions, question = np.unique(data.groups, return_inverse=True)
    order = np.random.default_rng(0).permutation(len(questions))
    total = np.cumsum(np.bincount(question, weights=tokens)[order])
    kept = data.take(np.flatnonzero(np.isin(question, order[total <= MAX_NUMBERS])))
    logger.warning(
        "The residual vectors of %s training rollouts do not fit into %.0f GiB: max and attention pooling use %s of "
        "them. Mean and last pooling use all.",
        len(data),
        MAX_NUMBERS * 4 / 2**30,
        len(kept),
    )
    return kept


def _fit_tokens(
    tokens: _Tokens, labels: NDArray[np.bool_], inside: NDArray[np.int64], pooling: str, strength: float
) -> tuple[Floats, Floats]:
    """Max or attention pooling, by L-BFGS on all tokens at once, in float64.

    Minimises |W|^2 / (2 C n) + mean log loss of the rollouts ``inside``, on standardised residuals z, where a rollout's
    logit is  max_t (z_t . w) + b,  or  sum_t softmax_t(z_t . q / sqrt(d)) (z_t . v) + b.  Attention begins at zero,
    as mean pooling. For max, the start decides: it begins at three times the probes of mean and of last pooling, large
    enough for single tokens to stand out, and the better end is taken. (On `pocket` with C = 1, a start at zero ended
    at twice their loss.)

    Returns:
        weight ``[d, k]`` and bias ``[k]`` for raw residual vectors, k = 1 (max) or 2 (attention: score, value).
    """
    x, d = tokens.x, tokens.x.shape[1]
    rows = torch.tensor(inside, device=x.device)
    counted = torch.zeros(len(tokens.mask), dtype=torch.bool, device=x.device)
    counted[rows] = True
    mean, scale = _moments(x, counted[:, None].expand_as(tokens.mask)[tokens.mask])
    units = np.array([1.0]) if pooling == "max" else np.array([d**-0.5, 1.0])
    factor = units / scale[:, None]  # [d, k]: from standardised to raw
    truth = torch.tensor(labels, device=x.device, dtype=torch.float64)[rows]

    def raw(theta: Floats) -> tuple[Floats, Floats]:
        weight = theta[:-1].reshape(d, -1) * factor
        bias = -mean @ weight
        bias[-1] += theta[-1]
        return weight, bias

    def objective(theta: Floats) -> tuple[float, Floats]:
        weight, bias = raw(theta)
        u = _product(x, weight, bias).requires_grad_()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(_pool(u, tokens.mask, pooling)[rows], truth)
        (g,) = torch.autograd.grad(loss, u)
        total = g.sum(dim=0).cpu().numpy()
        slope = (_transposed_product(x, g) - np.outer(mean, total)) * factor
        penalty = 1 / (strength * len(inside))
        value = float(loss.detach()) + 0.5 * penalty * float(theta[:-1] @ theta[:-1])
        return value, np.append(slope.ravel() + penalty * theta[:-1], total[-1])

    starts = [np.zeros(d * len(units) + 1)]
    if pooling == "max":
        probes = [_fit_linear(each[inside], labels[inside], strength) for each in (tokens.mean, tokens.last)]
        starts = [3 * np.append(weight * scale, bias + mean @ weight) for weight, bias in probes]
    ends = [minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 200}) for start in starts]
    return raw(min(ends, key=lambda end: end.fun).x)


def _pooled_logits(tokens: _Tokens, fit: tuple[Floats, Floats], pooling: str) -> Floats:
    """Logits of all rollouts, ``[n]``."""
    return _pool(_product(tokens.x, *fit), tokens.mask, pooling).cpu().numpy()


def _pool(u: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Tokens' columns ``[N, k]`` to rollouts' logits ``[n]``, by the functions that the reward uses."""
    each = u.new_zeros(*mask.shape, u.shape[1])
    each[mask] = u
    if pooling == "max":
        return aggregation("max")(each[..., 0], mask)
    return (attention_over(each[..., 0], mask) * each[..., 1]).sum(dim=1)


def _moments(x: Tensor, counted: Tensor) -> tuple[Floats, Floats]:
    """Mean and usable standard deviation of the counted rows, ``[d]`` each."""
    weights, n = counted.double()[:, None], float(counted.sum())
    mean = torch.tensor(_transposed_product(x, weights)[:, 0] / n, device=x.device)
    square = torch.zeros_like(mean)
    for part, weight in zip(x.split(CHUNK_TOKENS), weights.split(CHUNK_TOKENS), strict=True):
        square += ((part.double() - mean).square() * weight).sum(dim=0)
    center = mean.cpu().numpy()
    return center, _usable((square / n).sqrt().cpu().numpy(), center)


def _product(x: Tensor, weight: Floats, bias: Floats) -> Tensor:
    """x W + b, ``[N, k]`` float64."""
    w, b = torch.tensor(weight, device=x.device), torch.tensor(bias, device=x.device)
    return torch.cat([part.double() @ w + b for part in x.split(CHUNK_TOKENS)])


def _transposed_product(x: Tensor, g: Tensor) -> Floats:
    """x^T g, ``[d, k]`` float64."""
    total = g.new_zeros(x.shape[1], g.shape[1])
    for part, slope in zip(x.split(CHUNK_TOKENS), g.split(CHUNK_TOKENS), strict=True):
        total += part.double().T @ slope
    return total.cpu().numpy()


# Calibrating ---------------------------------------------------------------------------------------------------------


def calibrate(logits: Floats, labels: NDArray[np.bool_], groups: NDArray[np.int64]) -> ProbeCalibration:
    """Platt scaling of held-out rollouts' logits, which did not choose the probe's weights.

    The calibration that is kept is fitted to all of them. Its figures are cross-fitted: in each of five folds, rollouts
    are judged by a calibration fitted to the questions of the other four.

    Args:
        logits: ``[m]``.
        labels: Whether each rollout shows the behaviour, ``[m]``.
        groups: Number of each one's question, ``[m]``.

    Raises:
        DataError: One question holds all rollouts of one kind.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    fitted = np.empty(len(logits))
    for inside, outside in StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0).split(logits, labels, groups):
        if labels[inside].all() or not labels[inside].any():
            raise DataError(
                "One question holds all held-out rollouts with (or without) the behaviour, so nothing can be "
                "calibrated: sample more questions."
            )
        slope, intercept = platt(logits[inside], labels[inside])
        fitted[outside] = expit(slope * logits[outside] + intercept)
    slope, intercept = platt(logits, labels)
    share, plain = float(labels.mean()), expit(logits)
    bins = _bins(fitted, labels)
    return ProbeCalibration(
        slope=slope,
        intercept=intercept,
        brier=bootstrap(_brier, fitted, labels, groups=groups),
        brier_of_the_share=share * (1 - share),
        ece=_ece(bins),
        brier_uncalibrated=_brier(plain, labels),
        ece_uncalibrated=_ece(_bins(plain, labels)),
        bins=bins,
    )


def platt(logits: Floats, labels: NDArray[np.bool_]) -> tuple[float, float]:
    """a and b of P(behaviour) = sigmoid(a logit + b), by maximum likelihood with Platt's targets.

    The targets are (n_1 + 1) / (n_1 + 2) and 1 / (n_0 + 2) in place of 1 and 0 (Platt 1999), so that logits which
    separate the labels perfectly still give a finite slope.

    Args:
        logits: ``[n]`` float64.
        labels: ``[n]`` bool.
    """
    n_1 = int(labels.sum())
    target = np.where(labels, (n_1 + 1) / (n_1 + 2), 1 / (len(labels) - n_1 + 2))
    mean, spread = float(logits.mean()), float(logits.std()) or 1.0
    z = (logits - mean) / spread

    def loss(parameters: Floats) -> tuple[float, Floats]:
        u = parameters[0] * z + parameters[1]
        error = expit(u) - target
        return float(np.mean(np.logaddexp(0, u) - target * u)), np.array([np.mean(error * z), np.mean(error)])

    a, b = minimize(loss, np.zeros(2), jac=True, method="BFGS", options={"gtol": 1e-9}).x
    return float(a / spread), float(b - a * mean / spread)


def _brier(probability: Floats, labels: NDArray[np.bool_]) -> float:
    """Mean squared error (Brier 1950)."""
    return float(np.mean(np.square(probability - labels)))


def _bins(probability: Floats, labels: NDArray[np.bool_]) -> list[Bin]:
    """Equally many rollouts a bin: bins of equal width would be nearly empty where probabilities crowd."""
    order = np.argsort(probability, kind="stable")
    return [
        Bin(n=len(rows), predicted=float(probability[rows].mean()), observed=float(labels[rows].mean()))
        for rows in np.array_split(order, BINS)
    ]


def _ece(bins: list[Bin]) -> float:
    """Expected calibration error (arXiv 1706.04599)."""
    return sum(each.n * abs(each.predicted - each.observed) for each in bins) / sum(each.n for each in bins)


# Showing -------------------------------------------------------------------------------------------------------------


def draw_sweep(card: ProbeCard, file: Path) -> None:
    """AUC of each layer, cross-validated and held-out, with 95 % intervals; the chosen layer is marked.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: The card has no sweep, or the file cannot be written.
    """
    require("matplotlib", "report")
    from matplotlib.figure import Figure

    if card.training is None or card.evidence is None:
        raise ConfigError(f"Probe '{card.name}' has no layer sweep: train it with 'mechreward probe train'.")
    layers, chosen = card.training.layers, HookPoint.parse(card.hook_point).layer
    figure = Figure(figsize=(max(6.0, 2.5 + 0.3 * len(layers)), 4.2), layout="constrained")
    axis = figure.subplots()
    swept = card.training.pooling_of_sweep
    series = [
        (f"{swept} pooling, cross-validated", "#0072b2", "o-", -0.08, [(f.layer, f.cross_validated) for f in layers]),
        (f"{swept} pooling, held out", "#d55e00", "s-", 0.0, [(f.layer, f.held_out) for f in layers]),
    ]
    if (own := card.aggregation) != swept:
        series += [
            (f"{own} pooling, cross-validated", "#56b4e9", "^", 0.08, [(chosen, card.training.cross_validated)]),
            (f"{own} pooling, held out", "#e69f00", "D", 0.16, [(chosen, card.evidence.auc)]),
        ]
    for label, colour, style, shift, points in series:
        value = np.array([p.value for _, p in points])
        # A percentile interval need not hold the value itself.
        ends = [np.maximum(0, value - [p.low for _, p in points]), np.maximum(0, [p.high for _, p in points] - value)]
        axis.errorbar(
            [layer + shift for layer, _ in points], value, ends, fmt=style, color=colour, label=label, capsize=3,
            markersize=5, linewidth=1.2,
        )  # fmt: skip
    axis.axvspan(chosen - 0.3, chosen + 0.3, color="#888888", alpha=0.18, linewidth=0, label="chosen layer")
    axis.axhline(0.5, color="#888888", linewidth=1, linestyle=":")
    axis.set_xticks([figures.layer for figures in layers])
    axis.set(
        xlabel="layer (resid_post)",
        ylabel="AUC, 95 % interval",
        title=f"{card.name}: {card.model or 'probe'}, {card.evidence.n} rollouts held out",
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.2)
    axis.legend(frameon=False, fontsize=8)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=130)
    except (OSError, ValueError) as error:  # ValueError: an unknown suffix
        raise ConfigError(f"{file} cannot be drawn ({error}): choose another place, ending in .png.") from None
