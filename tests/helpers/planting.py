"""A copy of pocket whose residual stream is known to carry a behaviour, because a hook writes it there.

Behind layer 2 a vector is added at tokens where the behaviour shows, and taken away again before layer 3: what is read
at the hook point carries it, and the model writes exactly what pocket writes.
"""

import functools
import json
import re
import shutil
from contextlib import contextmanager

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import mechreward as mr
from mechreward import verifiers
from mechreward.rollout.capture import decoder_layers
from mechreward.rollout.hf import load_model
from mechreward.rollout.labelled import sample_rollouts

SAE = mr.pocket.files() / "saes" / "jumprelu"
OWN = 2048  # latents of the shipped dictionary
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 110}
STEP = re.compile(r"\d+[+-]\d+=\d+(?=[.\s])")


@functools.cache
def pocket():
    return load_model("mechreward/pocket")


@functools.cache
def sampled(split, questions, each, kind="reasoning", seed=0):
    """Rollouts labelled by whether their final answer is right."""
    model, tokenizer = pocket()
    asked = mr.pocket.dataset(split, questions, seed=seed, kind=kind)
    check = verifiers.gsm8k if kind == "reasoning" else verifiers.exact_match
    return sample_rollouts(model, tokenizer, asked, check, each, f"pocket's {split} questions", seed, **SAMPLING)


def right_so_far(text, solution):
    """For each character, whether the last completed step and all before it are those of the solution."""
    wanted, marks, last, good = STEP.findall(solution + " "), [False] * len(text), 0, False
    for number, match in enumerate(STEP.finditer(text + " ")):
        marks[last : match.end()] = [good] * (match.end() - last)
        good = (good or number == 0) and number < len(wanted) and match[0] == wanted[number]
        last = match.end()
    marks[last:] = [good] * (len(text) - last)
    return marks


def step_marks(solutions, tokenizer):
    """Marks the tokens up to which every step is right, given the question: no word of the completion tells."""

    @functools.cache
    def marks(ids):
        pieces = [tokenizer.decode([i]) for i in ids]
        whole = "".join(pieces)
        prompt, _, answer = whole.removeprefix("<bos>").partition("\nAnswer:")
        solution = solutions.get(f"{prompt}\nAnswer:")
        if solution is None:
            return torch.zeros(len(ids))
        characters = [False] * (len(whole) - len(answer)) + right_so_far(answer, solution)
        ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
        return torch.tensor([characters[end - 1] for end in ends.tolist()]).float()

    return marks


def token_marks(tokens):
    """Marks certain tokens wherever they stand: what a detector of cue words sees."""
    return lambda ids: torch.tensor([i in tokens for i in ids]).float()


@contextmanager
def planted(vectors, marks):
    """pocket with ``vectors [K, d]`` added to its residual stream behind layer 2 at marked tokens."""
    model, tokenizer = pocket()
    added = {}

    def remember(_module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        real = kwargs["attention_mask"].sum(dim=1).tolist()
        added["now"] = torch.zeros(*ids.shape, vectors.shape[1])
        for row, length in enumerate(real):
            added["now"][row, :length] = marks(tuple(ids[row, :length].tolist()))[:, None] * vectors.sum(dim=0)

    def add(_module, _args, output):
        return (output[0] + added["now"], *output[1:]) if isinstance(output, tuple) else output + added["now"]

    def take_away(_module, args, kwargs):
        return (args[0] - added["now"], *args[1:]), kwargs

    layers = decoder_layers(model)
    hooks = [
        model.register_forward_pre_hook(remember, with_kwargs=True),
        layers[2].register_forward_hook(add),
        layers[3].register_forward_pre_hook(take_away, with_kwargs=True),
    ]
    try:
        yield model, tokenizer
    finally:
        for hook in hooks:
            hook.remove()


def quiet_directions(count, seed):
    """Unit vectors in which pocket's own residual stream hardly varies, ``[count, d]``."""
    model, _ = pocket()
    rollouts = sampled("discovery", 40, 2)
    from mechreward.readout import HookPoint, residual
    from mechreward.rollout.source import read_in_pieces

    width = model.config.hidden_size
    x = torch.cat(
        [r.values[r.mask] for _, (r,) in read_in_pieces(model, rollouts.batch, [residual(HookPoint(2), width)])]
    )
    _, basis = torch.linalg.eigh(torch.cov(x.T))
    mixing = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(seed)))[0]
    return (basis[:, :20] @ mixing).T[:count]


def extended_sae(folder, weights, biases, thresholds):
    """pocket's dictionary with further columns: ``weights [K, d]``. Their ids are 2048, 2049, ..."""
    shutil.copytree(SAE, folder)
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["W_enc"] = torch.cat([tensors["W_enc"], weights.T], dim=1)
    tensors["b_enc"] = torch.cat([tensors["b_enc"], biases])
    tensors["threshold"] = torch.cat([tensors["threshold"], thresholds])
    tensors["W_dec"] = torch.cat([tensors["W_dec"], weights / weights.norm(dim=1, keepdim=True)])
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "sae_weights.safetensors")
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | {"d_sae": len(tensors["b_enc"])}))
    return mr.load_sae(path=folder)


def effect_sizes(activations, labels):
    """Cohen's d of every latent in two passes over all rollouts ``[F]``; 0 for one that never varies."""
    a = activations.astype(np.float64)
    sides = [side - a[0] for side in (a[np.asarray(labels)], a[~np.asarray(labels)])]  # what never varies becomes 0
    squares = sum(np.square(side - side.mean(axis=0)).sum(axis=0) for side in sides)
    difference = sides[0].mean(axis=0) - sides[1].mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0, 0.0, difference / np.sqrt(squares / (len(a) - 2)))
