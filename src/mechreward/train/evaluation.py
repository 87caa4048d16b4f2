"""How often one model is right: a run's model on the run's own test questions, or any model on questions of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from scipy import stats

from mechreward.errors import ConfigError
from mechreward.rollout.hf import load_model, parse_dtype
from mechreward.train import arms, runner
from mechreward.train.capability import CapabilityConfig, LmEvalTask, PocketSuite, Scores
from mechreward.train.config import ExperimentConfig
from mechreward.unfinished import Steps


@dataclass(frozen=True)
class Asked:
    """What is measured.

    Attributes:
        model: A folder, an id of the hub, or ``mechreward/pocket``.
        config: Of which the test questions, the verifier and the sampling count.
        seed: Of the draw of questions and of the sampling.
        dtype: Of the model's weights.
    """

    model: str
    config: ExperimentConfig
    seed: int
    dtype: str = "float32"

    @property
    def decides(self) -> dict[str, Any]:
        """All that its figures depend on."""
        from mechreward.train.capability_tasks import fingerprint

        settings = self.config.model_dump(mode="json", include={"verifier", "data", "evaluation", "training"})
        weights = fingerprint(self.model)
        return {"model": self.model, "weights": weights, "dtype": self.dtype, "seed": self.seed, **settings}


def of_run(folder: Path) -> Asked:
    """A finished run's model, and the questions and the seed that it was evaluated with.

    Raises:
        ConfigError: The run is not finished, or its configuration cannot be read.
    """
    if not (folder / "summary.json").exists():
        raise ConfigError(f"The run in {folder} is not finished: the command that started it goes on with it.")
    try:
        said = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8-sig"))
        known = {key: value for key, value in said.items() if key in ExperimentConfig.model_fields}
        arm = {folder.parent.name: {"outcome": 1.0}}  # what was rewarded does not matter to what is right
        config = ExperimentConfig.model_validate({**known, "output": str(folder), "arms": arm, "seeds": [said["seed"]]})
    except (yaml.YAMLError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{folder / 'config.yaml'} is not a run's configuration ({type(error).__name__}).") from None
    return Asked(str(folder / "model"), config, said["seed"], arms.dtype_of(config))


def answered(asked: Asked, steps: Steps, tell: Callable[[int, int], None]) -> dict[str, dict[str, Any]]:
    """Figures of one rollout a question, sampled at the training temperature, and greedy.

    The sampled one is what the run recorded of its last step, to the last question.

    Args:
        asked: What is measured.
        steps: Where finished figures are kept.
        tell: How far it is.

    Returns:
        For ``sampled`` and ``greedy`` the accuracy with its 95 % interval over questions (Wilson 1927), their number,
        the tokens of an answer, the share that was cut off, and where steps can be checked the share that is right.
    """
    loaded = functools.cache(
        lambda: load_model(asked.model, parse_dtype(asked.dtype))
    )  # only if something is left to measure
    test = runner.test_questions(asked.config, asked.seed)

    def measured(way: str) -> dict[str, Any]:
        model, tokenizer = loaded()
        seed = asked.seed if way == "sampled" else 0  # as a run does it
        rows, figures = runner.evaluate(model, tokenizer, test, asked.config, [], seed, do_sample=way == "sampled")
        return {"n": len(rows), **figures, "interval": wilson(sum(row["right"] for row in rows), len(rows))}

    ways = ("sampled", "greedy")
    found = {}
    tell(len(steps.done), len(ways))
    for way, figures in zip(ways, steps.each(ways, measured), strict=True):
        found[way] = figures
        tell(len(found), len(ways))
    return found


def wilson(right: int, n: int) -> list[float]:
    """95 % interval of a share (Wilson 1927)."""
    interval = stats.binomtest(right, n).proportion_ci(method="wilson")
    return [float(interval.low), float(interval.high)]


def task(text: str, questions: int) -> LmEvalTask:
    """lm-eval's ``task``, ``task:metric`` or ``task:metric:filter``."""
    name, metric, filtered = [*text.split(":"), "", ""][:3]
    return LmEvalTask(task=name, metric=metric or "acc", filter=filtered or "none", questions=questions)


def capabilities(
    model: str, tasks: list[LmEvalTask], suite: PocketSuite | None, seed: int, kept: Path, tell: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """lm-eval's tasks, and pocket's two skills and its perplexity, as experiment 07 measures them.

    Raises:
        MechRewardError: lm-eval, a task or its data cannot be had.
    """
    if not tasks and suite is None:
        return {}
    from mechreward.train.capability_tasks import measure

    nothing = {"nothing": {"models": model, "made_by": "mechreward eval"}}
    config = CapabilityConfig(name="eval", before=model, after=nothing, pocket=suite, lm_eval=tasks, seed=seed)  # pyright: ignore[reportArgumentType]
    return {what: _figures(scores) for what, scores in measure(config, model, kept, tell).items()}


def _figures(scores: Scores) -> dict[str, Any]:
    n = len(scores.questions)
    if scores.tokens is not None:
        return {"perplexity": scores.figure, "n": n}
    return {"accuracy": scores.figure, "n": n, "interval": wilson(int(scores.values.sum()), n)}
