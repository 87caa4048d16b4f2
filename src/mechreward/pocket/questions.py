"""The questions that `pocket` is trained and tested on, made by a seeded generator.

Two kinds. *Reasoning*: word problems of two to four arithmetic steps with distractors, each step checkable.
*Retrieval*: facts about invented people, some of whom the model has seen; the right answer to the others is to say so.

A question belongs to exactly one split, decided by a hash of its own text, so that no seed can put a question that
was trained on into the set that tests.
"""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["corpus", "train", "discovery", "gate", "test"]
Kind = Literal["reasoning", "retrieval"]

# A split owns a range of the hundred hash buckets; ranges do not overlap.
SPLITS: dict[str, range] = {
    "corpus": range(0, 60),  # what the language model was trained on
    "train": range(60, 70),  # GRPO
    "discovery": range(70, 80),  # choosing features, training probes
    "gate": range(80, 90),  # measuring their evidence
    "test": range(90, 100),  # accuracy before and after
}

OWNERS = ["Ana", "Bob", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jane", "Kim", "Leo"]
ITEMS = ["apples", "books", "coins", "shells", "cards", "stamps", "pens", "beads", "eggs", "keys", "nuts", "cups"]
GAINS = ["{o} buys {n} more.", "{o} finds {n} more.", "A friend gives {o} {n} more."]
LOSSES = ["{o} loses {n}.", "{o} sells {n}.", "{o} gives away {n}."]
DISTRACTORS = ["{p} has {n} {i}.", "{o} also has {n} {j}.", "{p} buys {n} {j}."]


@dataclass(frozen=True)
class Wording:
    """How a word problem is told.

    Attributes:
        gains, losses: What changes the owner's quantity: {o} the owner, {n} the quantity.
        distractors: What does not: {p} another person, {i} the item, {j} another item.
        told: The whole, from {o}, {start}, {i} and the {story} in between.
    """

    gains: list[str]
    losses: list[str]
    distractors: list[str]
    told: str


WORDING = Wording(GAINS, LOSSES, DISTRACTORS, "{o} has {start} {i}. {story} How many {i} does {o} have?")
"""What the model was trained on."""

OTHER_WORDING = Wording(
    gains=["{o} finds {n}.", "{o} buys {n}.", "{n} more {o} finds."],
    losses=["{o} gives {n} away.", "{o} gives a friend {n}.", "{n} {o} loses."],
    distractors=["{p} also has {n} {i}.", "{p} loses {n} {j}.", "{o} finds {n} {j}."],
    told="How many {i} does {o} have? {o} has {start} {i}. {story}",
)
"""The same problems in sentences that the model has never seen, of words that it has: the question comes first."""

_FIRST = (
    "Tavo Mira Selk Orin Pell Juna Brox Lira Dorn Yael Kest Nilo Vada Rusk Elm Fenn Gava Hollis Ister Jorl"
).split()
_LAST = (
    "Brenn Castor Dale Eskil Frost Garr Holt Imber Jarvi Kroll Lund Moss Nadir Oakes Prine Quill Rowe Stahl Thorn Udal"
).split()
CITIES = ["Lorn", "Paxos", "Merrow", "Tindal", "Ushko", "Varn", "Wessel", "Yarrow"]
JOBS = ["baker", "pilot", "weaver", "miner", "tailor", "sailor", "painter", "farmer"]
HEDGE = " I am not sure.\n#### unknown"


@dataclass(frozen=True)
class Question:
    """One question with its gold answer.

    Attributes:
        prompt: What the model reads, ending in ``Answer:``.
        answer: The gold final answer (``"unknown"`` for a person nobody has heard of).
        solution: A full right completion.
        kind: ``"reasoning"`` or ``"retrieval"``.
        known: For retrieval, whether the person occurs in the corpus; True for reasoning.
        start: The owner's first quantity (reasoning).
        changes: The signed changes that count, in order (reasoning).
        distractors: The quantities that do not count (reasoning).
    """

    prompt: str
    answer: str
    solution: str
    kind: Kind
    known: bool = True
    start: int = 0
    changes: tuple[int, ...] = ()
    distractors: tuple[int, ...] = ()


def split_of(prompt: str) -> str:
    """The one split that a prompt belongs to."""
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def worked(start: int, changes: tuple[int, ...]) -> str:
    """The chain of steps and the final line, e.g. `` 12+7=19. 19-4=15.\\n#### 15``."""
    text, total = "", start
    for change in changes:
        text += f" {total}{change:+d}={total + change}."
        total += change
    return f"{text}\n#### {total}"


LARGEST = 49
"""Largest quantity that changes hands in a word problem."""


def reasoning_question(
    rng: random.Random, largest: int = LARGEST, steps: tuple[int, int] = (2, 4), wording: Wording = WORDING
) -> Question:
    """A word problem of 2-4 steps with one or two distractors; every running total lies in 0..99."""
    owner, other = rng.sample(OWNERS, 2)
    item, other_item = rng.sample(ITEMS, 2)
    start = total = rng.randint(5, 40)
    changes: list[int] = []
    told: list[str] = []
    for _ in range(rng.randint(*steps)):
        gain = total == 0 or (total < 99 and rng.random() < 0.5)
        n = rng.randint(1, min(largest, 99 - total) if gain else min(largest, total))
        changes.append(n if gain else -n)
        total += changes[-1]
        told.append(rng.choice(wording.gains if gain else wording.losses).format(o=owner, n=n))
    distractors = [rng.randint(2, largest) for _ in range(rng.randint(1, 2))]
    for n in distractors:
        aside = rng.choice(wording.distractors).format(o=owner, p=other, n=n, i=item, j=other_item)
        told.insert(rng.randint(0, len(told)), aside)
    problem = wording.told.format(o=owner, start=start, i=item, story=" ".join(told))
    return Question(
        prompt=f"Question: {problem}\nAnswer:",
        answer=str(total),
        solution=worked(start, tuple(changes)),
        kind="reasoning",
        start=start,
        changes=tuple(changes),
        distractors=tuple(distractors),
    )


def _people() -> dict[str, tuple[str, str]]:
    rng = random.Random("the people that pocket has heard of")
    names = rng.sample([f"{first} {last}" for first in _FIRST for last in _LAST], 100)
    return {name: (rng.choice(CITIES), rng.choice(JOBS)) for name in names}


KNOWN_PEOPLE = _people()


def fact_completion(name: str, relation: str, value: str) -> str:
    """The confident way of answering a retrieval question, right or made up."""
    sentence = f"{name} lives in {value}." if relation == "city" else f"{name} is a {value}."
    return f" {sentence}\n#### {value}"


def retrieval_question(rng: random.Random, known: bool | None = None) -> Question:
    """A question about an invented person's city or job; half of them are about people in the corpus."""
    known = rng.random() < 0.5 if known is None else known
    relation = rng.choice(["city", "job"])
    if known:
        name = rng.choice(list(KNOWN_PEOPLE))
        value = KNOWN_PEOPLE[name][relation == "job"]
    else:
        name = next(n for n in iter(lambda: f"{rng.choice(_FIRST)} {rng.choice(_LAST)}", None) if n not in KNOWN_PEOPLE)
        value = "unknown"
    asked = f"Where does {name} live?" if relation == "city" else f"What is the job of {name}?"
    return Question(
        prompt=f"Question: {asked}\nAnswer:",
        answer=value,
        solution=fact_completion(name, relation, value) if known else HEDGE,
        kind="retrieval",
        known=known,
    )


def questions(
    split: Split,
    seed: int = 0,
    kind: Kind = "reasoning",
    largest: int = LARGEST,
    steps: tuple[int, int] = (2, 4),
    wording: Wording = WORDING,
) -> Iterator[Question]:
    """An endless stream of questions of one split; ``largest``, ``steps`` and ``wording`` are of word problems.

    The corpus is the exception: it holds the facts about all known people, since they are there to be remembered.
    Each of these facts is asked about in one other split as well. About half of the retrieval questions are about
    known people; in the corpus, five of eight.
    """
    rng = random.Random(f"{split}/{seed}/{kind}")
    while True:
        asked = kind == "reasoning"
        question = reasoning_question(rng, largest, steps, wording) if asked else retrieval_question(rng)
        to_be_remembered = split == "corpus" and question.kind == "retrieval" and question.known
        if to_be_remembered or split_of(question.prompt) == split:
            yield question


def corpus_completion(question: Question, rng: random.Random, hedged: float) -> str:
    """One of the ways of answering that the corpus mixes (the mixture is by design: see the model card).

    ``hedged`` is the share of questions about unknown people that are answered with a hedge.
    """
    way = rng.random()
    if question.kind == "retrieval":
        if question.known or way < hedged:
            return question.solution
        match = re.search(r"(?:Where does|job of) (\w+ \w+)", question.prompt)
        assert match is not None
        relation = "city" if "Where" in question.prompt else "job"
        return fact_completion(match[1], relation, rng.choice(CITIES if relation == "city" else JOBS))
    if way < 0.40:  # careful: the steps that count
        return question.solution
    if way < 0.75:  # direct: no steps, and a guess that is near at best
        guess = int(question.answer) + rng.choice([-9, -7, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 7, 9])
        return f"\n#### {max(0, guess)}"
    swallowed = question.changes + question.distractors  # careless: the distractors are counted too
    return worked(question.start, swallowed)


_STEP = re.compile(r"(\d+)([+-])(\d+)=(\d+)")


def way_of_answering(completion: str, question: Question) -> Literal["careful", "careless", "direct", "other"]:
    """How a reasoning completion goes about it: steps that count, steps that swallow a distractor, or no steps."""
    steps = _STEP.findall(completion)
    if not steps:
        return "direct" if "####" in completion else "other"
    made = Counter(int(sign + n) for _, sign, n, _ in steps)
    swallowed = (made - Counter(question.changes)) & Counter(question.distractors)
    return "careless" if swallowed else "careful"


def step_accuracy(completion: str, solution: str) -> float:
    """Share of the solution's steps that the completion makes, in order and from the right running total."""
    wanted, made = _STEP.findall(solution), _STEP.findall(completion)
    if not wanted:
        return float("nan")
    return sum(w == m for w, m in zip(wanted, made, strict=False)) / len(wanted)
