"""Hugging Face models: the names that scripts import."""

from mechreward.rollout.sampling import (
    end_token,
    end_tokens,
    fingerprint,
    keeping_softcap,
    load_model,
    parse_dtype,
    sample,
    samples_depend_on,
)
from mechreward.rollout.source import (
    MAX_NUMBERS,
    MAX_TOKENS,
    HFSource,
    group_requests,
    over_tokens,
    pooled,
    read_forward,
    read_in_pieces,
    refuse_dense,
)

__all__ = [
    "MAX_NUMBERS",
    "MAX_TOKENS",
    "HFSource",
    "end_token",
    "end_tokens",
    "fingerprint",
    "group_requests",
    "keeping_softcap",
    "load_model",
    "over_tokens",
    "parse_dtype",
    "pooled",
    "read_forward",
    "read_in_pieces",
    "refuse_dense",
    "sample",
    "samples_depend_on",
]
