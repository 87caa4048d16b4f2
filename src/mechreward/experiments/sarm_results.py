"""What experiment 04 says when its cells and policies are put side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mechreward.errors import ConfigError
from mechreward.experiments import page, results
from mechreward.experiments.results import Difference, resampled_interval, t_interval
from mechreward.experiments.runner import environment
from mechreward.experiments.sarm import SarmConfig

Found = dict[str, list[dict[str, Any]]]
"""By cell, each seed's ``result.json``."""


def write(config: SarmConfig, out: Path) -> str:
    """Write ``<name>.json`` and ``<name>.md``, and return the page."""
    found, text = report(config), ""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results._without_infinities(found), indent=1, allow_nan=False)
    flat = re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", lambda m: "[" + re.sub(r"\n\s+", " ", m[1]) + "]", text)
    (out / f"{config.name}.json").write_text(flat + "\n", encoding="utf-8")
    shown = markdown(json.loads(flat))
    (out / f"{config.name}.md").write_text(shown, encoding="utf-8")
    return shown


def report(config: SarmConfig) -> dict[str, Any]:
    """Everything that is reported, as JSON.

    Raises:
        ConfigError: A cell is not finished.
    """
    found = read_cells(config)
    some = found[config.main][0]
    whole: dict[str, Any] = {
        "settings": config.model_dump(mode="json"),
        "environment": environment(),
        "pairs": some["pairs"],
        "cells": {name: _of_cell(runs, list(config.test)) for name, runs in found.items()},
        "main": config.main,
        "differences": {
            name: {test: difference(found[config.main], runs, test).report() for test in config.test}
            for name, runs in found.items()
            if name != config.main
        },
        "grpo": None,
    }
    if config.grpo is not None and any(Path(config.grpo.output).glob("*/seed-*/summary.json")):
        whole["grpo"] = results.compare(config.grpo.output, "outcome", 0.6)
    return whole


def read_cells(config: SarmConfig) -> Found:
    """The results of every cell of the configuration.

    Raises:
        ConfigError: One is missing.
    """
    found: Found = {}
    for name in config.cells:
        for seed in config.seeds:
            file = Path(config.output) / "models" / name / f"seed-{seed}" / "result.json"
            if not file.exists():
                raise ConfigError(f"There is no {file}: finish the cells first, with --stage models.")
            found.setdefault(name, []).append(json.loads(file.read_text(encoding="utf-8")))
    return found


def _of_cell(runs: Sequence[Mapping[str, Any]], tests: list[str]) -> dict[str, Any]:
    told: dict[str, Any] = {"sets": {test: _accuracy([_correct(run, test) for run in runs]) for test in tests}}
    for key in ("learning_rate", "pretraining_loss", "seconds"):
        told[key] = [run.get(key) for run in runs]
    if runs[0].get("top_latents"):
        told["top_latents"] = {test: float(np.mean([run["top_latents"][test] for run in runs])) for test in tests}
    return told


def _correct(run: Mapping[str, Any], test: str) -> np.ndarray:
    """For each prompt of a set, the share of its pairs that are ranked rightly."""
    return np.array(run["sets"][test]["correct"])


def _accuracy(per_prompt: list[np.ndarray]) -> dict[str, Any]:
    means = [float(values.mean()) for values in per_prompt]
    return {
        "mean": float(np.mean(means)),
        "per_seed": means,
        "student": t_interval(means),
        "resampled": resampled_interval(per_prompt),
    }


def difference(one: Sequence[Mapping[str, Any]], two: Sequence[Mapping[str, Any]], test: str) -> Difference:
    """Pairwise accuracy on a set, one cell minus another, paired by seed and prompt."""
    gaps = [_correct(a, test) - _correct(b, test) for a, b in zip(one, two, strict=True)]
    means = [float(gap.mean()) for gap in gaps]
    return Difference(float(np.mean(means)), means, resampled_interval(gaps), t_interval(means))


# -- the page ---------------------------------------------------------------------------------------------------------


def markdown(found: dict[str, Any]) -> str:
    """Tables: pairwise accuracy, differences, what the latents carry; then the policies."""
    tests = list(found["settings"]["test"])
    lines = [_setting(found), "", "### Pairwise accuracy", ""]
    lines += ["| cell | " + " | ".join(tests) + " | by seed, the first |", "|---" * (len(tests) + 2) + "|"]
    for name, cell in found["cells"].items():
        cells = [_mean(cell["sets"][test]) for test in tests]
        seeds = " ".join(f"{value:.3f}" for value in cell["sets"][tests[0]]["per_seed"])
        lines.append(f"| {name} | {' | '.join(cells)} | {seeds} |")
    main = found["main"]
    lines += ["", f"### `{main}` minus each other cell, paired by seed and prompt", ""]
    lines += ["| minus | " + " | ".join(tests) + " |", "|---" * (len(tests) + 1) + "|"]
    for name, sets in found["differences"].items():
        lines.append(f"| {name} | {' | '.join(_difference(sets[test]) for test in tests)} |")
    lines += ["", *_verdicts(found, tests), "", "### How they were made", ""]
    lines += ["| cell | learning rates chosen | loss after pretraining | top 10 latents' share of the margins | s |"]
    lines += ["|---|---|---|---|---|"]
    for name, cell in found["cells"].items():
        rates = " ".join(f"{rate:g}" for rate in cell["learning_rate"] if rate is not None)
        losses = [loss for loss in cell["pretraining_loss"] if loss is not None]
        reached = f"{np.mean(losses):.3f}" if losses else ""
        share = f"{cell['top_latents'][tests[0]]:.2f}" if "top_latents" in cell else ""
        lines.append(f"| {name} | {rates} | {reached} | {share} | {np.mean(cell['seconds']):.0f} |")
    if found["grpo"] is not None:
        lines += ["", "## As the only reward in GRPO", "", page.markdown(found["grpo"]).rstrip()]
    return "\n".join(lines) + "\n"


def _setting(found: dict[str, Any]) -> str:
    s, model = found["settings"]["reward_model"], found["settings"]["model"]
    sizes = "; ".join(f"{name}, {n['pairs']} pairs of {n['prompts']} prompts" for name, n in found["pairs"].items())
    left = sum(n["left_out"] for n in found["pairs"].values())
    return (
        f"{model}, first {s['layers']} layers, {s['latents']} latents, k = {s['k']}, {s['epochs']} epochs of batches "
        f"of {s['batch_size']} pairs, {len(found['settings']['seeds'])} seeds. Pairs: {sizes}; {left} left out as "
        f"longer than {s['max_length']} tokens. Test pairs are the same for all cells and seeds. Intervals: 95 %, the "
        "wider ends of Student's t over seeds and of resampling seeds and prompts; a tie counts as half right."
    )


def _ends(figure: Mapping[str, Any]) -> tuple[float, float] | None:
    """The wider ends of both intervals; None for a single seed."""
    if None in figure["student"]:
        return None
    low, high = zip(figure["student"], figure["resampled"], strict=True)
    return min(low), max(high)


def _mean(figure: Mapping[str, Any]) -> str:
    ends = _ends(figure)
    return f"{figure['mean']:.3f}" + ("" if ends is None else f" ({ends[0]:.3f} to {ends[1]:.3f})")


def _difference(figure: Mapping[str, Any]) -> str:
    ends = _ends(figure)
    shown = "" if ends is None else f" ({ends[0]:+.3f} to {ends[1]:+.3f})"
    return f"{figure['mean']:+.3f}{shown}" + (" *" if figure["shown"] else "")


def _verdicts(found: dict[str, Any], tests: list[str]) -> list[str]:
    """What the starred differences say, on the first set."""
    said = ["A star: both intervals leave out 0, without correction for the number of comparisons.", ""]
    for name, sets in found["differences"].items():
        d = sets[tests[0]]
        if d["shown"]:
            more = "more" if d["mean"] > 0 else "less"
            said.append(f"- `{found['main']}` is {more} accurate than `{name}` on {tests[0]}: {_difference(d)[:-2]}.")
        else:
            said.append(f"- No difference from `{name}` shown on {tests[0]}: {_difference(d)}.")
    return said
