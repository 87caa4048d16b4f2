"""Measure how often a model is right: at the evaluations of a training, and for ``mechreward eval``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from mechreward import progress, stats
from mechreward.errors import ConfigError
from mechreward.pocket.questions import step_accuracy
from mechreward.reward.feature_reward import FeatureReward
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.sampling import load_model, parse_dtype, sample
from mechreward.rollout.source import HFSource
from mechreward.train import arms, capability, data
from mechreward.train.capability import Scores
from mechreward.train.config import ExperimentConfig, validated
from mechreward.train.lm_eval import LmEvalTask
from mechreward.unfinished import Steps
from mechreward.verifiers.golds import golds, verdicts

# -- test questions ---------------------------------------------------------------------------------------------------


def test_questions(config: ExperimentConfig, seed: int) -> Any:
    """Draw a seed's test questions; the column ``number`` identifies them, so that arms can be paired."""
    test = data.load(config.data.test)
    wanted = min(config.evaluation.questions or len(test), len(test))
    numbers = sorted(np.random.default_rng(seed).choice(len(test), wanted, replace=False).tolist())
    return test.select(numbers).add_column("number", numbers)


def evaluate(
    model: Any,
    tokenizer: Any,
    test: Any,
    config: ExperimentConfig,
    watched: Sequence[FeatureReward],
    seed: int,
    do_sample: bool = True,
    look: Callable[[RolloutBatch], None] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Sample one rollout per test question, judge it, and read it.

    The seed is the same at every step and in every arm, and the random state of the training is left as it was.

    Args:
        model: The model, put back into its mode (training or not) afterwards.
        tokenizer: Its tokenizer.
        test: From :func:`test_questions`.
        config: For the verifier and the sampling.
        watched: Feature rewards whose readings are recorded.
        seed: Random seed of the sampling.
        do_sample: Sample at the training temperature; otherwise decode greedily.
        look: Called with the rollouts.

    Returns:
        A record per rollout (question's number, completion, right, tokens, ended, readings, and where steps can be
        checked right_steps, the share of the solution's steps that it makes), and their means.
    """
    training = model.training
    options = arms.sampling(config) | ({} if do_sample else {"do_sample": False, "temperature": None})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        batch = sample(model.eval(), tokenizer, test["prompt"], 1, config.evaluation.batch_size, **options)
    if look is not None:
        look(batch)
    source = HFSource(model, tokenizer)
    readings = {
        reward.__name__: reward(batch.prompts, batch.completions, batch.completion_ids, source=source)
        for reward in watched
    }
    model.train(training)

    verifier = arms.verifier(config)
    judged = verdicts(verifier, batch.texts, golds(verifier, test["answer"], "answer"))
    solutions: list[Any] = test["solution"] if "solution" in test.column_names else [None] * len(batch)
    rows = []
    for i, (text, ids) in enumerate(zip(batch.texts, batch.completion_ids, strict=True)):
        row: dict[str, Any] = {
            "question": test["number"][i],
            "completion": text,
            "right": judged[i] is True,
            "tokens": len(ids),
            "ended": ids[-1] in batch.eos_token_ids if len(ids) else False,
            **{name: values[i] for name, values in readings.items()},
        }
        if solutions[i] is not None:
            row["right_steps"] = step_accuracy(text, solutions[i])
        rows.append(row)

    figures = {"accuracy": _mean([row["right"] for row in rows]), "tokens": _mean([row["tokens"] for row in rows])}
    figures["truncated"] = 1 - _mean([row["ended"] for row in rows])
    for name in [*readings, "right_steps"]:
        known = [row[name] for row in rows if row.get(name) is not None]
        if known:
            figures[name] = _mean(known)
    return rows, figures


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# -- mechreward eval --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvalRequest:
    """What ``mechreward eval`` measures.

    Attributes:
        model: A folder, an id of the hub, or ``mechreward/pocket``.
        config: The test questions, the verifier and the sampling; the rest is not used.
        seed: Random seed of the draw of questions and of the sampling.
        dtype: Of the model's weights.
    """

    model: str
    config: ExperimentConfig
    seed: int
    dtype: str = "float32"

    @property
    def cache_key(self) -> dict[str, Any]:
        """Everything that the figures depend on."""
        settings = self.config.model_dump(mode="json", include={"verifier", "data", "evaluation", "training"})
        weights = capability.fingerprint(self.model)
        return {"model": self.model, "weights": weights, "dtype": self.dtype, "seed": self.seed, **settings}


def request_of_run(folder: Path) -> EvalRequest:
    """Measure a finished run's model, on the questions and with the seed of its own evaluations.

    Raises:
        ConfigError: The run is not finished, or its configuration cannot be read.
    """
    if not (folder / "summary.json").exists():
        raise ConfigError(f"The run in {folder} is not finished: the command that started it goes on with it.")
    try:
        stored = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8-sig"))
        known = {key: value for key, value in stored.items() if key in ExperimentConfig.model_fields}
        arm = {folder.parent.name: {"outcome": 1.0}}  # the reward makes no difference to what is right
        rest = {"output": str(folder), "arms": arm, "seeds": [stored["seed"]]}
        config = ExperimentConfig.model_validate({**known, **rest})
    except (yaml.YAMLError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{folder / 'config.yaml'} is not a run's configuration ({type(error).__name__}).") from None
    return EvalRequest(str(folder / "model"), config, stored["seed"], arms.dtype_of(config))


def accuracy_figures(request: EvalRequest, steps: Steps) -> dict[str, dict[str, Any]]:
    """Measure one rollout per question, sampled at the training temperature, and one that is greedy.

    For a run, the sampled figures equal those that it recorded at its last step.

    Args:
        request: What is measured.
        steps: Where finished figures are saved.

    Returns:
        For ``sampled`` and ``greedy`` the accuracy with its 95 % interval over questions (Wilson 1927), the number of
        questions, the tokens per answer, the share that was cut off, and where steps can be checked the share of right
        steps.
    """
    # The model is loaded only if something is left to measure.
    loaded = functools.cache(lambda: load_model(request.model, parse_dtype(request.dtype)))
    test = test_questions(request.config, request.seed)

    def measured(way: str) -> dict[str, Any]:
        seed = request.seed if way == "sampled" else 0  # as a run does it
        with progress.stage(f"Answering, {way}", len(test)):
            rows, figures = evaluate(*loaded(), test, request.config, [], seed, do_sample=way == "sampled")
        return {"n": len(rows), **figures, "interval": list(stats.wilson(sum(row["right"] for row in rows), len(rows)))}

    ways = ("sampled", "greedy")
    return dict(zip(ways, steps.each(ways, measured), strict=True))


def parse_tasks(text: str, questions: int) -> list[LmEvalTask]:
    """Parse lm-eval's tasks, written ``task``, ``task:metric`` or ``task:metric:filter`` and separated by commas.

    Raises:
        ConfigError: A task is named twice, or not at all.
    """
    tasks = []
    for each in filter(None, text.split(",")):
        name, metric, kept = [*each.split(":"), "", ""][:3]
        if name in [task.task for task in tasks]:
            raise ConfigError(f"--tasks names '{name}' twice: give each task once.")
        fields = {"task": name, "metric": metric or "acc", "filter": kept or "none", "questions": questions}
        tasks.append(validated(LmEvalTask, fields, "--tasks: ", "task"))
    return tasks


def capability_figures(scores: dict[str, Scores]) -> dict[str, dict[str, Any]]:
    """Summarise scores as accuracy with its 95 % interval, or as perplexity."""
    return {what: _figures(each) for what, each in scores.items()}


def _figures(scores: Scores) -> dict[str, Any]:
    n = len(scores.questions)
    if scores.tokens is not None:
        return {"perplexity": scores.figure, "n": n}
    return {"accuracy": scores.figure, "n": n, "interval": list(stats.wilson(int(scores.values.sum()), n))}
