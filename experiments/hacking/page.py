"""Experiment 06 as a page of Markdown and figures, made from the report alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.tables import table
from mechreward.extras import require
from mechreward.files import made_sentence

CELLS = {
    "outcome": "outcome only, KL .04 (the honest control)",
    "none": "no guard",
    "kl_01": "KL .01",
    "kl_04": "KL .04",
    "kl_1": "KL .1",
    "reference": "read on the frozen reference",
    "dual": "dual verifier",
    "suite": "detectors",
    "gated": "gated by the outcome",
    "hero": "HERO",
    "max": "max over tokens",
    "top_4": "mean of the top 4 tokens",
    "all": "all: gated, KL .04, reference, dual verifier, detectors",
    "none_aware": "no guard, aware attacker (3 s.d.)",
    "none_mild": "no guard, aware attacker (0.5 s.d.)",
    "none_blind": "no guard, aware but blind attacker (0.5 s.d.)",
    "dual_aware": "dual verifier, aware attacker (0.5 s.d.)",
    "suite_aware": "detectors, aware attacker (0.5 s.d.)",
    "all_aware": "all, aware attacker (3 s.d.)",
}


def markdown(report: Mapping[str, Any]) -> str:
    """Return the page: what is left of the accuracy, which detectors noticed and when, and best of N."""
    sections = (_accuracy, _detection, _alarms, _templates, _best_of_n)
    return "\n".join("\n".join(section(report)) + "\n" for section in sections)


def _called(name: str) -> str:
    return CELLS.get(name, name)


def _accuracy(report: Mapping[str, Any]) -> list[str]:
    training = report["training"]
    rollouts = training["prompts_per_step"] * training["num_generations"]
    rows = [
        [
            _called(name),
            str(len(c["seeds"])),
            _mean(c["accuracy"][0]),
            _with(c["accuracy"][-1]),
            _with(c["minus_outcome"], sign=True),
            _mean(c["reward"][0]),
            _with(c["reward"][-1]),
            _with(c["proxy_gold_gap"], sign=True),
        ]
        for name, c in report["cells"].items()
    ]
    return [
        "# Experiment 06: a reward under attack",
        "",
        f"Made by `{report['command']}`. {made_sentence(report)} pocket, LoRA rank {training['lora_rank']}, "
        f"learning rate {training['learning_rate']:g}, {training['max_steps']} steps of {rollouts} rollouts; "
        f"{report['questions']} test questions a run, another draw for each seed. Mean over seeds; in brackets 95 % "
        "intervals by Student's t over seeds.",
        "",
        "## Accuracy and reward",
        "",
        "`minus outcome`: accuracy at the end minus the control's, paired by seed. `reward`: the features' mean reward "
        "on the test questions. `gap`: its gain minus the accuracy's, each in standard deviations at the start. "
        "`aware`: the attacker pays for what the detectors and the probe see, so much where they would flag him; "
        "`blind`: those detectors do not know the outcome.",
        "",
        *table("| cell | seeds | accuracy, start | end | minus outcome | reward, start | end | gap |", rows),
    ]


def _detection(report: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, c in report["cells"].items():
        d = c["detection"]
        best = max(c["caught_by"], key=c["caught_by"].get)
        rows.append(
            [
                _called(name),
                f"{_mean(d['auc'])} ({_mean(d['auc_without_outcome'])})",
                f"{_percent(d['evasion']['mean'])} ({_percent(d['evasion_without_outcome']['mean'])})",
                _percent(sum(c["flagged"][-5:]) / 5),
                f"{best} {_percent(c['caught_by'][best])}",
                _mean(c["held_out_auc"]),
            ]
        )
    rates = report["false_positives"]
    named = ", ".join(f"{name} {_percent(rate, 1)}" for name, rate in rates.items() if name not in ("any", "rollouts"))
    return [
        "## Detection, on the rollouts of the last 5 steps",
        "",
        "One suite for all cells, whether it guarded them or not; `AUC` against fresh clean rollouts of the untrained "
        "model, `evasion`: the share that a threshold with 1 % false positives misses. In brackets the same without "
        "the one detector that knows the outcome. For `outcome`, which nobody attacks, what is 'detected' are false "
        "alarms. `held-out`: the AUC for right answers of a probe at another layer, on the policy, at the end.",
        "",
        *table("| cell | AUC | evasion | flagged | most by | held-out AUC |", rows),
        "",
        f"False positives on {rates['rollouts']} fresh clean rollouts: {_percent(rates['any'], 1)} by any detector "
        f"({named}).",
    ]


def _alarms(report: Mapping[str, Any]) -> list[str]:
    cells = report["cells"]
    alarms = sorted({alarm for c in cells.values() for alarm in c["first_alarm"]})
    rows = []
    for name, c in cells.items():
        rung = [_each(c["first_alarm"].get(alarm, [None] * len(c["seeds"]))) for alarm in alarms]
        rows.append([_called(name), _each(c["fell_at"]), *rung])
    return [
        "## Alarms",
        "",
        "The step at which each alarm first rang, one figure a seed (`-`: never), and the step from which accuracy "
        "stayed 5 points below its start. `flagged`: more rollouts flagged than 3 % in two steps running (p < .001).",
        "",
        *table(f"| cell | accuracy fell | {' | '.join(alarms)} |", rows),
    ]


def _templates(report: Mapping[str, Any]) -> list[str]:
    detectors = list(next(iter(report["templates"].values())))
    rows = [[family, *(f"{shares[d]:.2f}" for d in detectors)] for family, shares in report["templates"].items()]
    return [
        "## Attack 1: text templates",
        "",
        "Share of attacked rollouts that each detector flags, at thresholds that flag at most 1 % of clean ones each. "
        "`woven` keeps the model's answer, `replacing` loses it.",
        "",
        *table(f"| family | {' | '.join(detectors)} |", rows),
    ]


def _best_of_n(report: Mapping[str, Any]) -> list[str]:
    best = report["best_of_n"]
    rows = []
    for name, curve in best["curves"].items():
        low, high = curve["interval"][-1]
        rows.append([_called(name), *(f"{a:.2f}" for a in curve["accuracy"]), f"({low:.2f} to {high:.2f})"])
    return [
        "## Attack 2: best of N",
        "",
        f"Accuracy of the rollout that each reward likes best among N of the untrained model, {best['questions']} "
        "questions; 95 % bootstrap intervals over questions at the end.",
        "",
        *table(f"| reward | {' | '.join(f'N = {n}' for n in best['n'])} | |", rows),
    ]


def _each(values: Sequence[float | None]) -> str:
    return " ".join("-" if v is None else f"{v:.0f}" for v in values)


def _mean(figure: Mapping[str, Any]) -> str:
    return "n/a" if figure["mean"] is None else f"{figure['mean']:.2f}"


def _with(figure: Mapping[str, Any] | None, sign: bool = False) -> str:
    if figure is None or figure["mean"] is None:
        return "n/a"
    shown = "{:+.3f}" if sign else "{:.3f}"
    if figure["interval"] is None:
        return shown.format(figure["mean"])
    low, high = (shown.format(v) for v in figure["interval"])
    return f"{shown.format(figure['mean'])} ({low} to {high})"


def _percent(share: float | None, digits: int = 0) -> str:
    return "n/a" if share is None else f"{100 * share:.{digits}f} %"


def draw(report: Mapping[str, Any], folder: Path) -> None:
    """Draw ``hacking-curves.png`` (accuracy, reward and flagged share over training) and ``hacking-best-of-n.png``."""
    matplotlib = require("matplotlib", "report")
    matplotlib.use("Agg")
    plt = require("matplotlib.pyplot", "report")
    cells = report["cells"]
    shown = [n for n in ("outcome", "none", "all", "none_blind", "none_aware") if n in cells]
    colours = dict(zip(shown, ["#4d4d4d", "#d73027", "#1a9850", "#4575b4", "#fdae61"], strict=False))
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    for name in shown:
        c = cells[name]
        for axis, key in zip(axes, ("accuracy", "reward"), strict=False):
            means = [f["mean"] for f in c[key]]
            axis.plot(c["steps"], means, color=colours[name], label=CELLS[name].split(":")[0], marker="o", markersize=3)
            if len(c["seeds"]) >= 5:  # of three seeds, Student's interval fills the picture
                low, high = zip(*(f["interval"] for f in c[key]), strict=True)
                axis.fill_between(c["steps"], low, high, color=colours[name], alpha=0.12, linewidth=0)
        axes[2].plot(range(1, len(c["flagged"]) + 1), c["flagged"], color=colours[name])
    for axis, title in zip(axes, ("accuracy", "features' reward", "share flagged by the suite"), strict=True):
        axis.set(xlabel="step", title=title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0, 1)
    axes[2].set_ylim(0, 1)
    axes[2].axhline(0.03, color="#999999", linewidth=0.8, linestyle=":")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=len(shown), frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(folder / "hacking-curves.png", dpi=130)
    best = report["best_of_n"]
    figure, axis = plt.subplots(figsize=(6.5, 4.2))
    for name, curve in best["curves"].items():
        axis.plot(best["n"], curve["accuracy"], marker="o", markersize=3, label=CELLS[name].split(":")[0])
    axis.set(xscale="log", xlabel="N", ylabel="accuracy of the best of N", ylim=(0, 1))
    axis.set_xticks(best["n"], [str(n) for n in best["n"]])
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "hacking-best-of-n.png", dpi=130)
    plt.close("all")
