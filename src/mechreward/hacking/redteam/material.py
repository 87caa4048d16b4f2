"""What text attacks are made of: the question's words and numbers, and how the model writes steps and answers."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mechreward.rollout.batch import RolloutBatch, plain_text
from mechreward.verifiers.golds import gold

Style = Literal["woven", "replacing"]
STYLES: tuple[Style, ...] = ("woven", "replacing")

NUMBER = re.compile(r"\d+(?:\.\d+)?")
_WORD = re.compile(r"[^\W\d_]{3,}")
_SENTENCE = re.compile(r"[^\n]*?(?:[.!?](?=\s|$)|(?=\n)|$)")
_MARKED_LINE = re.compile(r"(?m)^[^\n]*(?:####|\\boxed|\\fbox)[^\n]*")
_SLOT = "\0"  # where a number stood in a step; no tokenizer's text holds it by chance
_GOLDS = ("answer", "gold", "target", "label")  # columns whose numbers must not be given by an attack that loses
_COMMON = frozenset(
    "the and for are was were has have had does did how many much what where when who why that this with from "
    "they them then than there their his her him she you your not but can will would all any its of more "
    "question answer".split()
)


@dataclass(frozen=True)
class Material:
    """What an attack on one rollout is made of.

    Attributes:
        question: The prompt's text.
        sentences: The question's sentences.
        numbers: The question's numbers, in order; those of the rollout where it has none.
        words: The question's words of three letters or more.
        steps: The rollout's sentences before its final answer.
        final: The rest, with the final answer; empty where there is no answer.
        marked: Whether that is marked as one, by ``####`` or a box, so that what follows it does not count.
        answer: The answer alone.
        marker: How the model's rollouts mark an answer, with ``{}`` where it goes.
        shapes: How they write steps, most common first, with :data:`_SLOT` for each number.
        others: Sentences of the model's rollouts on other questions, one list per rollout.
        avoid: Numbers that an attack without an answer must not end with: the rollout's answer, and the gold.
    """

    question: str
    sentences: list[str]
    numbers: list[str]
    words: list[str]
    steps: list[str]
    final: str
    marked: bool
    answer: str
    marker: str
    shapes: list[str]
    others: list[list[str]]
    avoid: frozenset[str]


def materials(batch: RolloutBatch) -> list[Material]:
    """Return what attacks on each rollout are made of."""
    texts = batch.texts
    split = [split_final(text) for text in texts]
    steps = [_sentences(body) for body, _ in split]
    # How the model writes steps and marks answers is learned from all its rollouts.
    shapes = Counter(
        NUMBER.sub(_SLOT, sentence) for each in steps for sentence in each if NUMBER.search(sentence) is not None
    )
    common = [shape for shape, _ in shapes.most_common(8)]
    marked = [_MARKED_LINE.search(final) for _, final in split]
    marker = Counter(_marker(line[0]) for line in marked if line).most_common(1)
    made = []
    for i, (_, final) in enumerate(split):
        question = plain_text(batch.prompts[i])
        answer = _answer(final)
        numbers = NUMBER.findall(question) or NUMBER.findall(texts[i]) or [str(len(question)), str(len(texts[i]))]
        cells = {name: batch.columns[name][i] for name in _GOLDS if name in batch.columns}
        golds = {str(gold(cell, name, structured=True)).strip() for name, cell in cells.items()}
        made.append(
            Material(
                question=question,
                sentences=_sentences(question) or [question or "?"],
                numbers=numbers,
                words=_words(question) or _words(texts[i]) or ["it"],
                steps=steps[i],
                final=final,
                marked=marked[i] is not None,
                answer=answer,
                marker=marker[0][0] if marker else "The answer is {}.",
                shapes=common,
                others=[steps[j] for j in range(len(batch)) if batch.prompts[j] != batch.prompts[i] and steps[j]],
                avoid=frozenset({answer, *golds, *(n for one in golds for n in NUMBER.findall(one)[-1:])}),
            )
        )
    return made


def split_final(text: str) -> tuple[str, str]:
    """Return a completion's work, and its final answer with the white space before it and all that follows.

    The answer is the last line with ``####`` or a box; without one, the last sentence.
    """
    lines = list(_MARKED_LINE.finditer(text))
    if lines:
        start = lines[-1].start()
    else:
        sentences = [match for match in _SENTENCE.finditer(text) if match[0].strip()]
        start = sentences[-1].start() if sentences else len(text)
    start = len(text[:start].rstrip())
    return text[:start], text[start:]


def _sentences(text: str) -> list[str]:
    return [match[0].strip() for match in _SENTENCE.finditer(text) if match[0].strip()]


def _words(text: str) -> list[str]:
    """Return the words that carry meaning, or all words where none does."""
    found = _WORD.findall(text)
    return [word for word in found if word.lower() not in _COMMON] or found


def _marker(line: str) -> str:
    """Return how a line marks an answer, with ``{}`` in the answer's place."""
    return "\\boxed{{}}" if "\\boxed" in line or "\\fbox" in line else "#### {}"


def _answer(final: str) -> str:
    """Return the answer in a final line, as text: in the box, behind the mark, or its last number."""
    if boxed := re.search(r"\\(?:boxed|fbox)\{([^{}]*)\}", final):
        return boxed[1].strip()
    if mark := re.search(r"####([^\n]*)", final):
        return mark[1].strip()
    return (NUMBER.findall(final) or [""])[-1]


def whole(number: str) -> int:
    """Round a number down; a degenerate model may write one of a thousand digits."""
    return int(min(float(number), 1e15))


class Draw:
    """Random choices from the material of one rollout."""

    def __init__(self, material: Material, rng: np.random.Generator, style: Style):
        self.material, self.rng, self.style = material, rng, style

    def one(self, among: Sequence[Any]) -> Any:
        return among[int(self.rng.integers(len(among)))]

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def count(self, low: int, high: int) -> int:
        """Draw a number between both, small ones more often: log-uniform."""
        return int(math.exp(self.rng.uniform(math.log(low), math.log(high + 1))))

    def number(self) -> str:
        """Draw one of the question's numbers."""
        return self.one(self.material.numbers)

    def word(self) -> str:
        """Draw one of the question's words."""
        return self.one(self.material.words)

    def answer(self) -> str:
        """Return the rollout's own answer, or a wrong one where the attack is to lose it."""
        if self.style == "woven" and self.material.answer:
            return self.material.answer
        for _ in range(50):
            guess = str(max(0, whole(self.number()) + int(self.rng.integers(-9, 30))))
            if guess not in self.material.avoid:
                return guess
        return "1000003"

    def marked(self) -> str:
        """Return an answer in the model's own format."""
        return self.material.marker.replace("{}", self.answer())

    def said(self, *parts: Sequence[str]) -> str:
        """Join one phrase of each part, and fill their slots.

        ``{n}`` is a number, ``{w}`` a word, ``{a}`` the answer, ``{m}`` the answer as the model marks it, ``{k}`` a
        small count.
        """
        text = " ".join(phrase for phrase in (self.one(part) for part in parts) if phrase)
        drawn = {
            "{n}": self.number,
            "{w}": self.word,
            "{a}": self.answer,
            "{m}": self.marked,
            "{k}": lambda: str(self.count(2, 12)),
        }
        return re.sub(r"\{[nwamk]\}", lambda slot: drawn[slot[0]](), text)

    def step(self, total: int) -> tuple[str, int]:
        """Write a step in one of the model's own shapes, true where the shape can be worked out.

        Returns:
            The step, and the number at which it arrives.
        """
        shape = self.one(self.material.shapes[:4])
        other = self.one([0, 1, whole(self.number()), whole(self.number())])
        sign = re.search(rf"{_SLOT}\s*([+*×-])\s*{_SLOT}\s*=\s*{_SLOT}", shape)
        values: list[int] = []
        if sign is not None:
            other = min(other, total) if sign[1] == "-" else other
            result = {"+": total + other, "-": total - other}.get(sign[1], total * other)
            values, total = [total, other, result], result % 1000
        slots = itertools.chain(map(str, values), iter(self.number, None))
        return re.sub(_SLOT, lambda _: next(slots), shape), total
