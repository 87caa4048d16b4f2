"""An experiment's comparison as a page of Markdown and a figure; everything on them comes from the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mechreward.extras import require
from mechreward.integrations.made import made_sentence

Report = dict[str, Any]
"""What :func:`mechreward.train.results.compare` returns."""


def markdown(report: Report) -> str:
    """Tables: accuracy, differences, steps to the target, readings, cost; and a sentence on each difference."""
    arms, base = report["arms"], report["baseline"]
    steps = arms[base]["steps"]
    lines = [
        _setting(report),
        "",
        "### Accuracy",
        "",
        "| arm | start | " + " | ".join(f"step {s}" for s in steps[1:]) + " | greedy, at the end |",
        "|---" * (len(steps) + 2) + "|",
    ]
    for name, arm in arms.items():
        curve = arm["curves"]["right"]
        cells = [_with_interval(m, i) for m, i in zip(curve["mean"], curve["interval"], strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} | {_figure(arm['greedy_accuracy'])} |")
    lines += ["", f"### Minus `{base}`, paired by seed and question", ""]
    lines += ["| arm | accuracy, last step | resampled | t over seeds | per seed | over training | right steps |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, arm in arms.items():
        if "difference" in arm:
            d = arm["difference"]
            right, steps_too = d["right"], _signed(d["right_steps"]) if "right_steps" in d else "n/a"
            lines.append(
                f"| {name} | {right['mean']:+.3f} | {_interval(right['resampled'])} | {_interval(right['student'])} "
                f"| {' '.join(f'{v:+.3f}' for v in right['per_seed'])} | {_signed(d['right_over_training'])} "
                f"| {steps_too} |"
            )
    lines += ["", *_verdicts(report), "", *_pairs(report), *_details(report)]
    return "\n".join(lines) + "\n"


def _setting(report: Report) -> str:
    training, arms = report["budget"]["training"], report["arms"]
    rollouts = training["prompts_per_step"] * training["num_generations"]
    counts = sorted({len(arm["seeds"]) for arm in arms.values()})
    seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f"{made_sentence(report)} "
        f"{report['budget']['model']}, {training['max_steps']} steps of {rollouts} rollouts, learning rate "
        f"{training['learning_rate']:g}, beta {training['beta']:g}; seeds an arm: {seeds}. Test questions are another "
        "draw for each seed, the same for all arms, answered once at the training temperature. Intervals: 95 %, "
        "Student's t over seeds."
    )


def _pairs(report: Report) -> list[str]:
    if not report["pairs"]:
        return []
    lines = [
        "### The other pairs, accuracy at the last step",
        "",
        "| pair | difference | t over seeds |",
        "|---|---|---|",
    ]
    lines += [
        f"| {pair} | {_number(d['mean'], '+.3f')} | {_interval(d['student'])} |" for pair, d in report["pairs"].items()
    ]
    return [*lines, ""]


def _verdicts(report: Report) -> list[str]:
    """A sentence on each arm; several comparisons are being made, and it says so."""
    compared = {name: arm["difference"]["right"] for name, arm in report["arms"].items() if "difference" in arm}
    said = [f"- {verdict(f'`{name}`', d)}" for name, d in compared.items()]
    return [f"Arms compared: {len(compared)}, without correction for their number.", "", *said]


def verdict(name: str, d: dict[str, Any]) -> str:
    """What a difference in accuracy (:meth:`results.Difference.report`, without infinities) allows one to say."""
    if None in d["student"]:
        return f"{name}: {d['mean']:+.3f} with one seed, of which no interval can be given."
    low, high = widest(d)
    if d["shown"]:
        more = "more" if d["mean"] > 0 else "less"
        return f"{name} is {more} accurate: {d['mean']:+.3f} ({low:+.3f} to {high:+.3f})."
    return f"{name}: no difference shown. Anything from {low:+.3f} to {high:+.3f} is compatible with the data."


def widest(d: dict[str, Any]) -> tuple[float, float]:
    """The interval that holds both of a difference's intervals."""
    lows, highs = zip(d["resampled"], d["student"], strict=True)
    return min(lows), max(highs)


def _details(report: Report) -> list[str]:
    arms = report["arms"]
    watched = list(next(iter(arms.values()))["readings"])
    lines = [
        "### What else was measured",
        "",
        f"| arm | steps to {report['target']:.0%} | right steps, start and end | tokens, start and end "
        "| KL, last five steps | own reading, first and last five steps | flagged "
        "| our share of the time, with the watched pack |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, arm in arms.items():
        reached = arm["steps_to_target"]
        median = "not reached" if reached["median"] is None else f"{reached['median']:.0f}"
        own = arm["own_reading"]
        lines.append(
            f"| {name} | {median} ({reached['reached']} of {len(arm['seeds'])}) "
            f"| {_ends(arm['curves'].get('right_steps'))} | {_ends(arm['curves']['tokens'], 1)} "
            f"| {_number(arm['kl']['mean'], '.4f')} | {'' if own is None else _first_and_last(own)} "
            f"| {_number(arm['flagged'], '.2%')} | {_number(arm['our_share_of_time']['mean'], '.2%')} |"
        )
    if all(arm["complete"] for arm in arms.values()):
        lines += ["", *_complete_rollouts(arms)]
    for pack in watched:
        lines += [
            "",
            f"### The reading of `{pack}` on test rollouts, rewarded or not",
            "",
            "Moved: in standard deviations of the untrained model's rollouts. AUC: for a right answer, among the "
            "rollouts of that step.",
            "",
            "| arm | moved, at the end | AUC, start | AUC, end | accuracy gained |",
            "|---|---|---|---|---|",
        ]
        for name, arm in arms.items():
            reading, right = arm["readings"][pack], arm["curves"]["right"]["mean"]
            lines.append(
                f"| {name} | {_figure(reading['moved'][-1], '+.2f')} | {_figure(reading['auc'][0])} "
                f"| {_figure(reading['auc'][-1])} | {right[-1] - right[0]:+.3f} |"
            )
    return lines


def _complete_rollouts(arms: dict[str, Any]) -> list[str]:
    lines = [
        "### Rollouts that make every step of the solution",
        "",
        "They may make others as well, and then be wrong.",
        "",
        "| arm | share, start | share, end | right among them, start | right among them, end |",
        "|---|---|---|---|---|",
    ]
    for name, arm in arms.items():
        cells = [_figure(arm["complete"][step][what]) for what in ("share", "right") for step in (0, 1)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def draw(report: Report, file: Path) -> None:
    """Curves of accuracy, differences at the last step, and reading against accuracy."""
    require("matplotlib", "report")
    from matplotlib.figure import Figure

    arms, base = report["arms"], report["baseline"]
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    curves, forest, gap = figure.subplots(1, 3, width_ratios=[1.25, 1, 1])
    colours = dict(zip(arms, _PALETTE * (1 + len(arms) // len(_PALETTE)), strict=False))
    for name, arm in arms.items():
        curve, steps = arm["curves"]["right"], arm["steps"]
        curves.plot(steps, curve["mean"], color=colours[name], label=name, linewidth=2.5 if name == base else 1.5)
    low, high = np.array(arms[base]["curves"]["right"]["interval"], dtype=float).T  # None becomes NaN
    curves.fill_between(arms[base]["steps"], low, high, color=colours[base], alpha=0.15, linewidth=0)
    curves.set(xlabel="step", ylabel="right answers, sampled", title=f"Accuracy (band: 95 % of {base})", ylim=(0, 1))
    curves.legend(frameon=False, fontsize=8, ncols=2, loc="lower left")

    compared = [name for name in arms if name != base][::-1]
    for place, name in enumerate(compared):
        d = arms[name]["difference"]["right"]
        for interval, width in ((d["student"], 1.2), (d["resampled"], 3.5)):
            forest.plot(np.array(interval, dtype=float), [place, place], color=colours[name], linewidth=width)
        forest.plot(d["mean"], place, "o", color=colours[name])
        forest.plot(d["per_seed"], [place - 0.25] * len(d["per_seed"]), "|", color=colours[name], markersize=7)
    forest.axvline(0, color="#888888", linewidth=1)
    forest.set_yticks(range(len(compared)), compared)
    forest.set(
        xlabel="accuracy minus " + base,
        title="Last step: mean, 95 % (thick: resampled,\nthin: t over seeds; ticks: seeds)",
    )

    for name, arm in arms.items():
        for reading in list(arm["readings"].values())[:1]:
            moved = np.array([point["mean"] for point in reading["moved"]], dtype=float)
            gap.plot(moved, arm["curves"]["right"]["mean"], "o-", color=colours[name], markersize=3, linewidth=1.5)
    gap.set(
        xlabel="reading of the pack, SDs from the start",
        ylabel="right answers, sampled",
        title="Reading and accuracy (colours as left)",
    )
    for axis in (curves, forest, gap):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    figure.savefig(file, dpi=130)


_PALETTE = [
    "#000000",
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#8c564b",
    "#7f7f7f",
    "#bcbd22",
    "#9467bd",
]


def _number(value: float | None, form: str) -> str:
    return "?" if value is None else f"{value:{form}}"


def _interval(interval: tuple[float | None, float | None]) -> str:
    return " to ".join(_number(end, "+.3f") for end in interval)


def _signed(difference: dict[str, Any]) -> str:
    return f"{difference['mean']:+.3f} ({_interval(difference['student'])})"


def _with_interval(mean: float, interval: tuple[float | None, float | None]) -> str:
    return f"{_number(mean, '.3f')} ({'-'.join(_number(end, '.3f') for end in interval)})"


def _figure(figure: dict[str, Any], form: str = ".3f") -> str:
    return f"{_number(figure['mean'], form)} ({' to '.join(_number(end, form) for end in figure['interval'])})"


def _first_and_last(reading: dict[str, Any]) -> str:
    return f"{reading['first']['mean']:+.2f}, {reading['last']['mean']:+.2f}"


def _ends(curve: dict[str, Any] | None, digits: int = 3) -> str:
    return "n/a" if curve is None else f"{curve['mean'][0]:.{digits}f}, {curve['mean'][-1]:.{digits}f}"
