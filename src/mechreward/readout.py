"""HookPoint, Readout, ReadoutBank, Readings: the one concept at which everything meets.

A *readout* turns residual vectors into a few numbers per token: chosen features of a sparse autoencoder, a linear
probe, a raw direction. A *bank* holds all readouts that one run needs and computes them together, in float32 whatever
the model's dtype, in chunks, so that no ``[tokens, d_model]`` or ``[tokens, d_sae]`` tensor of a whole batch exists.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mechreward.errors import ModelMismatchError, RewardError

Reads = Literal["policy", "reference"]

CHUNK_TOKENS = 1024
"""Tokens encoded at once: bounds the float32 copy of the residual, and for TopK the whole-dictionary activations."""


@dataclass(frozen=True, order=True)
class HookPoint:
    """Where on the residual stream a reading is taken.

    ``resid_post`` of layer L is the output of decoder layer L (HF ``hidden_states[L + 1]``, except for the last layer,
    whose HF entry is already normed); ``resid_pre`` is its input.
    """

    layer: int
    site: Literal["resid_pre", "resid_post"] = "resid_post"

    def __str__(self) -> str:
        return f"blocks.{self.layer}.hook_{self.site}"

    @classmethod
    def parse(cls, name: str) -> HookPoint:
        """Read the name that TransformerLens and SAELens use, e.g. ``blocks.22.hook_resid_post``.

        Raises:
            ModelMismatchError: The name is not a residual-stream hook point.
        """
        match = re.fullmatch(r"blocks\.(\d+)\.hook_(resid_pre|resid_post)", name)
        if match is None:
            raise ModelMismatchError(
                f"'{name}' is not a residual-stream hook point: write blocks.<layer>.hook_resid_post or _resid_pre."
            )
        return cls(int(match[1]), match[2])  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, eq=False)
class InputTransform:
    """What an encoder does to the residual before its matrix: normalise, then subtract.

    Attributes:
        norm: ``"none"``; ``"constant_norm_rescale"`` x sqrt(d) / ||x||; ``"layer_norm"`` (x - mean) / (std + 1e-5),
            std with Bessel's correction as in SAELens.
        shift: What is subtracted afterwards (``b_dec`` where the encoder wants it), ``[d_model]`` float32, or None.
        scale: What x is multiplied by first (``expected_average_only_in``, Llama Scope).
        center: Subtract x's mean before anything else: TransformerLens' stream with ``center_writing_weights``.
    """

    norm: Literal["none", "constant_norm_rescale", "layer_norm"] = "none"
    shift: Tensor | None = None
    scale: float = 1.0
    center: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        if self.center:
            x = x - x.mean(dim=-1, keepdim=True)
        if self.scale != 1.0:
            x = x * self.scale
        if self.norm == "constant_norm_rescale":
            x = x * (x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True))
        elif self.norm == "layer_norm":
            x = x - x.mean(dim=-1, keepdim=True)
            x = x / (x.std(dim=-1, keepdim=True) + 1e-5)
        return x if self.shift is None else x - self.shift

    def to(self, device: torch.device) -> InputTransform:
        return self if self.shift is None else replace(self, shift=self.shift.to(device))


RAW_INPUT = InputTransform()


@dataclass(frozen=True, eq=False)
class Nonlinearity:
    """The encoder's activation function. ``parameters`` are per column, so that it can be sliced with the matrix.

    Attributes:
        kind: ``"identity"`` (probes, directions) z; ``"relu"`` max(z, 0);
            ``"jumprelu"`` max(z, 0) 1[z > threshold]; ``"topk"`` keeps the k largest z of a token, then max(z, 0);
            ``"groupmax"`` keeps the largest of each of k groups of neighbours, then max(z, 0);
            ``"gated"`` 1[z + b_gate > 0] max(z exp(r_mag) + b_mag, 0).
        parameters: ``threshold``, or ``b_gate``, ``r_mag`` and ``b_mag``, each ``[columns]`` float32.
        k: For ``"topk"`` and ``"groupmax"``.
    """

    kind: Literal["identity", "relu", "jumprelu", "gated", "topk", "groupmax"]
    parameters: dict[str, Tensor]
    k: int = 0

    @property
    def sliceable(self) -> bool:
        """Whether a column's activation can be computed without the other columns."""
        return self.kind not in ("topk", "groupmax")

    def columns(self, ids: Tensor) -> Nonlinearity:
        """The same function on fewer columns."""
        return replace(self, parameters={name: p[ids] for name, p in self.parameters.items()})

    def to(self, device: torch.device) -> Nonlinearity:
        return replace(self, parameters={name: p.to(device) for name, p in self.parameters.items()})

    def __call__(self, z: Tensor) -> Tensor:
        p = self.parameters
        if self.kind == "relu":
            return z.relu()
        if self.kind == "jumprelu":
            return z.relu() * (z > p["threshold"])
        if self.kind == "gated":
            return (z * p["r_mag"].exp() + p["b_mag"]).relu() * (z + p["b_gate"] > 0)
        if self.kind == "topk":
            values, index = z.topk(self.k, dim=-1, sorted=False)
            return torch.zeros_like(z).scatter_(-1, index, values.relu())
        if self.kind == "groupmax":
            groups = z.unflatten(-1, (self.k, -1))
            values, index = groups.max(dim=-1, keepdim=True)
            return torch.zeros_like(groups).scatter_(-1, index, values.relu()).flatten(-2)
        return z


IDENTITY = Nonlinearity("identity", {})


@dataclass(frozen=True, eq=False)
class Readout:
    """K numbers per token at one hook point: ``nonlinearity(transform(x) @ weight + bias)[:, keep]``.

    Attributes:
        name: What it is called in logs.
        labels: One name per column, K of them.
        hook_point: Where it reads.
        weight: ``[d_model, P]`` float32; P = K unless the nonlinearity needs the whole dictionary (TopK).
        bias: ``[P]`` float32.
        keep: The K columns that are returned, or None for all.
        model_name: The model that it was made for, as far as known (checked before training).
        aggregation: From values per token to one per rollout, as it was trained (probes); what FeatureReward uses
            unless told otherwise. ``"attention"``: the columns are a score and a value.
        summary: Makes the K columns of the P activations where they are no selection: (x ``[N, d_model]``, activations
            ``[N, P]``) -> ``[N, K]``, e.g. a reconstruction error.
    """

    name: str
    labels: tuple[str, ...]
    hook_point: HookPoint
    weight: Tensor
    bias: Tensor
    nonlinearity: Nonlinearity = IDENTITY
    transform: InputTransform = RAW_INPUT
    keep: Tensor | None = None
    model_name: str | None = None
    aggregation: str = "mean"
    summary: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self):
        products = self.weight.shape[1]
        columns = products if self.keep is None else len(self.keep)
        if self.summary is not None:
            columns = len(self.labels)
        vectors = {"bias": self.bias, **self.nonlinearity.parameters}
        if len(self.labels) != columns or any(vector.shape != (products,) for vector in vectors.values()):
            shapes = ", ".join(f"{part} {tuple(vector.shape)}" for part, vector in vectors.items())
            raise RewardError(
                f"Readout '{self.name}' has {len(self.labels)} labels for {columns} columns, and {shapes} for a weight "
                f"of shape {tuple(self.weight.shape)}: they must agree."
            )
        parts = {"weight": self.weight, **vectors}
        if self.transform.shift is not None:
            parts["shift"] = self.transform.shift
        for part, tensor in parts.items():
            # +inf thresholds are legitimate: a dead JumpReLU latent never fires.
            if tensor.isnan().any() or (part != "threshold" and tensor.isinf().any()):
                raise RewardError(f"The {part} of readout '{self.name}' holds NaN or infinity: its file is damaged.")

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        """K, the number of values per token."""
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class LogitReadout(Readout):
    """A readout that was trained to predict something: its values, pooled by ``aggregation``, are a rollout's logit."""

    @property
    def probability(self) -> Callable[[ArrayLike], NDArray[np.float64]] | None:
        """From logits of rollouts to probabilities in 0..1, NaN to NaN; None where it was never calibrated."""
        return None


def direction(name: str, vector: Tensor, hook_point: HookPoint, bias: float = 0.0) -> Readout:
    """A raw direction ``[d_model]`` as a readout: x . vector + bias."""
    return Readout(name, (name,), hook_point, vector.float()[:, None], torch.tensor([bias]))


def residual(hook_point: HookPoint, d_model: int) -> Readout:
    """The residual vector itself, as a readout of d_model columns."""
    width = tuple(map(str, range(d_model)))
    return Readout("residual", width, hook_point, torch.eye(d_model), torch.zeros(d_model))


def projection(hook_point: HookPoint, d_model: int, width: int, model_name: str | None = None) -> Readout:
    """The residual stream in at most ``width`` random orthonormal directions, the same each time.

    Ratios of distances survive a random projection (Johnson and Lindenstrauss 1984), up to about sqrt(1 / 2 width), and
    ``[tokens, d_model]`` need not be kept.
    """
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(d_model, min(width, d_model), generator=generator)).Q
    labels = tuple(f"direction_{i}" for i in range(basis.shape[1]))
    return Readout("projection", labels, hook_point, basis, torch.zeros(len(labels)), model_name=model_name)


@dataclass(frozen=True)
class Request:
    """A readout that somebody needs, and how it is to be read.

    Attributes:
        readout: What to read.
        reads: The activations of the policy being trained, or of the frozen model that it started from.
        read_last: Also read the final sampled token, which no tap sees: costs a forward pass of our own.
    """

    readout: Readout
    reads: Reads = "policy"
    read_last: bool = False


@dataclass(frozen=True, eq=False)
class Readings:
    """What was read on the completions of a rollout batch.

    Attributes:
        values: ``[B, T, K]`` float32; 0 where the mask is False.
        mask: ``[B, T]`` bool; True for a real completion token that was read.
    """

    values: Tensor
    mask: Tensor


@dataclass
class _Part:
    """One readout's place in a fused product."""

    readout: Readout
    where: slice  # its P columns in the product
    nonlinearity: Nonlinearity
    keep: Tensor | None


@dataclass
class _Fused:
    """Readouts that share a matrix product: same hook point, same input transform."""

    transform: InputTransform
    weight: Tensor
    bias: Tensor
    parts: list[_Part]

    def move_to(self, device: torch.device) -> None:
        self.transform = self.transform.to(device)
        self.weight, self.bias = self.weight.to(device), self.bias.to(device)
        for part in self.parts:
            part.nonlinearity = part.nonlinearity.to(device)
            part.keep = None if part.keep is None else part.keep.to(device)


class ReadoutBank:
    """All readouts of one run, fused into one matrix product per hook point and input transform.

    TopK encoders need every pre-activation of a token to know the k-th largest; readouts that share such a dictionary
    share its product.

    Args:
        readouts: What to read.
        apart: Those of them that get a product of their own. The last bits of a product depend on how many columns it
            has, so that what is only watched would otherwise move what is rewarded.
    """

    def __init__(self, readouts: Sequence[Readout], apart: Collection[Readout] = ()):
        self.readouts = list(dict.fromkeys(readouts))
        self.apart = frozenset(apart)
        self.columns: dict[Readout, slice] = {}
        for readout in self.readouts:
            start = sum(r.width for r in self.columns)
            self.columns[readout] = slice(start, start + readout.width)
        self._fused: dict[HookPoint, list[_Fused]] = {point: [] for point in self.hook_points}
        for members in self._shared_products():
            self._fused[members[0].hook_point].append(_fuse(members))

    def __len__(self) -> int:
        """K, the number of values per token."""
        return sum(r.width for r in self.readouts)

    @property
    def hook_points(self) -> list[HookPoint]:
        """Where it reads, from the first layer to the last."""
        return sorted({r.hook_point for r in self.readouts})

    def _shared_products(self) -> Iterable[list[Readout]]:
        groups: dict[tuple, list[Readout]] = {}
        for r in self.readouts:
            t = r.transform
            # A whole dictionary is as wide for all who share it.
            dictionary = r in self.apart if r.nonlinearity.sliceable else id(r.weight)
            key = (r.hook_point, t.norm, t.scale, t.center, id(t.shift), r.nonlinearity.sliceable, dictionary)
            groups.setdefault(key, []).append(r)
        return groups.values()

    @torch.no_grad()
    def encode(self, hook_point: HookPoint, x: Tensor, out: Tensor, rows: Tensor | None = None) -> None:
        """Encode residual vectors ``x[rows]`` and write them into ``out``.

        Args:
            hook_point: Where x was read.
            x: ``[N, d_model]``, any float dtype.
            out: ``[M, K]`` float32, all K columns of the bank; only this hook point's columns are written.
            rows: ``[M]`` which vectors of x to encode; None for all.
        """
        count = x.shape[0] if rows is None else rows.shape[0]
        with _full_float32(x.device.type):
            for start in range(0, count, CHUNK_TOKENS):
                stop = min(start + CHUNK_TOKENS, count)
                chunk = (x[start:stop] if rows is None else x[rows[start:stop]]).float()
                for fused in self._fused[hook_point]:
                    if fused.weight.device != x.device:
                        fused.move_to(x.device)
                    z = torch.addmm(fused.bias, fused.transform(chunk), fused.weight)
                    for part in fused.parts:
                        values = part.nonlinearity(z[:, part.where])
                        if part.readout.summary is not None:
                            values = part.readout.summary(chunk, values)
                        out[start:stop, self.columns[part.readout]] = (
                            values if part.keep is None else values[:, part.keep]
                        )

    def split(self, values: Tensor, mask: Tensor) -> dict[Readout, Readings]:
        """Each readout's own columns of ``values [B, T, K]``, as views."""
        return {readout: Readings(values[..., columns], mask) for readout, columns in self.columns.items()}


def _fuse(members: list[Readout]) -> _Fused:
    first = members[0]
    if not first.nonlinearity.sliceable:  # one dictionary, several choices of columns
        everything = slice(0, first.weight.shape[1])
        return _Fused(
            first.transform, first.weight, first.bias, [_Part(r, everything, r.nonlinearity, r.keep) for r in members]
        )
    parts, start = [], 0
    for r in members:
        parts.append(_Part(r, slice(start, start + r.weight.shape[1]), r.nonlinearity, r.keep))
        start += r.weight.shape[1]
    weight = torch.cat([r.weight for r in members], dim=1)
    return _Fused(first.transform, weight, torch.cat([r.bias for r in members]), parts)


@contextmanager
def _full_float32(device_type: str):
    """No autocast, no TF32 and no bf16: in lower precision, activations near a threshold flip."""
    # torch >= 2.9 has a switch of its own for each backend, and raises an error when the old one is read after the new
    # one was set, as `TrainingArguments(tf32=True)` does.
    backends, switch, full = [torch.backends.cuda.matmul], "allow_tf32", False
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        backends.append(torch.backends.mkldnn.matmul)  # pyright: ignore[reportAttributeAccessIssue]
        switch, full = "fp32_precision", "ieee"
    kept = [getattr(backend, switch) for backend in backends]
    try:
        for backend in backends:
            setattr(backend, switch, full)
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, value in zip(backends, kept, strict=True):
            setattr(backend, switch, value)
