"""Readouts on their way to an engine's worker, and what was read there on its way back: JSON around safetensors.

Text, because vLLM's remote calls take no tensors, and over HTTP nothing but text.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load, save
from torch import Tensor

from mechreward.errors import CaptureError
from mechreward.readout import HookPoint, InputTransform, Nonlinearity, Readout, ReadoutBank
from mechreward.rollout.batch import RolloutBatch


def send_bank(bank: ReadoutBank) -> str:
    """What :func:`receive_bank` reads. A tensor that readouts share is sent once, and shared there too.

    Raises:
        CaptureError: A readout has a summary, which is code and stays here.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def name(tensor: Tensor | None) -> str | None:
        if tensor is None:
            return None
        if id(tensor) not in names:
            names[id(tensor)] = f"t{len(names)}"
            tensors[names[id(tensor)]] = tensor.detach().cpu().clone()  # safetensors refuses views of one storage
        return names[id(tensor)]

    cards = []
    for r in bank.readouts:
        if r.summary is not None:
            raise CaptureError(f"Readout '{r.name}' summarises a whole dictionary, which no engine's worker can do.")
        cards.append(
            {
                "name": r.name,
                "labels": r.labels,
                "hook_point": str(r.hook_point),
                "weight": name(r.weight),
                "bias": name(r.bias),
                "kind": r.nonlinearity.kind,
                "parameters": {key: name(tensor) for key, tensor in r.nonlinearity.parameters.items()},
                "k": r.nonlinearity.k,
                "norm": r.transform.norm,
                "shift": name(r.transform.shift),
                "scale": r.transform.scale,
                "center": r.transform.center,
                "keep": name(r.keep),
                "apart": r in bank.apart,
            }
        )
    return _text({"readouts": cards}, tensors)


def receive_bank(text: str) -> ReadoutBank:
    """The bank that :func:`send_bank` was given."""
    header, tensors = _parts(text)
    readouts = [
        Readout(
            name=card["name"],
            labels=tuple(card["labels"]),
            hook_point=HookPoint.parse(card["hook_point"]),
            weight=tensors[card["weight"]],
            bias=tensors[card["bias"]],
            nonlinearity=Nonlinearity(
                card["kind"], {key: tensors[name] for key, name in card["parameters"].items()}, card["k"]
            ),
            transform=InputTransform(card["norm"], tensors.get(card["shift"]), card["scale"], card["center"]),
            keep=tensors.get(card["keep"]),
        )
        for card in header["readouts"]
    ]
    return ReadoutBank(readouts, [r for r, card in zip(readouts, header["readouts"], strict=True) if card["apart"]])


@dataclass(frozen=True, eq=False)
class Fed:
    """What one request fed to the model, and what was read of it.

    Attributes:
        prompt: The request's prompt.
        tokens: The n tokens after it, as they were fed back. A position that no pass ran is -1, which is no token.
        values: ``[n, K]`` float32, their readings.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    values: Tensor


def send_fed(prompts: Sequence[Sequence[int]], lengths: Sequence[int], tokens: Tensor, values: Tensor) -> str:
    """What :func:`receive_fed` reads.

    Args:
        prompts: The requests' prompts.
        lengths: How many tokens each has after it.
        tokens: ``[n]``, those of all requests, one request after the other.
        values: ``[n, K]`` float32, their readings.
    """
    flat = torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.int32)
    each = list(zip(map(len, prompts), lengths, strict=True))
    return _text({"lengths": each}, {"prompts": flat, "tokens": tokens.int(), "values": values})


def send_problem(problem: str) -> str:
    """In the place of readings: why there are none. An error raised amid a step would end the engine."""
    return json.dumps({"problem": problem})


def receive_fed(text: str) -> list[Fed]:
    """The requests that :func:`send_fed` was given.

    Raises:
        CaptureError: What :func:`send_problem` was given.
    """
    if "problem" in (problem := json.loads(text)):
        raise CaptureError(problem["problem"])
    header, tensors = _parts(text)
    prompts, tokens = tensors["prompts"].tolist(), tensors["tokens"].tolist()
    requests, p, t = [], 0, 0
    for prompt, fed in header["lengths"]:
        own = slice(t, t + fed)
        requests.append(Fed(tuple(prompts[p : p + prompt]), tuple(tokens[own]), tensors["values"][own]))
        p, t = p + prompt, t + fed
    return requests


def match(fed: Sequence[Fed], batch: RolloutBatch, columns: int, read_last: bool = False) -> Tensor:
    """Each rollout's readings, found by its very tokens: what was read is what was sampled, or it is an error.

    Rollouts of the same tokens have the same readings, so that it does not matter which of them is found.

    Args:
        fed: What the engine's requests fed to the model.
        batch: B rollouts.
        columns: K.
        read_last: The final sampled token was fed too.

    Returns:
        ``[B, T, K]`` float32, T the longest completion; what the batch's mask leaves out is 0.

    Raises:
        CaptureError: No request fed these tokens.
    """
    exactly = {(request.prompt, request.tokens): request for request in fed}
    of_prompt: dict[tuple[int, ...], list[Fed]] = {}
    for request in fed:
        of_prompt.setdefault(request.prompt, []).append(request)
    mask = batch.mask(read_last)
    values = torch.zeros(*mask.shape, columns)
    for row, (prompt, completion) in enumerate(zip(batch.prompt_ids, batch.completion_ids, strict=True)):
        wanted = mask[row].nonzero()[:, 0]
        if not len(wanted):
            continue
        until = int(wanted[-1]) + 1
        own, start = tuple(prompt), tuple(completion[:until])
        found = exactly.get((own, start))
        if found is None:  # engines may feed a token more
            found = next((request for request in of_prompt.get(own, []) if request.tokens[:until] == start), None)
        if found is None:
            raise CaptureError(
                f"The engine has not read all tokens of rollout {row} ({len(prompt)} + {len(completion)} tokens): "
                "choose another way of reading, e.g. backend='forward'."
            )
        values[row, wanted] = found.values[wanted]
    return values


def _text(header: dict, tensors: dict[str, Tensor]) -> str:
    return json.dumps({**header, "tensors": base64.b64encode(save(tensors)).decode()})


def _parts(text: str) -> tuple[dict, dict[str, Tensor]]:
    header = json.loads(text)
    return header, load(base64.b64decode(header.pop("tensors")))
