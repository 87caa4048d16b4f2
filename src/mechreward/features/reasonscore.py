"""ReasonScore: latents that are active around the words of reasoning (Galichin et al., arXiv 2503.18878).

    ReasonScore_i = mu+_i / sum_j mu+_j * H_i^alpha - mu-_i / sum_j mu-_j

mu+ is a latent's mean activation in windows around reasoning words, mu- its mean on all other tokens of the same texts,
and H the entropy of its mean activations around the single words, divided by ln of their number, so that a latent of
one word alone counts little. Windows reach one token to the left and two to the right of a word; a word of several
tokens is matched as a whole; activations are multiplied by the norm of the latent's decoder row first. Words, windows
and alpha = .7 are those of the authors' repository (AIRI-Institute/SAE-Reasoning).

It looks at words, not at labels. Ma et al. (arXiv 2601.05679) found that 45 to 90 % of such features fire when a few
cue words are put into any text: the gate's injection test is there for that.

An earlier port for rewards, which is not followed here, takes windows of two and three tokens, leaves the entropy
unnormalised, takes mu- from another corpus, matches only a phrase's first token, leaves the decoder's norm out and
counts ``but`` and ``another`` in lower case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mechreward.errors import PackError
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.source import read_in_pieces
from mechreward.sae.handle import SAEHandle

Words = Sequence[Sequence[str]]

WORDS: Words = [
    *(
        [start + form for form in (word, word.capitalize()) for start in ("", " ")]
        for word in ("alternatively", "hmm", "maybe", "wait", "perhaps", "let me", "therefore", "however")
    ),
    ["But", " But"],  # in lower case these two are too common
    ["Another", " Another"],
]
"""The ways in which each reasoning word is written."""

LEFT, RIGHT, ALPHA, EPSILON = 1, 2, 0.7, 1e-12


def reason_scores(
    model: Any, tokenizer: Any, batch: RolloutBatch, sae: SAEHandle, words: Words = WORDS
) -> NDArray[np.float64]:
    """The score of every latent, ``[d_sae]``, over the completions' tokens that can be read.

    Args:
        model: The model that the dictionary reads.
        tokenizer: Its tokenizer.
        batch: Rollouts of the model.
        sae: The dictionary.
        words: Written forms of each reasoning word.

    Raises:
        PackError: No reasoning word occurs.
    """
    forms = [[ids for form in each if (ids := _encoded(tokenizer, form))] for each in words]
    sums, counts = torch.zeros(len(words) + 2, sae.d_sae, dtype=torch.float64), torch.zeros(len(words) + 2)
    for piece, (readings,) in read_in_pieces(model, batch, [sae.all_features()]):
        around = torch.zeros(len(words), *readings.mask.shape, dtype=torch.bool)
        for row, tokens in enumerate(piece.completion_ids):
            ids = [token if own else -1 for token, own in zip(tokens, piece.own[row].tolist(), strict=False)]
            for word, written in enumerate(forms):
                for t in _around(ids, written):
                    around[word, row, t] = True
        any_word = around.any(dim=0)
        sets = torch.cat([around, any_word[None], ~any_word[None]])[:, readings.mask.cpu()].double()  # [R + 2, N]
        sums += sets @ readings.values[readings.mask].cpu().double()
        counts += sets.sum(dim=1)
    if counts[len(words)] == 0:
        said = ", ".join(each[0].strip() for each in words)
        raise PackError(f"None of the reasoning words ({said}) occurs in the rollouts: use another method.")
    norms = sae.read_decoder()[0].norm(dim=1).double()
    means = (sums / counts.clamp(min=1)[:, None] * norms).numpy()
    return scores_of(means[:-2], means[-2], means[-1])


def scores_of(single: NDArray, positive: NDArray, negative: NDArray) -> NDArray[np.float64]:
    """ReasonScore from mean activations around each word ``[R, F]``, around any ``[F]``, and elsewhere ``[F]``."""
    p = single / (single.sum(axis=0) + EPSILON)
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=0)
    h = entropy / math.log(len(p)) if len(p) > 1 else np.ones(p.shape[1])
    return positive / (positive.sum() + EPSILON) * h**ALPHA - negative / (negative.sum() + EPSILON)


def _encoded(tokenizer: Any, form: str) -> list[int]:
    """The form's tokens; none where the tokenizer cannot write it."""
    ids = tokenizer(form, add_special_tokens=False).input_ids
    return [] if tokenizer.unk_token_id in ids else list(ids)


def _around(ids: Sequence[int], written: list[list[int]]) -> set[int]:
    """Places in the windows around every occurrence of a word in any of its forms."""
    found = set()
    for form in written:
        for start in range(len(ids) - len(form) + 1):
            if list(ids[start : start + len(form)]) == form:
                found |= set(range(max(0, start - LEFT), min(len(ids), start + len(form) + RIGHT)))
    return found
