"""What a model can do, question by question: pocket's own skills and perplexity, and lm-eval's tasks.

Prompts and scoring of lm-eval's tasks are lm-eval's own; only where the questions are read from can be changed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import logging
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from mechreward import pocket, verifiers
from mechreward.errors import ConfigError, nearest
from mechreward.extras import require
from mechreward.integrations.recording import environment
from mechreward.pocket.questions import Question, corpus_completion, questions
from mechreward.rollout.hf import end_token, load_model, sample
from mechreward.train.capability import CapabilityConfig, LmEvalTask, PocketSuite, Scores, matching

FORMATS = {".jsonl": "json", ".json": "json", ".arrow": "arrow", ".parquet": "parquet"}
MAX_NEW_TOKENS = 96
"""Of pocket's answers; its longest right ones have about 60."""
HEDGED = 0.75
"""Share of unknown people that the corpus hedges about, as in the last phase of pocket's training."""


# -- one model -------------------------------------------------------------------------------------------------------


def measure(
    config: CapabilityConfig, model: str, kept: Path | None = None, tell: Callable[[str], None] = print
) -> dict[str, Scores]:
    """Every capability of one model.

    Args:
        config: What to measure.
        model: A folder (a LoRA adapter's, too), ``mechreward/pocket``, or an id of the hub.
        kept: A folder for what was measured before, so that an interrupted comparison goes on; at another commit of
            this library, or where a model's weights have changed since, it is measured again.
        tell: Called with a line for each capability.

    Raises:
        MechRewardError: The model, a task or its data cannot be had.
    """
    pieces: list[PocketSuite | LmEvalTask] = [*([config.pocket] if config.pocket else []), *config.lm_eval]
    if config.lm_eval:
        require("lm_eval", "eval")  # say so before anything is loaded
    ran_on = packages()
    decides = [model, fingerprint(model), config.batch_size, config.seed, ran_on["packages"], ran_on["commit"]]
    loaded = functools.cache(load_model)  # only if something is left to measure, and once

    def carry_out(piece: PocketSuite | LmEvalTask) -> dict[str, Scores]:
        if isinstance(piece, PocketSuite):
            return pocket_scores(*loaded(model), piece)
        return {piece.task: lm_eval_scores(*loaded(model), piece, config.batch_size, config.seed)}

    found: dict[str, Scores] = {}
    for piece in pieces:
        text = json.dumps([*decides, type(piece).__name__, piece.model_dump(mode="json")], sort_keys=True)
        file = None if kept is None else kept / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        if file is not None and file.exists():
            part = {k: Scores.from_json(v["questions"], v) for k, v in json.loads(file.read_text()).items()}
        else:
            part = carry_out(piece)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                unfinished = file.with_suffix(".part")
                unfinished.write_text(
                    json.dumps({k: {"questions": v.questions, **v.to_json()} for k, v in part.items()})
                )
                unfinished.replace(file)
        for what, scores in part.items():
            unit = "perplexity" if scores.tokens is not None else "right"
            tell(f"{model}: {what}: {scores.figure:.3f} {unit} (n = {len(scores.questions)})")
        found |= part
    return found


def fingerprint(model: str) -> str | None:
    """SHA-256 of a local model's weights; None for an id of the hub."""
    files = sorted(Path(pocket.resolve(model)).glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def packages() -> dict[str, Any]:
    """The environment, with lm-eval's version where it is installed."""
    found = environment()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["packages"]["lm-eval"] = importlib.metadata.version("lm_eval")
    return found


# -- pocket ----------------------------------------------------------------------------------------------------------


def pocket_scores(model: Any, tokenizer: Any, suite: PocketSuite) -> dict[str, Scores]:
    """Both skills, greedily (what it does by default) and sampled (what RL trains), and the perplexity."""
    found = {}
    for kind, asked in skill_questions(suite).items():
        for way in ("greedy", "sampled"):
            completions = answers(model, tokenizer, asked, way == "sampled", suite.seed)
            found[f"{kind}, {way}"] = judged(asked, completions)
    return found | perplexities(model, tokenizer, corpus_texts(suite))


def skill_questions(suite: PocketSuite) -> dict[str, list[Question]]:
    """Distinct questions of each kind; fewer where there are not so many.

    Word problems: the test split. Known people: any of the 200 facts that the corpus holds, to be remembered. Unknown
    people: those that the corpus does not ask about, the test split's first; only 48 of them are there, so that the
    other splits have to help out (``train`` last: a run that is rewarded for retrieval has seen these).
    """
    facts = [q for q in itertools.islice(questions("corpus", suite.seed, "retrieval"), 8_000) if q.known]
    others = itertools.chain.from_iterable(
        itertools.islice(questions(split, suite.seed, "retrieval"), 3_000)
        for split in ("test", "gate", "discovery", "train")
    )
    return {
        "word problems": _distinct(questions("test", suite.seed, "reasoning"), suite.questions),
        "facts about known people": _distinct(facts, suite.questions),
        "unknown people (right: to say so)": _distinct((q for q in others if not q.known), suite.questions),
    }


def _distinct(asked: Iterable[Question], number: int) -> list[Question]:
    by_prompt: dict[str, Question] = {}
    for question in asked:
        by_prompt.setdefault(question.prompt, question)
        if len(by_prompt) == number:
            break
    return list(by_prompt.values())


def answers(model: Any, tokenizer: Any, asked: Sequence[Question], sampled: bool, seed: int) -> list[str]:
    """One answer to each question; sampled at temperature 1 from the whole distribution, or greedily."""
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None}
    if sampled:
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        batch = sample(model, tokenizer, [q.prompt for q in asked], 1, 256, max_new_tokens=MAX_NEW_TOKENS, **how)
    return batch.texts


def judged(asked: Sequence[Question], completions: Sequence[str]) -> Scores:
    """Right or wrong; to a question about somebody unknown, ``unknown`` is right, and an invention is wrong."""
    verdicts = verifiers.math_boxed(completions, [q.answer for q in asked])
    return Scores([short_name(q.prompt) for q in asked], np.array([float(v is True) for v in verdicts]))


def short_name(prompt: str) -> str:
    """Enough of a hash to tell questions apart, in place of their whole text."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:10]


def corpus_texts(suite: PocketSuite) -> list[tuple[str, str]]:
    """(prompt, completion) as in the corpus, three word problems to one fact, on questions of the test split."""
    rng = random.Random(f"perplexity/{suite.seed}")
    problems, facts = (questions("test", suite.seed, kind) for kind in ("reasoning", "retrieval"))
    drawn = (next(facts if rng.random() < 0.25 else problems) for _ in range(suite.texts))
    return [(q.prompt, corpus_completion(q, rng, HEDGED)) for q in drawn]


def perplexities(model: Any, tokenizer: Any, texts: Sequence[tuple[str, str]]) -> dict[str, Scores]:
    """The perplexity of whole texts, and of the answers in them, given the questions."""
    asked, rows = [short_name("".join(text)) for text in texts], []
    for prompt, completion in texts:
        prompt_ids = tokenizer(prompt).input_ids
        answer_ids = [*tokenizer(completion, add_special_tokens=False).input_ids, *end_token(model, tokenizer)]
        rows.append((prompt_ids, answer_ids))
    nats = token_nats(model, [p + a for p, a in rows])
    lengths = np.array([len(a) for _, a in rows])
    answers_only = np.array([own[-n:].sum() for own, n in zip(nats, lengths, strict=True)])
    return {
        "perplexity of the corpus's texts": Scores(
            asked, np.array([own.sum() for own in nats]), np.array([len(own) for own in nats])
        ),
        "perplexity of the answers in them": Scores(asked, answers_only, lengths),
    }


@torch.no_grad()
def token_nats(model: Any, sequences: Sequence[Sequence[int]], batch_size: int = 64) -> list[np.ndarray]:
    """-log p of each token given those before it, the first left out: ``[T - 1]`` float64 for each sequence."""
    found: list[np.ndarray] = []
    for start in range(0, len(sequences), batch_size):
        rows = [list(row) for row in sequences[start : start + batch_size]]
        width = max(map(len, rows))
        # Padded on the right, where a causal model does not look.
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
        attention = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
        logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1]
        if logits.device.type == "mps":  # which has no float64
            logits, ids = logits.cpu(), ids.cpu()
        logits = logits.double()
        nats = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        found += [own[: len(row) - 1].cpu().numpy() for own, row in zip(nats, rows, strict=True)]
    return found


# -- lm-eval ---------------------------------------------------------------------------------------------------------


def lm_eval_scores(model: Any, tokenizer: Any, task: LmEvalTask, batch_size: int = 16, seed: int = 0) -> Scores:
    """One of lm-eval's tasks, on so many questions drawn from all of them.

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
    """Which questions of which task: ``number`` of all of them, each as likely as any other; sorted, for lm-eval."""
    everything = [(name, i) for name, size in sorted(sizes.items()) for i in range(size)]
    if number is not None and number < len(everything):
        drawn = np.random.default_rng(seed).choice(len(everything), number, replace=False)
        everything = [everything[i] for i in sorted(drawn)]
    chosen: dict[str, list[int]] = {}
    for name, i in everything:
        chosen.setdefault(name, []).append(i)
    return chosen


def scores_of(task: LmEvalTask, samples: dict[str, list[dict[str, Any]]]) -> Scores:
    """What lm-eval logged of each question, as scores.

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
    """lm-eval's task, or all tasks of its group, with their questions read from where the configuration says.

    Raises:
        ConfigError: No such task; files or splits that are not there; a dataset that cannot be had.
    """
    require("lm_eval", "eval")
    from lm_eval.tasks import TaskManager

    index, names = _found(task.task)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            changed = {"include": str(index[name].yaml_path), "task": name, **_changes(task, index[name].cfg)}
            (Path(folder) / f"{name}.yaml").write_text(yaml.safe_dump(changed, sort_keys=False), encoding="utf-8")
        ours = TaskManager(include_path=folder, include_defaults=False)
        try:
            return {name: ours.load(name)["tasks"][name] for name in ours.all_subtasks}
        except Exception as error:  # `datasets` has no base class for what can go wrong: network, names, formats
            said = " ".join(str(error).split())
            raise ConfigError(
                f"The data of lm-eval's task '{task.task}' cannot be loaded ({type(error).__name__}: {said[:200]}): "
                "check the network, or name local files with `data`, in the columns of the hub's dataset."
            ) from error


def _found(task: str) -> tuple[Any, list[str]]:
    """lm-eval's definitions, and the names of the tasks that a task, tag or group stands for.

    Only the folders whose files name it are read as YAML: all of lm-eval's 14,000 files take 20 seconds.
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
    """The tasks of a task, a tag or a group of groups."""
    entry = index[name]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name != "GROUP":
        return [name]
    children = [child if isinstance(child, str) else child.get("task") for child in entry.cfg["task"]]
    if not all(isinstance(child, str) for child in children):
        raise ConfigError(f"lm-eval's group '{name}' defines tasks within itself: name its tasks one by one.")
    return [leaf for child in children for leaf in _leaves(index, child)]


def _changes(task: LmEvalTask, own: dict[str, Any]) -> dict[str, Any]:
    """What differs from lm-eval's own definition: where the questions come from, and how much is asked for."""
    changed: dict[str, Any] = {}
    if task.fewshot is not None:
        changed["num_fewshot"] = task.fewshot
    if task.max_new_tokens is not None:
        if own.get("output_type") != "generate_until":
            raise ConfigError(f"lm-eval's task '{task.task}' generates nothing: leave max_new_tokens out.")
        changed["generation_kwargs"] = {**own.get("generation_kwargs", {}), "max_gen_toks": task.max_new_tokens}
    if not task.data:
        return changed
    files, formats = {}, set()
    for split, pattern in task.data.items():
        path = pattern.replace("{subset}", str(own.get("dataset_name")))
        found = [str(Path(file).resolve()) for file in matching(path)]
        if not found:
            raise ConfigError(f"There is no file {path}: lm_eval's `data` of '{task.task}' names it for {split}.")
        files[split] = found
        formats |= {FORMATS.get(Path(file).suffix, file) for file in found}
    if len(formats) > 1 or not formats <= set(FORMATS.values()):
        raise ConfigError(
            f"`data` of '{task.task}' should be .jsonl, .json, .arrow or .parquet files, all of one kind."
        )
    shots = own.get("num_fewshot", 0) if task.fewshot is None else task.fewshot
    fewshot_split = own.get("fewshot_split") or own.get("training_split") or own.get("validation_split")
    if shots and fewshot_split not in files:
        raise ConfigError(
            f"lm-eval's task '{task.task}' takes {shots} examples from its split '{fewshot_split}', for which `data` "
            "names no file: name one, or set fewshot: 0."
        )
    return {
        **changed,
        "training_split": own.get("training_split") if own.get("training_split") in files else None,
        "validation_split": "validation" if "validation" in files else None,
        "test_split": "test" if "test" in files else None,
        "fewshot_split": fewshot_split if shots else None,
        "dataset_path": formats.pop(),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }
