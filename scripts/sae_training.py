"""What training a sparse autoencoder needs around SAELens' trainer: text, residual vectors in random order, figures.

The vectors come from any Hugging Face causal language model through our own hooks, so that the SAE is trained on the
very numbers that rewards will read. The first position of every piece of text is left out: BOS, or in models without
one (Qwen, SmolLM2) whatever token stands there, is an attention sink, whose norm is some hundred times the others'.
``scripts/train_sae.py`` puts it together; ``docs/training_new_sae.md`` explains it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mechreward.errors import ConfigError, DataError, ModelMismatchError, SAEError
from mechreward.readout import CHUNK_TOKENS, HookPoint, ReadoutBank
from mechreward.rollout.capture import (
    ResidualTap,
    decoder_layers,
    evaluating,
    input_device,
    refuse_uncapped,
    text_config,
    truncated_forward,
)
from mechreward.rollout.source import MAX_TOKENS
from mechreward.sae.handle import SAEHandle

FIGURE_TOKENS = 1024
"""Padded tokens in one pass of :func:`sae_figures`: its logits, ``[tokens, vocabulary]`` float32, are a GB at 256k."""


def read_documents(files: Sequence[Path]) -> Iterator[str]:
    """The documents of text files: the whole of a ``.txt``, each row of a ``.jsonl``.

    A row's text is its ``text``; or ``prompt`` and ``completion`` as they follow on each other (our rollouts); or
    ``question`` and ``answer`` on lines of their own (GSM8K).

    Raises:
        DataError: A file is missing, empty or not text, or a row has none of these.
    """
    for file in files:
        if file.suffix not in (".txt", ".jsonl"):
            raise DataError(f"{file} is neither .txt nor .jsonl: name it by what it holds.")
        if not file.is_file():
            raise DataError(f"There is no file {file}.")
        found = 0
        try:
            for document in _rows(file) if file.suffix == ".jsonl" else [file.read_text(encoding="utf-8-sig")]:
                if document.strip():
                    found += 1
                    yield document
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8 text.") from error
        if not found:
            raise DataError(f"{file} holds no text.")


def _rows(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{file}, line {number}, is not JSON.") from error
            yield _text_of(row, f"{file}, line {number},")


def _text_of(row: Any, where: str) -> str:
    if isinstance(row, dict):
        for columns, between in ((("text",), ""), (("prompt", "completion"), ""), (("question", "answer"), "\n")):
            parts = [row.get(column) for column in columns]
            if all(isinstance(part, str) for part in parts):
                return between.join(parts)  # pyright: ignore[reportArgumentType]
    raise DataError(f"{where} has neither 'text' nor 'prompt' and 'completion' nor 'question' and 'answer' as text.")


@dataclass(frozen=True, eq=False)
class Pieces:
    """Tokenised text: P pieces of a document each, of at most a context's length. Documents are never mixed.

    Attributes:
        ids: All pieces' tokens one after the other, ``[N]`` int32.
        ends: Where each piece ends in them, ``[P]`` int64.
    """

    ids: Tensor
    ends: Tensor

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, piece: int) -> list[int]:
        start = int(self.ends[piece - 1]) if piece else 0
        return self.ids[start : int(self.ends[piece])].tolist()

    @property
    def readable(self) -> Tensor:
        """Tokens of each piece that are read, ``[P]`` int64: all but the first."""
        return torch.diff(self.ends, prepend=torch.zeros(1, dtype=torch.long)) - 1

    def take(self, pieces: Sequence[int]) -> Pieces:
        """Some of them."""
        starts = [0, *self.ends.tolist()]
        spans = [self.ids[starts[piece] : starts[piece + 1]] for piece in pieces]
        ids = torch.cat(spans) if spans else self.ids[:0]
        return Pieces(ids, torch.tensor([len(span) for span in spans], dtype=torch.long).cumsum(0))

    def fingerprint(self) -> str:
        """Tells whether an interrupted run is continued on the same text."""
        digest = hashlib.sha256(self.ids.numpy().tobytes())
        digest.update(self.ends.numpy().tobytes())
        return digest.hexdigest()


def tokenise(tokenizer: Any, documents: Iterable[str], context: int) -> Pieces:
    """Cut documents into pieces of at most ``context`` tokens, each with the BOS that the tokenizer itself would add.

    Raises:
        ConfigError: A context of fewer than two tokens leaves nothing to read.
        DataError: No document has two tokens.
    """
    if context < 2:
        raise ConfigError(
            f"A context of {context} leaves nothing to read, since the first token is left out: take 512."
        )
    bos = [tokenizer.bos_token_id]
    if tokenizer("a").input_ids[:1] != bos:
        bos = []
    ids, ends = array("i"), array("q")
    for document in documents:
        # Documents longer than the model's window, of which tokenizers warn, are cut here.
        tokens = tokenizer(document, add_special_tokens=False, verbose=False).input_ids
        if bos and tokens[:1] == bos:
            tokens = tokens[1:]  # the text brings its own, as a rendered chat template does
        step = context - len(bos)
        for start in range(0, len(tokens), step):
            piece = [*bos, *tokens[start : start + step]]
            if len(piece) > 1:
                ids.extend(piece)
                ends.append(len(ids))
    if not ends:
        raise DataError("The text has no document of two tokens or more: there is nothing to train on.")
    return Pieces(torch.tensor(ids, dtype=torch.int32), torch.tensor(ends, dtype=torch.long))


def check_layer(model: nn.Module, layer: int) -> None:
    """Refuse a layer that the model does not have.

    Raises:
        ModelMismatchError: There is no such layer.
    """
    layers = len(decoder_layers(model))
    if not 0 <= layer < layers:
        raise ModelMismatchError(f"The model has no layer {layer}: choose one of 0 to {layers - 1}.")


def residual_vectors(model: nn.Module, point: HookPoint, rows: Sequence[Sequence[int]]) -> Tensor:
    """The residual stream at every position of the rows but their first, by truncated forward passes.

    Args:
        model: Any HF causal language model.
        point: Where to read.
        rows: Token ids, without padding, any lengths.

    Returns:
        ``[sum(len(row) - 1), d_model]`` in the model's dtype on the CPU, in the rows' order.

    Raises:
        CaptureError: The model's layout is not supported.
    """
    device = input_device(model)
    starts = [0, *itertools.accumulate(len(row) - 1 for row in rows)]
    vectors: Tensor | None = None
    tap = ResidualTap(model, [point])
    read: list[Tensor] = []

    def keep(point: HookPoint, hidden: Tensor) -> None:
        read.append(hidden.cpu())

    try:
        for chunk, ids, attention in _padded(rows, MAX_TOKENS):
            inputs = {"input_ids": ids.to(device), "attention_mask": attention.to(device), "use_cache": False}
            truncated_forward(model, tap, keep, inputs)
            stream = read.pop()
            if vectors is None:
                vectors = torch.empty(starts[-1], stream.shape[-1], dtype=stream.dtype)
            for row, hidden in zip(chunk, stream, strict=True):
                vectors[starts[row] : starts[row + 1]] = hidden[1 : len(rows[row])]
    finally:
        tap.close()
    return torch.empty(0, text_config(model).hidden_size) if vectors is None else vectors


def _padded(rows: Sequence[Sequence[int]], max_tokens: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Batches of rows of similar length: which rows, and ids and attention mask ``[b, T]``, padded on the right."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    while order:
        width = len(rows[order[-1]])
        count = max(1, max_tokens // max(width, 1))
        order, chunk = order[:-count], order[-count:]
        ids = torch.zeros(len(chunk), width, dtype=torch.long)
        attention = torch.zeros_like(ids)
        for k, row in enumerate(chunk):
            ids[k, : len(rows[row])] = torch.tensor(rows[row])
            attention[k, : len(rows[row])] = 1
        yield chunk, ids, attention


class ResidualStream(Iterator[Tensor]):
    """Endless batches of residual vectors in random order, for SAELens' trainer.

    The pieces are read in a new random order each epoch, a buffer at a time; a buffer's vectors are dealt out in random
    order. All of it follows from the text, the settings and the seed, so the number of batches dealt out is all that a
    checkpoint has to hold: set :attr:`batches` to it, and the buffer is filled again and dealt out from there.

    Args:
        model: Any HF causal language model.
        point: Where to read.
        pieces: The text.
        batch: Vectors in a batch.
        buffer: Vectors in the buffer, rounded down to whole batches, and no more than the text has.
        seed: Of both orders.

    Attributes:
        batches: How many were dealt out.
        tokens: How many the text has to read.

    Raises:
        ModelMismatchError: There is no such layer.
        DataError: The text is shorter than a batch.
        ConfigError: The buffer is smaller than a batch.
    """

    def __init__(self, model: nn.Module, point: HookPoint, pieces: Pieces, batch: int, buffer: int, seed: int = 0):
        check_layer(model, point.layer)
        readable = pieces.readable
        self.tokens = int(readable.sum())
        if batch < 1 or buffer < batch:
            raise ConfigError(f"A buffer of {buffer} vectors cannot hold a batch of {batch}: make it larger.")
        if self.tokens < batch:
            raise DataError(f"The text has {self.tokens} tokens to read, fewer than one batch of {batch}: add text.")
        self.model, self.point, self.pieces, self.batch, self.seed = model, point, pieces, batch, seed
        self.batches = 0
        self._lengths = readable.tolist()
        self._batches_per_buffer = min(buffer, self.tokens) // batch
        self._walk, self._taken = self._all_pieces(), 0
        self._held = -1
        self._vectors = self._order = torch.empty(0)

    def __next__(self) -> Tensor:
        """``[batch, d_model]`` float32 on the CPU."""
        buffer, offset = divmod(self.batches, self._batches_per_buffer)
        if buffer != self._held:
            self._fill(buffer)
        self.batches += 1
        return self._vectors[self._order[offset * self.batch : (offset + 1) * self.batch]].float()

    def _fill(self, buffer: int) -> None:
        if buffer < self._taken:
            self._walk, self._taken = self._all_pieces(), 0
        while self._taken < buffer:  # passed over, not captured
            self._take()
        pieces = self._take()
        self._vectors = torch.empty(0)  # the old ones make room first
        self._vectors = residual_vectors(self.model, self.point, [self.pieces[piece] for piece in pieces])
        # What exceeds whole batches, less than a piece, is never dealt out.
        self._order = torch.randperm(len(self._vectors), generator=self._generator("buffer", buffer))
        self._held = buffer

    def _take(self) -> list[int]:
        """The pieces of the next buffer."""
        pieces, missing = [], self._batches_per_buffer * self.batch
        while missing > 0:
            pieces.append(next(self._walk))
            missing -= self._lengths[pieces[-1]]
        self._taken += 1
        return pieces

    def _all_pieces(self) -> Iterator[int]:
        for epoch in itertools.count():
            yield from torch.randperm(len(self.pieces), generator=self._generator("epoch", epoch)).tolist()

    def _generator(self, what: str, number: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed} {what} {number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@torch.no_grad()
def sae_figures(
    model: nn.Module, sae: SAEHandle, rows: Sequence[Sequence[int]], seen: Iterable[Tensor]
) -> dict[str, float]:
    """How good a sparse autoencoder is on text that it was not trained on. The first position is left alone throughout.

    Args:
        model: The model that it was made for.
        sae: At a ``resid_post`` hook point.
        rows: Token ids of held-out text, each at least two.
        seen: Residual vectors ``[n, d_model]`` in parts, in which dead latents are looked for: text that it was
            trained on, and enough of it, since rare latents are not dead.

    Returns:
        ``fvu``: fraction of variance unexplained, sum ||x - x'||^2 / sum ||x - mean||^2 over all held-out tokens;
        ``l0``: latents active per token; ``dead``: share of the latents that fire on no token of ``seen``;
        ``cross_entropy_recovered``: (zero - reconstructed) / (zero - clean), of the model's next-token losses with the
        hook point's output set to 0, to x', and left as it is; ``cross_entropy``, ``cross_entropy_reconstructed``,
        ``cross_entropy_zero``: these losses, in nats a token; ``tokens``: how many were reconstructed; ``seen``: how
        many dead latents were looked for in.

    Raises:
        SAEError: It reads another site than ``resid_post``.
        DataError: There is no held-out text.
    """
    if sae.hook_point.site != "resid_post":
        raise SAEError(f"{sae.name} reads {sae.hook_point}: only SAEs of a layer's output can be evaluated.")
    if not any(len(row) > 1 for row in rows):
        raise DataError("There is no held-out text of two tokens or more: nothing can be evaluated.")
    refuse_uncapped(model)
    device = input_device(model)
    w_dec, b_dec = (tensor.to(device) for tensor in sae.read_decoder())
    sae = replace(sae, read_decoder=lambda: (w_dec, b_dec))  # else it is read from disk for each batch
    bank = ReadoutBank([sae.all_features()])

    def encode(x: Tensor) -> Tensor:
        activations = torch.zeros(len(x), sae.d_sae, device=x.device)
        bank.encode(sae.hook_point, x, activations)
        return activations

    # Sums in float64, since the variance is a difference of large numbers; on the CPU, since Apple's GPU has none.
    sums = torch.zeros(sae.d_model, dtype=torch.float64)
    squares = missed = active = tokens = 0.0

    def reconstructed(hidden: Tensor, real: Tensor) -> Tensor:
        nonlocal squares, missed, active, tokens
        result = hidden.clone()
        for part in real.nonzero().split(CHUNK_TOKENS):
            x = hidden[part[:, 0], part[:, 1]].float()
            activations = encode(x)
            decoded = sae.decode(activations, x)
            result[part[:, 0], part[:, 1]] = decoded.to(hidden.dtype)
            exact = x.cpu().double()
            sums.add_(exact.sum(dim=0))
            squares += float(exact.square().sum())
            missed += float((x - decoded).cpu().double().square().sum())
            active += float((activations > 0).sum())
            tokens += len(x)
        return result

    def zeroed(hidden: Tensor, real: Tensor) -> Tensor:
        return hidden.masked_fill(real[..., None], 0)

    ways: dict[str, Callable[[Tensor, Tensor], Tensor] | None]
    ways = {"clean": None, "reconstructed": reconstructed, "zero": zeroed}
    losses, targets = dict.fromkeys(ways, 0.0), 0
    with evaluating(model):
        for _, ids, attention in _padded([row for row in rows if len(row) > 1], FIGURE_TOKENS):
            ids, attention = ids.to(device), attention.to(device)
            real = attention.bool()
            real[:, 0] = False
            labels = ids.masked_fill(attention == 0, -100)[:, 1:]
            targets += int((labels >= 0).sum())
            for way, replacement in ways.items():
                with _replaced(model, sae.hook_point, replacement, real):
                    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
                losses[way] += float(
                    nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
                )
    clean, recon, zero = (losses[way] / targets for way in ways)
    fired, looked_at = torch.zeros(sae.d_sae, dtype=torch.bool, device=device), 0
    for vectors in seen:
        for part in vectors.split(CHUNK_TOKENS):
            fired |= (encode(part.to(device)) > 0).any(dim=0)
        looked_at += len(vectors)
    return {
        "fvu": missed / (squares - float(sums.square().sum()) / tokens),
        "l0": active / tokens,
        "dead": 1 - float(fired.float().mean()),
        "cross_entropy_recovered": (zero - recon) / (zero - clean),
        "cross_entropy": clean,
        "cross_entropy_reconstructed": recon,
        "cross_entropy_zero": zero,
        "tokens": tokens,
        "seen": looked_at,
    }


@contextmanager
def _replaced(
    model: nn.Module, point: HookPoint, replacement: Callable[[Tensor, Tensor], Tensor] | None, real: Tensor
) -> Iterator[None]:
    """A layer's output passes through ``replacement(hidden, real)`` inside the ``with`` block."""
    if replacement is None:
        yield
        return

    def hook(_module, _args, output):
        if isinstance(output, tuple):
            return (replacement(output[0], real), *output[1:])
        return replacement(output, real)

    handle = decoder_layers(model)[point.layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
