"""The results of experiment 05: what a learned choice of features gains over its controls, and what lasts."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from common.comparison import finished_runs, read_runs
from common.provenance import made_by
from common.tables import figure, interval, mean, numbers, seeds, table
from crl import experiment
from crl.experiment import CRLConfig
from mechreward.files import ENVIRONMENT, made_sentence
from mechreward.train.results import Run, difference, over_seeds, without_infinities
from mechreward.train.runner import folder_of

SCORES = {
    "right": "as in experiment 03 (`math_boxed`, which reads the answer's last number where no answer is marked)",
    "strict": "right, and marked as the task wants it (`#### N`)",
    "tolerant": "right, or the last number in the text is the right one",
}
TOP = 10
"""Features that are compared between seeds: the most used of each."""


def report(config: CRLConfig, outcome: Path) -> dict[str, Any]:
    """Return everything in the tables, from the finished runs.

    Args:
        config: The experiment.
        outcome: Experiments 01 to 03 as JSON, by ``experiments/compare.py``; left out where there is no such file.

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
            f"{one} - {two}": {score: difference(runs[one], runs[two], score).report() for score in (*SCORES, "greedy")}
            for one, two in _pairs(config, runs)
        },
        "outcome": _beside(runs, outcome),
    }
    return without_infinities(found)


def _pairs(config: CRLConfig, runs: dict[str, list[Run]]) -> list[tuple[str, str]]:
    """Return every arm with the unsteered model, and the trained policy with each other arm."""

    def is_unsteered(name: str) -> bool:
        return config.arms[name].steer == "none" and not config.arms[name].begin_without

    done = [name for name in config.arms if name in runs]
    unsteered, tuned = next(filter(is_unsteered, done), None), config.tuning.arm
    pairs = [(name, unsteered) for name in done if unsteered not in (None, name)]
    if tuned in runs:
        pairs += [(tuned, name) for name in done if name not in (tuned, unsteered)]
    return [(one, two) for one, two in pairs if two and {r.seed for r in runs[one]} & {r.seed for r in runs[two]}]


def _of_arm(config: CRLConfig, arm: str, runs: list[Run]) -> dict[str, Any]:
    folders = [folder_of(config, arm, run.seed) for run in runs]
    last = [run.rows[-1] for run in runs]

    def at_the_end(column: str) -> dict[str, Any] | None:
        if column not in last[0]:
            return None
        return over_seeds([float(np.nanmean(rows[column])) for rows in last])

    columns = (*SCORES, "greedy", "greedy_tolerant", "off", "steps_shown", "tokens")
    return {
        "arm": yaml.safe_load((folders[0] / "config.yaml").read_text(encoding="utf-8"))["arm"],
        "seeds": [run.seed for run in runs],
        "steps": runs[0].steps,
        "curve": [over_seeds([float(run.curve("right")[k]) for run in runs]) for k in range(len(runs[0].steps))],
        **{column: at_the_end(column) for column in columns},
        "training": _training(runs),
        "features": _features([_used(folder) for folder in folders], config.arms[arm].k),
    }


def _training(runs: list[Run]) -> dict[str, Any] | None:
    """Average what was logged: the sampled rewards of the first and the last five steps, and the rest."""
    if not runs[0].metrics:
        return None

    def logged(key: str, start: int | None, stop: int | None) -> dict[str, Any]:
        return over_seeds([float(np.mean([log[key] for log in run.metrics[start:stop]])) for run in runs])

    return {
        "first": logged("reward", 0, 5),
        "last": logged("reward", -5, None),
        "entropy": logged("entropy", -5, None),
        "explained": logged("explained", -5, None),
        "clipped": logged("clipped", None, None),
        "seconds": logged("seconds", None, None),
    }


# -- features ---------------------------------------------------------------------------------------------------------

Used = dict[str, dict[str, int]]
"""``tokens`` and ``first``: how often each feature was added."""


def _used(folder: Path) -> Used:
    return json.loads((folder / "features.json").read_text(encoding="utf-8"))


def _features(used: Sequence[Used], k: int) -> dict[str, Any] | None:
    """Measure how concentrated the added features are, and how much of them two seeds share; None if there are none.

    ``effective``: exp of the entropy of their shares. ``overlap``: the sum over features of the smaller of two seeds'
    shares, 1 for the same use and 0 for none in common. ``top``: common features among the most used of each seed.
    """
    if not all(used) or not all(each["tokens"] for each in used):
        return None
    found: dict[str, Any] = {"k": k}
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
    return found


def _shares(counts: dict[str, int]) -> dict[str, float]:
    total = sum(counts.values())
    return {feature: n / total for feature, n in counts.items()}


def _top(shares: dict[str, float]) -> set[str]:
    return {feature for feature, _ in Counter(shares).most_common(TOP)}


def _search(config: CRLConfig, runs: dict[str, list[Run]]) -> dict[str, Any] | None:
    """Return the constant feature, its accuracy in the search, and what the search cost."""
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
    """Return the gain of experiment 01's arm ``outcome``, which trains the model, and each arm's accuracy minus its."""
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


def markdown(report: dict[str, Any]) -> str:
    """Return the tables, from the report alone."""
    sections = (_setting, _accuracy, _differences, _outcome, _learning, _stability, _before)
    return "\n".join("\n".join(lines) + "\n" for section in sections if (lines := section(report)))


def _setting(report: dict[str, Any]) -> list[str]:
    t, sae = report["budget"]["training"], report["budget"]["sae"]
    return [
        f"From `{report['command']}`. {made_sentence(report)} "
        f"{report['budget']['model']}, {sae['release']} {sae['sae_id']}; {t['max_steps']} "
        f"steps of {t['prompts_per_step'] * t['num_generations']} rollouts, c = {t['coefficient']:g}, learning rate "
        f"{t['learning_rate']:g}; seeds an arm: {seeds(report['arms'])}. Test questions: "
        f"{report['budget']['evaluation']['questions']} a seed, the same for all arms, answered once at the training "
        "temperature, steered by the feature that the policy scores highest. Intervals: 95 %, Student's t over seeds."
    ]


def _accuracy(report: dict[str, Any]) -> list[str]:
    rows = []
    for name, arm in report["arms"].items():
        before = figure(arm["curve"][0]) if arm["training"] else ""
        cells = [figure(arm[column]) for column in (*SCORES, "greedy", "off")]
        rows.append([name, before, *cells, mean(arm["steps_shown"]), mean(arm["tokens"], ".1f")])
    header = "| arm | before training | right | strict | tolerant | greedy | off | answers with steps | tokens |"
    return [
        "### Accuracy",
        "",
        *(f"- *{score}*: {what}" for score, what in SCORES.items()),
        "- *off*: the same, steering switched off after training. The model's weights were never changed.",
        "",
        *table(header, rows),
    ]


def _differences(report: dict[str, Any]) -> list[str]:
    rows = []
    for pair, scores in report["minus"].items():
        d = scores["right"]
        rows.append(
            [
                pair,
                f"{d['mean']:+.3f}",
                interval(d["resampled"]),
                interval(d["student"]),
                numbers(d["per_seed"], "+.3f"),
                "yes" if d["shown"] else "no",
                *(f"{scores[score]['mean']:+.3f}" for score in ("strict", "tolerant", "greedy")),
            ]
        )
    return [
        "### Differences, paired by seed and question",
        "",
        f"{len(report['minus'])} comparisons, without correction for their number. Shown: both intervals (resampled "
        "seeds and questions; t over seeds) leave out 0.",
        "",
        *table("| pair | right | resampled | t over seeds | per seed | shown | strict | tolerant | greedy |", rows),
    ]


def _outcome(report: dict[str, Any]) -> list[str]:
    beside = report["outcome"]
    if beside is None:
        return []
    minus = ", ".join(f"`{arm}` {figure(gap, '+.3f')}" for arm, gap in beside["minus"].items())
    return [
        "### Beside GRPO on the outcome (experiment 01), which trains the model on as many rollouts",
        "",
        f"It went from {mean(beside['start'])} to {figure(beside['end'])}, greedy {figure(beside['greedy'])}. "
        f"Minus its accuracy at the end, by seed: {minus}.",
    ]


def _learning(report: dict[str, Any]) -> list[str]:
    logs = {name: arm["training"] for name, arm in report["arms"].items() if arm["training"] is not None}
    rows = [
        [
            name,
            figure(log["first"]),
            figure(log["last"]),
            mean(log["entropy"], ".2f"),
            mean(log["explained"]),
            mean(log["clipped"]),
            mean(log["seconds"], ".1f"),
        ]
        for name, log in logs.items()
    ]
    header = (
        "| arm | right, first five steps | right, last five | entropy at the end (nats) | critic's explained variance "
        "| clipped ratios | seconds a step |"
    )
    return ["### Training: the policy as it samples, on training questions", "", *table(header, rows)]


def _stability(report: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            called,
            mean(f["effective"], ".1f"),
            mean(f["largest"]),
            ", ".join(f"{feature} ({share:.0%})" for feature, share in f["most_used"]),
            mean(f["overlap"]),
            mean(f["top"], ".1f"),
        ]
        for name, arm in report["arms"].items()
        if arm["features"] is not None
        for where, called in (("tokens", "every"), ("first", "first"))
        for f in [arm["features"][where]]
    ]
    header = (
        "| arm | token | effective number | share of the most used | most used, seed by seed | overlap | common top "
        f"{TOP} |"
    )
    return [
        "### Which features are added on test questions",
        "",
        "Effective number: exp of the entropy of their shares. Overlap between two seeds: the sum of the smaller "
        f"shares. Common top {TOP}: of the {TOP} most used features of each of two seeds.",
        "",
        *table(header, rows),
    ]


def _before(report: dict[str, Any]) -> list[str]:
    lines = ["### Before the runs", ""]
    if report["tuning"]:
        settings = report["tuning_settings"]
        pilots = [
            [f"{p['coefficient']:g}", f"{p['learning_rate']:g}", f"{p['first']:.3f}", f"{p['last']:.3f}"]
            for p in report["tuning"]
        ]
        lines += [
            f"Pilots of `{settings['arm']}` on training questions, seed {settings['seed']}, at the full budget; judged "
            "by the last third of their steps:",
            "",
            *table("| c | learning rate | right, first third | right, last third |", pilots),
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
