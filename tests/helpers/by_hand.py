"""What latents do on rollouts of pocket, by Hugging Face's own hidden states and SAELens' own encoder, one by one."""

import functools

import numpy as np
import sae_lens
import torch
from planting import pocket, sampled

import mechreward as mr

SAES = {"jumprelu": "layer_2/width_2k/canonical", "topk": "layer_2/width_2k/topk"}


@functools.cache
def saelens(kind):
    return sae_lens.SAE.load_from_disk(mr.pocket.files() / "saes" / kind)


@functools.cache
def ours(kind):
    return mr.load_sae("pocket-res-canonical", SAES[kind])


@functools.cache
def rollouts():
    return sampled("discovery", 40, 2)


@torch.no_grad()
def per_token(batch, row, kind, folded=False):
    """Activations at the completion tokens of one rollout that a reward may read ``[T, F]`` float64: not the last."""
    model, _ = pocket()
    prompt, completion = list(batch.prompt_ids[row]), list(batch.completion_ids[row])
    hidden = model(input_ids=torch.tensor([prompt + completion]), output_hidden_states=True).hidden_states[3][0]
    sae = saelens(kind)
    acts = sae.encode(hidden[len(prompt) : -1]).double()
    return (acts * sae.W_dec.double().norm(dim=1) if folded else acts).numpy()


@functools.cache
def tokens(row, kind):
    """The same for one of :func:`rollouts`."""
    return per_token(rollouts().batch, row, kind)


@functools.cache
def means(kind):
    """Mean activation of every latent over each of the rollouts, ``[n, F]``."""
    return np.stack([tokens(row, kind).mean(axis=0) for row in range(len(rollouts()))])
