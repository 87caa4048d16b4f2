"""lm-eval's tasks, question by question. Prompts and scoring are lm-eval's own."""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mechreward.errors import ConfigError, nearest
from mechreward.extras import require
from mechreward.train.capability import Scores, Suite
from mechreward.train.config import NonEmpty, Positive


class LmEvalTask(Suite):
    """A task (or group) of lm-eval, with its own prompt and scoring.

    Attributes:
        task: Its name there: ``hellaswag``, ``arc_easy``, ``mmlu``, ``gsm8k``.
        metric: One of the metrics that it reports, 0 or 1 for each question: ``acc``, ``acc_norm``, ``exact_match``.
        filter: Which of lm-eval's readings of the answer counts; ``none`` for tasks that have only one.
        questions: Number of questions, drawn over the whole task (for a group: over all its tasks); None for all.
    """

    task: NonEmpty
    metric: NonEmpty
    filter: NonEmpty = "none"
    questions: Positive | None = 200

    def check(self) -> None:
        require("lm_eval", "eval")

    def changes(self, own: dict[str, Any]) -> dict[str, Any]:
        """Return what differs from lm-eval's own definition of one of the tasks: here nothing."""
        return {}

    def scores(self, model: Any, tokenizer: Any, batch_size: int = 16, seed: int = 0) -> dict[str, Scores]:
        return {self.task: task_scores(model, tokenizer, self, batch_size, seed)}


def task_scores(model: Any, tokenizer: Any, task: LmEvalTask, batch_size: int = 16, seed: int = 0) -> Scores:
    """Measure a model on one of lm-eval's tasks, on questions drawn from all of the task's.

    Raises:
        MissingExtraError: lm-eval is not installed.
        ConfigError: No such task, metric or data.
    """
    lm_eval = require("lm_eval", "eval")
    HFLM: Any = require("lm_eval.models.huggingface", "eval").HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    parts = loaded_tasks(task)
    chosen = drawn_questions({name: len(part.eval_docs) for name, part in parts.items()}, task.questions, seed)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    # lm-eval limits an answer by max_length, which max_new_tokens in the model's own settings would overrule.
    own, model.generation_config.max_new_tokens = model.generation_config.max_new_tokens, None
    try:
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=[parts[name] for name in chosen],
            samples=chosen,
            task_manager=TaskManager(include_defaults=False),  # the tasks are loaded already
            bootstrap_iters=0,  # its standard errors are of each model alone
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    finally:
        model.generation_config.max_new_tokens = own
    return scores_of(task, results["samples"])


def drawn_questions(sizes: dict[str, int], number: int | None, seed: int) -> dict[str, list[int]]:
    """Draw ``number`` questions from all tasks, each equally likely; return each task's, sorted for lm-eval."""
    everything = [(name, i) for name, size in sorted(sizes.items()) for i in range(size)]
    if number is not None and number < len(everything):
        drawn = np.random.default_rng(seed).choice(len(everything), number, replace=False)
        everything = [everything[i] for i in sorted(drawn)]
    chosen: dict[str, list[int]] = {}
    for name, i in everything:
        chosen.setdefault(name, []).append(i)
    return chosen


def scores_of(task: LmEvalTask, samples: dict[str, list[dict[str, Any]]]) -> Scores:
    """Convert lm-eval's log of each question to scores.

    Raises:
        ConfigError: The metric or filter is not among what the task reports, or is not 0 or 1 for each question.
    """
    logged = [(f"{name}/{row['doc_id']}", row) for name, rows in sorted(samples.items()) for row in rows]
    filters = list(dict.fromkeys(row["filter"] for _, row in logged))
    if task.filter not in filters:
        raise ConfigError(
            f"lm-eval's task '{task.task}' has no filter '{task.filter}', only {', '.join(filters)}."
            f"{nearest(task.filter, filters)}"
        )
    rows = [(question, row) for question, row in logged if row["filter"] == task.filter]
    metrics = list(rows[0][1]["metrics"])
    if task.metric not in metrics:
        raise ConfigError(
            f"lm-eval's task '{task.task}' has no metric '{task.metric}', only {', '.join(metrics)}."
            f"{nearest(task.metric, metrics)}"
        )
    values = [row[task.metric] for _, row in rows]
    if not all(isinstance(v, bool | int | float | np.number) and v in (0, 1) for v in values):
        raise ConfigError(
            f"lm-eval's metric '{task.metric}' of '{task.task}' is not 0 or 1 for each question: choose one that is."
        )
    # Each choice of a multiple-choice question is a request of its own.
    choices = [len(row["arguments"]) for _, row in rows]
    chance = 0.0 if min(choices) < 2 else float(np.mean([1 / n for n in choices]))
    return Scores([question for question, _ in rows], np.array(values, dtype=np.float64), chance=chance)


def loaded_tasks(task: LmEvalTask) -> dict[str, Any]:
    """Load lm-eval's task, or all tasks of its group, with their questions from where the configuration says.

    Raises:
        ConfigError: There is no such task, file or split, or a dataset is unavailable.
    """
    require("lm_eval", "eval")
    from lm_eval.tasks import TaskManager

    index, names = _found(task.task)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            changed = {"include": str(index[name].yaml_path), "task": name, **task.changes(index[name].cfg)}
            (Path(folder) / f"{name}.yaml").write_text(yaml.safe_dump(changed, sort_keys=False), encoding="utf-8")
        ours = TaskManager(include_path=folder, include_defaults=False)
        try:
            return {name: ours.load(name)["tasks"][name] for name in ours.all_subtasks}
        except Exception as error:  # `datasets` has no base class for its errors: network, names, formats
            message = " ".join(str(error).split())
            raise ConfigError(
                f"The data of lm-eval's task '{task.task}' cannot be loaded ({type(error).__name__}: {message[:200]}): "
                "check the network, or name local files with `data`, in the columns of the hub's dataset."
            ) from error


def _found(task: str) -> tuple[Any, list[str]]:
    """Return lm-eval's definitions, and the names of the tasks behind a task, tag or group.

    Read only folders whose files name it: all of lm-eval's 14,000 YAML files take 20 seconds.
    """
    from lm_eval import tasks

    root = Path(str(tasks.__file__)).parent
    # Templates, which may hold a tag, have no suffix.
    files = [file for file in root.rglob("*") if file.suffix in (".yaml", "") and file.is_file()]
    texts = {file: file.read_text(encoding="utf-8", errors="replace") for file in files}
    named = re.compile(rf"(?<![\w-]){re.escape(task)}(?![\w-])")
    folders = {root / file.relative_to(root).parts[0] for file, text in texts.items() if named.search(text)}
    if folders:
        near = tasks.TaskManager(include_path=sorted(map(str, folders)), include_defaults=False).task_index
        with contextlib.suppress(KeyError):
            return near, _leaves(near, task)
        index = tasks.TaskManager().task_index  # a group's tasks may lie in another folder
        with contextlib.suppress(KeyError):
            return index, _leaves(index, task)
    known = {name for text in texts.values() for name in re.findall(r"^(?:task|group): *(\w+)", text, re.MULTILINE)}
    raise ConfigError(f"lm-eval has no task '{task}'.{nearest(task, known)}")


def _leaves(index: Any, name: str) -> list[str]:
    """Return the tasks behind a task, a tag or a group of groups."""
    entry = index[name]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name != "GROUP":
        return [name]
    children = [child if isinstance(child, str) else child.get("task") for child in entry.cfg["task"]]
    if not all(isinstance(child, str) for child in children):
        raise ConfigError(f"lm-eval's group '{name}' defines tasks within itself: name its tasks one by one.")
    return [leaf for child in children for leaf in _leaves(index, child)]
