"""The results of experiment 04: its cells and policies side by side."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.comparison import accuracy_at_the_end, finished_runs, gap, read_runs
from common.provenance import made_by
from common.tables import numbers, table
from mechreward import stats
from mechreward.errors import ConfigError
from mechreward.files import ENVIRONMENT, Made, environment, made_sentence
from mechreward.train.results import Difference, Run, difference, widest, without_infinities
from sarm.cells import cell_folder
from sarm.config import SarmConfig

Found = dict[str, list[dict[str, Any]]]
"""By cell, each seed's ``result.json``."""


def report(config: SarmConfig) -> dict[str, Any]:
    """Return everything that is reported, as JSON, of the cells that are finished with every seed.

    Raises:
        ConfigError: The main cell is not finished.
    """
    found, tests = read_cells(config), list(config.test)
    if config.main not in found:
        raise ConfigError(f"Cell '{config.main}' is not finished in {config.output}: make it with --stage models.")

    def differences(one: str, two: str) -> dict[str, Any]:
        return {test: minus(found[one], found[two], test).report() for test in tests}

    whole: dict[str, Any] = {
        "made": made_by_all(config, found),
        "settings": config.model_dump(mode="json"),
        "environment": environment(),
        "pairs": found[config.main][0]["pairs"],
        "cells": {name: _of_cell(runs, tests) for name, runs in found.items()},
        "main": config.main,
        "unfinished": [name for name in config.cells if name not in found],
        "differences": {name: differences(config.main, name) for name in found if name != config.main},
        "twins": {
            f"{one} - {two}": differences(one, two) for one, two in twins(config) if one in found and two in found
        },
        "grpo": None,
    }
    if config.grpo is not None and finished_runs(config.grpo.output):
        whole["grpo"] = of_policies(config)
    return without_infinities(whole)


def twins(config: SarmConfig) -> list[tuple[str, str]]:
    """Return cells that differ only in the encoder: pretrained on last tokens, or otherwise; without the main cell."""
    cells = {name: cell for name, cell in config.cells.items() if cell.head == "sarm" and not cell.shuffled}
    return [
        (one, two)
        for one, two in itertools.permutations(cells, 2)
        if one != config.main
        and cells[one].encoder == "sequence" != cells[two].encoder
        and cells[one] == cells[two].model_copy(update={"encoder": "sequence"})
    ]


def read_cells(config: SarmConfig) -> Found:
    """Read the results of every cell that is finished with all seeds."""
    found: Found = {}
    for name in config.cells:
        files = [cell_folder(config, name, seed) / "result.json" for seed in config.seeds]
        if all(file.exists() for file in files):
            found[name] = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return found


def made_by_all(config: SarmConfig, cells: Iterable[str]) -> Made:
    """Return at which commits and when these cells, and the policies, were made."""
    runs = [cell_folder(config, cell, seed) for cell in cells for seed in config.seeds]
    if config.grpo is not None:
        runs += [file.parent for file in finished_runs(config.grpo.output)]
    return made_by(folder / ENVIRONMENT for folder in runs)


def _of_cell(runs: Sequence[Mapping[str, Any]], tests: list[str]) -> dict[str, Any]:
    cell: dict[str, Any] = {"sets": {}}
    for test in tests:
        accuracy = Difference.of([_correct(run, test) for run in runs])  # from 0
        cell["sets"][test] = {key: vars(accuracy)[key] for key in ("mean", "per_seed", "student", "resampled")}
    for key in ("learning_rate", "pretraining_loss", "seconds"):
        cell[key] = [run.get(key) for run in runs]
    if runs[0].get("top_latents"):
        cell["top_latents"] = {test: float(np.mean([run["top_latents"][test] for run in runs])) for test in tests}
    return cell


def _correct(run: Mapping[str, Any], test: str) -> np.ndarray:
    """Return for each prompt of a set the share of its pairs that are ranked rightly."""
    return np.array(run["sets"][test]["correct"])


def minus(one: Sequence[Mapping[str, Any]], two: Sequence[Mapping[str, Any]], test: str) -> Difference:
    """Return the pairwise accuracy of one cell minus another's on a set, paired by seed and prompt."""
    return Difference.of([_correct(a, test) - _correct(b, test) for a, b in zip(one, two, strict=True)])


# -- policies ---------------------------------------------------------------------------------------------------------


def of_policies(config: SarmConfig) -> dict[str, Any]:
    """Compare the finished runs of the configuration's arms with each other, and with stored results.

    Stored results hold each seed's accuracy and not its answers, so that intervals against them are over seeds alone.

    Raises:
        ConfigError: The stored results are of another budget.
    """
    assert config.grpo is not None
    found, budget = read_runs(config.grpo.output)
    arms = {name: found[name] for name in config.grpo.arms if name in found}
    stored = _stored(config, budget)
    return {
        "budget": budget,
        "stored": stored,
        "arms": {name: _of_arm(runs) for name, runs in arms.items()},
        "unfinished": [
            f"{name} seed {seed}"
            for name, seed in itertools.product(config.grpo.arms, config.grpo.seeds)
            if seed not in {run.seed for run in found.get(name, [])}
        ],
        "against_stored": {
            f"{name} - {other}": gap(accuracy_at_the_end(runs), per_seed)
            for name, runs in arms.items()
            for other, per_seed in stored.items()
        },
        "pairs": {
            f"{one} - {two}": difference(arms[one], arms[two]).report()
            for one, two in itertools.combinations(arms, 2)
            if {run.seed for run in arms[one]} & {run.seed for run in arms[two]}
        },
    }


def _stored(config: SarmConfig, budget: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Read each seed's accuracy at the last step, of the stored arms that reward the outcome or features alone."""
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


def _of_arm(runs: list[Run]) -> dict[str, Any]:
    curves = np.stack([run.curve("right") for run in runs])
    raw = [[log.get("composite/sarm/raw", np.nan) for log in run.metrics] for run in runs]
    return {
        "seeds": [run.seed for run in runs],
        "steps": runs[0].steps,
        "curve": curves.mean(axis=0).tolist(),
        "per_seed": curves[:, -1].tolist(),
        "student": stats.t_interval(curves[:, -1]),
        "greedy_accuracy": [run.figures[-1]["greedy_accuracy"] for run in runs],
        "right_steps": [float(run.curve("right_steps")[-1]) for run in runs],
        "tokens": [[float(run.curve("tokens")[step]) for step in (0, -1)] for run in runs],
        "kl": [float(np.mean([log["kl"] for log in run.metrics[-5:]])) for run in runs],
        "reward": [[float(np.mean(log[:5])), float(np.mean(log[-5:]))] for log in raw],
    }


# -- the page ---------------------------------------------------------------------------------------------------------


def markdown(found: dict[str, Any]) -> str:
    """Return the page: pairwise accuracy, differences, what the latents carry, and the policies."""
    tests = list(found["settings"]["test"])
    title = f"`{found['main']}` minus each other cell, paired by seed and prompt"
    twins = _differences("Other cells that differ in the encoder alone", "pair", found["twins"], tests)
    sections = [
        [_setting(found)],
        _accuracy(found, tests),
        _differences(title, "minus", found["differences"], tests),
        _verdicts(found, tests),
        twins if found["twins"] else [],
        _making(found, tests),
        [] if found["grpo"] is None else _policies(found["grpo"]),
    ]
    return "\n".join("\n".join(lines) + "\n" for lines in sections if lines)


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


def _accuracy(found: dict[str, Any], tests: list[str]) -> list[str]:
    rows = []
    for name, cell in found["cells"].items():
        accuracies = [_figure(cell["sets"][test], ".3f") for test in tests]
        rows.append([name, *accuracies, numbers(cell["sets"][tests[0]]["per_seed"])])
    header = f"| cell | {' | '.join(tests)} | by seed, the first |"
    return ["### Pairwise accuracy", "", *table(header, rows), *_unfinished(found)]


def _unfinished(found: Mapping[str, Any]) -> list[str]:
    names = found["unfinished"]
    return ["", f"Planned in the configuration and not made: {', '.join(names)}."] if names else []


def _differences(title: str, first: str, found: dict[str, Any], tests: list[str]) -> list[str]:
    rows = [[name, *(_difference(sets[test]) for test in tests)] for name, sets in found.items()]
    return [f"### {title}", "", *table(f"| {first} | {' | '.join(tests)} |", rows)]


def _verdicts(found: dict[str, Any], tests: list[str]) -> list[str]:
    """Say what the starred differences show, on the first set."""
    lines = ["A star: both intervals leave out 0, without correction for the number of comparisons.", ""]
    for name, sets in found["differences"].items():
        d = sets[tests[0]]
        if d["shown"]:
            more = "more" if d["mean"] > 0 else "less"
            lines.append(f"- `{found['main']}` is {more} accurate than `{name}` ({tests[0]}): {_figure(d, '+.3f')}.")
        else:
            lines.append(f"- No difference from `{name}` shown ({tests[0]}): {_difference(d)}.")
    return lines


def _making(found: dict[str, Any], tests: list[str]) -> list[str]:
    rows = []
    for name, cell in found["cells"].items():
        rates = " ".join(f"{rate:g}" for rate in cell["learning_rate"] if rate is not None)
        losses = [loss for loss in cell["pretraining_loss"] if loss is not None]
        reached = f"{np.mean(losses):.3f}" if losses else ""
        rows.append([name, rates, reached, f"{cell['top_latents'][tests[0]]:.2f}" if "top_latents" in cell else ""])
    header = "| cell | learning rates chosen | loss after pretraining | top 10 latents' share of the margins |"
    return ["### How they were made", "", *table(header, rows)]


def _policies(grpo: Mapping[str, Any]) -> list[str]:
    t = grpo["budget"]["training"]
    steps = next(iter(grpo["arms"].values()))["steps"]
    rows = []
    for name, arm in grpo["arms"].items():
        tokens, reward = np.mean(arm["tokens"], axis=0), np.array(arm["reward"], dtype=float).mean(axis=0)
        rows.append(
            [
                name,
                str(len(arm["seeds"])),
                *(f"{value:.3f}" for value in arm["curve"]),
                numbers(arm["per_seed"]),
                f"{np.mean(arm['greedy_accuracy']):.3f}",
                f"{tokens[0]:.1f}, {tokens[1]:.1f}",
                f"{np.mean(arm['kl']):.4f}",
                "" if np.isnan(reward).any() else f"{reward[0]:+.2f}, {reward[1]:+.2f}",  # no reward model, no score
            ]
        )
    header = (
        f"| arm | seeds | {' | '.join(f'step {step}' for step in steps)} | by seed, at the end | greedy | tokens | KL "
        "| raw reward, first and last five steps |"
    )
    stored = [
        f"| {name}, stored | {len(per_seed)} {'| ' * len(steps)}| {numbers(per_seed.values())} | | | | |"
        for name, per_seed in grpo["stored"].items()
    ]
    gaps = [
        [f"{pair}, stored", _figure({**d, "resampled": d["student"]}, "+.3f"), numbers(d["per_seed"], "+.3f")]
        for pair, d in grpo["against_stored"].items()
    ]
    gaps += [[pair, _difference(d), numbers(d["per_seed"], "+.3f")] for pair, d in grpo["pairs"].items()]
    return [
        "## As the only reward in GRPO",
        "",
        f"{t['max_steps']} steps of {t['prompts_per_step'] * t['num_generations']} rollouts, learning rate "
        f"{t['learning_rate']:g}, beta {t['beta']:g}: the budget of experiments 01 to 03, whose arms stand below as "
        "they were stored. Each seed's policy is rewarded by the reward model of that seed. Intervals against what is "
        "stored: 95 %, Student's t over seeds.",
        "",
        *table(header, rows),
        *stored,
        *_unfinished(grpo),
        "",
        *table("| accuracy at the end | difference | by seed |", gaps),
    ]


def _figure(found: Mapping[str, Any], form: str) -> str:
    """Format a mean with the wider ends of both intervals; a single seed has none."""
    shown = f"{found['mean']:{form}}"
    if None in found["student"]:
        return shown
    low, high = widest(dict(found))
    return f"{shown} ({low:{form}} to {high:{form}})"


def _difference(found: Mapping[str, Any]) -> str:
    return _figure(found, "+.3f") + (" *" if found["shown"] else "")
