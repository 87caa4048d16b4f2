"""Preference pairs for experiment 04: read from a file or the hub, or sampled from the model itself."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechreward import pocket, verifiers
from mechreward.errors import DataError
from mechreward.pocket.questions import OTHER_WORDING, WORDING, questions
from mechreward.rollout.labelled import sample_rollouts
from mechreward.rollout.sampling import load_model
from mechreward.unfinished import digest
from sarm import model as method
from sarm.config import Pairs, SarmConfig
from sarm.model import Tokens
from sarm.preferences import Preference, read_preferences, write_preferences


def prepared_pairs(config: SarmConfig, name: str, source: Pairs) -> list[Preference]:
    """Read a set's pairs; pairs of pocket are sampled once and kept in the experiment's folder."""
    if source.path != pocket.MODEL_ID:
        wanted = None if source.rows is None else source.first + source.rows
        pairs = read_preferences(source.path, source.split, wanted)[source.first :]
        if not pairs:
            raise DataError(f"{source.path} has no pairs after the first {source.first}.")
        return pairs
    cache_key = {"model": config.model, "verifier": config.verifier, **source.model_dump()}
    file = Path(config.output) / "pairs" / f"{name.replace(' ', '-')}-{digest(cache_key)}.jsonl"
    if not file.exists():
        write_preferences(sampled_pairs(config, source), file)
    return read_preferences(file)


def sampled_pairs(config: SarmConfig, source: Pairs) -> list[Preference]:
    """Pair the model's own right and wrong answers to the same questions, as texts; no text is used twice."""
    model, tokenizer = load_model(config.model)
    wording = WORDING if source.wording == "usual" else OTHER_WORDING
    low, high = source.steps
    stream = questions(source.split, steps=(low, high), wording=wording)  # pyright: ignore[reportArgumentType]
    asked = list(itertools.islice(stream, source.first, source.first + (source.rows or 0)))
    found = sample_rollouts(
        model,
        tokenizer,
        {"prompt": [q.prompt for q in asked], "answer": [q.answer for q in asked]},
        getattr(verifiers, config.verifier),
        source.rollouts,
        f"{source.path} ({source.split})",
        seed=0,
        batch_size=512,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=64 if high <= 4 else 96,
    )
    pairs, texts = [], found.batch.texts
    for group in np.unique(found.groups):
        rows = np.flatnonzero(found.groups == group)
        right, wrong = (list(dict.fromkeys(texts[i] for i in rows if found.labels[i] == label)) for label in (1, 0))
        prompt = found.batch.prompts[rows[0]]
        both = list(zip(right, wrong, strict=False))[: source.per_question]
        pairs += [Preference(prompt, chosen, rejected) for chosen, rejected in both]
    return pairs


@dataclasses.dataclass(frozen=True)
class PairSet:
    """A set of pairs that fit into the model's length.

    Attributes:
        pairs: As text.
        tokens: As the reward model reads them.
        groups: The number of each pair's prompt, ``[P]``: pairs of one prompt are alike.
        left_out: How many were too long.
    """

    pairs: list[Preference]
    tokens: list[tuple[Tokens, Tokens]]
    groups: NDArray[np.int64]
    left_out: int

    @classmethod
    def of(cls, pairs: Sequence[Preference], tokenizer: Any, longest: int) -> PairSet:
        tokens = [method.encoded_pair(tokenizer, pair) for pair in pairs]
        kept = [i for i, sides in enumerate(tokens) if max(len(side.ids) for side in sides) <= longest]
        if not kept:
            raise DataError(f"All {len(pairs)} pairs are longer than max_length = {longest} tokens: raise it.")
        _, groups = np.unique([json.dumps(pairs[i].prompt) for i in kept], return_inverse=True)
        return cls([pairs[i] for i in kept], [tokens[i] for i in kept], groups, len(pairs) - len(kept))

    def count(self) -> dict[str, int]:
        """Return how many pairs there are, of how many prompts, and how many more were too long."""
        return {"pairs": len(self.pairs), "prompts": len(np.unique(self.groups)), "left_out": self.left_out}
