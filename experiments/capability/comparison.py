"""Compare what a model could do before RL with what it can do afterwards, question by question.

Both are measured on the same questions (:mod:`mechreward.train.capability`), so that they are compared in pairs. A
regression of more than :data:`LIMIT` is flagged, with its significance; where none is shown, the interval says which
regressions the data leave possible.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from scipy.stats import beta, norm

from capability.tasks import ChangedTask, matching
from common.tables import table
from mechreward import stats
from mechreward.errors import ConfigError, DataError
from mechreward.files import made_sentence
from mechreward.schema import Strict
from mechreward.train.capability import PocketSuite, Scores, Suite
from mechreward.train.config import Count, NonEmpty, Positive
from mechreward.train.results import DRAWS

LIMIT = 0.02
"""A regression of more than this is flagged: two points of accuracy, or a perplexity that is 2 % higher."""

Z = float(norm.ppf(0.975))


# -- the configuration -----------------------------------------------------------------------------------------------


class After(Strict):
    """A way of training, and what came out of it.

    Attributes:
        models: A folder, a pattern of folders (one for each seed of the same training), or an id of the hub.
        made_by: The command that makes them, for the error where there are none.
    """

    models: NonEmpty
    made_by: NonEmpty


class CapabilityConfig(Strict):
    """Settings of a comparison.

    Attributes:
        name: Name of the result, ``capability-<name>``.
        before: The model before RL: ``mechreward/pocket``, a folder, or an id of the hub.
        after: Ways of training, by name.
        pocket: pocket's own suite.
        lm_eval: Tasks of lm-eval.
        batch_size: Rows in one forward pass.
        seed: Random seed of the choice of lm-eval's questions.
        remarks: Sentences for the page: what the runs were, and what they cannot show.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    before: NonEmpty
    after: Annotated[dict[NonEmpty, After], Field(min_length=1)]
    pocket: PocketSuite | None = None
    lm_eval: list[ChangedTask] = Field(default_factory=list)
    batch_size: Positive = 16
    seed: Count = 0
    remarks: list[NonEmpty] = Field(default_factory=list)

    @model_validator(mode="after")
    def _measures_something(self) -> CapabilityConfig:
        if self.pocket is None and not self.lm_eval:
            raise ValueError("measures nothing: give it pocket, lm_eval or both")
        names = [task.task for task in self.lm_eval]
        if len(set(names)) < len(names):
            raise ValueError("names a task of lm_eval twice")
        return self

    @property
    def suites(self) -> list[Suite]:
        """Everything that is measured."""
        return [*([self.pocket] if self.pocket else []), *self.lm_eval]


def models_of(after: After) -> list[str]:
    """Return the folders that a pattern finds, in order, or an id of the hub unchanged.

    Raises:
        ConfigError: There are none: the sentence names the command that makes them.
    """
    pattern = after.models
    local = Path(pattern).exists() or re.search(r"[*?\[]", pattern) or pattern.count("/") != 1
    found = matching(pattern) if local else [pattern]
    if not found:
        raise ConfigError(f"There is no trained model at {pattern}: run {after.made_by} first.")
    return found


# -- statistics ------------------------------------------------------------------------------------------------------


def paired_bootstrap(
    differences: NDArray, weights: NDArray | None = None, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile interval of sum(d) / sum(w) over questions drawn with replacement, in pairs.

    Args:
        differences: After minus before, ``[Q]``.
        weights: Tokens of each text, ``[Q]``; 1 for a question, which makes it the mean.
        draws: Number of resamples.
        seed: Random seed of the resampling.
    """
    w = np.ones(len(differences)) if weights is None else np.asarray(weights, dtype=np.float64)
    rng, number, means = np.random.default_rng(seed), len(differences), []
    for start in range(0, draws, 200):  # not all at once: all of MMLU would fill the memory
        drawn = rng.integers(number, size=(min(200, draws - start), number))
        means.append(differences[drawn].sum(axis=1) / w[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def adjusted_wald(differences: NDArray) -> tuple[float, float]:
    """Return a 95 % interval of the mean of paired differences in -1..1 that does not collapse for few changes.

    Bonett & Price (2012), J. Educ. Behav. Stat. 37, 479-488: one question lost and one won are added, and
    m +- z sqrt((sum d^2 / n' - m^2) / n') is taken over the n' = n + 2. Where none of 200 questions changed, a
    bootstrap says "0 to 0", and this says -1.4 to +1.4 points.
    """
    n = len(differences) + 2
    mean = float(differences.sum()) / n
    half = Z * float(np.sqrt((np.square(differences).sum() + 2) / n - mean**2) / np.sqrt(n))
    return mean - half, mean + half


@dataclass(frozen=True)
class Change:
    """One capability, after minus before.

    Attributes:
        questions: Number of questions.
        before, after: Accuracy, or perplexity (over several models: of the mean of their nats per token).
        gain: Negative where something was lost: the difference in accuracy, or 1 - after / before of the perplexity.
        per_model: Each trained model's own gain.
        intervals: 95 % intervals of the gain: ``bootstrap`` over questions; ``adjusted`` for questions (see
            :func:`adjusted_wald`); ``student``, t over several trained models.
        lost, won: Questions that were right only before, and only after (means over models); None for texts.
        chance: The accuracy of guessing; None for texts.
        above_chance: Whether what there was to lose is more than guessing, beyond the limit (one-sided 97.5 %,
            Clopper-Pearson); None for texts.
    """

    questions: int
    before: float
    after: float
    gain: float
    per_model: list[float]
    intervals: dict[str, tuple[float, float]]
    lost: float | None
    won: float | None
    chance: float | None
    above_chance: bool | None

    @property
    def interval(self) -> tuple[float, float]:
        """The lowest and the highest end of the intervals; none of them alone covers everything that varies."""
        lows, highs = zip(*self.intervals.values(), strict=True)
        return min(lows), max(highs)

    @property
    def flagged(self) -> bool:
        """Whether the regression is more than the limit: 2.0 points are not."""
        return self.gain < -LIMIT - 1e-9

    @property
    def significant(self) -> bool:
        """Whether every interval excludes 0."""
        low, high = self.interval
        return low > 0 or high < 0

    @property
    def ruled_out(self) -> bool:
        """Whether a regression of more than the limit is outside the interval."""
        return self.interval[0] >= -LIMIT

    def report(self) -> dict[str, Any]:
        """Return the change for JSON."""
        verdicts = {"flagged": self.flagged, "significant": self.significant, "regression_ruled_out": self.ruled_out}
        return {**vars(self), "interval": self.interval, **verdicts}


def change(before: Scores, after: Sequence[Scores]) -> Change:
    """Compare one capability before and after; of several trained models, their mean, question by question.

    Raises:
        DataError: They were not measured on the same questions, or there are none.
    """
    if not after or not before.questions:
        raise DataError("There is nothing to compare: measure at least one question and one trained model.")
    for scores in after:
        if scores.questions != before.questions or not np.array_equal(_tokens(scores), _tokens(before)):
            raise DataError("Before and after were measured on different questions: measure both again.")
    differences = np.stack([scores.values - before.values for scores in after])  # [models, Q]
    each = differences.mean(axis=0)
    if before.tokens is not None:
        return _change_of_texts(before, after, differences)
    intervals = {"bootstrap": paired_bootstrap(each), "adjusted": adjusted_wald(each)}
    per_model = differences.mean(axis=1)
    if len(after) > 1:
        intervals["student"] = stats.t_interval(per_model)
    right = int(before.values.sum())
    sure = float(beta.ppf(0.025, right, len(each) - right + 1)) if right else 0.0
    return Change(
        questions=len(each),
        before=before.figure,
        after=float(np.mean([scores.figure for scores in after])),
        gain=float(each.mean()),
        per_model=per_model.tolist(),
        intervals=intervals,
        lost=float((differences < 0).sum(axis=1).mean()),
        won=float((differences > 0).sum(axis=1).mean()),
        chance=before.chance,
        above_chance=sure > before.chance if before.chance else before.figure > LIMIT,
    )


def _change_of_texts(before: Scores, after: Sequence[Scores], differences: NDArray) -> Change:
    """Return the gain of a perplexity, 1 - exp(d), d the difference in nats per token; it falls in d, so ends swap."""
    tokens = _tokens(before)
    per_model = differences.sum(axis=1) / tokens.sum()
    intervals = {"bootstrap": paired_bootstrap(differences.mean(axis=0), tokens)}
    if len(after) > 1:
        intervals["student"] = stats.t_interval(per_model)
    mean = float(per_model.mean())
    return Change(
        questions=len(tokens),
        before=before.figure,
        after=before.figure * float(np.exp(mean)),
        gain=_gain(mean),
        per_model=[_gain(d) for d in per_model],
        intervals={name: (_gain(high), _gain(low)) for name, (low, high) in intervals.items()},
        lost=None,
        won=None,
        chance=None,
        above_chance=None,
    )


def _tokens(scores: Scores) -> NDArray:
    return np.zeros(0) if scores.tokens is None else scores.tokens


def _gain(nats: float) -> float:
    return -float(np.expm1(nats))


# -- in words --------------------------------------------------------------------------------------------------------


def verdict(change: Change) -> str:
    """Say what is shown of one capability, and no more: no regression shown does not mean that there is none."""
    low, high = change.interval
    said = f"{_signed(change.gain, change)} (95 % interval {_signed(low, change)} to {_signed(high, change)})"
    limit = _unsigned(LIMIT, change)
    if change.flagged and change.significant:
        return f"REGRESSION, more than {limit} and significant: {said}."
    if change.flagged:
        return f"regression, more than {limit}, but not significant: {said}; no change at all is compatible with that."
    if change.significant and change.gain < 0:
        over = f"one of more than {limit} is ruled out" if change.ruled_out else f"more than {limit} is not ruled out"
        return f"a regression within {limit}, significant: {said}; {over}."
    if change.significant:
        return f"better, significantly: {said}."
    if change.above_chance is False:  # a narrow interval would look like evidence, and is none
        guessing = f"guessing ({100 * change.chance:.0f} %)" if change.chance else f"{limit} right"
        return f"says nothing: {said}, but it was not shown to be above {guessing} before, so that little can be lost."
    if change.ruled_out:
        return f"no regression shown: {said}, which rules out a loss of more than {limit}."
    return f"no regression shown: {said}, so that a loss of up to {_unsigned(-low, change)} is not ruled out."


def _signed(value: float, change: Change) -> str:
    """Format a gain in points; for a perplexity in percent, + is better: a fall by 3 % is +3.00 %."""
    shown = round(100 * value, 9) + 0.0  # a zero without a sign; but -0.0 where an interval just leaves out 0
    return f"{shown:+.1f}" if change.lost is not None else f"{shown:+.2f} %"


def _unsigned(value: float, change: Change) -> str:
    return f"{100 * value:.1f} points" if change.lost is not None else f"{100 * value:.2f} % of the perplexity"


def compared(report: Mapping[str, Any]) -> dict[str, dict[str, Change]]:
    """Compare every capability of every way of training, from the stored scores of each question.

    Args:
        report: ``made``, ``settings``, ``environment``, ``questions`` (by capability), ``before`` and ``after`` (the
            models' scores).

    Raises:
        DataError: The report holds no scores, or they do not belong together.
    """
    try:
        questions, before = report["questions"], report["before"]["scores"]
        after = {name: [model["scores"] for model in models] for name, models in report["after"].items()}
        return {
            name: {
                what: change(
                    Scores.from_json(asked, before[what]), [Scores.from_json(asked, scores[what]) for scores in models]
                )
                for what, asked in questions.items()
            }
            for name, models in after.items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"The stored scores cannot be read ({error!r}): measure again.") from error


def markdown(report: Mapping[str, Any]) -> str:
    """Return a table and a sentence for each capability of each way of training, and how it was measured."""
    changes = compared(report)
    settings = report["settings"]
    lines = [
        f"# What RL did to other capabilities: {settings['name']}",
        "",
        f"{made_sentence(report)} "
        f"Before: `{settings['before']}`. A change is after minus before on the same questions, in points (of a "
        "perplexity: in percent, + is lower, which is better). The interval is the widest of three at 95 %: a paired "
        "bootstrap over the questions, Bonett and Price's adjusted one (a bootstrap collapses where few questions "
        "change) and, with several trained models, Student's t over them. FLAG: more than "
        f"{100 * LIMIT:.0f} points (a perplexity: {100 * LIMIT:.0f} %) worse.",
        "",
        *[f"- {remark}" for remark in settings["remarks"]],
    ]
    for name, of_arm in changes.items():
        models = report["after"][name]
        lines += [
            "",
            f"## After `{name}`",
            "",
            f"{_runs(len(models))}: `{settings['after'][name]['models']}`.",
        ]
        lines += ["", *table(HEADER, [_row(what, c) for what, c in of_arm.items()]), ""]
        lines += [f"- {what}: {verdict(c)}" for what, c in of_arm.items()]
    number = sum(map(len, changes.values()))
    lines += ["", f"Comparisons: {number}, without correction for their number: of {number} that changed nothing, "]
    lines[-1] += f"up to {0.05 * number:.1f} would look significant, either way."
    return "\n".join([*lines, "", "## How it was measured", "", *_how(report)]) + "\n"


HEADER = "| | n | chance | before | after | change | 95 % interval | only before right / only after | |"


def _row(what: str, c: Change) -> list[str]:
    low, high = c.interval
    text = c.lost is None
    return [
        what,
        str(c.questions),
        "" if not c.chance else f"{100 * c.chance:.0f} %",
        *(f"{value:.4f}" if text else f"{100 * value:.1f} %" for value in (c.before, c.after)),
        _signed(c.gain, c),
        f"{_signed(low, c)} to {_signed(high, c)}",
        "" if c.lost is None or c.won is None else f"{c.lost:.3g} / {c.won:.3g}",
        ("FLAG" if c.flagged else "") + (", significant" if c.flagged and c.significant else ""),
    ]


def _runs(number: int) -> str:
    if number > 1:
        return f"{number} runs"
    return "One run, so that the intervals are over questions alone, and say nothing of what another seed would do"


def _how(report: Mapping[str, Any]) -> list[str]:
    settings, environment = report["settings"], report["environment"]
    lines = [f"Command: `{report['command']}`", ""]
    if settings["pocket"] is not None:
        suite = settings["pocket"]
        lines += [
            f"- pocket's skills: {suite['questions']} questions of each kind, answered greedily and sampled at "
            f"temperature 1 (seed {suite['seed']}, the same for every model). Word problems are of the test split; "
            "facts are about all known people; unknown people are those of the test, gate, discovery and train splits, "
            "in this order.",
            f"- perplexity: {suite['texts']} texts as in the corpus, its mixture of ways of answering, on questions of "
            "the test split. RL that moves the policy from one way of answering to another raises it; that is what it "
            "was trained to do, and it is a loss of the other ways all the same.",
        ]
    for task in settings["lm_eval"]:
        where = ", ".join(f"{split}: `{file}`" for split, file in task["data"].items()) or "the hub's"
        shots = "the task's own number of" if task["fewshot"] is None else task["fewshot"]
        tokens = "" if task["max_new_tokens"] is None else f", at most {task['max_new_tokens']} new tokens"
        lines.append(
            f"- lm-eval `{task['task']}`: `{task['metric']}` ({task['filter']}), {shots} examples in a prompt{tokens}; "
            f"data: {where}."
        )
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    return [*lines, f"- {packages}; Python {environment['python']}, {environment['device']}."]
