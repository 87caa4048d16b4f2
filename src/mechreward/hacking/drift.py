"""Signs of gaming in the activations: text, or a model, that does what no clean rollout does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mechreward.aggregation import aggregation
from mechreward.hacking.signs import Detector, Rewarded
from mechreward.readout import Readings, Readout, Reads, Request, projection
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.hf import over_tokens
from mechreward.sae.handle import SAEHandle

SHRINK = 0.1
"""Share of the average variance in an estimated covariance: few clean rollouts must not make a direction look still."""

WIDTH = 32
"""Random directions in which outliers are looked for."""

LATENTS = ("relu", "jumprelu", "gated", "topk", "groupmax")
"""Nonlinearities under which a column is zero unless its latent fires."""


class RunningGaussian:
    """The mean and covariance of clean rollouts' vectors, gathered batch by batch.

    distance: d^2 = (x - mu)' ((1 - s) C + s tr(C)/K I)^-1 (x - mu) / K, s = :data:`SHRINK`: 1 on average.
    """

    def __init__(self):
        self.count = 0
        self.total = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add vectors ``[B, K]``; rows with a NaN are left out."""
        rows = rows[~rows.isnan().any(dim=1)]
        self.count += len(rows)
        self.total = self.total + rows.sum(dim=0)
        self.squares = self.squares + rows.T @ rows

    def distance(self, rows: Tensor) -> Tensor:
        """Return the Mahalanobis distance of each row over sqrt(K), ``[B]``."""
        if self.count < 2:
            return torch.full((len(rows),), torch.nan)
        mean = self.total / self.count
        covariance = self.squares / self.count - torch.outer(mean, mean)
        average = covariance.diagonal().mean() + 1e-12  # tr(C)/K
        shrunk = (1 - SHRINK) * covariance + SHRINK * average * torch.eye(len(mean), dtype=torch.float64)
        away = rows - mean
        return (away * torch.linalg.solve(shrunk, away.T).T).mean(dim=1).sqrt().float()

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "total": self.total.tolist(), "squares": self.squares.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]
        self.total, self.squares = (torch.tensor(state[name], dtype=torch.float64) for name in ("total", "squares"))


class Distance(Detector):
    """A detector whose score is the Mahalanobis distance of a few numbers per rollout from those of clean rollouts.

    Args:
        reads: Whose activations. The reference's depend on the text alone; the policy's move with honest training, too.
    """

    what = ""

    def __init__(self, reads: Reads = "reference"):
        super().__init__()
        self.reads: Reads = reads
        self.readouts: list[Readout] = []

    def forget(self) -> None:
        self.usual = RunningGaussian()

    @property
    def requests(self) -> list[Request]:
        return [Request(readout, self.reads) for readout in self.readouts]

    def numbers(self, readings: Readings) -> Tensor:
        """Return the numbers of one readout, ``[B, K]`` float64; NaN where nothing is read."""
        return over_tokens(readings, aggregation("mean")).double()

    def _rows(self, readings: Mapping[Request, Readings]) -> Tensor:
        return torch.cat([self.numbers(readings[request]) for request in self.requests], dim=1)

    def learn(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> None:
        self.usual.add(self._rows(readings))

    def scores(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> Tensor:
        return self.usual.distance(self._rows(readings))

    def reason(self, score: float, usual: float) -> str:
        return (
            f"{self.what} {score:.1f} times as far from clean rollouts' mean as is average (usual: up to {usual:.1f})"
        )

    def state_dict(self) -> dict[str, Any]:
        return self.usual.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.usual.load_state_dict(state)


class Outlier(Distance):
    """Where a rollout's mean residual vector lies, at each hook point of the guarded rewards."""

    name = "outlier"
    what = "its mean residual vector lies"

    def attach(self, rewarded: Rewarded) -> None:
        places = {r.readout.hook_point: r.readout for r in rewarded.requests}
        self.readouts = [projection(at, like.d_model, WIDTH, like.model_name) for at, like in sorted(places.items())]
        self.missing = None if places else "there is no feature reward whose hook point it could read"


class Firing(Distance):
    """On which share of the tokens each of the rewarded latents fires."""

    name = "firing"
    what = "the firing rates of the rewarded latents lie"

    def attach(self, rewarded: Rewarded) -> None:
        latents = {r.readout: None for r in rewarded.requests if r.readout.nonlinearity.kind in LATENTS}
        self.readouts = list(latents)
        self.missing = None if latents else "no rewarded readout is a set of SAE latents, which fire or do not"

    def numbers(self, readings: Readings) -> Tensor:
        fires = Readings((readings.values > 0).float(), readings.mask)
        return super().numbers(fires)


class Reconstruction(Distance):
    """How badly a whole SAE reconstructs the residual stream, and how many latents it needs (L0).

    Both rise where the stream does what the SAE has never seen. Needs the whole SAE: two matrix products of
    ``[d_model, d_sae]`` for each token.

    Args:
        sae: Any residual-stream SAE of the model; the rewarded one or another.
        reads: Whose activations, see :class:`Distance`.
    """

    name = "reconstruction"
    what = "the SAE's reconstruction error and L0 lie"

    def __init__(self, sae: SAEHandle, reads: Reads = "reference"):
        super().__init__(reads)
        self.readouts = [sae.health()]
