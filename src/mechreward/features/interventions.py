"""What a reading does when the text is changed in ways that should not matter, and whether the text is the model's own.

- *Injection* (Ma et al., arXiv 2601.05679): the tokens on which the pack reads highest are put into rollouts that lack
  the behaviour. A reading that rises as if the behaviour were there is a detector of words.
- *Format*: the same rollouts with other line breaks, spaces, bullets or capitals, and in other words where given.
- *On-policy*: a reward is read on what the model itself writes at temperature 1, so that is what a gate must see.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechreward import progress
from mechreward.aggregation import aggregation
from mechreward.readout import Readings, Readout
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.capture import input_device
from mechreward.rollout.labelled import Labelled
from mechreward.rollout.source import MAX_NUMBERS, over_tokens, read_in_pieces

CUES = 3  # tokens that are injected
SEEN = 5  # a token must have been read so often before it is called a cue
LEAST_RATE = 0.1  # injected tokens as a share of the completion's own

Ids = list[int]


@dataclass(frozen=True)
class Rewards:
    """C weighted sums of readings: a pack's reward, and what it is compared with.

    Attributes:
        readouts: What is read.
        weights: For each readout, ``[K, C]`` float32.
        aggregation: How a sum over latents becomes one number per rollout.
    """

    readouts: list[Readout]
    weights: list[Tensor]
    aggregation: str

    def per_token(self, model: Any, batch: RolloutBatch) -> Iterator[tuple[RolloutBatch, Readings]]:
        """r_t = sum_k w_k f_k(h_t) of a few rollouts at a time, ``[b, T, C]``."""
        for piece, each in read_in_pieces(model, batch, self.readouts):
            values = sum(r.values @ w.to(r.values.device) for r, w in zip(each, self.weights, strict=True))
            assert isinstance(values, Tensor)  # there is a readout
            yield piece, Readings(values, each[0].mask)

    def __call__(self, model: Any, batch: RolloutBatch) -> NDArray[np.float64]:
        """The rewards of each rollout, ``[n, C]``."""
        aggregate = aggregation(self.aggregation)
        rewards = [over_tokens(readings, aggregate) for _, readings in self.per_token(model, batch)]
        return torch.cat(rewards).double().numpy()


@dataclass(frozen=True)
class Cues:
    """The tokens on which a reward reads highest.

    Attributes:
        tokens: :data:`CUES` of them, highest first.
        before: What stands before each most often, where anything does.
        rate: Share of tokens to inject: that by which rollouts with the behaviour have more of them, at least
            :data:`LEAST_RATE`.
    """

    tokens: Ids
    before: list[Ids]
    rate: float


def cues(model: Any, rollouts: Labelled, reward: Rewards) -> Cues:
    """Find the cue tokens of a reward of one column.

    A token's reading is the mean of r_t over its occurrences; the ends of completions are no cues.
    """
    sums: defaultdict[int, float] = defaultdict(float)
    counts: Counter[int] = Counter()
    before: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for piece, readings in reward.per_token(model, rollouts.batch):
        values, mask = readings.values[..., 0].cpu(), readings.mask.cpu()
        for row, ids in enumerate(piece.completion_ids):
            for t in mask[row].nonzero()[:, 0].tolist():
                token = ids[t]
                sums[token] += float(values[row, t])
                counts[token] += 1
                if t > 0 and piece.own[row, t - 1]:
                    before[token][ids[t - 1]] += 1
    ends = rollouts.batch.eos_token_ids
    often = [t for t in counts if counts[t] >= SEEN and t not in ends] or [t for t in counts if t not in ends]
    best = sorted(often, key=lambda t: -sums[t] / counts[t])[:CUES]
    shares = np.array([sum(t in best for t in ids) / len(ids) for ids in rollouts.batch.written])
    more = float(shares[rollouts.labels].mean() - shares[~rollouts.labels].mean())
    common = [[token for token, _ in before[t].most_common(1)] for t in best]
    return Cues(best, common, min(0.5, max(LEAST_RATE, more)))


def injected(batch: RolloutBatch, found: Cues, how: str, seed: int = 0) -> RolloutBatch:
    """The rollouts with cue tokens put in.

    Args:
        batch: Rollouts.
        found: What to put in.
        how: ``interspersed`` at random places, ``in_context`` behind the token that stands before it most often,
            ``prepended`` or ``appended``.
        seed: Of the places.
    """
    rng = np.random.default_rng(seed)
    changed, masks = [], []
    for row, ids in enumerate(batch.completion_ids):
        text, end = _without_end(list(ids), batch.eos_token_ids)
        # Flags of the text's tokens: cues are put between the model's own, never into a tool's.
        own = [1] * len(text)
        if batch.tool_mask is not None:
            text, end, own = list(ids), [], list(batch.tool_mask[row])
        count = max(CUES, math.ceil(found.rate * sum(own)))
        which = [int(rng.integers(len(found.tokens))) for _ in range(count)]
        if how in ("prepended", "appended"):
            place, cues = (0 if how == "prepended" else len(text)), [found.tokens[w] for w in which]
            text[place:place], own[place:place] = cues, [1] * len(cues)
        else:
            for w in which:
                places = [t for t, mine in enumerate([*own, 1]) if mine]
                place = places[int(rng.integers(len(places)))]
                cues = [*(found.before[w] if how == "in_context" else []), found.tokens[w]]
                text[place:place], own[place:place] = cues, [1] * len(cues)
        changed.append(text + end)
        masks.append(own)
    return replace(
        batch,
        completion_ids=changed,
        completions=["" for _ in changed],
        tool_mask=None if batch.tool_mask is None else masks,
    )


INJECTIONS = ("interspersed", "in_context", "prepended", "appended")


def _without_end(ids: Ids, ends: frozenset[int]) -> tuple[Ids, Ids]:
    last = next((t for t, token in enumerate(ids) if token in ends), len(ids))
    return ids[:last], ids[last : last + 1]


FORMATS: dict[str, Callable[[str], str]] = {
    "a line for each sentence": lambda text: re.sub(r"(?<=[.!?]) +", "\n", text),
    "one line": lambda text: re.sub(r"\s*\n\s*", " ", text),
    "double spaces": lambda text: text.replace(" ", "  "),
    "bullets": lambda text: "\n".join(f"- {line}" for line in text.split("\n")),
    "lower case": str.lower,
}


def reformatted(rollouts: Labelled, tokenizer: Any, change: Callable[[str], str]) -> RolloutBatch | None:
    """The rollouts in another format, or None where nothing changes or the tokenizer cannot write it."""
    texts = [change(text) for text in rollouts.batch.texts]
    return None if texts == list(rollouts.batch.texts) else rewritten(rollouts, tokenizer, texts)


def rewritten(rollouts: Labelled, tokenizer: Any, texts: Sequence[str]) -> RolloutBatch | None:
    """The rollouts with other completions; None where the tokenizer cannot write them, or they have several turns."""
    batch = rollouts.batch
    if batch.tool_mask is not None:  # which tokens would be the model's own is unknown
        return None
    ids = [list(each) for each in tokenizer(list(texts), add_special_tokens=False).input_ids]
    back = tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
    if any(a.strip() != b.strip() for a, b in zip(back, texts, strict=True)) or not all(ids):
        return None
    ends = [_without_end(list(old), batch.eos_token_ids)[1] for old in batch.completion_ids]
    return replace(batch, completions=list(texts), completion_ids=[a + b for a, b in zip(ids, ends, strict=True)])


@torch.no_grad()
def surprise(model: Any, batch: RolloutBatch, temperature: float = 1.0) -> NDArray[np.float64]:
    """How much less likely each rollout is to the model than what it writes itself, ``[n, 2]``: nats, and tokens.

    The sum over tokens of -ln p(x_t) - H_t, with H_t the entropy of the model's next token. Its expectation is 0 for
    text that the model itself sampled at this temperature (each term's is, given what stands before), negative for
    greedy or truncated sampling, positive for somebody else's text.
    """
    device, found = input_device(model), []
    step = max(1, MAX_NUMBERS // (4 * model.config.get_text_config().vocab_size * batch.longest))
    for start in range(0, len(batch), step):
        rows = range(start, min(start + step, len(batch)))
        piece = batch.take(rows)
        texts = [[*p, *c] for p, c in zip(piece.prompt_ids, piece.completion_ids, strict=True)]
        ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
        real = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)], real[row, : len(text)] = torch.tensor(text), 1
        logits = model(input_ids=ids.to(device), attention_mask=real.to(device), use_cache=False).logits
        for row, own in enumerate(piece.own):
            at = own.nonzero()[:, 0] + len(piece.prompt_ids[row])
            log_p = (logits[row, (at - 1).to(logits.device)].float() / temperature).log_softmax(dim=-1).cpu()
            chosen = log_p.gather(1, ids[row, at, None])[:, 0]
            entropy = -(log_p.exp() * log_p).nan_to_num().sum(dim=-1)
            found.append((float((-chosen - entropy).sum()), len(at)))
        progress.advance(len(rows))
    return np.array(found)
