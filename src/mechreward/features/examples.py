"""What makes a latent fire: its top, random and silent examples in a corpus, how often it fires, and how strongly.

One pass over the corpus, in batches. What is kept is a few windows of tokens per latent in bounded heaps, so the corpus
may be as long as one likes, and the result does not depend on the batches.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mechreward.errors import DataError
from mechreward.pocket.questions import questions
from mechreward.readout import Readout, ReadoutBank
from mechreward.rollout.batch import Call, RolloutBatch, Text, own_text
from mechreward.rollout.capture import check_fits, unwrap
from mechreward.rollout.sampling import token_texts
from mechreward.rollout.source import HFSource, read_forward
from mechreward.schema import shown

SAMPLE = 200
"""Activating examples that are kept at random, for quantiles: exact quantiles up to this many."""

CONTROLS = 100
"""Stretches without activation that are kept at random."""

SHORTEST_CONTROL = 8
"""Tokens: a shorter stretch says little about when the latent stays silent."""

BINS = 64
"""Bins of the histogram of activations."""


class Passage(NamedTuple):
    """A rollout of a corpus: the prompt is context, the completion is read.

    Attributes:
        prompt: Plain, or a conversation.
        completion: Likewise.
        completion_ids: The sampled tokens, which the text alone need not give back.
    """

    prompt: Text
    completion: Text
    completion_ids: Sequence[int] | None = None


Corpus = Iterable[str | Passage | RolloutBatch]
"""Texts, rollouts, or batches of rollouts with their token ids, in any mixture."""

Decode = Callable[[tuple[int, ...]], str]


@dataclass(frozen=True, eq=False)
class Example:
    """A window of T tokens and what a latent does on them.

    Attributes:
        tokens: T texts of single tokens; a character that is split over tokens shows as ``\\ufffd`` in each.
        token_ids: T ids.
        activations: ``[T]`` float32, in the units of the SAE; 0 where nothing was read.
        read: ``[T]`` bool: False for the prompt and for special tokens, which are context only.
        peak: Index of the largest activation; of ties the first.
        text: Which text or rollout of the corpus, from 0.
        start: Where the window starts among the tokens that the model read, BOS included.
    """

    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    activations: NDArray[np.float32]
    read: NDArray[np.bool_]
    peak: int
    text: int
    start: int

    @property
    def maximum(self) -> float:
        return float(self.activations[self.peak])


@dataclass(frozen=True, eq=False)
class FeatureExamples:
    """What a latent does in a corpus.

    Attributes:
        name: The readout's label, e.g. ``feature_123``.
        top: The examples with the largest activations, largest first; one a text.
        sample: Activating examples chosen at random among all, one a text, largest first: what quantiles are taken of.
        controls: Stretches of tokens on which it stays silent, at most one a text (its longest), at random.
        tokens: Tokens that were read: without prompts, BOS, other special tokens, padding, and the first position.
        fired: Those among them on which it is above 0.
        texts: Texts (or pieces of long ones, or rollouts) in which a token was read.
        texts_fired: Those among them in which it fires.
        counts: Histogram of its activations above 0, ``[64]``.
        edges: The bins' edges, ``[65]``: bin i holds ``edges[i] < a <= edges[i + 1]``.
    """

    name: str
    top: list[Example]
    sample: list[Example]
    controls: list[Example]
    tokens: int
    fired: int
    texts: int
    texts_fired: int
    counts: NDArray[np.int64]
    edges: NDArray[np.float64]

    @property
    def firing_rate(self) -> float:
        """Share of the tokens on which it fires."""
        return self.fired / self.tokens if self.tokens else 0.0

    @property
    def maximum(self) -> float:
        """Its largest activation in the corpus; 0 if it never fires."""
        return self.top[0].maximum if self.top else 0.0

    def quantiles(self, groups: int = 4, each: int = 3, seed: int = 0) -> list[list[Example]]:
        """Examples of every strength: :attr:`sample` in groups of equal size by maximum, and some at random of each.

        Delphi's way (Paulo et al. 2024, arXiv 2410.13928): top examples alone make a latent look more specific than
        it is.

        Returns:
            ``groups`` lists, strongest first, each with the largest first; shorter where the latent fires seldom.
        """
        rng = np.random.default_rng(seed)
        parts = [part.tolist() for part in np.array_split(np.arange(len(self.sample)), groups)]
        chosen = [sorted(rng.permutation(part)[:each].tolist()) for part in parts]
        return [[self.sample[i] for i in part] for part in chosen]


def collect(
    model: nn.Module,
    tokenizer: Any,
    readout: Readout,
    corpus: Corpus,
    *,
    top: int = 20,
    context: int = 64,
    batch_size: int = 32,
    length: int = 512,
    seed: int = 0,
) -> list[FeatureExamples]:
    """Read a corpus once and keep each latent's examples.

    A plain text is read as a completion to an empty prompt: behind BOS where the tokenizer has one. The first position
    is never counted, BOS or not: it is an attention sink, whose residual is like no other's. Special tokens (BOS, EOS,
    padding, turn markers) are never counted anywhere. Unlike a reward, which leaves a rollout's final token out, this
    reads it.

    Args:
        model: A Hugging Face causal language model; run in eval mode, without gradients, up to the hook point.
        tokenizer: Its tokenizer.
        readout: K latents, from ``sae.features(ids)`` or a frozen pack. "Fires" means above 0.
        corpus: Texts, :class:`Passage` rollouts, or rollout batches.
        top: How many top examples to keep.
        context: Tokens of an example's window; three quarters of it lie before the peak where the text allows
            (as in Delphi).
        batch_size: Texts read together.
        length: Longer plain texts are cut into pieces of so many tokens, each read on its own. Rollouts are not cut.
        seed: Of the random examples and controls.

    Returns:
        K results, in the order of the readout's labels.

    Raises:
        ModelMismatchError: The readout was made for another model.
        DataError: There is no token to read in the corpus, or one that the model does not know, or a conversation
            that its chat template does not take.
    """
    latents = [_Latent(top) for _ in readout.labels]
    rng, tokens, texts = np.random.default_rng(seed), 0, 0
    for numbers, batch, counted, values in latent_activations(
        model, tokenizer, readout, corpus, batch_size=batch_size, length=length
    ):
        tokens += int(counted.sum())
        for k, latent in enumerate(latents):
            latent.count(values[..., k])
        peaks = values.max(axis=1, initial=0)  # [B, K]
        for b in np.flatnonzero(counted.any(axis=1)).tolist():
            # Drawn for every text, needed or not: so the choice depends neither on the batches nor on the latents.
            priority, offset = rng.random(2)
            prompt, completion = list(batch.prompt_ids[b]), list(batch.completion_ids[b])
            count = len(completion)
            row = _Row(
                ids=prompt + completion,
                prompt=len(prompt),
                counted=counted[b, :count],
                values=values[b, :count],
                text=numbers[b],
                order=texts,
                context=context,
                offset=offset,
            )
            for k, latent in enumerate(latents):
                latent.offer(row, k, float(peaks[b, k]), priority)
            texts += 1
    if tokens == 0:
        raise DataError("There is no token to read in the corpus: it is empty, or holds nothing but special tokens.")

    @functools.cache  # a token is met again and again
    def decode(ids: tuple[int, ...]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return [latent.result(name, decode, tokens, texts) for name, latent in zip(readout.labels, latents, strict=True)]


def latent_activations(
    model: nn.Module, tokenizer: Any, readout: Readout, corpus: Corpus, *, batch_size: int = 32, length: int = 512
) -> Iterator[tuple[list[int], RolloutBatch, NDArray[np.bool_], NDArray[np.float32]]]:
    """Read a corpus in batches of B rollouts of at most T completion tokens; :func:`collect` says what is read.

    Yields:
        The number of each rollout's text; the rollouts; which tokens are counted, ``[B, T]``; the activations of K
        latents, ``[B, T, K]``, 0 on tokens that are not counted.
    """
    check_fits([readout], model)
    bank, special = ReadoutBank([readout]), torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.long)
    for numbers, batch in _batches(model, tokenizer, corpus, batch_size, length):
        readings = read_forward(model, batch, bank, read_last=True)[readout]
        counted = _counted(batch, readings.mask.cpu(), special).numpy()
        yield numbers, batch, counted, np.where(counted[..., None], readings.values.cpu().numpy(), np.float32(0))


def _counted(batch: RolloutBatch, mask: torch.Tensor, special: torch.Tensor) -> torch.Tensor:
    """``[B, T]`` bool: what is read, without special tokens and the first position."""
    counted = mask.clone()
    for row, (prompt, completion) in enumerate(zip(batch.prompt_ids, batch.completion_ids, strict=True)):
        counted[row, : len(completion)] &= ~torch.isin(torch.tensor(completion, dtype=torch.long), special)
        if not prompt:
            counted[row, :1] = False
    return counted


def _batches(
    model: nn.Module, tokenizer: Any, corpus: Corpus, batch_size: int, length: int
) -> Iterator[tuple[list[int], RolloutBatch]]:
    """The corpus as rollout batches, with the number of each row's text."""
    source, vocabulary = HFSource(model, tokenizer), unwrap(model).get_input_embeddings().num_embeddings  # pyright: ignore
    pieces = _pieces(corpus, tokenizer, length)
    for made, run in itertools.groupby(pieces, key=lambda piece: isinstance(piece[1], RolloutBatch)):
        if made:
            yield from ((list(range(number, number + len(batch))), batch) for number, batch in run)
            continue
        while some := list(itertools.islice(run, batch_size)):
            numbers = [number for number, _ in some]
            yield numbers, _tokenised(source, [passage for _, passage in some], numbers, vocabulary)


def _tokenised(source: HFSource, passages: list[Passage], numbers: list[int], vocabulary: int) -> RolloutBatch:
    """Passages with token ids as a rollout batch."""
    prompts, completions, ids = zip(*passages, strict=True)
    try:
        made = source.batch(Call(prompts, completions, ids))
    except (ValueError, TypeError, KeyError, jinja2.TemplateError) as error:  # from a chat template, or its lack
        said = " ".join(str(error).split())[:200]
        raise DataError(
            f"The prompts of texts {numbers[0] + 1} to {numbers[-1] + 1} of the corpus cannot be tokenised "
            f"({type(error).__name__}: {said}): give plain prompts, or conversations that the model's chat "
            "template takes."
        ) from error
    largest = max(max(row, default=0) for row in [*made.prompt_ids, *made.completion_ids])
    if largest >= vocabulary:
        raise DataError(
            f"Texts {numbers[0] + 1} to {numbers[-1] + 1} of the corpus hold token {largest}, but the model knows "
            f"{vocabulary} tokens: give the ids or the tokenizer of this model."
        )
    return made


def _pieces(corpus: Corpus, tokenizer: Any, length: int) -> Iterator[tuple[int, Any]]:
    """Texts cut into passages, rollouts as passages with token ids, and batches as they are, each with its number."""

    def encoded(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    number = 0
    for item in corpus:
        if isinstance(item, RolloutBatch):
            yield number, item
            number += len(item)
            continue
        if isinstance(item, str):
            ids = encoded(item)
            for start in range(0, len(ids), length):
                yield number, Passage("", item, ids[start : start + length])
        else:
            ids = encoded(own_text(item.completion)) if item.completion_ids is None else item.completion_ids
            if len(ids):
                yield number, item._replace(completion_ids=ids)
        number += 1


class _Kept:
    """The ``size`` windows with the largest keys, largest first."""

    def __init__(self, size: int):
        self.size, self._heap = size, []

    def offer(self, key: tuple, window: Callable[[], Example | None]) -> None:
        """Keep a window, made only if it is wanted. Keys are never equal: they end in the number of the row."""
        full = len(self._heap) >= self.size
        if (not full or (self.size > 0 and key > self._heap[0][0])) and (item := window()) is not None:
            (heapq.heappushpop if full else heapq.heappush)(self._heap, (key, item))

    def items(self) -> list[Any]:
        return [item for _, item in sorted(self._heap, key=lambda entry: entry[0], reverse=True)]


@dataclass
class _Row:
    """One text: a prompt, T completion tokens, K latents."""

    ids: list[int]
    prompt: int  # tokens of the prompt
    counted: NDArray[np.bool_]  # [T]
    values: NDArray[np.float32]  # [T, K]
    text: int
    order: int
    context: int
    offset: float

    def around_peak(self, k: int) -> Example:
        peak = self.prompt + int(self.values[:, k].argmax())
        start = max(0, min(peak - 3 * self.context // 4, len(self.ids) - self.context))
        return self._cut(k, start, start + self.context)

    def silent(self, k: int) -> Example | None:
        """The longest stretch of counted tokens on which a latent stays silent, cut at random; None if it is short."""
        quiet = self.counted & (self.values[:, k] <= 0)
        edges = np.flatnonzero(np.diff(quiet.astype(np.int8), prepend=0, append=0))
        lengths = edges[1::2] - edges[::2]
        if len(lengths) == 0 or lengths.max() < SHORTEST_CONTROL:
            return None
        start, stop = edges[2 * lengths.argmax()], edges[2 * lengths.argmax() + 1]
        start += int(self.offset * (max(0, stop - start - self.context) + 1))
        return self._cut(k, self.prompt + start, self.prompt + min(stop, start + self.context))

    def _cut(self, k: int, start: int, stop: int) -> Example:
        """Tokens start to stop of prompt and completion together; their texts are for what is kept in the end."""
        inside = slice(max(0, start - self.prompt), max(0, stop - self.prompt))
        before = max(0, min(stop, self.prompt) - start)
        activations = np.concatenate([np.zeros(before, np.float32), self.values[inside, k]])
        return Example(
            tokens=(),
            token_ids=tuple(self.ids[start:stop]),
            activations=activations,
            read=np.concatenate([np.zeros(before, bool), self.counted[inside]]),
            peak=int(activations.argmax()),
            text=self.text,
            start=int(start),
        )


class _Latent:
    """What is kept of one latent while the corpus passes."""

    def __init__(self, top: int):
        self.top, self.sample, self.controls = _Kept(top), _Kept(SAMPLE), _Kept(CONTROLS)
        self.fired = self.texts_fired = 0
        self.counts, self.range = np.zeros(BINS, np.int64), 0.0

    def count(self, values: NDArray[np.float32]) -> None:
        """Add activations to the histogram, whose range is the smallest power of 2 that holds all of them.

        Doubling the range merges neighbouring bins, so the counts are exact, whatever came first.
        """
        above = values[values > 0].astype(np.float64)
        if len(above) == 0:
            return
        self.fired += len(above)
        needed = 2.0 ** np.ceil(np.log2(above.max()))
        if self.range == 0.0:
            self.range = needed
        while self.range < needed:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2, np.int64)])
            self.range *= 2
        bins = np.ceil(above * (BINS / self.range)).astype(np.int64) - 1
        self.counts += np.bincount(bins, minlength=BINS)

    def offer(self, row: _Row, k: int, maximum: float, priority: float) -> None:
        fires = maximum > 0
        self.texts_fired += fires
        if fires:
            self.top.offer((maximum, -row.order), lambda: row.around_peak(k))
            self.sample.offer((priority, row.order), lambda: row.around_peak(k))
        self.controls.offer((priority, row.order), lambda: row.silent(k))

    def result(self, name: str, decode: Decode, tokens: int, texts: int) -> FeatureExamples:
        def examples(kept: _Kept) -> list[Example]:
            return [replace(each, tokens=tuple(token_texts(decode, each.token_ids))) for each in kept.items()]

        return FeatureExamples(
            name=name,
            top=examples(self.top),
            sample=sorted(examples(self.sample), key=lambda example: -example.maximum),
            controls=examples(self.controls),
            tokens=tokens,
            fired=self.fired,
            texts=texts,
            texts_fired=self.texts_fired,
            counts=self.counts,
            edges=np.linspace(0.0, self.range, BINS + 1),
        )


def read_corpus(path: str | Path) -> Iterator[str | Passage]:
    """Texts or rollouts from a file, one after the other.

    - ``.txt``: one text per line; if blank lines stand between texts, each block between them is a text of its own.
    - ``.jsonl``: an object per line with the key ``text``; or ``prompt`` and ``completion``, plain or as conversations,
      and ``completion_ids`` where the sampled tokens are known. Other keys are ignored.

    Raises:
        DataError: The file is missing, of another kind, or damaged; raised when the line is reached.
    """
    path = Path(path)
    kinds: dict[str, Callable[[Path], Iterator[str | Passage]]] = {".txt": _plain_texts, ".jsonl": _json_lines}
    if path.suffix not in kinds:
        raise DataError(f"{path} is neither .txt nor .jsonl: give the corpus as one of these.")
    try:
        yield from kinds[path.suffix](path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the path of the corpus.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8.") from None


def _plain_texts(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as lines:
        several = len(list(itertools.islice(_blocks(lines), 2))) > 1
    with path.open(encoding="utf-8-sig") as lines:
        for block in _blocks(lines):
            yield from (text.rstrip("\r\n") for text in (["".join(block)] if several else block))


def _blocks(lines: Iterable[str]) -> Iterator[Iterator[str]]:
    """The lines between blank lines."""
    return (block for blank, block in itertools.groupby(lines, key=lambda line: not line.strip()) if not blank)


def _json_lines(path: Path) -> Iterator[str | Passage]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number} is not valid JSON ({error}): correct it there.") from None
            yield _item(row, f"{path}, line {number}")


def _item(row: Any, where: str) -> str | Passage:
    keys = set(row) if isinstance(row, dict) else set()
    if "text" in keys and isinstance(row["text"], str):
        return row["text"]
    if {"prompt", "completion"} <= keys and _is_text(row["prompt"]) and _is_text(row["completion"]):
        ids = row.get("completion_ids")
        if ids is None or (isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids)):
            return Passage(row["prompt"], row["completion"], ids)
    raise DataError(
        f'{where} is {shown(row)}: it needs a "text", or a "prompt" and a "completion" that are texts or '
        'conversations (and "completion_ids", if any, a list of token ids).'
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(message, dict) for message in value))


def pocket_corpus(count: int) -> Iterator[Passage]:
    """``count`` of pocket's own discovery questions with their right answers: word problems and facts in turn."""
    kinds = [questions("discovery", kind="reasoning"), questions("discovery", kind="retrieval")]
    for question in itertools.islice(itertools.chain.from_iterable(zip(*kinds, strict=False)), count):
        yield Passage(question.prompt, question.solution)
