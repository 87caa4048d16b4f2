"""What a model can do beside what it is trained on, question by question: pocket's skills and its perplexity."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mechreward import pocket, verifiers
from mechreward.files import environment, write
from mechreward.pocket.questions import Question, corpus_completion, questions
from mechreward.rollout.sampling import as_training, end_token, load_model, sample
from mechreward.schema import Strict
from mechreward.train.config import Count, Positive
from mechreward.unfinished import digest

MAX_NEW_TOKENS = 96
"""Of pocket's answers; its longest right ones have about 60."""
HEDGED = 0.75
"""Share of unknown people that the corpus hedges about, as in the last phase of pocket's training."""


# -- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """One model's results on one set of questions or texts.

    Attributes:
        questions: Their names, ``[Q]``; two models are compared on the same ones.
        values: ``[Q]``: 1 for a right answer and 0 for a wrong one; for a text, its negative log-likelihood in nats.
        tokens: For texts, how many tokens were predicted, ``[Q]``; None for questions.
        chance: The accuracy of guessing, where there are choices to guess from.
    """

    questions: list[str]
    values: NDArray[np.float64]
    tokens: NDArray[np.int64] | None = None
    chance: float = 0.0

    @property
    def figure(self) -> float:
        """Accuracy, or perplexity: exp(nats / tokens)."""
        return float(self.values.mean() if self.tokens is None else np.exp(self.values.sum() / self.tokens.sum()))

    def to_json(self) -> dict[str, Any]:
        """Return one character per question, so that the file stays small, or nats to four decimals."""
        if self.tokens is None:
            return {"values": "".join(str(int(v)) for v in self.values), "chance": self.chance}
        return {"values": [round(float(v), 4) for v in self.values], "tokens": self.tokens.tolist()}

    @classmethod
    def from_json(cls, questions: list[str], stored: Mapping[str, Any]) -> Scores:
        """Read what :meth:`to_json` wrote."""
        if "tokens" not in stored:
            return cls(questions, np.array([float(v) for v in stored["values"]]), chance=stored["chance"])
        return cls(questions, np.array(stored["values"], dtype=np.float64), np.array(stored["tokens"]))


class Suite(Strict):
    """A set of questions or texts that models are measured on."""

    def check(self) -> None:
        """Check before a model is loaded that the suite can be measured.

        Raises:
            MissingExtraError: A package is not installed.
        """

    def scores(self, model: Any, tokenizer: Any, batch_size: int, seed: int) -> dict[str, Scores]:
        """Measure a model.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            batch_size: Rows in one forward pass.
            seed: Random seed of the choice of questions.

        Raises:
            ConfigError: The suite's settings or data are impossible.
        """
        raise NotImplementedError


def measure(
    model: str,
    suites: Sequence[Suite],
    batch_size: int = 16,
    seed: int = 0,
    kept: Path | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Scores]:
    """Measure every capability of one model.

    Args:
        model: A folder (a LoRA adapter's, too), ``mechreward/pocket``, or an id of the hub.
        suites: What to measure.
        batch_size: Rows in one forward pass.
        seed: Random seed of the choice of questions.
        kept: A folder for finished suites, so that an interrupted command resumes; at another commit of this library,
            or after a change of the model's weights, they are measured again.
        log: Called with a line for each capability.

    Raises:
        MechRewardError: The model, a task or its data is unavailable.
    """
    for suite in suites:
        suite.check()
    ran_on = packages()
    of_model = [model, fingerprint(model), batch_size, seed, ran_on["packages"], ran_on["commit"]]
    loaded = functools.cache(lambda: load_model(model))  # only if something is left to measure, and once
    found: dict[str, Scores] = {}
    for suite in suites:
        cache_key = [*of_model, type(suite).__name__, suite.model_dump(mode="json")]
        file = None if kept is None else kept / f"{digest(cache_key)}.json"
        if file is not None and file.exists():
            stored = json.loads(file.read_text(encoding="utf-8"))
            part = {what: Scores.from_json(each["questions"], each) for what, each in stored.items()}
        else:
            part = suite.scores(*loaded(), batch_size, seed)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                content = {what: {"questions": each.questions, **each.to_json()} for what, each in part.items()}
                write(file, json.dumps(content))
        for what, scores in part.items():
            unit = "perplexity" if scores.tokens is not None else "right"
            log(f"{model}: {what}: {scores.figure:.3f} {unit} (n = {len(scores.questions)})")
        found |= part
    return found


def fingerprint(model: str) -> str | None:
    """Return the SHA-256 of a local model's weights; None for an id of the hub."""
    files = sorted(Path(pocket.resolve(model)).glob("*.safetensors"))
    if not files:
        return None
    sha256 = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: sha256)
    return sha256.hexdigest()


def packages() -> dict[str, Any]:
    """Return the environment, with lm-eval's version where it is installed."""
    found = environment()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["packages"]["lm-eval"] = importlib.metadata.version("lm_eval")
    return found


# -- pocket ----------------------------------------------------------------------------------------------------------


class PocketSuite(Suite):
    """pocket's own two skills, and its perplexity.

    Attributes:
        questions: Questions of each kind: word problems, facts about known people, questions about unknown people.
        texts: Texts for the perplexity.
        seed: Random seed of the questions, the texts, and the sampling.
    """

    questions: Positive = 200
    texts: Positive = 200
    seed: Count = 0

    def scores(self, model: Any, tokenizer: Any, batch_size: int, seed: int) -> dict[str, Scores]:
        """Measure both skills, greedily (the default) and sampled (what RL trains), and the perplexity."""
        found = {}
        for kind, asked in skill_questions(self).items():
            for way in ("greedy", "sampled"):
                completions = answers(model, tokenizer, asked, way == "sampled", self.seed)
                found[f"{kind}, {way}"] = judged(asked, completions)
        return found | perplexities(model, tokenizer, corpus_texts(self))


def skill_questions(suite: PocketSuite) -> dict[str, list[Question]]:
    """Draw distinct questions of each kind, or fewer where there are not as many.

    Word problems come from the test split. Known people: any of the 200 facts in the corpus, which the model is to
    remember. Unknown people: those that the corpus does not ask about, the test split's first; it has only 48 of them,
    so the other splits follow (``train`` last: a run that is rewarded for retrieval has seen these).
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
    """Answer each question once: sampled at temperature 1 from the whole distribution, or greedily."""
    greedily = {"do_sample": False, "temperature": None, "top_k": None, "max_new_tokens": MAX_NEW_TOKENS}
    how = as_training(MAX_NEW_TOKENS) if sampled else greedily
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        batch = sample(model, tokenizer, [q.prompt for q in asked], 1, 256, **how)
    return batch.texts


def judged(asked: Sequence[Question], completions: Sequence[str]) -> Scores:
    """Judge answers. To a question about an unknown person ``unknown`` is right, and an invention is wrong."""
    verdicts = verifiers.math_boxed(completions, [q.answer for q in asked])
    return Scores([short_name(q.prompt) for q in asked], np.array([float(v is True) for v in verdicts]))


def short_name(prompt: str) -> str:
    """Return a short hash that identifies a question, instead of its whole text."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:10]


def corpus_texts(suite: PocketSuite) -> list[tuple[str, str]]:
    """Draw (prompt, completion) as in the corpus, three word problems to one fact, from the test split's questions."""
    rng = random.Random(f"perplexity/{suite.seed}")
    problems, facts = (questions("test", suite.seed, kind) for kind in ("reasoning", "retrieval"))
    drawn = (next(facts if rng.random() < 0.25 else problems) for _ in range(suite.texts))
    return [(q.prompt, corpus_completion(q, rng, HEDGED)) for q in drawn]


def perplexities(model: Any, tokenizer: Any, texts: Sequence[tuple[str, str]]) -> dict[str, Scores]:
    """Measure the perplexity of whole texts, and of the answers in them given the questions."""
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
def token_nats(model: Any, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Return -log p of each token given those before it, without the first: ``[T - 1]`` float64 for each sequence."""
    found: list[np.ndarray] = []
    for start in range(0, len(sequences), 64):
        rows = [list(row) for row in sequences[start : start + 64]]
        width = max(map(len, rows))
        # Pad on the right, where a causal model does not look.
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
        attention = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
        logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1]
        if logits.device.type == "mps":  # which has no float64
            logits, ids = logits.cpu(), ids.cpu()
        logits = logits.double()
        nats = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        found += [own[: len(row) - 1].cpu().numpy() for own, row in zip(nats, rows, strict=True)]
    return found
