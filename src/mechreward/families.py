"""Families of models: what a model's name says of its architecture.

Of a sparse autoencoder or a probe, nothing but a name tells which model it was made for, and models of different
architectures are often equally wide. So the name decides whether the policy can be that model, or a fine-tune of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

UNNAMED = "unknown"
"""What stands for the model's name in packs of which it is not known."""


class Family(NamedTuple):
    """One architecture.

    Attributes:
        pattern: Of whole parts of names in lower case, with ``-`` for ``_`` and spaces: what follows a last letter must
            not be a letter, what follows a last digit neither letter nor digit.
        types: The ``model_type`` of its Hugging Face configurations, of the text model or of the whole.
        centers: Whether TransformerLens' ``center_writing_weights`` takes the mean out of its residual stream: where it
            is normalised by LayerNorm (``weight_processing.py`` of TransformerLens: ``normalization_type`` LN, LNPre),
            not where by RMSNorm. None: TransformerLens' ``HookedTransformer`` does not load it, or does so in part.
    """

    pattern: str
    types: frozenset[str]
    centers: bool | None = False


def _families() -> Iterator[Family]:
    for pattern, types, centred in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")):
        yield Family(pattern, frozenset(types.split()), centred)


# A name belongs to each family that a part of it names. The special stand before the general, since what a pattern
# matched is cut out. Only families that Hugging Face's causal language models have: the others can't be a policy.
FAMILIES = tuple(_families())

_WHOLE = [
    re.compile(rf"(?<![a-z0-9])(?:{family.pattern})(?:(?<=[a-z])(?![a-z])|(?<=[0-9])(?![a-z0-9]))")
    for family in FAMILIES
]


_STAGE = re.compile(r"(checkpoint|ckpt|step|epoch|final|last|latest|best|merged|model|hf|policy)?[-\d]*")
"""What folders inside a model's own folder are called."""


def families(name: str) -> list[Family]:
    """The families that a model's name names.

    Args:
        name: A short name; a hub id, whose owner does not count; or a path, of which the last part counts that is not
            ``checkpoint-500`` and the like, or the name in the hub's cache (``models--owner--name/snapshots/...``).
    """
    parts = re.sub(r"[_\s]+", "-", name.lower()).replace("\\", "/").strip("/").split("/")
    cached = [part.split("--")[-1] for part in parts if part.startswith("models--")]
    while len(parts) > 1 and _STAGE.fullmatch(parts[-1]):
        parts.pop()
    part = cached[-1] if cached else parts[-1]
    found = []
    for family, whole in zip(FAMILIES, _WHOLE, strict=True):
        part, times = whole.subn("/", part)
        if times:
            found.append(family)
    return found


def model_types(name: str) -> frozenset[str]:
    """The ``model_type`` that the configuration of a model of this name can have; none where no family is named."""
    return frozenset().union(*(family.types for family in families(name)))


def centers(name: str) -> bool | None:
    """What :attr:`Family.centers` says of a model of this name; None where nothing, or both."""
    said = {family.centers for family in families(name)}
    return said.pop() if len(said) == 1 else None
