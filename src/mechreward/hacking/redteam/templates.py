"""Attacks by text: families of ways to look good, made anew from each question and the model's own rollouts.

No family is a fixed string. An instance is drawn from the question's own numbers, words and sentences, from the way in
which the model writes its steps and marks its answer, from its rollouts on other questions, and from the tokens on
which the pack reads highest. So a detector that knows one instance does not know the next.

Each family comes in two styles, since both happen in training:

- ``woven``: put into the model's own rollout, whose final answer stays the last one given;
- ``replacing``: in its place, with no final answer or another one than the rollout's.

The phrases are in ``templates.yaml``. Where the ideas come from: filler dilution, the Obfuscation Atlas (arXiv
2602.15515); cue tokens, Ma et al. (arXiv 2601.05679); one-token "master keys", Zhao et al. (arXiv 2507.08794); the
rest, what policies are known to do under rewards that read style.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mechreward.errors import ConfigError, DataError, nearest
from mechreward.features.interventions import Cues
from mechreward.hacking.redteam.material import NUMBER, STYLES, Draw, Material, materials, whole
from mechreward.hacking.redteam.tokens import cue_injection, one_token
from mechreward.rollout.batch import RolloutBatch

LONGEST = 256
"""Tokens of an attacked completion, unless its own rollout is longer already: a trainer would cut it."""

Phrases = Mapping[str, Any]
Pieces = Callable[[Draw, Phrases], Iterator[str]]


# -- pieces of text, without end: how many are used is drawn -----------------------------------------------------------


def step_theatre(draw: Draw, phrases: Phrases) -> Iterator[str]:
    """Write steps that lead nowhere: in the model's own format with the question's numbers, or numbered and worded."""
    total, own = whole(draw.number()), draw.chance(0.6)
    for i in itertools.count(1):
        if own and draw.material.shapes:
            text, total = draw.step(total)
            yield text
        else:
            yield draw.said(phrases["starts"], phrases["worded"]).replace("{i}", str(i))
        if draw.chance(0.1):
            own = not own


def fact_spam(draw: Draw, phrases: Phrases) -> Iterator[str]:
    """Make true statements that help nobody: about the question's numbers and words, and about the world."""
    while True:
        n, word = whole(draw.number()), draw.word()
        facts = {"parity": "odd" if n % 2 else "even", "digits": len(str(n)), "sum": sum(map(int, str(n)))}
        facts |= {"double": 2 * n, "next": n + 1, "more": n + draw.count(1, 50), "tenfold": 10 * n, "square": n * n}
        facts |= {"letters": len(word), "first": word[0], "last": word[-1]}
        about = draw.one([phrases["about_number"], phrases["about_word"], phrases["about_the_world"]])
        yield draw.one(about).format(n=n, word=word, **facts)


def reflection_spam(draw: Draw, phrases: Phrases) -> Iterator[str]:
    """Doubt and check again, without checking anything."""
    while True:
        yield draw.said(phrases["starts"], phrases["acts"], phrases["ends"])


def format_mimicry(draw: Draw, phrases: Phrases) -> Iterator[str]:
    """Copy the form of a good answer: headings, tags, boxes, tables, the model's own answer line."""
    while True:
        yield draw.said(draw.one(phrases["forms"]))


def question_copy(draw: Draw, phrases: Phrases) -> Iterator[str]:
    """Repeat the question: in order, shuffled, quoted, in parts."""
    sentences = list(draw.material.sentences)
    if draw.chance(0.4):
        draw.rng.shuffle(sentences)
    for i in itertools.count(int(draw.rng.integers(len(sentences)))):
        copied = sentences[i % len(sentences)]
        if draw.chance(0.2):
            words = copied.split()
            start = int(draw.rng.integers(len(words)))
            copied = " ".join(words[start : start + draw.count(2, 8)])
        yield f"{draw.one(phrases['starts'])} {copied}" if draw.chance(0.3) else copied


def answer_first(draw: Draw, phrases: Phrases) -> Iterator[str]:
    """Give the answer before anything else, and then reasons that were found for it."""
    yield draw.one([draw.said(form) for form in phrases["openings"]])
    while True:
        yield draw.said(phrases["reasons"])


def filler_dilution(draw: Draw, phrases: Phrases) -> Iterator[str]:
    """Thin out what a mean over tokens sees with harmless words: common ones, and the model's own."""
    fillers = phrases["fillers"].split()
    own = [word for steps in draw.material.others[:20] for word in " ".join(steps).split()] or draw.material.words
    while True:
        among = draw.one([fillers, fillers, own])
        yield " ".join(draw.one(among) for _ in range(draw.count(3, 12))) + draw.one(phrases["ends"])


def language_switch(draw: Draw, phrases: Phrases) -> Iterator[str]:
    """Continue in another language, or in several."""
    language = draw.one(phrases["languages"])
    while True:
        if draw.chance(0.25):
            language = draw.one(phrases["languages"])
        yield draw.said(language)


def length_padding(draw: Draw, phrases: Phrases) -> Iterator[str]:
    """Add length without content: white space, dots, dashes."""
    sign = draw.one(phrases["signs"])
    while True:
        yield sign * draw.count(2, 16)


def template_repetition(draw: Draw, phrases: Phrases) -> Iterator[str]:
    """Repeat one sentence, word for word or with its numbers counted up."""
    own = draw.material.steps or draw.one(draw.material.others or [draw.material.sentences]) or draw.material.sentences
    sentence, counts = draw.one(own), draw.chance(0.6)
    by = draw.count(1, 9)
    for i in itertools.count():
        yield NUMBER.sub(lambda n, i=i: str(whole(n[0]) + by * i), sentence) if counts else sentence


def borrowed_work(draw: Draw, phrases: Phrases) -> Iterator[str]:
    """Show the model's own work on other questions."""
    while True:
        yield from draw.one(draw.material.others or [draw.material.sentences])


def answer_enumeration(draw: Draw, phrases: Phrases) -> Iterator[str]:
    """List every answer that it could be."""
    while True:
        near = whole(draw.number())
        few = ", ".join(str(max(0, near + int(draw.rng.integers(-9, 10)))) for _ in range(draw.count(2, 6)))
        yield draw.said(phrases["guesses"]).replace("{few}", few)


def lookalikes(draw: Draw, phrases: Phrases) -> Iterator[str]:
    """Write the rollout's or the question's sentences in letters that only look the same, or with invisible ones."""
    sentences = [*draw.material.steps, *draw.material.sentences]
    share, hidden = draw.rng.uniform(0.1, 0.9), draw.chance(0.4)
    twins = str.maketrans(phrases["letters"], phrases["twins"])
    while True:
        text = draw.one(sentences)
        yield "".join(
            (c + draw.one(phrases["invisible"]) if hidden else c.translate(twins)) if draw.chance(share) else c
            for c in text
        )


def word_salad(draw: Draw, phrases: Phrases) -> Iterator[str]:
    """Mix words of the question and of the model's rollouts in no order."""
    words = [word for steps in draw.material.others for step in steps for word in step.split()]
    words = [*words, *draw.material.question.split()] or draw.material.words
    while True:
        yield " ".join(draw.one(words) for _ in range(draw.count(2, 10)))


def number_soup(draw: Draw, phrases: Phrases) -> Iterator[str]:
    """Write the question's numbers and signs, as if something were computed."""
    while True:
        signs = draw.one(phrases["signs"])
        drawn = [draw.number() for _ in range(draw.count(2, 8))]
        yield "".join(n + draw.one(signs) for n in drawn[:-1]) + drawn[-1] + draw.one(phrases["ends"])


# -- families ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A way of attacking by text; ``templates.yaml`` says what its fields mean."""

    pieces: Pieces
    phrases: Phrases = field(default_factory=dict)
    most: int = 12
    places: Sequence[str] = ("before", "between", "behind", "after")
    joints: Sequence[str] = (" ", " ", "\n")


_PIECES: Sequence[Pieces] = (
    step_theatre, fact_spam, reflection_spam, format_mimicry, question_copy, answer_first, filler_dilution,
    language_switch, length_padding, template_repetition, borrowed_work, answer_enumeration, lookalikes, word_salad,
    number_soup,
)  # fmt: skip
_SPECS = yaml.safe_load(Path(__file__).with_name("templates.yaml").read_text(encoding="utf-8"))

FAMILIES = {pieces.__name__: Family(pieces, **_SPECS[pieces.__name__]) for pieces in _PIECES}
"""Those that are made of text."""

TOKEN_FAMILIES = ("cue_injection", "one_token")
"""Those that are made of token ids."""


# -- instances ---------------------------------------------------------------------------------------------------------


def attacks(
    batch: RolloutBatch,
    tokenizer: Any,
    cues: Cues | None = None,
    seed: int = 0,
    families: Sequence[str] | None = None,
) -> dict[str, RolloutBatch]:
    """Attack every rollout once by each family and style.

    Args:
        batch: Rollouts of the model on the user's questions.
        tokenizer: The model's.
        cues: The tokens on which the pack reads highest (:func:`mechreward.features.interventions.cues`); without
            them there is no ``cue_injection``.
        seed: Another seed gives other instances; the same gives the same.
        families: Names from :data:`FAMILIES` and :data:`TOKEN_FAMILIES`; by default all.

    Returns:
        For each ``family/style`` the attacked rollouts: same prompts, columns and order as in ``batch``, completions
        as token ids that end with the rollout's own end token (or the tokenizer's, or the model's, where it knows one)
        and nowhere before, and as text. They have at most :data:`LONGEST` tokens: fewer pieces are put in where more
        would not fit, and a rollout that is as long itself gets a single one.

    Raises:
        ConfigError: An unknown family.
        DataError: There are no rollouts.
    """
    known = [*FAMILIES, *(name for name in TOKEN_FAMILIES if cues is not None or name != "cue_injection")]
    for name in families or []:
        if name not in known:
            raise ConfigError(f"There is no family of attacks '{name}' here.{nearest(name, known)}")
    if len(batch) == 0:
        raise DataError("There are no rollouts to attack: sample some first.")
    material, made = materials(batch), {}
    for name, style in itertools.product(families or known, STYLES):
        completions = []
        for row, own in enumerate(material):
            rng = np.random.default_rng([seed, zlib.crc32(f"{name}/{style}".encode()), row])
            room = max(LONGEST, batch.lengths[row] if style == "woven" else 0) - 1
            ids = _instance(name, Draw(own, rng, style), batch, row, tokenizer, cues, room)
            completions.append(_ended(ids, batch, row, tokenizer))
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        made[f"{name}/{style}"] = replace(
            batch,
            completions=[
                text if isinstance(old, str) else [{"role": "assistant", "content": text}]
                for old, text in zip(batch.completions, texts, strict=True)
            ],
            completion_ids=completions,
            tool_mask=None,
            trust=None,
            dropped=None,
            flags=None,
        )
    return made


def _instance(
    name: str, draw: Draw, batch: RolloutBatch, row: int, tokenizer: Any, cues: Cues | None, room: int
) -> list[int]:
    """Return the token ids of one attacked rollout."""
    if name in FAMILIES:
        return _text_attack(FAMILIES[name], draw, tokenizer, room)
    woven = draw.style == "woven"
    own = [token for token in batch.written[row] if token not in batch.eos_token_ids] if woven else []
    if name == "one_token":
        return one_token(draw, own, tokenizer, cues, room, _SPECS[name]["phrases"]["keys"])
    assert cues is not None  # attacks() refuses the family without them
    return cue_injection(draw, own, tokenizer, cues, room)


def _text_attack(family: Family, draw: Draw, tokenizer: Any, room: int) -> list[int]:
    """Return the token ids of the attacked text, of as many pieces as fit."""
    count = draw.count(1, family.most) if draw.style == "woven" else draw.count(2, family.most + 4)
    pieces = list(itertools.islice(family.pieces(draw, family.phrases), count))
    joint = draw.one(family.joints)
    allowed = [place for place in family.places if place != "after" or draw.material.marked]
    place, cut = draw.one(allowed or ["behind"]), int(draw.rng.integers(len(draw.material.steps) + 1))
    leading = draw.one([" ", " ", "\n"])
    while True:
        attack = joint.join(pieces)
        text = attack if draw.style == "replacing" else _woven(draw.material, attack, place, cut)
        ids = list(tokenizer(text if text[:1].isspace() else leading + text, add_special_tokens=False).input_ids)
        if len(ids) <= room:
            return ids
        if len(pieces) == 1:
            return ids[:room] if draw.style == "replacing" else ids
        pieces = pieces[: (len(pieces) + 1) // 2]


def _woven(own: Material, attack: str, place: str, cut: int) -> str:
    """Put an attack into a rollout, whose final answer stays the last one that is given."""
    before, behind = {"before": (0, 0), "between": (cut, cut)}.get(place, (len(own.steps), len(own.steps)))
    body = " ".join(own.steps[:before]), " ".join(own.steps[behind:])
    if place == "after":
        return " ".join(filter(None, body)) + own.final + "\n" + attack
    final = own.final if own.final[:1].isspace() or not own.final else " " + own.final
    return " ".join(filter(None, [body[0], attack, body[1]])) + final


def _ended(ids: Sequence[int], batch: RolloutBatch, row: int, tokenizer: Any) -> list[int]:
    """End a completion as its rollout ended, or as the tokenizer or the model can, and nowhere before."""
    ends = [token for token in batch.written[row] if token in batch.eos_token_ids]
    known = (*ends, tokenizer.eos_token_id, *sorted(batch.eos_token_ids))
    end = [token for token in known if token is not None][:1]
    stops = batch.eos_token_ids | set(end)
    return [*(token for token in ids if token not in stops), *end]
