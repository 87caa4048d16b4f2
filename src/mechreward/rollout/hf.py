"""Hugging Face models: the names that scripts import."""

from mechreward.rollout.sampling import load_model, sample
from mechreward.rollout.source import HFSource, read_forward

__all__ = ["HFSource", "load_model", "read_forward", "sample"]
