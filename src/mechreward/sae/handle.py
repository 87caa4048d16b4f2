"""SAEHandle: a sparse autoencoder on disk, from which only the needed columns are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mechreward.errors import SAEError
from mechreward.readout import RAW_INPUT, HookPoint, InputTransform, Nonlinearity, Readout


@dataclass(frozen=True, eq=False)
class EncoderColumns:
    """Some columns of an encoder.

    Attributes:
        weight: ``[d_model, P]`` float32.
        bias: ``[P]`` float32.
        nonlinearity: With its parameters for these columns.
    """

    weight: Tensor
    bias: Tensor
    nonlinearity: Nonlinearity


@dataclass(frozen=True, eq=False)
class SAEHandle:
    """A sparse autoencoder, as a reward needs it.

    Attributes:
        name: Release and id, or the path.
        model_name: The model whose activations it was trained on.
        hook_point: Where it reads.
        d_model: Width of the residual stream.
        d_sae: Number of latents.
        kind: Its nonlinearity (``"topk"`` and ``"groupmax"`` need the whole dictionary at every token).
        transform: What it does to its input first.
        read_encoder: Reads the columns with the given ids, or all for None.
        read_decoder: Reads ``W_dec [d_sae, d_model]`` and ``b_dec [d_model]``, for reconstructions.
    """

    name: str
    model_name: str | None
    hook_point: HookPoint
    d_model: int
    d_sae: int
    kind: str
    read_encoder: Callable[[list[int] | None], EncoderColumns]
    read_decoder: Callable[[], tuple[Tensor, Tensor]]
    transform: InputTransform = RAW_INPUT

    def features(self, ids: Sequence[int], name: str | None = None) -> Readout:
        """The activations of chosen latents as a readout.

        Exact on K columns alone, unless the encoder is TopK or GroupMax: then the whole dictionary is kept, and K
        columns of the result are returned.

        Raises:
            SAEError: An id is outside the dictionary, or occurs twice.
        """
        chosen = [int(i) for i in ids]
        outside = [i for i in chosen if not 0 <= i < self.d_sae]
        if outside:
            raise SAEError(f"Feature {outside[0]} is outside the dictionary of {self.name}, which has {self.d_sae}.")
        if len(set(chosen)) < len(chosen):
            raise SAEError(f"A feature id of {self.name} is given twice: give each once.")
        whole = self.kind in ("topk", "groupmax")
        encoder = self._whole_encoder if whole else self.read_encoder(chosen)
        return Readout(
            name=name or self.name,
            labels=tuple(f"feature_{i}" for i in chosen),
            hook_point=self.hook_point,
            weight=encoder.weight,
            bias=encoder.bias,
            nonlinearity=encoder.nonlinearity,
            transform=self.transform,
            keep=torch.tensor(chosen) if whole else None,
            model_name=self.model_name,
        )

    @cached_property
    def _whole_encoder(self) -> EncoderColumns:
        """Read once, so that several readouts of a TopK dictionary share it, and its matrix product."""
        return self.read_encoder(None)

    @cached_property
    def _decoders(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    def _decoder(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Read and moved once: it is needed at every token."""
        if device not in self._decoders:
            weight, bias = self.read_decoder()
            self._decoders[device] = weight.to(device), bias.to(device)
        return self._decoders[device]

    def all_features(self) -> Readout:
        """Every latent, for discovery: ``[tokens, d_sae]``."""
        return self.features(range(self.d_sae))

    def health(self) -> Readout:
        """How well this SAE describes each token: ``error`` ||x - x'||^2 / ||x||^2, and ``l0``, the latents that fire.

        Keeps the whole encoder and decoder in memory.
        """

        def summary(x: Tensor, activations: Tensor) -> Tensor:
            error = (x - self.decode(activations, x)).square().sum(dim=-1) / x.square().sum(dim=-1)
            return torch.stack([error, (activations > 0).sum(dim=-1).float()], dim=-1)

        return replace(self.all_features(), name="health", labels=("error", "l0"), keep=None, summary=summary)

    def decode(self, activations: Tensor, x: Tensor) -> Tensor:
        """Reconstruct residual vectors: activations @ W_dec + b_dec, with the input's normalisation undone.

        Args:
            activations: ``[N, d_sae]`` float32.
            x: ``[N, d_model]``, the vectors that were encoded (their norms are needed where the encoder rescaled).
        """
        mean = x.mean(dim=-1, keepdim=True)
        if self.transform.center:
            x = x - mean
        w_dec, b_dec = self._decoder(x.device)
        reconstruction = activations @ w_dec + b_dec
        if self.transform.norm == "constant_norm_rescale":
            reconstruction = reconstruction * (x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5)
        elif self.transform.norm == "layer_norm":
            reconstruction = reconstruction * (x.std(dim=-1, keepdim=True) + 1e-5) + x.mean(dim=-1, keepdim=True)
        reconstruction = reconstruction / self.transform.scale
        return reconstruction + mean if self.transform.center else reconstruction
