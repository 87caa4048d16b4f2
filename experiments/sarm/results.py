"""What experiment 04 says when its cells and policies are put side by side."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mechreward.errors import ConfigError
from mechreward.integrations.made import Made, made_by, made_sentence
from mechreward.integrations.recording import ENVIRONMENT, environment
from mechreward.train.results import (
    Difference,
    Run,
    finished_runs,
    read_runs,
    resampled_interval,
    t_interval,
    without_infinities,
)
from mechreward.train.results import difference as paired_difference
from sarm.config import SarmConfig

Found = dict[str, list[dict[str, Any]]]
"""By cell, each seed's ``result.json``."""


def write(config: SarmConfig, out: Path) -> str:
    """Write ``<name>.json`` and ``<name>.md``, and return the page."""
    found, text = report(config), ""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(without_infinities(found), indent=1, allow_nan=False)
    flat = re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", lambda m: "[" + re.sub(r"\n\s+", " ", m[1]) + "]", text)
    (out / f"{config.name}.json").write_text(flat + "\n", encoding="utf-8")
    shown = markdown(json.loads(flat))
    (out / f"{config.name}.md").write_text(shown, encoding="utf-8")
    return shown


def report(config: SarmConfig) -> dict[str, Any]:
    """Everything that is reported, as JSON: of the cells that are finished with every seed.

    Raises:
        ConfigError: The main cell is not.
    """
    found = read_cells(config)
    if config.main not in found:
        raise ConfigError(f"Cell '{config.main}' is not finished in {config.output}: make it with --stage models.")
    some = found[config.main][0]
    whole: dict[str, Any] = {
        "made": made_by_all(config, found),
        "settings": config.model_dump(mode="json"),
        "environment": environment(),
        "pairs": some["pairs"],
        "cells": {name: _of_cell(runs, list(config.test)) for name, runs in found.items()},
        "main": config.main,
        "unfinished": [name for name in config.cells if name not in found],
        "differences": {
            name: {test: difference(found[config.main], runs, test).report() for test in config.test}
            for name, runs in found.items()
            if name != config.main
        },
        "twins": {
            f"{one} - {two}": {test: difference(found[one], found[two], test).report() for test in config.test}
            for one, two in twins(config)
            if one in found and two in found
        },
        "grpo": None,
    }
    if config.grpo is not None and finished_runs(config.grpo.output):
        whole["grpo"] = of_policies(config)
    return whole


def twins(config: SarmConfig) -> list[tuple[str, str]]:
    """Cells that differ in the encoder alone: pretrained on last tokens, and otherwise; without the main cell's."""
    cells = {name: cell for name, cell in config.cells.items() if cell.head == "sarm" and not cell.shuffled}
    return [
        (one, two)
        for one, two in itertools.permutations(cells, 2)
        if one != config.main
        and cells[one].encoder == "sequence" != cells[two].encoder
        and cells[one] == cells[two].model_copy(update={"encoder": "sequence"})
    ]


def read_cells(config: SarmConfig) -> Found:
    """The results of every cell that is finished with all seeds."""
    found: Found = {}
    for name in config.cells:
        files = [Path(config.output) / "models" / name / f"seed-{seed}" / "result.json" for seed in config.seeds]
        if all(file.exists() for file in files):
            found[name] = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return found


def made_by_all(config: SarmConfig, cells: Iterable[str]) -> Made:
    """At which commits and when these cells were made, and the policies."""
    runs = [Path(config.output) / "models" / cell / f"seed-{seed}" for cell in cells for seed in config.seeds]
    if config.grpo is not None:
        runs += [file.parent for file in finished_runs(config.grpo.output)]
    return made_by(folder / ENVIRONMENT for folder in runs)


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


# -- policies ---------------------------------------------------------------------------------------------------------


def of_policies(config: SarmConfig) -> dict[str, Any]:
    """The finished runs of the configuration's arms, against each other and against stored results.

    Stored results hold each seed's accuracy and not its answers, so that intervals against them are over seeds alone.

    Raises:
        ConfigError: The stored results are of another budget.
    """
    assert config.grpo is not None
    found, budget = read_runs(config.grpo.output)
    arms = {name: found[name] for name in config.grpo.arms if name in found}
    base = _stored(config, budget)
    pairs = {f"{a} - {b}": difference_of(arms[a], arms[b]) for a, b in itertools.combinations(arms, 2)}
    return {
        "budget": budget,
        "stored": base,
        "arms": {name: _of_arm(runs) for name, runs in arms.items()},
        "unfinished": [
            f"{name} seed {seed}"
            for name, seed in itertools.product(config.grpo.arms, config.grpo.seeds)
            if seed not in {run.seed for run in found.get(name, [])}
        ],
        "against_stored": {
            f"{name} - {other}": _gap({run.seed: float(run.curve("right")[-1]) for run in runs}, per_seed)
            for name, runs in arms.items()
            for other, per_seed in base.items()
        },
        "pairs": {pair: gap for pair, gap in pairs.items() if gap is not None},
    }


def difference_of(one: list[Run], two: list[Run]) -> dict[str, Any] | None:
    """Accuracy at the last step, paired by seed and question; None where no seed is in both."""
    if not {run.seed for run in one} & {run.seed for run in two}:
        return None
    return paired_difference(one, two).report()


def _stored(config: SarmConfig, budget: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Each seed's accuracy at the last step, of the stored arms that reward the outcome or features alone."""
    if config.stored is None:
        return {}
    try:
        there = json.loads(Path(config.stored).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{config.stored} cannot be read ({error}): check the path given as `stored`.") from None
    if there["budget"] != budget:
        raise ConfigError(f"{config.stored} is of another budget than grpo: compare their settings.")
    arms = {name: there["arms"][name] for name in ("outcome", "features") if name in there["arms"]}
    return {
        name: {seed: values[-1] for seed, values in zip(arm["seeds"], arm["curves"]["right"]["per_seed"], strict=True)}
        for name, arm in arms.items()
    }


def _gap(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[str, Any]:
    """One arm's accuracy minus another's, over the seeds of both, with Student's interval."""
    gaps = [ours[seed] - theirs[seed] for seed in sorted(ours) if seed in theirs]
    return {"mean": float(np.mean(gaps)), "per_seed": gaps, "student": t_interval(gaps)}


def _of_arm(runs: list[Run]) -> dict[str, Any]:
    curves = np.stack([run.curve("right") for run in runs])
    raw = [[log.get("composite/sarm/raw", np.nan) for log in run.metrics] for run in runs]
    return {
        "seeds": [run.seed for run in runs],
        "steps": runs[0].steps,
        "curve": curves.mean(axis=0).tolist(),
        "per_seed": curves[:, -1].tolist(),
        "student": t_interval(curves[:, -1]),
        "greedy_accuracy": [run.figures[-1]["greedy_accuracy"] for run in runs],
        "right_steps": [float(run.curve("right_steps")[-1]) for run in runs],
        "tokens": [[float(run.curve("tokens")[step]) for step in (0, -1)] for run in runs],
        "kl": [float(np.mean([log["kl"] for log in run.metrics[-5:]])) for run in runs],
        "reward": [[float(np.mean(log[:5])), float(np.mean(log[-5:]))] for log in raw],
    }


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
    if found["unfinished"]:
        lines += ["", f"Planned in the configuration and not made: {', '.join(found['unfinished'])}."]
    main = found["main"]
    lines += ["", f"### `{main}` minus each other cell, paired by seed and prompt", ""]
    lines += ["| minus | " + " | ".join(tests) + " |", "|---" * (len(tests) + 1) + "|"]
    for name, sets in found["differences"].items():
        lines.append(f"| {name} | {' | '.join(_difference(sets[test]) for test in tests)} |")
    lines += ["", *_verdicts(found, tests)]
    if found["twins"]:
        lines += ["", "### Other cells that differ in the encoder alone", ""]
        lines += ["| pair | " + " | ".join(tests) + " |", "|---" * (len(tests) + 1) + "|"]
        for pair, sets in found["twins"].items():
            lines.append(f"| {pair} | {' | '.join(_difference(sets[test]) for test in tests)} |")
    lines += ["", "### How they were made", ""]
    lines += ["| cell | learning rates chosen | loss after pretraining | top 10 latents' share of the margins |"]
    lines += ["|---|---|---|---|"]
    for name, cell in found["cells"].items():
        rates = " ".join(f"{rate:g}" for rate in cell["learning_rate"] if rate is not None)
        losses = [loss for loss in cell["pretraining_loss"] if loss is not None]
        reached = f"{np.mean(losses):.3f}" if losses else ""
        share = f"{cell['top_latents'][tests[0]]:.2f}" if "top_latents" in cell else ""
        lines.append(f"| {name} | {rates} | {reached} | {share} |")
    if found["grpo"] is not None:
        lines += ["", *_policies(found["grpo"])]
    return "\n".join(lines) + "\n"


def _setting(found: dict[str, Any]) -> str:
    s, model = found["settings"]["reward_model"], found["settings"]["model"]
    sizes = "; ".join(f"{name}, {n['pairs']} pairs of {n['prompts']} prompts" for name, n in found["pairs"].items())
    left = sum(n["left_out"] for n in found["pairs"].values())
    return (
        f"{made_sentence(found)} "
        f"{model}, first {s['layers']} layers, {s['latents']} latents, k = {s['k']}, {s['epochs']} epochs of batches "
        f"of {s['batch_size']} pairs, {len(found['settings']['seeds'])} seeds. Pairs: {sizes}; {left} left out as "
        f"longer than {s['max_length']} tokens. Test pairs are the same for all cells and seeds. Intervals: 95 %, the "
        "wider ends of Student's t over seeds and of resampling seeds and prompts; a tie counts as half right."
    )


def _policies(grpo: Mapping[str, Any]) -> list[str]:
    t = grpo["budget"]["training"]
    steps = next(iter(grpo["arms"].values()))["steps"]
    lines = [
        "## As the only reward in GRPO",
        "",
        f"{t['max_steps']} steps of {t['prompts_per_step'] * t['num_generations']} rollouts, learning rate "
        f"{t['learning_rate']:g}, beta {t['beta']:g}: the budget of experiments 01 to 03, whose arms stand below as "
        "they were stored. Each seed's policy is rewarded by the reward model of that seed. Intervals against what is "
        "stored: 95 %, Student's t over seeds.",
        "",
        "| arm | seeds | "
        + " | ".join(f"step {step}" for step in steps)
        + " | by seed, at the end | greedy | tokens | KL "
        "| raw reward, first and last five steps |",
        "|---" * (len(steps) + 7) + "|",
    ]
    for name, arm in grpo["arms"].items():
        tokens, reward = np.mean(arm["tokens"], axis=0), np.array(arm["reward"], dtype=float).mean(axis=0)
        earned = "" if np.isnan(reward).any() else f"{reward[0]:+.2f}, {reward[1]:+.2f}"  # no reward model, no score
        lines.append(
            f"| {name} | {len(arm['seeds'])} | {' | '.join(f'{value:.3f}' for value in arm['curve'])} "
            f"| {' '.join(f'{value:.3f}' for value in arm['per_seed'])} | {np.mean(arm['greedy_accuracy']):.3f} "
            f"| {tokens[0]:.1f}, {tokens[1]:.1f} | {np.mean(arm['kl']):.4f} | {earned} |"
        )
    for name, per_seed in grpo["stored"].items():
        blank = "| " * len(steps)
        seeds = " ".join(f"{value:.3f}" for value in per_seed.values())
        lines.append(f"| {name}, stored | {len(per_seed)} {blank}| {seeds} | | | | |")
    if grpo["unfinished"]:
        lines += ["", f"Planned in the configuration and not made: {', '.join(grpo['unfinished'])}."]
    lines += ["", "| accuracy at the end | difference | by seed |", "|---|---|---|"]
    for pair, gap in grpo["against_stored"].items():
        seeds = " ".join(f"{value:+.3f}" for value in gap["per_seed"])
        lines.append(f"| {pair}, stored | {_with_student(gap)} | {seeds} |")
    for pair, gap in grpo["pairs"].items():
        seeds = " ".join(f"{value:+.3f}" for value in gap["per_seed"])
        lines.append(f"| {pair} | {_difference(gap)} | {seeds} |")
    return lines


def _with_student(gap: Mapping[str, Any]) -> str:
    low, high = gap["student"]
    return f"{gap['mean']:+.3f}" + ("" if low is None else f" ({low:+.3f} to {high:+.3f})")


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
            said.append(f"- `{found['main']}` is {more} accurate than `{name}` ({tests[0]}): {_difference(d)[:-2]}.")
        else:
            said.append(f"- No difference from `{name}` shown ({tests[0]}): {_difference(d)}.")
    return said
