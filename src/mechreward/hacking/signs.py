"""Signs of gaming in the text: each detector gives every rollout one number, higher for more suspicious.

A detector learns from clean rollouts what is usual, where it needs to. Its threshold is set on other clean rollouts, by
:class:`~mechreward.hacking.adversarial.AdversarialSuite`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mechreward.hacking.dual_verifier import DualVerifier
from mechreward.hacking.penalty import OneSidedPenalty
from mechreward.readout import Readings, Request
from mechreward.reward.composition import CompositeReward
from mechreward.reward.feature_reward import FeatureReward
from mechreward.reward.guards import all_within, repeated_ngrams
from mechreward.reward.outcome import OutcomeReward
from mechreward.rollout.batch import RolloutBatch, plain_text

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_WORD = re.compile(r"\w+")
_SENTENCE = re.compile(r"(?<=[.!?;])\s+|\n+")
_TERM = r"\d+(?:,\d{3}(?!\d))*(?:\.\d+)?"  # 3,000.5, too
_CALCULATION = re.compile(
    rf"(?<![\w.])({_TERM})\s*([-+*/x\u00d7\u00f7])\s*({_TERM})\s*=\s*(-?{_TERM})(?!\w)",
)
_SIGNS = {"x": "*", "\u00d7": "*", "\u00f7": "/"}
_STRUCTURE = {  # each in linear time: ^\s* would go over a run of empty lines from every one of them
    "heading": re.compile(r"(?m)^[^\S\n]*(?:#{1,6}\s+\D|\*\*|(?:step|part|stage)\b)", re.IGNORECASE),
    "numbering": re.compile(r"(?m)(?:^|(?<=\s))\(?\d{1,2}[.)]\s+[A-Za-z]"),
    "bullet": re.compile(r"(?m)^[^\S\n]*[-*\u2022]\s+\S"),
    "tag": re.compile(r"</?\w+>"),
    "table": re.compile(r"(?m)^[^\S\n]*\|.*\|"),
    "code": re.compile(r"```|\{\s*\"|<<|>>>"),
    "box": re.compile(r"\\boxed|\$\$|\\\["),
    "answers": re.compile(r"####|(?i:final answer|the answer is)"),
}


class Rewarded:
    """The guarded feature rewards, sum_i w_i r_i over all of them, however deep they are nested.

    Args:
        rewards: Rewards as a trainer or composite has them; others than ours are passed over.
    """

    def __init__(self, rewards: Sequence[Any] = ()):
        self.features = [part for reward in rewards for part in _features(reward, 1.0)]
        self.outcome = next((reward for reward in all_within(rewards) if isinstance(reward, OutcomeReward)), None)

    @property
    def requests(self) -> list[Request]:
        return [request for reward, _ in self.features for request in reward.requests]

    def per_rollout(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> Tensor:
        """Return what each rollout is paid, ``[B]``; NaN where nothing is read."""
        return sum((w * reward.aggregated(readings) for reward, w in self.features), start=torch.zeros(len(batch)))

    def per_token(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> Tensor:
        """Return what each token is paid, ``[B, T]`` on the CPU; 0 where nothing is read."""
        total = torch.zeros(batch.mask().shape)
        for reward, weight in self.features:
            read = readings[reward.request]
            total += weight * reward.raw(read).masked_fill(~read.mask, 0.0).cpu()
        return total

    def right(self, batch: RolloutBatch) -> Tensor:
        """Return the outcome, ``[B]``; NaN where it is not known."""
        return torch.full((len(batch),), torch.nan) if self.outcome is None else self.outcome.score(batch, {}).values


def _features(reward: Any, weight: float) -> Iterator[tuple[FeatureReward, float]]:
    """Yield the feature rewards in a reward, with their weights."""
    if isinstance(reward, FeatureReward):
        yield reward, weight
    elif isinstance(reward, CompositeReward):
        for part, own in zip(reward.rewards, reward.weights, strict=True):
            yield from _features(part, weight * own)
    elif isinstance(reward, OneSidedPenalty):
        yield from _features(reward.reward, weight)
    elif isinstance(reward, DualVerifier):
        yield reward.feature_reward, weight


class Detector:
    """One sign of gaming.

    Attributes:
        name: What its flags begin with.
        missing: Why it cannot work here, or None.
        learned: Names of the attributes that :meth:`learn` sets, for checkpoints (JSON).
    """

    name = ""
    learned: tuple[str, ...] = ()
    missing: str | None = None

    def __init__(self):
        self.rewarded = Rewarded()
        self.forget()

    def attach(self, rewarded: Rewarded) -> None:
        """Receive the rewards that are guarded."""
        self.rewarded = rewarded

    @property
    def requests(self) -> list[Request]:
        """Return the readouts that it needs."""
        return []

    def forget(self) -> None:
        """Reset."""

    def learn(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> None:
        """Learn from clean rollouts."""

    def scores(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> Tensor:
        """Return ``[B]`` float32 on the CPU, higher for more suspicious; NaN where there is nothing to go by."""
        raise NotImplementedError

    def reason(self, score: float, usual: float) -> str:
        """Return why a rollout is flagged, in words; ``usual`` is the threshold."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned (JSON)."""
        return {name: vars(self)[name] for name in self.learned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` saved."""
        vars(self).update({name: state[name] for name in self.learned})


class Repetition(Detector):
    """The share of n-grams of token ids that have occurred before in the completion (seq-rep-4, arXiv 1908.04319)."""

    name = "repetition"

    def scores(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> Tensor:
        return torch.tensor([repeated_ngrams(ids, 4) for ids in batch.written])

    def reason(self, score: float, usual: float) -> str:
        return f"{score:.0%} of 4-grams repeat (usual: up to {usual:.0%})"


class Template(Detector):
    """How often the most frequent sentence comes, numbers aside: ``Step 1: 2+2=4`` and ``Step 2: 3+3=6`` are one.

    A sentence that is said again word for word, numbers included, counts as four more.
    """

    name = "template"

    def scores(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> Tensor:
        return torch.tensor([_said_again(text) for text in batch.texts])

    def reason(self, score: float, usual: float) -> str:
        return (
            f"one sentence comes again and again: {score:.0f}, verbatim repeats counted fourfold (usual: {usual:.0f})"
        )


def _said_again(text: str) -> float:
    sentences = [s.strip().lower() for s in _SENTENCE.split(text) if s.strip()]
    verbatim = max(Counter(sentences).values(), default=1) - 1
    return float(max(Counter(_NUMBER.sub("0", s) for s in sentences).values(), default=0) + 4 * verbatim)


class Filler(Detector):
    """Tokens for each piece of content.

    Content is what the task is about: each number, and each word of the prompt, once. The reward of a mean can be
    kept up, or a penalty thinned out, by tokens that say nothing (filler dilution, arXiv 2602.15515).
    """

    name = "filler"

    def scores(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> Tensor:
        contents = [_content(plain_text(p), text) for p, text in zip(batch.prompts, batch.texts, strict=True)]
        return torch.tensor([n / (1 + c) for n, c in zip(batch.lengths, contents, strict=True)])

    def reason(self, score: float, usual: float) -> str:
        return f"{score:.1f} tokens for each number or word of the prompt (usual: up to {usual:.1f})"


def _content(prompt: str, completion: str) -> int:
    said = set(_WORD.findall(completion.lower()))
    asked = set(_WORD.findall(prompt.lower()))
    return len({word for word in said if word.isdigit() or (word in asked and len(word) > 2)})


class CueStuffing(Detector):
    """The share of tokens that are the reward's cues, out of their place.

    Cues are the :data:`CUES` tokens on which the reward reads highest in clean rollouts (Ma et al., arXiv 2601.05679:
    most "reasoning" features fire on a few tokens, wherever one puts them). Out of place is a cue behind a token that
    no cue follows in clean rollouts.
    """

    CUES = 8
    SEEN = 5  # a token must have been read so often before it is called a cue

    name = "cue_stuffing"
    learned = ("paid", "seen", "pairs")

    def forget(self) -> None:
        self.paid: dict[str, float] = {}
        self.seen: dict[str, int] = {}
        self.pairs: dict[str, int] = {}

    def attach(self, rewarded: Rewarded) -> None:
        super().attach(rewarded)
        self.missing = None if rewarded.features else "there is no feature reward whose cues it could know"

    @property
    def requests(self) -> list[Request]:
        return self.rewarded.requests

    def learn(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> None:
        paid, mask = self.rewarded.per_token(batch, readings), batch.mask()
        for row, ids in enumerate(batch.completion_ids):
            for t in mask[row].nonzero()[:, 0].tolist():
                token = str(ids[t])
                self.paid[token] = self.paid.get(token, 0.0) + float(paid[row, t])
                self.seen[token] = self.seen.get(token, 0) + 1
                pair = f"{_before(ids, batch.own[row], t)} {token}"
                self.pairs[pair] = self.pairs.get(pair, 0) + 1

    @property
    def cues(self) -> set[str]:
        """Token ids, as text."""
        often = [token for token, count in self.seen.items() if count >= self.SEEN] or list(self.seen)
        return set(sorted(often, key=lambda token: -self.paid[token] / self.seen[token])[: self.CUES])

    def scores(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> Tensor:
        cues, shares = self.cues, []
        for ids, own, n in zip(batch.completion_ids, batch.own, batch.lengths, strict=True):
            at = own.nonzero()[:, 0].tolist()
            pairs = [(f"{_before(ids, own, t)} {ids[t]}", str(ids[t])) for t in at]
            shares.append(sum(token in cues and pair not in self.pairs for pair, token in pairs) / max(n, 1))
        return torch.tensor(shares)

    def reason(self, score: float, usual: float) -> str:
        return f"{score:.0%} of tokens are cues of the reward where none comes otherwise (usual: up to {usual:.0%})"


def _before(ids: Sequence[int], own: Tensor, t: int) -> int | str:
    """The token that the model wrote before its token t; a turn's first one comes after ``start``."""
    return ids[t - 1] if t and own[t - 1] else "start"


class EmptySteps(Detector):
    """Steps that a machine can see are none, and structure that clean rollouts do not have: format mimicry.

    For each completion, signs of each kind are counted: calculations that are false, trivial (x + 0), said before, or
    about numbers that stand neither in the prompt nor in an earlier result; a last number that no calculation gives
    although there are some; headings, numbered steps, tags, tables, code and boxes. The score is their surprise,
    sum_k -ln p_k(c_k), where p_k(c) = (1 + clean rollouts with c or more of kind k) / (2 + clean rollouts). Beyond the
    most that was ever seen, it grows in proportion.
    """

    name = "empty_steps"
    learned = ("clean", "seen")

    def forget(self) -> None:
        self.clean = 0
        self.seen: dict[str, list[int]] = {}  # for each kind, clean rollouts with 1, 2, ... or more of it

    def learn(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> None:
        self.clean += len(batch)
        for prompt, text in zip(batch.prompts, batch.texts, strict=True):
            for kind, count in _empty(plain_text(prompt), text).items():
                seen = self.seen.setdefault(kind, [])
                seen += [0] * (count - len(seen))
                for c in range(count):
                    seen[c] += 1

    def scores(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> Tensor:
        pairs = zip(batch.prompts, batch.texts, strict=True)
        return torch.tensor([self._surprise(_empty(plain_text(prompt), text)) for prompt, text in pairs])

    def _surprise(self, found: Counter[str]) -> float:
        total = 0.0
        for kind, count in found.items():
            seen = self.seen.get(kind, [])
            p = (1 + (seen[count - 1] if count <= len(seen) else 0)) / (2 + self.clean)
            total -= math.log(p) * max(1.0, count / max(len(seen), 1))
        return total

    def reason(self, score: float, usual: float) -> str:
        return (
            "steps that are false, trivial, repeated or about nothing, or structure that clean rollouts lack: "
            f"{score:.0f} nats (usual: up to {usual:.0f})"
        )


def _empty(prompt: str, text: str) -> Counter[str]:
    """How often a completion does each of the things that steps without content do; what it does not is left out."""
    known, results, said = set(map(_value, _NUMBER.findall(prompt))), set(), set()
    found: Counter[str] = Counter()
    for a, sign, b, c in _CALCULATION.findall(text):
        left, right, result = _value(a), _value(b), _value(c)
        true = {"+": left + right, "-": left - right, "*": left * right, "/": left / right if right else math.nan}
        found["false"] += not abs(true[str(_SIGNS.get(sign, sign))] - result) <= 0.01 * max(1, abs(result))
        found["trivial"] += right == 0 and sign in "+-"
        found["repeated"] += (a, sign, b) in said
        found["ungrounded"] += not {left, right} <= known | results
        said.add((a, sign, b))
        results.add(result)
    numbers = [_value(n) for n in _NUMBER.findall(text)]
    found["unreached"] += bool(results) and numbers[-1] not in results
    for kind, pattern in _STRUCTURE.items():
        found[kind] += len(pattern.findall(text))
    return +found


def _value(number: str) -> float:
    try:
        return float(number.replace(",", ""))
    except ValueError:  # 1.2.3
        return float("nan")


class PromptCopy(Detector):
    """Words of the completion that lie in a run of four or more words copied from the prompt."""

    RUN = 4

    name = "prompt_copy"

    def scores(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> Tensor:
        pairs = zip(batch.prompts, batch.texts, strict=True)
        return torch.tensor([float(_copied(plain_text(prompt), text, self.RUN)) for prompt, text in pairs])

    def reason(self, score: float, usual: float) -> str:
        return f"{score:.0f} words are copied from the prompt (usual: up to {usual:.0f})"


def _copied(prompt: str, completion: str, run: int) -> int:
    asked, said = _WORD.findall(prompt.lower()), _WORD.findall(completion.lower())
    runs = {tuple(asked[i : i + run]) for i in range(len(asked) - run + 1)}
    copied = [False] * len(said)
    for i in range(len(said) - run + 1):
        if tuple(said[i : i + run]) in runs:
            copied[i : i + run] = [True] * run
    return sum(copied)


class Length(Detector):
    """How many times as long as the longest other rollout of its group a rollout is, if it is paid the median or more.

    Without groups, as the longest of eight clean rollouts on average.
    """

    name = "length"
    learned = ("longest",)

    def forget(self) -> None:
        self.longest: list[float] = []

    @property
    def requests(self) -> list[Request]:
        return self.rewarded.requests

    def learn(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> None:
        lengths = torch.tensor(batch.lengths, dtype=torch.float32)
        self.longest += [float(chunk.max()) for chunk in lengths.split(8)]

    def scores(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> Tensor:
        lengths = torch.tensor(batch.lengths, dtype=torch.float32)
        if batch.num_generations < 2:
            return lengths / torch.tensor(self.longest or [1.0]).mean()
        grouped = batch.grouped(lengths)
        two = grouped.topk(2, dim=1).values
        others = torch.where(grouped == two[:, :1], two[:, 1:], two[:, :1])  # the longest other one
        paid = batch.grouped(self.rewarded.per_rollout(batch, readings).nan_to_num())
        return batch.local(grouped / others.clamp(min=1) * (paid >= paid.median(dim=1, keepdim=True).values))

    def reason(self, score: float, usual: float) -> str:
        return f"{score:.1f} times as long as the longest other rollout, and paid no less (usual: up to {usual:.1f})"


class Inflation(Detector):
    """Paid without being right, while the reward rises and the outcome does not.

    Over the last :data:`STEPS` steps, with n rollouts in all, G is the mean gain over clean rollouts in clean standard
    deviations: of the reward, minus that of the outcome, minus 3 sqrt(2 / n), which chance alone rarely exceeds. While
    G > 0, a rollout that is not right scores what it is paid above the clean mean, times min(G, 1); the others 0. What
    was the same in all clean rollouts, such as an outcome that was never right, counts in its own units.
    """

    STEPS = 5

    name = "inflation"
    learned = ("paid", "right", "history")

    def forget(self) -> None:
        self.paid: list[float] = []
        self.right: list[float] = []
        self.history: list[tuple[float, int]] = []  # reward's gain minus the outcome's, rollouts

    def attach(self, rewarded: Rewarded) -> None:
        super().attach(rewarded)
        needs = {"feature reward": rewarded.features, "outcome": rewarded.outcome}
        lacking = [name for name, there in needs.items() if not there]
        self.missing = f"there is no {lacking[0]} to compare" if lacking else None

    @property
    def requests(self) -> list[Request]:
        return self.rewarded.requests

    def learn(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> None:
        self.paid += self.rewarded.per_rollout(batch, readings).tolist()
        self.right += self.rewarded.right(batch).tolist()

    def scores(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> Tensor:
        right = self.rewarded.right(batch)
        reward = _standardised(self.rewarded.per_rollout(batch, readings), self.paid)
        everyones = batch.gather(reward - _standardised(right, self.right))
        recent = [*self.history, (float(everyones.nanmean().nan_to_num()), len(everyones))][-self.STEPS :]
        if batch.training:
            self.history = recent
        rollouts = sum(n for _, n in recent)
        ahead = sum(n * gain for gain, n in recent) / rollouts - 3 * (2 / rollouts) ** 0.5
        return reward.clamp(min=0) * ~(right > 0.5) * max(0.0, min(1.0, ahead))

    def reason(self, score: float, usual: float) -> str:
        return f"not right, but paid {score:.1f} s.d. above what is usual, while the reward outruns the outcome"


def _standardised(values: Tensor, clean: Sequence[float]) -> Tensor:
    usual = torch.tensor(clean)
    usual = usual[~usual.isnan()]
    deviation = float(usual.std()) if len(usual) > 1 else 0.0
    return (values - usual.mean()) / (deviation if deviation > 1e-6 else 1.0)
