"""What reading features costs vLLM: CPU seconds of generation with readings, beside generation alone.

    python benchmarks/vllm_overhead.py [--rounds 7]

Needs vLLM's CPU build (`scripts/engine_env.sh vllm`). All engines live in one process and take turns on the same
prompts, in a new order every round; every ratio is taken within a round, and the first round is discarded. CPU seconds
of the process, all threads, so that what else the machine does counts little. Leaves
`benchmarks/results/vllm_overhead-cpu.json` and a page made from it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mechreward import pocket
from mechreward.readout import HookPoint, Nonlinearity, Readout
from mechreward.rollout.vllm import VLLMRollout

RESULTS = Path(__file__).parent / "results"
TARGET = 0.05
"""Of plain generation, for what is read while vLLM generates."""

PROMPT, COMPLETION, ROLLOUTS = 40, 64, 16
LAYER, FEATURES, LATENTS = 6, 20, 4096
ENGINE = {
    "dtype": "float32", "max_model_len": 256, "max_num_seqs": 16, "enable_prefix_caching": False,
    "distributed_executor_backend": "uni", "enforce_eager": True, "seed": 0,
}  # fmt: skip


def small_llama(folder: Path) -> str:
    """A random Llama of 85 M parameters: 12 layers of width 768."""
    tokenizer = AutoTokenizer.from_pretrained(pocket.resolve("mechreward/pocket"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=4, head_dim=64, max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def random_features(kind: str, width: int) -> Readout:
    """K features of a random dictionary; of TopK ones all latents are computed."""
    keep = torch.arange(FEATURES)
    weight, bias = torch.randn(width, LATENTS) / width**0.5, torch.zeros(LATENTS)
    if kind == "topk":
        return Readout(kind, tuple(map(str, range(FEATURES))), HookPoint(LAYER), weight, bias,
                       Nonlinearity("topk", {}, 32), keep=keep)  # fmt: skip
    parameters = {"threshold": torch.full((FEATURES,), 0.5)}
    return Readout(kind, tuple(map(str, range(FEATURES))), HookPoint(LAYER), weight[:, keep].contiguous(),
                   bias[keep], Nonlinearity("jumprelu", parameters))  # fmt: skip


def arms(model: str, width: int) -> dict[str, Callable[[], Any]]:
    """What takes turns: each generates the same rollouts, and reads them in its way or not at all."""
    prompts = [{"prompt_token_ids": [(7 * i + j) % 60 + 5 for j in range(PROMPT)]} for i in range(ROLLOUTS)]
    sampling = {"temperature": 1.0, "max_tokens": COMPLETION, "ignore_eos": True, "detokenize": False}
    jumprelu, topk = random_features("jumprelu", width), random_features("topk", width)

    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    plain = LLM(model=model, **ENGINE)
    ids = [prompt["prompt_token_ids"] for prompt in prompts]
    found: dict[str, Callable[[], Any]] = {
        "generation alone": lambda: plain.generate(prompts, SamplingParams(**sampling), use_tqdm=False)
    }
    ways = {"aux": ("aux", jumprelu), "aux, TopK": ("aux", topk), "hook": ("hook", jumprelu)}
    ways |= {"second pass": ("second_pass", jumprelu), "Hugging Face forward": ("forward", jumprelu)}
    for name, (backend, readout) in ways.items():
        rollout = VLLMRollout(model, [readout], backend=backend, **ENGINE)
        found[name] = lambda rollout=rollout: rollout.generate(ids, **sampling)
    return found


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description="What reading features costs vLLM.")
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        turns = arms(small_llama(Path(folder)), 768)
        for number in range(rounds + 1):
            for name in random.sample(list(turns), len(turns)):
                began = time.process_time()
                turns[name]()
                spent = time.process_time() - began
                if number:
                    seconds.setdefault(name, []).append(spent)
                print(f"round {number}: {name} {spent:.2f} s", flush=True)
    RESULTS.mkdir(exist_ok=True)
    packages = {name: importlib.metadata.version(name) for name in ("vllm-cpu", "torch", "transformers")}
    result = {"command": f"python benchmarks/vllm_overhead.py --rounds {rounds}", "packages": packages,
              "threads": torch.get_num_threads(), "seconds": seconds}  # fmt: skip
    (RESULTS / "vllm_overhead-cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "vllm_overhead-cpu.md").write_text(page(result))
    print(page(result))


def page(result: dict[str, Any]) -> str:
    """The table, from the stored seconds."""
    alone = result["seconds"]["generation alone"]
    packages = ", ".join(f"{name} {version}" for name, version in result["packages"].items())
    lines = [
        "# What reading costs vLLM",
        "",
        f"`{result['command']}`; {packages}; {result['threads']} threads. A random Llama of 85 M parameters, float32, "
        f"eager; {ROLLOUTS} rollouts of {PROMPT} + {COMPLETION} tokens, {FEATURES} of {LATENTS:,} latents behind layer "
        f"{LAYER}. CPU seconds of the process; ratios within a round, medians of {len(alone)} rounds (lowest to "
        f"highest). Target while vLLM generates: at most {TARGET:.0%}.",
        "",
        "| | CPU seconds | more than generation alone |",
        "| --- | ---: | ---: |",
    ]
    for name, own in result["seconds"].items():
        more = sorted(a / b - 1 for a, b in zip(own, alone, strict=True))
        share = "" if name == "generation alone" else f"{median(more):+.1%} ({more[0]:+.1%} to {more[-1]:+.1%})"
        lines.append(f"| {name} | {median(own):.2f} | {share} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
