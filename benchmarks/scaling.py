"""What `ReadoutBank.encode` costs per token, against the tokens, columns, dictionary and layers that it reads."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mechreward.readout import HookPoint, Nonlinearity, Readout, ReadoutBank

PARAMETERS_GEMMA_2_9B = 9.24e9
D_MODEL_GEMMA_2_9B = 3584
D_SAE_GEMMA_SCOPE = 16_384
FEATURES = 20


@dataclass(frozen=True)
class Case:
    """One size of one sweep: N tokens, K columns of a dictionary of d_sae latents, at each of some layers."""

    sweep: str
    kind: str  # "jumprelu" (sliced) or "topk" (whole dictionary)
    tokens: int = 512
    columns: int = FEATURES
    d_sae: int = D_SAE_GEMMA_SCOPE
    layers: int = 1

    @property
    def products(self) -> int:
        """Columns of the matrix product at one layer."""
        return self.columns if self.kind == "jumprelu" else self.d_sae

    def flop_limit(self, d_model: int) -> int:
        """2 K d per token and layer where the encoder is sliced; 2 d_sae d where it needs its whole dictionary."""
        return 2 * self.products * d_model * self.layers


CASES = [
    *(Case("tokens N", "jumprelu", tokens=n) for n in (8, 64, 512, 4096)),
    *(Case("columns K", "jumprelu", columns=k) for k in (1, 4, 20, 64, 256)),
    *(Case("dictionary, sliced", "jumprelu", d_sae=n) for n in (4096, 16_384, 65_536)),
    *(Case("dictionary, TopK", "topk", tokens=128, d_sae=n) for n in (4096, 16_384, 65_536)),
    *(Case("layers", "jumprelu", layers=n) for n in (1, 2, 4, 8)),
]


def measure_scaling(d_model: int, repeats: int, device: str, seed: int = 0) -> list[dict[str, Any]]:
    """Every case beside its bare matrix product: interleaved, medians over ``repeats`` after one warm-up.

    Returns:
        For each case its sizes, microseconds per token (``encode``, ``matmul``: the median; ``rounds``: all) and FLOP
        per token (``counted`` by torch's counter, ``limit`` by the formula).
    """
    torch.manual_seed(seed)
    dictionary = torch.randn(d_model, max(case.d_sae for case in CASES), device=device) / d_model**0.5
    runs = [run for case in CASES for run in _encode_and_matmul(case, dictionary)]
    flops = [_counted_flops(encode) / case.tokens for case, (encode, _) in zip(CASES, _pairs(runs), strict=True)]
    rounds = _interleaved(runs, repeats, device, seed)
    return [
        vars(case)
        | {"rounds": {"encode": _per_token(encode, case), "matmul": _per_token(matmul, case)}}
        | {"encode": median(_per_token(encode, case)), "matmul": median(_per_token(matmul, case))}
        | {"counted": counted, "limit": case.flop_limit(d_model)}
        for case, (encode, matmul), counted in zip(CASES, _pairs(rounds), flops, strict=True)
    ]


def _encode_and_matmul(case: Case, dictionary: torch.Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    d_model, device = dictionary.shape[0], dictionary.device
    points = [HookPoint(layer) for layer in range(case.layers)]
    # The latents that are read lie all over the dictionary, as they do in a pack.
    ids = torch.linspace(0, case.d_sae - 1, case.columns, device=device).long()
    sliced = case.kind == "jumprelu"
    weight = dictionary[:, ids] if sliced else dictionary[:, : case.d_sae].contiguous()
    threshold = {"threshold": torch.full((case.products,), 0.5, device=device)}
    readouts = [
        Readout(
            name=f"{case.kind} {point}",
            labels=tuple(f"feature_{int(i)}" for i in ids),
            hook_point=point,
            weight=weight,
            bias=torch.zeros(case.products, device=device),
            nonlinearity=Nonlinearity("jumprelu", threshold) if sliced else Nonlinearity("topk", {}, k=100),
            keep=None if sliced else ids,
        )
        for point in points
    ]
    bank = ReadoutBank(readouts)
    x = torch.randn(case.tokens, d_model, device=device)
    out = torch.zeros(case.tokens, len(bank), device=device)
    return (
        lambda: [bank.encode(point, x, out) for point in points],
        lambda: [torch.mm(x, weight) for _ in points],
    )


def _pairs(values: list) -> list[tuple[Any, Any]]:
    return list(zip(values[::2], values[1::2], strict=True))


def _counted_flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _interleaved(runs: list[Callable[[], Any]], repeats: int, device: str, seed: int) -> list[list[float]]:
    """Seconds of each run in each round; the order is new in every round, and the first round is discarded."""
    seconds: list[list[float]] = [[] for _ in runs]
    order, shuffle = list(range(len(runs))), random.Random(seed)
    for _ in range(repeats + 1):
        shuffle.shuffle(order)
        for i in order:
            began = _now(device)
            runs[i]()
            seconds[i].append(_now(device) - began)
    return [values[1:] for values in seconds]


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _per_token(seconds: list[float], case: Case) -> list[float]:
    return [1e6 * s / case.tokens for s in seconds]


def on_paper() -> dict[str, Any]:
    """FLOP per token for Gemma-2-9B with one Gemma Scope dictionary, by the formulas beside them."""
    ours = 2 * FEATURES * D_MODEL_GEMMA_2_9B
    forward = 2 * PARAMETERS_GEMMA_2_9B
    dictionary = 2 * D_SAE_GEMMA_SCOPE * D_MODEL_GEMMA_2_9B
    return {
        "model": "Gemma-2-9B",
        "rows": [
            ["ours", f"2 K d, K = {FEATURES}, d = {D_MODEL_GEMMA_2_9B}", ours, ours / forward],
            ["one forward pass", f"2 x {PARAMETERS_GEMMA_2_9B:.3g} parameters", forward, 1.0],
            ["whole dictionary", f"2 d_sae d, d_sae = {D_SAE_GEMMA_SCOPE}", dictionary, dictionary / forward],
            [
                "naive",
                "one more forward pass + whole dictionary",
                forward + dictionary,
                (forward + dictionary) / forward,
            ],
        ],
        "naive_over_ours": (forward + dictionary) / ours,
    }
