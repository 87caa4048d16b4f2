"""What a discovery costs: seconds and peak memory against the tokens and the width of the dictionary.

    python benchmarks/discovery.py

Rollouts of `pocket`, dictionaries of random columns, 200 permutations. Sizes take turns in one process, and medians are
reported; memory is of a process of its own for each size.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import random
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

import mechreward as mr
from mechreward import verifiers
from mechreward.features.discover import discover
from mechreward.files import made_now, made_sentence
from mechreward.readout import HookPoint, Nonlinearity
from mechreward.rollout.labelled import Labelled, sample_rollouts
from mechreward.rollout.sampling import load_model
from mechreward.sae.handle import EncoderColumns, SAEHandle

WIDTHS = (1024, 4096, 16_384)
QUESTIONS = (15, 60)
RESULTS = Path(__file__).parent / "results"


def dictionary(width: int, d_model: int) -> SAEHandle:
    """Random columns, of which about half fire: the arithmetic is dense and does not depend on how many do."""
    weight = torch.randn(d_model, width, generator=torch.Generator().manual_seed(0))

    def read(ids: list[int] | None) -> EncoderColumns:
        columns = weight if ids is None else weight[:, ids]
        return EncoderColumns(columns, torch.zeros(columns.shape[1]), Nonlinearity("relu", {}))

    return SAEHandle(
        name=f"random/{width}/x",
        model_name=mr.pocket.MODEL_ID,
        hook_point=HookPoint(2),
        d_model=d_model,
        d_sae=width,
        kind="relu",
        read_encoder=read,
        read_decoder=lambda: (weight.T, torch.zeros(d_model)),
    )


def rollouts(questions: int) -> tuple[Any, Any, Labelled]:
    model, tokenizer = load_model(mr.pocket.MODEL_ID)
    asked = mr.pocket.dataset("discovery", questions)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 110}
    return model, tokenizer, sample_rollouts(model, tokenizer, asked, verifiers.gsm8k, 4, "pocket", **sampling)


def seconds(model: Any, tokenizer: Any, found_in: Labelled, width: int) -> float:
    began = time.perf_counter()
    discover(model, tokenizer, found_in, [dictionary(width, model.config.hidden_size)], "benchmark", "right")
    return time.perf_counter() - began


def peak(questions: int, width: int, queue: Any) -> None:
    """MiB that a discovery adds to the process at its peak (Linux alone tells)."""
    torch.set_num_threads(1)
    model, tokenizer, found_in = rollouts(questions)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: sampling had a higher one
    before = _resident("VmRSS")
    seconds(model, tokenizer, found_in, width)
    queue.put((_resident("VmHWM") - before) / 1024)


def _resident(figure: str) -> int:
    """A figure of this process's memory in KiB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(f"{figure}:"))


def measured(rounds: int) -> list[dict[str, Any]]:
    spawn = multiprocessing.get_context("spawn")
    sizes = [(questions, width) for questions in QUESTIONS for width in WIDTHS]
    drawn = {questions: rollouts(questions) for questions in QUESTIONS}
    times: dict[tuple[int, int], list[float]] = {size: [] for size in sizes}
    for turn in range(rounds):
        for size in random.Random(turn).sample(sizes, len(sizes)):
            times[size].append(seconds(*drawn[size[0]], size[1]))
    found = []
    for questions, width in sizes:
        queue = spawn.Queue()
        process = spawn.Process(target=peak, args=(questions, width, queue))
        process.start()
        memory = queue.get()
        process.join()
        batch = drawn[questions][2].batch
        tokens = int(batch.mask().sum())
        found.append(
            {"rollouts": len(batch), "tokens": tokens, "width": width, "rounds": times[questions, width]}
            | {"seconds": median(times[questions, width]), "peak_mib": memory}
        )
    return found


def page(report: dict[str, Any]) -> str:
    lines = [
        "# Discovery",
        "",
        f"`{report['command']}` on {report['machine']}, one thread; {report['versions']}. {made_sentence(report)}",
        "",
        "| rollouts | tokens | latents | seconds (lowest to highest) | µs a token and 1,000 latents | added memory |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in report["cases"]:
        each = 1e9 * case["seconds"] / case["tokens"] / case["width"]
        spread = f"{case['seconds']:.1f} ({min(case['rounds']):.1f} to {max(case['rounds']):.1f})"
        sizes = f"| {case['rollouts']:,} | {case['tokens']:,} | {case['width']:,} "
        lines.append(f"{sizes}| {spread} | {each:.1f} | {case['peak_mib']:,.0f} MiB |")
    lines += [
        "",
        f"All latents of a dictionary on rollouts of pocket, 200 permutations: medians of {report['rounds']} rounds.",
        "Stored activations would take rollouts x latents x 4 bytes aggregated, tokens x latents x 4 bytes otherwise.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = {
        "command": f"python benchmarks/discovery.py --rounds {options.rounds}",
        "made": made_now(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "numpy")),
        "rounds": options.rounds,
        "cases": measured(options.rounds),
    }
    (RESULTS / "discovery-cpu.json").write_text(json.dumps(report, indent=2) + "\n")
    (RESULTS / "discovery-cpu.md").write_text(page(report))
    print(page(report))


if __name__ == "__main__":
    main()
