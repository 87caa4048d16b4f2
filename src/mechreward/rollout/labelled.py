"""Labelled rollouts: what features are found on, packs are judged by, and probes learn from.

They come from the model itself, sampled and verified, or from a JSONL file. A line of the file is one rollout::

    {"prompt": "1+1=", "completion": " 2", "label": true}

or one contrast, which stands for two rollouts of one question::

    {"prompt": "", "positive": "Let me check that.", "negative": "Surely so."}

``prompt`` may be a conversation, or left out. Optional: ``completion_ids``, the sampled tokens, which the text alone
need not give back; ``temperature``, at which they were sampled; ``way``, the way of answering (the gate has a test
within the ``careful`` ones); ``paraphrase``, the completion in other words; ``group``, where one question has several
prompts. A null, as tables write it where a row lacks a column, says what a missing key says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray

from mechreward import progress
from mechreward.errors import DataError
from mechreward.rollout.batch import Call, RolloutBatch
from mechreward.rollout.capture import text_config
from mechreward.rollout.sampling import sample, samples_depend_on
from mechreward.rollout.source import HFSource
from mechreward.schema import shown
from mechreward.unfinished import Unfinished, digest
from mechreward.verifiers.golds import golds, verdicts

Verifier = Callable[[Sequence[str], Sequence[str]], Sequence[bool | None]]


@dataclass(frozen=True)
class Labelled:
    """n rollouts, each with or without a behaviour; a token of each can be read.

    Attributes:
        batch: The rollouts.
        labels: Whether each shows the behaviour, ``[n]`` bool.
        groups: Number of each one's question, ``[n]`` int: rollouts of one question are alike.
        source: For the evidence: where they come from.
        temperature: At which they were sampled, if known.
        ways: The way in which each was answered, if known.
        paraphrases: The same completions in other words, if given.
    """

    batch: RolloutBatch
    labels: NDArray[np.bool_]
    groups: NDArray[np.int64]
    source: str
    temperature: float | None = None
    ways: list[str] | None = None
    paraphrases: list[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int] | NDArray) -> Labelled:
        """Some of the rollouts, by their numbers or by a mask."""
        given = np.asarray(rows)
        chosen = (np.flatnonzero(given) if given.dtype == bool else given).astype(int).tolist()
        return replace(
            self,
            batch=self.batch.take(chosen),
            labels=self.labels[chosen],
            groups=self.groups[chosen],
            ways=self.ways and [self.ways[row] for row in chosen],
            paraphrases=self.paraphrases and [self.paraphrases[row] for row in chosen],
        )

    def fingerprint(self) -> str:
        """Tells whether work is continued on the same rollouts."""
        batch = self.batch
        ids = [list(map(list, side)) for side in (batch.prompt_ids, batch.completion_ids)]
        return digest([ids, batch.texts, self.labels.tolist(), self.groups.tolist()])

    def halves(self, seed: int = 0) -> tuple[Labelled, Labelled]:
        """Two halves that share no question."""
        questions, question = np.unique(self.groups, return_inverse=True)
        first = np.random.default_rng(seed).permutation(len(questions)) % 2 == 0
        return self.take(np.flatnonzero(first[question])), self.take(np.flatnonzero(~first[question]))


def sample_rollouts(
    model: Any,
    tokenizer: Any,
    questions: Any,
    verifier: Verifier,
    rollouts: int,
    source: str,
    seed: int = 0,
    batch_size: int = 64,
    unfinished: Unfinished | None = None,
    **generate: Any,
) -> Labelled:
    """Sample the model on questions, and label each rollout by the verifier.

    Args:
        model: Any HF causal language model.
        tokenizer: Its tokenizer.
        questions: With columns ``prompt`` and ``answer``.
        verifier: Of completions and golds; rollouts on which it does not decide (None) are left out.
        rollouts: How many a question.
        source: What to call them in the evidence.
        seed: Of torch's generator, which is left as it was.
        batch_size: Rollouts sampled at once.
        unfinished: Keeps the rollouts batch by batch, so that sampling can be interrupted.
        generate: Options of HF `generate`.

    Raises:
        DataError: All have the same label, or the verifier decides on none.
    """
    prompts, kept = list(questions["prompt"]), None
    if unfinished is not None:
        decides = samples_depend_on(model, prompts, rollouts, batch_size, seed, generate)
        kept = unfinished.steps("rollouts", decides)
    with torch.random.fork_rng(), progress.stage("Sampling rollouts", len(prompts) * rollouts):
        torch.manual_seed(seed)
        batch = sample(model, tokenizer, prompts, rollouts, batch_size, kept, **generate)
    answers = [cell for cell in questions["answer"] for _ in range(rollouts)]
    said = verdicts(verifier, batch.texts, golds(verifier, answers, "answer"))
    decided = [i for i, verdict in enumerate(said) if verdict is not None]
    if not decided:
        raise DataError(
            f"The verifier decides on none of the {len(batch)} rollouts of {source}: it cannot read gold answers such "
            f"as {shown(questions['answer'][0])}. Name the column with the answers, or another verifier."
        )
    labelled = Labelled(
        batch=batch.take(decided),
        labels=np.array([bool(said[i]) for i in decided]),
        groups=np.array([i // rollouts for i in decided]),
        source=source,
        temperature=_temperature(model, generate),
    )
    return _readable(labelled)


def read_rollouts(file: str | Path, model: Any, tokenizer: Any) -> Labelled:
    """Labelled rollouts from a JSONL file.

    Raises:
        DataError: It cannot be read, a line is not a labelled rollout, or all have the same label.
    """
    file = Path(file)
    rows = [row for number, line in read_lines(file) for row in _rollouts(line, f"{file}, line {number}")]
    if not rows:
        raise DataError(f"{file} holds no rollouts: give one JSON object a line.")
    call = Call([row["prompt"] for row in rows], [row["completion"] for row in rows])
    try:
        batch = replace(HFSource(model, tokenizer).batch(call), num_generations=1)
    except (ValueError, TypeError, TemplateError) as error:  # no chat template, or one that refuses these roles
        said = " ".join(str(error).split())[:200]
        raise DataError(
            f"The tokenizer cannot write the texts of {file} ({said}): give prompts as plain text."
        ) from None
    size = text_config(model).vocab_size
    completion_ids = []
    for row, own in zip(rows, batch.completion_ids, strict=True):
        ids = own if row.get("completion_ids") is None else row["completion_ids"]
        if max(ids, default=0) >= size:
            raise DataError(f"{row['where']}: token {max(ids)} is not in the model's vocabulary of {size}.")
        completion_ids.append(list(ids))
    question = {group: number for number, group in enumerate(dict.fromkeys(row["group"] for row in rows))}
    temperatures = {row.get("temperature") for row in rows}
    labelled = Labelled(
        batch=replace(
            batch,
            prompt_ids=[list(ids) or _beginning(tokenizer, file) for ids in batch.prompt_ids],
            completion_ids=completion_ids,
        ),
        labels=np.array([row["label"] for row in rows], dtype=bool),
        groups=np.array([question[row["group"]] for row in rows]),
        source=f"{len(rows)} rollouts of {file.name}",
        temperature=temperatures.pop() if len(temperatures) == 1 else None,
        ways=_column(rows, "way"),
        paraphrases=_column(rows, "paraphrase"),
    )
    return _readable(labelled)


def holds_rollouts(file: Path) -> bool:
    """Whether a JSONL file holds rollouts, and not questions to sample."""
    first = _given(next(iter(read_lines(file)), (0, {}))[1])
    return "completion" in first or "positive" in first


def write_rollouts(labelled: Labelled, file: Path) -> None:
    """Write rollouts as :func:`read_rollouts` reads them, token for token."""
    batch, lines = labelled.batch, []
    for i in range(len(labelled)):
        row = {
            "prompt": batch.prompts[i],
            "completion": batch.texts[i],
            "completion_ids": list(batch.completion_ids[i]),
            "label": bool(labelled.labels[i]),
            "group": int(labelled.groups[i]),
            "temperature": labelled.temperature,
            "way": labelled.ways and labelled.ways[i],
            "paraphrase": labelled.paraphrases and labelled.paraphrases[i],
        }
        lines.append(json.dumps({key: value for key, value in row.items() if value is not None}, ensure_ascii=False))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON object of each line that is not empty, with the line's number.

    Raises:
        DataError: It cannot be read, or a line is no JSON object.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut a text at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({type(error).__name__}): give a JSONL file in UTF-8.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}, line {number}, is not JSON ({error}): write one object a line.") from None
        if not isinstance(row, dict):
            raise DataError(f"{file}, line {number}, is {shown(row)}, not an object with named keys.")
        yield number, row


def _rollouts(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The rollouts that a line stands for."""
    row = {"prompt": ""} | _given(row)
    prompt = row["prompt"]
    # Texts without a prompt have nothing in common.
    group = {"group": str(row.get("group", json.dumps(prompt) if prompt else where)), "where": where}
    if "positive" in row and "negative" in row:
        sides = [{"completion": row["positive"], "label": True}, {"completion": row["negative"], "label": False}]
        found = [{"prompt": prompt} | group | side for side in sides]
    else:
        found = [row | group]
    for rollout in found:
        for name, (fits, wanted) in _FIELDS.items():
            value = rollout.get(name)
            if not fits(value) and (value is not None or name in _REQUIRED):
                raise DataError(f"{where}: {name} is {shown(value)}, but it should be {wanted}.")
    return found


def _given(row: dict[str, Any]) -> dict[str, Any]:
    """The entries that say something: tables fill the cells that a row lacks with null, or with NaN."""
    return {key: value for key, value in row.items() if value is not None and value == value}


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, list) and prompt:
        return all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in prompt)
    return isinstance(prompt, str)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_tokens(ids: Any) -> bool:
    return isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids)


_REQUIRED = ("prompt", "completion", "label")

_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prompt": (_is_prompt, "a text or a list of messages with role and content"),
    "completion": (_is_text, "a text"),
    "label": (lambda value: value in (True, False), "true or false, whether the rollout shows the behaviour"),
    "completion_ids": (_are_tokens, "a list of token ids"),
    "temperature": (lambda value: type(value) in (int, float) and 0 <= value < math.inf, "a number, 0 or more"),
    "way": (_is_text, "a text"),
    "paraphrase": (_is_text, "a text"),
}


def _temperature(model: Any, generate: dict[str, Any]) -> float:
    """At which `generate` samples with these options; 0 where it takes the likeliest token."""
    config = model.generation_config
    if not generate.get("do_sample", config.do_sample):
        return 0.0
    chosen = generate.get("temperature", config.temperature)
    return 1.0 if chosen is None else float(chosen)


def _column(rows: list[dict[str, Any]], name: str) -> list[Any] | None:
    """A column that every row has, or None."""
    return [row[name] for row in rows] if all(row.get(name) is not None for row in rows) else None


def _beginning(tokenizer: Any, file: Path) -> list[int]:
    """What stands before a text without a prompt."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise DataError(f"{file} has an empty prompt, and the tokenizer has no token to begin with: give prompts.")
    return [start]


def _readable(labelled: Labelled) -> Labelled:
    """Without the rollouts in which no token can be read."""
    kept = labelled.take(np.flatnonzero(labelled.batch.mask().any(dim=1).numpy()))
    if len(kept) == 0 or kept.labels.all() or not kept.labels.any():
        raise DataError(
            f"{int(kept.labels.sum())} of {len(kept)} rollouts of {labelled.source} show the behaviour, and there is "
            "nothing to contrast: use other questions, more of them, or another temperature."
        )
    return kept
