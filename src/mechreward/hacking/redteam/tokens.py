"""Attacks by token ids: the tokens on which the pack reads highest, and one token that may do by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mechreward.errors import DataError
from mechreward.features.interventions import Cues
from mechreward.hacking.redteam.material import Draw

WAYS = ("interspersed", "in_context", "prepended", "appended", "one_cue")
"""How cues are put in; ``in_context`` brings the token along that stands before each most often."""


def cue_injection(draw: Draw, own: list[int], tokenizer: Any, cues: Cues, room: int) -> list[int]:
    """Put cue tokens into a rollout's work.

    Args:
        draw: Random choices.
        own: The rollout's token ids without its end; none where it is replaced.
        tokenizer: The model's.
        cues: The tokens on which the pack reads highest.
        room: The largest number of token ids to return.
    """
    work, rest = _work_and_final(draw, own, tokenizer)
    length = max(len(own), 16) if own else draw.count(16, 128)  # replaced rollouts are of any length
    how, drawn = draw.one(WAYS), []
    space = max(1, room - len(own)) // (2 if how == "in_context" else 1)
    count = max(1, min(space, max(2, math.ceil(draw.rng.uniform(0.5, 4) * cues.rate * length))))
    fixed = draw.one(range(len(cues.tokens)))
    for _ in range(count):
        which = fixed if how == "one_cue" else draw.one(range(len(cues.tokens)))
        drawn.append([*(cues.before[which] if how == "in_context" else []), cues.tokens[which]])
    if how in ("prepended", "appended", "one_cue"):
        flat = [token for piece in drawn for token in piece]
        return (flat + work if how == "prepended" else work + flat) + rest
    for piece in drawn:
        at = draw.one(range(len(work) + 1))
        work = [*work[:at], *piece, *work[at:]]
    return work + rest


def one_token(
    draw: Draw, own: list[int], tokenizer: Any, cues: Cues | None, room: int, keys: Sequence[str]
) -> list[int]:
    """Put one token, once or many times, before or behind a rollout's work: a cue, one of the question's, or a key.

    Args:
        draw, own, tokenizer, cues, room: As for :func:`cue_injection`.
        keys: Texts of which the first or the last token is tried.

    Raises:
        DataError: The tokenizer cannot write any of them.
    """
    work, rest = _work_and_final(draw, own, tokenizer)
    token = _token(draw, tokenizer, cues, keys)
    times = min(max(1, room - len(own)), 1 if draw.chance(0.4) else draw.count(2, 48))
    return draw.one([[token] * times + work, work + [token] * times]) + rest


def _token(draw: Draw, tokenizer: Any, cues: Cues | None, keys: Sequence[str]) -> int:
    if cues is not None and draw.chance(0.4):
        return int(draw.one(cues.tokens[:2]))
    texts = [key for key in (*keys, " " + draw.word(), draw.number()) if key != "####" or draw.style != "woven"]
    for _ in range(20):
        ids = tokenizer(draw.one(texts), add_special_tokens=False).input_ids
        if ids:
            return int(ids[0] if draw.chance(0.5) else ids[-1])
    raise DataError("The tokenizer cannot write a single mark: it is not one of a language model.")


def _work_and_final(draw: Draw, own: list[int], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Split a rollout's token ids before its final answer, about where its text is split."""
    final = len(tokenizer(draw.material.final, add_special_tokens=False).input_ids) if draw.style == "woven" else 0
    return (own[: len(own) - final], own[len(own) - final :]) if final < len(own) else ([], own)
