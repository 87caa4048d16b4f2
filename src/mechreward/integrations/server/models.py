"""The model behind the reward server: Hugging Face's, or vLLM's. Lives in the server's worker process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mechreward import pocket
from mechreward.errors import ConfigError, ModelMismatchError
from mechreward.readout import Readings, Readout, Request
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.capture import check_fits
from mechreward.rollout.sampling import end_tokens, load_model
from mechreward.rollout.source import HFSource


@dataclass(frozen=True)
class ModelLimits:
    """What a model can take.

    Attributes:
        longest: Tokens, prompt and response together, if it says.
        vocabulary: Token ids lie below.
        weights: Bytes that a file of its weights may have, in whatever precision.
    """

    longest: int | None
    vocabulary: int
    weights: int


class HuggingFaceModel:
    """One truncated forward a batch.

    Raises:
        MechRewardError: It cannot be loaded, or a readout does not fit it.
    """

    def __init__(self, name: str, dtype: str, readouts: Sequence[Readout]):
        self.model, self.tokenizer = load_model(name, getattr(torch, dtype))
        check_fits(readouts, self.model)
        self.ends, self.limits = end_tokens(self.model, self.tokenizer), limits(self.model)
        self._source = HFSource(self.model, self.tokenizer, reference=self.model)

    def read(self, batch: RolloutBatch, requests: Sequence[Request]) -> dict[Request, Readings]:
        """Readings for each request."""
        return self._source.read(batch, requests)

    @torch.no_grad()
    def load_weights(self, file: Path) -> int:
        """Go on with the weights of a safetensors file; returns how many tensors were taken.

        Raises:
            ModelMismatchError: The file is damaged, or does not fit; the model is as it was.
        """
        names, own = fitting(file, self.model), self.model.state_dict()
        with safe_open(file, framework="pt") as opened:
            for name in names:
                own[name].copy_(opened.get_tensor(name))
        return len(names)


class VLLMModel:
    """One prefill a rollout, by vLLM.

    Raises:
        MechRewardError: It cannot be loaded, or a readout does not fit it.
    """

    def __init__(self, name: str, dtype: str, readouts: Sequence[Readout], options: dict[str, Any]):
        from transformers import AutoConfig, AutoModelForCausalLM

        from mechreward.rollout.vllm import VLLMRollout

        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the server's worker is a process of its own
        try:
            config = AutoConfig.from_pretrained(pocket.resolve(name))
            with torch.device("meta"):
                self._shapes: Any = AutoModelForCausalLM.from_config(config)
            check_fits(readouts, self._shapes)
            self._rollout = VLLMRollout(name, readouts, backend="second_pass", dtype=dtype, **options)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            said = " ".join(str(error).split())
            raise ConfigError(
                f"vLLM cannot be started on {name} ({type(error).__name__}: {said[:300]}): look at --model and --vllm."
            ) from error
        self.tokenizer, self.ends = self._rollout.llm.get_tokenizer(), self._rollout.ends
        self.limits = replace(limits(self._shapes), longest=self._rollout.anatomy.longest)

    def read(self, batch: RolloutBatch, requests: Sequence[Request]) -> dict[Request, Readings]:
        """Readings for each request, whatever it says of whose activations it wants."""
        own = {request: replace(request, reads="policy") for request in requests}
        read = self._rollout.read(batch, list(own.values()))
        return {request: read[as_policy] for request, as_policy in own.items()}

    def load_weights(self, file: Path) -> int:
        """As :meth:`HuggingFaceModel.load_weights`."""
        names = fitting(file, self._shapes)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "model.safetensors").symlink_to(file.resolve())
            self._rollout.load_weights(folder)
        return len(names)


def limits(model: Any) -> ModelLimits:
    """What a Hugging Face model can take; it may be on the meta device."""
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    weights = (1 << 20) + 8 * sum(tensor.numel() for tensor in model.state_dict().values())
    return ModelLimits(longest if isinstance(longest, int) else None, config.vocab_size, weights)


def fitting(file: Path, model: Any) -> set[str]:
    """The names of a file's tensors, if they are this model's weights.

    Tied weights may be left out, and so may the head, which no reading looks at.

    Raises:
        ModelMismatchError: The file is damaged, or holds another model's weights, or not all.
    """
    own = model.state_dict()
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelMismatchError(f"The weights are not whole safetensors ({error}): push them again.") from error
    unknown = sorted(shapes.keys() - own.keys())
    if unknown:
        raise ModelMismatchError(
            f"The server's model has no tensor '{unknown[0]}' ({len(unknown)} such names): push what the policy's "
            "state_dict() calls its weights, without a wrapper's prefix."
        )
    parameters = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name in own}
    held = {id(parameters[name]) for name in shapes.keys() & parameters.keys()}
    missing = sorted(n for n, p in parameters.items() if id(p) not in held and not n.startswith("lm_head."))
    if missing:
        raise ModelMismatchError(
            f"Tensor '{missing[0]}' is missing ({len(missing)} are): push all weights at once, or readings would mix "
            "two versions."
        )
    for name, shape in shapes.items():
        if tuple(shape) != tuple(own[name].shape):
            raise ModelMismatchError(
                f"Tensor '{name}' has shape {list(shape)}, and the server's model has {list(own[name].shape)}: push "
                "the weights of the same architecture."
            )
    return set(shapes)
