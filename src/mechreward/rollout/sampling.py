"""Load a Hugging Face model, and sample rollouts from it."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import itertools
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mechreward import pocket, progress
from mechreward.errors import ConfigError, nearest
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.capture import caps_attention, leaves_out_softcap, unwrap
from mechreward.unfinished import Steps, digest


def load_model(name: str, dtype: torch.dtype | str = "auto") -> tuple[Any, Any]:
    """A causal language model in eval mode, on this process's GPU if there is one, and its tokenizer.

    Args:
        name: A folder, an id of the Hugging Face hub, or ``mechreward/pocket``.
        dtype: Of its weights; ``"auto"`` is the one that they are stored in.

    Raises:
        ConfigError: It cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = pocket.resolve(name)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(
            f"The model {name} cannot be loaded ({type(error).__name__}: {said[:200]}): give a folder, an id of the "
            f"hub, or {pocket.MODEL_ID}."
        ) from error
    if leaves_out_softcap(model):
        model.set_attn_implementation("eager")
    return model.to(_own_device()).eval(), tokenizer


def _own_device() -> torch.device:
    """This process's GPU, where a launcher has started one process for each; else the first; else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # A launcher that shows each process a GPU of its own counts LOCAL_RANK all the same.
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def keeping_softcap(name: str) -> dict[str, str]:
    """Options of `from_pretrained` under which a model's attention logits are capped where they should be (Gemma-2)."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(pocket.resolve(name)).get_text_config()
    return {"attn_implementation": "eager"} if caps_attention(config) else {}


def parse_dtype(name: str) -> torch.dtype:
    """``float32``, ``bfloat16`` or ``float16``.

    Raises:
        ConfigError: It is none of these.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigError(f"There is no dtype '{name}' for a model here.{nearest(name, known)}")
    return known[name]


def as_training(max_new_tokens: int, temperature: float = 1.0) -> dict[str, Any]:
    """Options of `generate` to sample as TRL does: the whole distribution, whatever the model's own settings are."""
    return {
        "do_sample": True,
        "temperature": temperature,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "max_new_tokens": max_new_tokens,
    }


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    num_generations: int,
    batch_size: int = 256,
    kept: Steps | None = None,
    **generate: Any,
) -> RolloutBatch:
    """Sample rollouts with HF `generate`, ``num_generations`` a prompt, groups contiguous.

    Uses the model's own generation settings unless ``generate`` overrides them; torch's global seed decides. With each
    kept batch the state of torch's generator is kept, so that sampling goes on as if it had never stopped.

    Args:
        model: Any HF causal language model.
        tokenizer: Its tokenizer.
        prompts: Plain texts.
        num_generations: Rollouts a prompt.
        batch_size: Rollouts sampled at once.
        kept: Batches that were sampled before, decided by :func:`samples_depend_on`; new ones are added.
        generate: Options of HF `generate`.
    """
    repeated = [p for p in prompts for _ in range(num_generations)]
    kept = Steps() if kept is None else kept  # an empty one is false
    ends, prompt_ids, completion_ids = end_tokens(model, tokenizer, generate.get("eos_token_id")), [], []
    for number, start in enumerate(range(0, len(repeated), batch_size)):
        asked = [list(ids) for ids in tokenizer(repeated[start : start + batch_size]).input_ids]
        if number < len(kept.done):
            completions, states = kept.done[number]
            if number == len(kept.done) - 1:
                _set_generator(model.device, states)
        else:
            completions = _completions(model, asked, ends, generate)
            kept.add([completions, _generator(model.device)])
        prompt_ids += asked
        completion_ids += completions
        progress.advance(len(completions))
    return RolloutBatch(
        prompts=repeated,
        completions=tokenizer.batch_decode(completion_ids, skip_special_tokens=True),
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        num_generations=num_generations,
        eos_token_ids=ends,
    )


def _completions(
    model: Any, asked: list[list[int]], ends: frozenset[int], generate: Mapping[str, Any]
) -> list[list[int]]:
    """What the model writes behind each of a batch of prompts, up to and including the first end token."""
    width = max(map(len, asked))
    # Padded by hand: many base models' tokenizers have no token for it, and any will do where nothing is read.
    ids = torch.tensor([[0] * (width - len(own)) + own for own in asked], device=model.device)
    attention = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in asked], device=model.device)
    output: Tensor = model.generate(input_ids=ids, attention_mask=attention, **generate)
    completions = []
    for row in output.tolist():
        completion = row[width:]
        end = next((t + 1 for t, token in enumerate(completion) if token in ends), len(completion))
        completions.append(completion[:end])
    return completions


def end_tokens(model: Any, tokenizer: Any, chosen: int | Sequence[int] | None = None) -> frozenset[int]:
    """Tokens that end a completion: the tokenizer's, and those at which `generate` stops (chat models have several)."""
    return frozenset(_ends(model, tokenizer, chosen))


def end_token(model: Any, tokenizer: Any) -> list[int]:
    """The token that ends a completion: the tokenizer's, else the first at which `generate` stops, else none."""
    return _ends(model, tokenizer, None)[:1]


def _ends(model: Any, tokenizer: Any, chosen: int | Sequence[int] | None) -> list[int]:
    if chosen is None:
        chosen = getattr(getattr(unwrap(model), "generation_config", None), "eos_token_id", None)
    others = [chosen] if isinstance(chosen, int) or chosen is None else chosen
    return [token for token in (tokenizer.eos_token_id, *others) if token is not None]


def samples_depend_on(
    model: Any, prompts: Sequence[str], num_generations: int, batch_size: int, seed: int, generate: Mapping[str, Any]
) -> dict[str, Any]:
    """All that decides what :func:`sample` gives, for :meth:`mechreward.unfinished.Unfinished.steps`."""
    return {
        "seed": seed,
        "set of questions": digest(list(prompts)),
        "number of rollouts a question": num_generations,
        "batch size": batch_size,
        "way of sampling": dict(generate),
        "model": fingerprint(model),
        "device": model.device.type,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }


def fingerprint(model: nn.Module) -> str:
    """Tells a model from one that was trained further or rounded, by up to 64 numbers of each parameter."""
    seen = hashlib.sha256(str(getattr(model, "generation_config", None)).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // 64)].float().cpu().numpy()
        seen.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + some.tobytes())
    return seen.hexdigest()[:12]


def _generator(device: torch.device) -> list[str]:
    """The state of torch's generator, of the CPU and of the model's GPU."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    return [base64.b64encode(state.numpy().tobytes()).decode() for state in states]


def _set_generator(device: torch.device, states: Sequence[str]) -> None:
    of_cpu, *of_gpu = (torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8) for state in states)
    torch.set_rng_state(of_cpu)
    if of_gpu:
        torch.cuda.set_rng_state(of_gpu[0], device)


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Give back every global random generator as it was: nothing that is drawn inside moves training."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def token_texts(decode: Callable[[tuple[int, ...]], str], ids: Sequence[int]) -> list[str]:
    """The text of each token, with the space that it stands for: some tokenizers drop it from a token on its own."""
    texts = [decode((token,)) for token in ids]
    for place, pair in enumerate(itertools.pairwise(ids), start=1):
        before, both = decode((pair[0],)), decode(pair)
        if both.startswith(before) and "\ufffd" not in both:
            texts[place] = both[len(before) :]
    return texts
