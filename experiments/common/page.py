"""An experiment's comparison as a page of Markdown and a figure, made from the report of ``compare`` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.tables import figure, interval, number, numbers, seeds, table
from mechreward.extras import require
from mechreward.files import made_sentence
from mechreward.train.results import verdict


def markdown(report: dict[str, Any]) -> str:
    """Return the tables, with a sentence on each difference.

    Args:
        report: From :func:`common.comparison.compare`.
    """
    sections = (_setting, _accuracy, _differences, _verdicts, _pairs, _details, _complete, _readings)
    return "\n".join("\n".join(lines) + "\n" for section in sections if (lines := section(report)))


def _setting(report: dict[str, Any]) -> list[str]:
    training = report["budget"]["training"]
    rollouts = training["prompts_per_step"] * training["num_generations"]
    return [
        f"{made_sentence(report)} "
        f"{report['budget']['model']}, {training['max_steps']} steps of {rollouts} rollouts, learning rate "
        f"{training['learning_rate']:g}, beta {training['beta']:g}; seeds an arm: {seeds(report['arms'])}. Test "
        "questions are another draw for each seed, the same for all arms, answered once at the training temperature. "
        "Intervals: 95 %, Student's t over seeds."
    ]


def _accuracy(report: dict[str, Any]) -> list[str]:
    rows = []
    for name, arm in report["arms"].items():
        curve = arm["curves"]["right"]
        cells = [
            f"{number(mean)} ({'-'.join(map(number, ends))})"
            for mean, ends in zip(curve["mean"], curve["interval"], strict=True)
        ]
        rows.append([name, *cells, figure(arm["greedy_accuracy"])])
    steps = report["arms"][report["baseline"]]["steps"]
    header = "| arm | start | " + " | ".join(f"step {s}" for s in steps[1:]) + " | greedy, at the end |"
    return ["### Accuracy", "", *table(header, rows)]


def _compared(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return each other arm's differences from the baseline."""
    return {name: arm["difference"] for name, arm in report["arms"].items() if "difference" in arm}


def _differences(report: dict[str, Any]) -> list[str]:
    rows = []
    for name, found in _compared(report).items():
        right = found["right"]
        steps_too = _signed(found["right_steps"]) if "right_steps" in found else "n/a"
        rows.append(
            [
                name,
                f"{right['mean']:+.3f}",
                interval(right["resampled"]),
                interval(right["student"]),
                numbers(right["per_seed"], "+.3f"),
                _signed(found["right_over_training"]),
                steps_too,
            ]
        )
    header = "| arm | accuracy, last step | resampled | t over seeds | per seed | over training | right steps |"
    return [f"### Minus `{report['baseline']}`, paired by seed and question", "", *table(header, rows)]


def _verdicts(report: dict[str, Any]) -> list[str]:
    """Say what each difference shows, and how many comparisons are made."""
    compared = _compared(report)
    lines = [f"- {verdict(f'`{name}`', found['right'])}" for name, found in compared.items()]
    return [f"Arms compared: {len(compared)}, without correction for their number.", "", *lines]


def _pairs(report: dict[str, Any]) -> list[str]:
    rows = [[pair, number(d["mean"], "+.3f"), interval(d["student"])] for pair, d in report["pairs"].items()]
    if not rows:
        return []
    header = "| pair | difference | t over seeds |"
    return ["### The other pairs, accuracy at the last step", "", *table(header, rows)]


def _details(report: dict[str, Any]) -> list[str]:
    rows = []
    for name, arm in report["arms"].items():
        reached, own = arm["steps_to_target"], arm["own_reading"]
        median = "not reached" if reached["median"] is None else f"{reached['median']:.0f}"
        rows.append(
            [
                name,
                f"{median} ({reached['reached']} of {len(arm['seeds'])})",
                _ends(arm["curves"].get("right_steps")),
                _ends(arm["curves"]["tokens"], 1),
                number(arm["kl"]["mean"], ".4f"),
                "" if own is None else f"{own['first']['mean']:+.2f}, {own['last']['mean']:+.2f}",
                number(arm["flagged"], ".2%"),
                number(arm["our_share_of_time"]["mean"], ".2%"),
            ]
        )
    header = (
        f"| arm | steps to {report['target']:.0%} | right steps, start and end | tokens, start and end "
        "| KL, last five steps | own reading, first and last five steps | flagged "
        "| our share of the time, with the watched pack |"
    )
    return ["### What else was measured", "", *table(header, rows)]


def _complete(report: dict[str, Any]) -> list[str]:
    arms = report["arms"]
    if not all(arm["complete"] for arm in arms.values()):
        return []
    rows = [
        [name, *(figure(arm["complete"][step][what]) for what in ("share", "right") for step in (0, 1))]
        for name, arm in arms.items()
    ]
    header = "| arm | share, start | share, end | right among them, start | right among them, end |"
    return [
        "### Rollouts that make every step of the solution",
        "",
        "They may make others as well, and then be wrong.",
        "",
        *table(header, rows),
    ]


def _readings(report: dict[str, Any]) -> list[str]:
    arms = report["arms"]
    lines = []
    for pack in next(iter(arms.values()))["readings"]:
        rows = []
        for name, arm in arms.items():
            reading, right = arm["readings"][pack], arm["curves"]["right"]["mean"]
            moved, first, last = reading["moved"][-1], reading["auc"][0], reading["auc"][-1]
            rows.append(
                [name, figure(moved, "+.2f"), figure(first), figure(last), f"{right[-1] - right[0]:+.3f}"],
            )
        lines += [
            *([""] if lines else []),
            f"### The reading of `{pack}` on test rollouts, rewarded or not",
            "",
            "Moved: in standard deviations of the untrained model's rollouts. AUC: for a right answer, among the "
            "rollouts of that step.",
            "",
            *table("| arm | moved, at the end | AUC, start | AUC, end | accuracy gained |", rows),
        ]
    return lines


def _signed(difference: dict[str, Any]) -> str:
    return f"{difference['mean']:+.3f} ({interval(difference['student'])})"


def _ends(curve: dict[str, Any] | None, digits: int = 3) -> str:
    return "n/a" if curve is None else f"{curve['mean'][0]:.{digits}f}, {curve['mean'][-1]:.{digits}f}"


# -- the figure -------------------------------------------------------------------------------------------------------

PALETTE = ("#000000 #0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #8c564b #7f7f7f #bcbd22 #9467bd").split()


def draw(report: dict[str, Any], file: Path) -> None:
    """Draw curves of accuracy, differences at the last step, and reading against accuracy."""
    require("matplotlib", "report")
    from matplotlib.figure import Figure

    arms, base = report["arms"], report["baseline"]
    canvas = Figure(figsize=(13, 4.6), layout="constrained")
    curves, forest, gap = canvas.subplots(1, 3, width_ratios=[1.25, 1, 1])
    colours = dict(zip(arms, PALETTE * (1 + len(arms) // len(PALETTE)), strict=False))

    # Left: each arm's accuracy over steps, with the baseline's interval as a band.
    for name, arm in arms.items():
        curve, steps = arm["curves"]["right"], arm["steps"]
        curves.plot(steps, curve["mean"], color=colours[name], label=name, linewidth=2.5 if name == base else 1.5)
    low, high = np.array(arms[base]["curves"]["right"]["interval"], dtype=float).T  # None becomes NaN
    curves.fill_between(arms[base]["steps"], low, high, color=colours[base], alpha=0.15, linewidth=0)
    curves.set(xlabel="step", ylabel="right answers, sampled", title=f"Accuracy (band: 95 % of {base})", ylim=(0, 1))
    curves.legend(frameon=False, fontsize=8, ncols=2, loc="lower left")

    # Middle: each arm minus the baseline, with both intervals and every seed.
    compared = [name for name in arms if name != base][::-1]
    for place, name in enumerate(compared):
        d = arms[name]["difference"]["right"]
        for ends, width in ((d["student"], 1.2), (d["resampled"], 3.5)):
            forest.plot(np.array(ends, dtype=float), [place, place], color=colours[name], linewidth=width)
        forest.plot(d["mean"], place, "o", color=colours[name])
        forest.plot(d["per_seed"], [place - 0.25] * len(d["per_seed"]), "|", color=colours[name], markersize=7)
    forest.axvline(0, color="#888888", linewidth=1)
    forest.set_yticks(range(len(compared)), compared)
    forest.set(
        xlabel="accuracy minus " + base,
        title="Last step: mean, 95 % (thick: resampled,\nthin: t over seeds; ticks: seeds)",
    )

    # Right: does accuracy follow the reading?
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
    canvas.savefig(file, dpi=130)
