"""What experiment 05's runs say: what a learned choice of features gains, beside which controls, and what lasts."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from crl import experiment
from crl.experiment import CRLConfig
from mechreward.integrations.made import made_by, made_sentence
from mechreward.integrations.recording import ENVIRONMENT
from mechreward.train.results import Run, difference, finished_runs, over_seeds, read_runs, without_infinities

Report = dict[str, Any]
SCORES = {
    "right": "as in experiment 03 (`math_boxed`, which reads the answer's last number where no answer is marked)",
    "strict": "right, and marked as the task wants it (`#### N`)",
    "tolerant": "right, or the last number in the text is the right one",
}
TOP = 10
"""Features that are compared between seeds: the most used of each."""


def report(config: CRLConfig, beside: Path) -> Report:
    """Everything in the tables, from the runs that are finished.

    Args:
        config: The experiment.
        beside: Experiments 01 to 03 as JSON, by ``experiments/compare.py``; left out where there is no such file.

    Raises:
        ConfigError: No run is finished, or runs were not made at equal budget.
    """
    runs, budget = read_runs(config.output)
    tuning = Path(config.output) / "tuning.json"
    found = {
        "made": made_by(file.with_name(ENVIRONMENT) for file in finished_runs(config.output)),
        "budget": budget,
        "tuning": json.loads(tuning.read_text(encoding="utf-8"))["pilots"] if tuning.exists() else None,
        "tuning_settings": config.tuning.model_dump(),
        "search": _search(config, runs),
        "arms": {arm: _of_arm(config, arm, runs[arm]) for arm in config.arms if arm in runs},
        "minus": {
            f"{one} - {two}": {score: difference(runs[one], runs[two], score).report() for score in SCORES}
            | {"greedy": difference(runs[one], runs[two], "greedy").report()}
            for one, two in _pairs(config, runs)
        },
        "outcome": _beside(runs, beside),
    }
    return without_infinities(found)


def _pairs(config: CRLConfig, runs: dict[str, list[Run]]) -> list[tuple[str, str]]:
    """Every arm minus the unsteered model, and the trained policy minus each other."""
    unsteered = next((name for name in runs if name in config.arms and _alone(config, name)), None)
    pairs = [(name, unsteered) for name in config.arms if name in runs and unsteered not in (None, name)]
    tuned = config.tuning.arm
    if tuned in runs:
        pairs += [(tuned, name) for name in config.arms if name in runs and name not in (tuned, unsteered)]
    return [(one, two) for one, two in pairs if {r.seed for r in runs[one]} & {r.seed for r in runs[two]}]  # pyright: ignore


def _alone(config: CRLConfig, name: str) -> bool:
    return config.arms[name].steer == "none" and not config.arms[name].begin_without


def _of_arm(config: CRLConfig, arm: str, runs: list[Run]) -> dict[str, Any]:
    folders = [Path(config.output) / arm / f"seed-{run.seed}" for run in runs]
    last = [run.rows[-1] for run in runs]

    def at_the_end(column: str) -> dict[str, Any] | None:
        if column not in last[0]:
            return None
        return over_seeds([float(np.nanmean(rows[column])) for rows in last])

    return {
        "arm": yaml.safe_load((folders[0] / "config.yaml").read_text(encoding="utf-8"))["arm"],
        "seeds": [run.seed for run in runs],
        "steps": runs[0].steps,
        "curve": [over_seeds([float(run.curve("right")[k]) for run in runs]) for k in range(len(runs[0].steps))],
        **{
            score: at_the_end(score) for score in (*SCORES, "greedy", "greedy_tolerant", "off", "steps_shown", "tokens")
        },
        "training": _training(runs),
        "features": _features([_used(folder) for folder in folders], config.arms[arm].k),
    }


def _training(runs: list[Run]) -> dict[str, Any] | None:
    """The rewards of the policy as it samples, over the first and the last five steps; its entropy; seconds a step."""
    if not runs[0].metrics:
        return None
    parts = {"first": slice(0, 5), "last": slice(-5, None)}
    logs = [run.metrics for run in runs]
    return {
        **{part: over_seeds([_mean(m, "reward", where) for m in logs]) for part, where in parts.items()},
        "entropy": over_seeds([_mean(m, "entropy", slice(-5, None)) for m in logs]),
        "explained": over_seeds([_mean(m, "explained", slice(-5, None)) for m in logs]),
        "clipped": over_seeds([_mean(m, "clipped", slice(0, None)) for m in logs]),
        "seconds": over_seeds([_mean(m, "seconds", slice(0, None)) for m in logs]),
    }


def _mean(metrics: list[dict[str, float]], key: str, where: slice) -> float:
    return float(np.mean([log[key] for log in metrics[where]]))


# -- features ---------------------------------------------------------------------------------------------------------

Used = dict[str, dict[str, int]]


def _used(folder: Path) -> Used:
    file = folder / "features.json"
    return json.loads(file.read_text(encoding="utf-8"))


def _features(used: Sequence[Used], k: int) -> dict[str, Any] | None:
    """How concentrated the added features are, and how much of them two seeds have in common; None if there are none.

    ``effective``: exp of the entropy of their shares. ``overlap``: the sum over features of the smaller of two seeds'
    shares, 1 for the same use and 0 for none in common. ``top``: common features among the most used of each seed.
    """
    if not all(used) or not all(each["tokens"] for each in used):
        return None
    found: dict[str, Any] = {}
    for where in ("tokens", "first"):
        shares = [_shares(each[where]) for each in used]
        pairs = list(itertools.combinations(shares, 2))
        found[where] = {
            "effective": over_seeds([float(np.exp(-sum(p * np.log(p) for p in s.values()))) for s in shares]),
            "largest": over_seeds([max(s.values()) for s in shares]),
            "most_used": [[int(f), round(p, 4)] for f, p in (max(s.items(), key=lambda item: item[1]) for s in shares)],
            "overlap": over_seeds([sum(min(p, b.get(f, 0.0)) for f, p in a.items()) for a, b in pairs]),
            "top": over_seeds([float(len(_top(a) & _top(b))) for a, b in pairs]),
        }
    return {"k": k, **found}


def _shares(counts: dict[str, int]) -> dict[str, float]:
    total = sum(counts.values())
    return {feature: n / total for feature, n in counts.items()}


def _top(shares: dict[str, float]) -> set[str]:
    return {feature for feature, _ in Counter(shares).most_common(TOP)}


def _search(config: CRLConfig, runs: dict[str, list[Run]]) -> dict[str, Any] | None:
    """The constant feature, its accuracy where it was searched for, and what the search cost."""
    name = next((name for name, arm in config.arms.items() if arm.search and name in runs), None)
    if name is None:
        return None
    bench = experiment.bench(config)
    found = bench.search(config.arms[name].search)
    return {
        "feature": int(found["feature"][0]),
        "accuracy": float(found["accuracy"][0]),
        "rollouts": int(found["rollouts"][0]),
        "rounds": [each.model_dump() for each in config.arms[name].search],
        "fires_on": float(bench.discovery()["firing"][found["feature"][0]]),
    }


def _beside(runs: dict[str, list[Run]], file: Path) -> dict[str, Any] | None:
    """Experiment 01's arm ``outcome``, which trains the model: its gain, and each arm's accuracy minus its, by seed."""
    if not file.exists():
        return None
    outcome = json.loads(file.read_text(encoding="utf-8"))["arms"]["outcome"]
    curves = dict(zip(outcome["seeds"], outcome["curves"]["right"]["per_seed"], strict=True))
    minus = {}
    for arm, finished in runs.items():
        gaps = [float(run.rows[-1]["right"].mean()) - curves[run.seed][-1] for run in finished if run.seed in curves]
        minus[arm] = over_seeds(gaps)
    ends = {part: over_seeds([curve[k] for curve in curves.values()]) for part, k in (("start", 0), ("end", -1))}
    return {**ends, "greedy": outcome["greedy_accuracy"], "minus": minus}


# -- the page ---------------------------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """Tables, from the report alone."""
    arms = report["arms"]
    lines = [
        _setting(report),
        "",
        "### Accuracy",
        "",
        *(f"- *{score}*: {what}" for score, what in SCORES.items()),
        "- *off*: the same, steering switched off after training. The model's weights were never changed.",
        "",
        "| arm | before training | right | strict | tolerant | greedy | off | answers with steps | tokens |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, arm in arms.items():
        before = _figure(arm["curve"][0]) if arm["training"] else ""
        cells = [_figure(arm[column]) for column in (*SCORES, "greedy", "off")]
        lines.append(
            f"| {name} | {before} | {' | '.join(cells)} | {_mean_of(arm['steps_shown'])} "
            f"| {_mean_of(arm['tokens'], '.1f')} |"
        )
    lines += ["", *_differences(report), "", *_outcome(report), "", *_learning(report), "", *_stability(report), ""]
    return "\n".join([*lines, *_before(report)]) + "\n"


def _setting(report: Report) -> str:
    t, sae = report["budget"]["training"], report["budget"]["sae"]
    counts = {len(arm["seeds"]) for arm in report["arms"].values()}
    seeds = str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return (
        f"From `{report['command']}`. {made_sentence(report)} "
        f"{report['budget']['model']}, {sae['release']} {sae['sae_id']}; {t['max_steps']} "
        f"steps of {t['prompts_per_step'] * t['num_generations']} rollouts, c = {t['coefficient']:g}, learning rate "
        f"{t['learning_rate']:g}; seeds an arm: {seeds}. Test questions: {report['budget']['evaluation']['questions']} "
        "a seed, the same for all arms, answered once at the training temperature, steered by the feature that the "
        "policy scores highest. Intervals: 95 %, Student's t over seeds."
    )


def _differences(report: Report) -> list[str]:
    lines = [
        "### Differences, paired by seed and question",
        "",
        f"{len(report['minus'])} comparisons, without correction for their number. Shown: both intervals (resampled "
        "seeds and questions; t over seeds) leave out 0.",
        "",
        "| pair | right | resampled | t over seeds | per seed | shown | strict | tolerant | greedy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for pair, scores in report["minus"].items():
        d = scores["right"]
        others = " | ".join(f"{scores[s]['mean']:+.3f}" for s in ("strict", "tolerant", "greedy"))
        lines.append(
            f"| {pair} | {d['mean']:+.3f} | {_interval(d['resampled'])} | {_interval(d['student'])} "
            f"| {' '.join(f'{v:+.3f}' for v in d['per_seed'])} | {'yes' if d['shown'] else 'no'} | {others} |"
        )
    return lines


def _outcome(report: Report) -> list[str]:
    beside = report["outcome"]
    if beside is None:
        return []
    minus = ", ".join(f"`{arm}` {_figure(gap, '+.3f')}" for arm, gap in beside["minus"].items())
    return [
        "### Beside GRPO on the outcome (experiment 01), which trains the model on as many rollouts",
        "",
        f"It went from {_mean_of(beside['start'])} to {_figure(beside['end'])}, greedy {_figure(beside['greedy'])}. "
        f"Minus its accuracy at the end, by seed: {minus}.",
    ]


def _learning(report: Report) -> list[str]:
    lines = [
        "### Training: the policy as it samples, on training questions",
        "",
        "| arm | right, first five steps | right, last five | entropy at the end (nats) | critic's explained variance "
        "| clipped ratios | seconds a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, arm in report["arms"].items():
        if (log := arm["training"]) is not None:
            lines.append(
                f"| {name} | {_figure(log['first'])} | {_figure(log['last'])} | {_mean_of(log['entropy'], '.2f')} "
                f"| {_mean_of(log['explained'])} | {_mean_of(log['clipped'])} | {_mean_of(log['seconds'], '.1f')} |"
            )
    return lines


def _stability(report: Report) -> list[str]:
    lines = [
        "### Which features are added on test questions",
        "",
        "Effective number: exp of the entropy of their shares. Overlap between two seeds: the sum of the smaller "
        f"shares. Common top {TOP}: of the {TOP} most used features of each of two seeds.",
        "",
        "| arm | token | effective number | share of the most used | most used, seed by seed | overlap | common top "
        f"{TOP} |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, arm in report["arms"].items():
        for where, called in (("tokens", "every"), ("first", "first")):
            if arm["features"] is not None:
                f = arm["features"][where]
                lines.append(
                    f"| {name} | {called} | {_mean_of(f['effective'], '.1f')} | {_mean_of(f['largest'])} "
                    f"| {', '.join(f'{feature} ({share:.0%})' for feature, share in f['most_used'])} "
                    f"| {_mean_of(f['overlap'])} | {_mean_of(f['top'], '.1f')} |"
                )
    return lines


def _before(report: Report) -> list[str]:
    lines = ["### Before the runs", ""]
    if report["tuning"]:
        lines += [
            f"Pilots of `{report['tuning_settings']['arm']}` on training questions, seed "
            f"{report['tuning_settings']['seed']}, at the full budget; judged by the last third of their steps:",
            "",
            "| c | learning rate | right, first third | right, last third |",
            "|---|---|---|---|",
            *(
                f"| {p['coefficient']:g} | {p['learning_rate']:g} | {p['first']:.3f} | {p['last']:.3f} |"
                for p in report["tuning"]
            ),
            "",
        ]
    if (found := report["search"]) is not None:
        t = report["budget"]["training"]
        times = found["rollouts"] / (t["max_steps"] * t["prompts_per_step"] * t["num_generations"])
        lines.append(
            f"The constant feature is {found['feature']}, which fires by itself on {found['fires_on']:.1%} of the "
            f"tokens; in the search's last round, on discovery questions, it was right in {found['accuracy']:.3f}. "
            f"The search took {found['rollouts']:,} rollouts, {times:.1f} times those that a policy is trained on."
        )
    return lines


def _interval(interval: Sequence[float | None]) -> str:
    return " to ".join("?" if end is None else f"{end:+.3f}" for end in interval)


def _mean_of(figure: dict[str, Any] | None, form: str = ".3f") -> str:
    return "" if figure is None or figure["mean"] is None else f"{figure['mean']:{form}}"


def _figure(figure: dict[str, Any] | None, form: str = ".3f") -> str:
    if figure is None:
        return ""
    ends = " to ".join("?" if end is None else f"{end:{form}}" for end in figure["interval"])
    return f"{_mean_of(figure, form)} ({ends})"
