"""Sources of activations: what turns a call of a reward into rollouts, and reads a model on them.

:func:`read_forward` is the one way in which this library runs a Hugging Face model by itself: a forward pass that stops
after the deepest layer that is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mechreward import progress
from mechreward.aggregation import Aggregate, aggregation
from mechreward.errors import RewardError
from mechreward.readout import HookPoint, Readings, Readout, ReadoutBank, Request
from mechreward.rollout.batch import Call, RolloutBatch, Scores, Text, holds_others_turns, plain_text
from mechreward.rollout.capture import (
    ResidualTap,
    SequenceReader,
    check_fits,
    input_device,
    is_sharded,
    truncated_forward,
)
from mechreward.rollout.sampling import end_token, end_tokens

MAX_TOKENS = 4096
"""Padded tokens in one forward pass of our own: more would take more memory than the trainer's own passes."""


MAX_NUMBERS = 1 << 26
"""Readings held at once where every latent is read: 256 MiB."""


class Source(Protocol):
    """Whatever can turn a call from a trainer into a rollout batch, and produce readings for it."""

    def batch(self, call: Call) -> RolloutBatch:
        """The call with its token ids and groups."""
        ...

    def read(self, batch: RolloutBatch, requests: Sequence[Request]) -> Mapping[Request, Readings]:
        """Values ``[B, T, K]`` and their mask ``[B, T]``, for each request."""
        ...

    def accept(self, reward: object, batch: RolloutBatch, scores: Scores) -> None:
        """Take what a list of numbers cannot carry: dense parts, and the guards' verdicts in ``batch``."""
        ...


def read_forward(
    model: nn.Module,
    batch: RolloutBatch,
    bank: ReadoutBank,
    read_last: bool = False,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    max_tokens: int = MAX_TOKENS,
) -> dict[Readout, Readings]:
    """Read a batch's completions with forward passes of our own, truncated after the deepest hook.

    Rows are padded on the right, so that positions are right even for models that look them up in a table, and sorted
    by length, so that little is padded. The model is in eval mode meanwhile. A sharded model (FSDP, ZeRO-3) runs whole
    passes, and as many on each process: all processes must call this function together.

    Args:
        model: Any HF causal language model, wrapped or not.
        batch: B rollouts, T tokens in the longest completion.
        bank: What to read.
        read_last: Include the final sampled token.
        autocast: The precision context of the trainer's own passes.
        max_tokens: Padded tokens in one pass.

    Returns:
        For each readout, values ``[B, T, K']`` float32 and mask ``[B, T]``, on the model's device.

    Raises:
        CaptureError: The model's layout is not supported.
    """
    device = input_device(model)
    mask = batch.mask(read_last)
    values = torch.zeros(*mask.shape, len(bank), device=device)
    rows = [list(p) + list(c) for p, c in zip(batch.prompt_ids, batch.completion_ids, strict=True)]
    chunks = _chunks([i for i in range(len(rows)) if mask[i].any()], rows, max_tokens)
    tap = ResidualTap(model, bank.hook_points)
    progress.advance(len(rows) - sum(map(len, chunks)))
    try:
        # Agreed before the first pass: a sharded model's processes must do the same things in the same order.
        idle = _most(len(chunks), device) - len(chunks) if is_sharded(model) else 0
        for chunk in chunks:
            width = max(len(rows[i]) for i in chunk)
            ids = torch.zeros(len(chunk), width, dtype=torch.long)
            attention = torch.zeros_like(ids)
            positions = torch.zeros_like(ids, dtype=torch.bool)
            for k, i in enumerate(chunk):
                ids[k, : len(rows[i])] = torch.tensor(rows[i])
                attention[k, : len(rows[i])] = 1
                start, length = len(batch.prompt_ids[i]), len(batch.completion_ids[i])
                positions[k, start : start + length] = mask[i, :length]
            reader = SequenceReader(bank, positions)
            inputs = {"input_ids": ids.to(device), "attention_mask": attention.to(device), "use_cache": False}
            with autocast():
                truncated_forward(model, tap, reader, inputs)
            block = torch.zeros(len(chunk), *values.shape[1:], device=device)
            block[mask[chunk].to(device)] = reader.values().to(device)  # FSDP may keep the parameters elsewhere
            values[chunk] = block
            progress.advance(len(chunk))
        for _ in range(idle):
            token = torch.zeros(1, 1, dtype=torch.long, device=device)
            with autocast():
                truncated_forward(model, tap, _read_nothing, {"input_ids": token, "use_cache": False})
    finally:
        tap.close()
    return bank.split(values, mask.to(device))


def _chunks(chosen: Sequence[int], rows: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """The chosen rows, the longest first, in chunks of at most ``max_tokens`` padded tokens, and one row at least."""
    order, chunks = sorted(chosen, key=lambda i: len(rows[i])), []
    while order:
        count = max(1, max_tokens // len(rows[order[-1]]))
        chunks.append(order[-count:])
        order = order[:-count]
    return chunks


def _most(count: int, device: torch.device) -> int:
    """The largest of all processes' counts."""
    most = torch.tensor(count, device=device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return int(most)


def _read_nothing(point: HookPoint, hidden: Tensor) -> None:
    """For passes that only the other processes need."""


def group_requests(requests: Sequence[Request], apart: Collection[Readout] = ()) -> dict[tuple[str, bool], ReadoutBank]:
    """One bank for each (reads, read_last) that is asked for; ``apart`` as in :class:`ReadoutBank`."""
    groups: dict[tuple[str, bool], list[Readout]] = {}
    for request in requests:
        groups.setdefault((request.reads, request.read_last), []).append(request.readout)
    return {key: ReadoutBank(readouts, apart) for key, readouts in groups.items()}


class HFSource:
    """Activation source for rewards that are called without a trainer: a model and its tokenizer.

    Args:
        model: The model whose activations are read (``reads="policy"``).
        tokenizer: Its tokenizer, which encodes prompts, and completions that come without ids.
        reference: The model for ``reads="reference"``; without one, such rewards are refused.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, reference: nn.Module | None = None):
        self.models = {"policy": model, "reference": reference}
        self.tokenizer = tokenizer

    def batch(self, call: Call) -> RolloutBatch:
        """Tokenise what a reward was called with; a completion without ids is taken to have ended.

        Where neither the tokenizer nor the model knows a token to end with, it was cut off: as everywhere, its last
        token is then left out. Messages that the model did not write are read as context, and masked.

        Raises:
            RewardError: Token ids of such a conversation, which do not say whose they are.
        """
        several = any(map(holds_others_turns, call.completions))
        completion_ids, masks = call.completion_ids, None
        if several and completion_ids is not None:
            raise RewardError(
                "A completion holds messages that the model did not write, and completion_ids do not say which tokens "
                "are its own: leave completion_ids out, or use MechRewardGRPOTrainer, which knows the mask."
            )
        if completion_ids is None:
            encoded = [self._completion_ids(completion) for completion in call.completions]
            completion_ids, masks = [ids for ids, _ in encoded], [mask for _, mask in encoded]
        return RolloutBatch(
            prompts=call.prompts,
            completions=call.completions,
            prompt_ids=[self._prompt_ids(p) for p in call.prompts],
            completion_ids=completion_ids,
            columns=call.columns,
            num_generations=len(call.prompts) or 1,
            eos_token_ids=end_tokens(self.models["policy"], self.tokenizer),
            tool_mask=masks if several else None,
        )

    def _completion_ids(self, completion: Text) -> tuple[list[int], list[int]]:
        """A completion's token ids, and for each 1 where the model wrote it."""
        messages = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        ids, mask = [], []
        for number, message in enumerate(messages):
            text = plain_text([message]) + ("\n" if number < len(messages) - 1 else "")
            own = self.tokenizer(text, add_special_tokens=False).input_ids
            ids += own
            mask += [int(not holds_others_turns([message]))] * len(own)
        # What ends with a tool's or a user's message is under way: the model has written no end.
        ended = not messages or not holds_others_turns([messages[-1]])
        end = end_token(self.models["policy"], self.tokenizer) if ended else []
        return [*ids, *end], [*mask, *[1] * len(end)]

    def _prompt_ids(self, prompt: Text) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(prompt).input_ids
        return self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True).input_ids

    def read(self, batch: RolloutBatch, requests: Sequence[Request]) -> dict[Request, Readings]:
        """Readings for each request, by one truncated forward a model."""
        found: dict[Request, Readings] = {}
        for (reads, read_last), bank in group_requests(requests).items():
            model = self.models[reads]
            if model is None:
                raise RewardError('A reward with reads="reference" needs HFSource(model, tokenizer, reference=...).')
            check_fits(bank.readouts, model)
            by_readout = read_forward(model, batch, bank, read_last)
            found |= {Request(r, reads, read_last): readings for r, readings in by_readout.items()}  # pyright: ignore
        return found

    def accept(self, reward: object, batch: RolloutBatch, scores: Scores) -> None:
        """Dense rewards have nowhere to go without our trainer."""
        refuse_dense(scores)


class TextOnly:
    """For rewards that need no activations, called by hand."""

    def batch(self, call: Call) -> RolloutBatch:
        n = len(call.prompts)
        ids = call.completion_ids
        if ids is None or any(map(holds_others_turns, call.completions)):
            ids = [[]] * n  # which tokens of several turns the model wrote is unknown: guards that read tokens pass
        return RolloutBatch(call.prompts, call.completions, [[]] * n, ids, call.columns, num_generations=n or 1)

    def read(self, batch: RolloutBatch, requests: Sequence[Request]) -> dict[Request, Readings]:
        return {}

    def accept(self, reward: object, batch: RolloutBatch, scores: Scores) -> None:
        refuse_dense(scores)


def refuse_dense(scores: Scores) -> None:
    """A list of numbers cannot carry per-token rewards.

    Raises:
        RewardError: There are some.
    """
    if scores.dense:
        raise RewardError(
            'aggregation="per_token" needs dense advantages, which only MechRewardGRPOTrainer can give: use it in '
            "place of GRPOTrainer, or choose another aggregation."
        )


def read_in_pieces(
    model: nn.Module, batch: RolloutBatch, readouts: Sequence[Readout]
) -> Iterator[tuple[RolloutBatch, list[Readings]]]:
    """Read a batch a few rollouts at a time, so that all latents of whole dictionaries can be read.

    Args:
        model: Any HF causal language model.
        batch: Rollouts.
        readouts: What to read.

    Yields:
        The next rollouts, and their readings by each readout, values ``[b, T, K]``.
    """
    bank = ReadoutBank(readouts)
    step = max(1, MAX_NUMBERS // (batch.longest * len(bank)))
    for start in range(0, len(batch), step):
        piece = batch.take(range(start, min(start + step, len(batch))))
        read = read_forward(model, piece, bank)
        yield piece, [read[readout] for readout in readouts]


def pooled(model: nn.Module, batch: RolloutBatch, readouts: Sequence[Readout], how: str = "mean") -> Iterator[Tensor]:
    """Readings aggregated over each rollout's tokens, a few rollouts at a time.

    Yields:
        ``[b, K]`` float32 on the CPU, K the columns of all readouts, in their order; NaN where no token is read.
    """
    aggregate = aggregation(how)
    for _, readings in read_in_pieces(model, batch, readouts):
        yield torch.cat([over_tokens(each, aggregate) for each in readings], dim=1)


def over_tokens(readings: Readings, aggregate: Aggregate) -> Tensor:
    """Each column over each rollout's tokens, ``[B, T, K] -> [B, K]`` on the CPU."""
    rows, _, columns = readings.values.shape
    each = readings.values.transpose(1, 2).reshape(rows * columns, -1)
    return aggregate(each, readings.mask.repeat_interleave(columns, dim=0)).view(rows, columns).cpu()
