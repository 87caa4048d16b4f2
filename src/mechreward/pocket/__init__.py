"""`pocket`: a language model of about a million parameters, shipped with the library, to see everything work on.

It answers word problems and questions about invented people; its model card (``files/README.md``) says how it was made
and what it can do. ``scripts/build_pocket.py`` makes it again from nothing.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mechreward.errors import ConfigError, nearest
from mechreward.pocket.questions import SPLITS, questions

if TYPE_CHECKING:
    from datasets import Dataset

MODEL_ID = "mechreward/pocket"


def files() -> Path:
    """The folder with the shipped model, tokenizer, SAEs and probes."""
    return Path(__file__).parent / "files"


def path() -> str:
    """The shipped model's folder, for ``AutoModelForCausalLM.from_pretrained`` and trainers."""
    return str(files() / "model")


def resolve(model: str) -> str:
    """``mechreward/pocket`` becomes the shipped folder; any other model id stays as it is."""
    return path() if model == MODEL_ID else model


def named(model: str) -> str:
    """The inverse: wherever the shipped model lies, it is ``mechreward/pocket``."""
    return MODEL_ID if model == path() else model


def dataset(
    split: Literal["train", "discovery", "gate", "test"] = "train",
    n: int = 1000,
    seed: int = 0,
    kind: Literal["reasoning", "retrieval"] = "reasoning",
) -> Dataset:
    """Questions as a dataset that TRL can train on.

    Args:
        split: Splits never share a word problem or an unknown person.
        n: Number of questions.
        seed: Of the generator.
        kind: Word problems, or facts about invented people.

    Returns:
        Columns ``prompt``, ``solution`` (a full right completion), ``answer``, ``kind``, ``known``.

    Raises:
        ConfigError: An unknown split or kind.
        MissingExtraError: The package `datasets` is not installed.
    """
    if split not in SPLITS:
        raise ConfigError(f"There is no split '{split}'.{nearest(split, SPLITS)}")
    if kind not in ("reasoning", "retrieval"):
        raise ConfigError(f"There is no kind of question '{kind}'.{nearest(kind, ['reasoning', 'retrieval'])}")
    from mechreward.extras import require

    columns = ("prompt", "solution", "answer", "kind", "known")
    rows = itertools.islice(questions(split, seed, kind), n)
    return require("datasets", "trl").Dataset.from_list([{c: getattr(q, c) for c in columns} for q in rows])
