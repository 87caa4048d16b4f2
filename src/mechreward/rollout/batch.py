"""RolloutBatch: everything that a reward may look at besides readings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from mechreward.errors import RewardError

Message = Mapping[str, Any]
Text = str | Sequence[Message]  # plain, or a conversation


def plain_text(text: Text) -> str:
    """Return all the text of a prompt or corpus passage, whoever wrote it, from either of TRL's formats."""
    if isinstance(text, str):
        return text
    return "\n".join(_content(message) for message in text)


def own_text(completion: Text) -> str:
    """Return what the model itself wrote of a completion: plain text, or the assistant's messages.

    What a tool, a user or an environment wrote into a completion is context, never the model's answer.
    """
    if isinstance(completion, str):
        return completion
    return "\n".join(_content(message) for message in completion if _is_own(message))


def holds_others_turns(completion: Text) -> bool:
    """Return whether a tool, a user or an environment wrote some of a completion's messages."""
    return not isinstance(completion, str) and not all(map(_is_own, completion))


def _is_own(message: Message) -> bool:
    return message.get("role", "assistant") == "assistant"


def _content(message: Message) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    # Typed blocks: images carry no text, and `datasets` writes the text that a block lacks as None.
    return "".join(block.get("text") or "" for block in content)


def _end(ids: Sequence[int], ends: frozenset[int]) -> int:
    """How many tokens there are up to and including the first end token."""
    ids = list(ids)
    return min([ids.index(end) + 1 for end in ends if end in ids], default=len(ids))


@dataclass(frozen=True)
class Call:
    """What a trainer calls a reward with: B prompts and completions, their token ids if it passes them, and columns."""

    prompts: Sequence[Text]
    completions: Sequence[Text]
    completion_ids: Sequence[Sequence[int]] | None = None
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class RolloutBatch:
    """Rollouts of one generation step, as one process sees them: B rows, groups contiguous.

    Attributes:
        prompts: B prompts, plain or conversational.
        completions: B completions, likewise. Plain ones hold the model's own text alone; in conversations, the
            assistant's messages are the model's.
        prompt_ids: B lists of token ids, exactly as the model reads them, without padding.
        completion_ids: B lists of sampled token ids, without padding.
        columns: The dataset's other columns, B values each.
        num_generations: Rollouts per prompt (group size).
        eos_token_ids: Tokens that end a completion.
        tool_mask: For multi-turn rollouts, B lists with a flag per token of ``completion_ids``: 1 where the model wrote
            the token, 0 where a tool, a user or an environment did.
        training: False in evaluation, which must not move running statistics.
        progress: Share of the training steps that are done, 0 to 1.
        gather: Brings the rows of all processes together, ``[B, ...] -> [B x processes, ...]``: groups may span
            processes, and TRL gathers only after the reward functions.
        process_index: Which of the gathered blocks of B rows is ours.
        trust: ``[B]`` in 0..1, what the guards leave of a feature reward.
        dropped: ``[B]`` bool, rollouts that a guard removes from training.
        flags: What the guards said of each rollout.
    """

    prompts: Sequence[Text]
    completions: Sequence[Text]
    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    num_generations: int = 1
    eos_token_ids: frozenset[int] = frozenset()
    tool_mask: Sequence[Sequence[int]] | None = None
    training: bool = True
    progress: float = 0.0
    gather: Callable[[Tensor], Tensor] = lambda rows: rows
    process_index: int = 0
    trust: Tensor | None = None
    dropped: Tensor | None = None
    flags: Sequence[Sequence[str]] | None = None

    def __post_init__(self):
        counts = {
            "prompts": len(self.prompts),
            "completions": len(self.completions),
            "prompt_ids": len(self.prompt_ids),
            "completion_ids": len(self.completion_ids),
            **({} if self.tool_mask is None else {"masks": len(self.tool_mask)}),
            **{f"column '{name}'": len(values) for name, values in self.columns.items()},
        }
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise RewardError(f"A rollout batch needs one row each of everything, but has {listed}.")
        for row, (written, ids) in enumerate(zip(self.tool_mask or [], self.completion_ids, strict=False)):
            if len(written) != len(ids):
                raise RewardError(
                    f"Rollout {row} has {len(ids)} completion tokens and a mask of {len(written)}: give one flag per "
                    "token, 1 where the model wrote it."
                )

    def __len__(self) -> int:
        return len(self.completions)

    @cached_property
    def texts(self) -> list[str]:
        """What the model itself wrote, B plain texts."""
        return [own_text(completion) for completion in self.completions]

    @cached_property
    def own(self) -> Tensor:
        """``[B, T]`` bool on the CPU, T the longest completion: the tokens that the model itself wrote.

        Of a single turn, those up to and including the first EOS; each of several turns ends with an EOS of its own.
        """
        width = max(map(len, self.completion_ids), default=0)
        if self.tool_mask is None:
            ends = [_end(ids, self.eos_token_ids) for ids in self.completion_ids]
            return torch.arange(width) < torch.tensor(ends, dtype=torch.long)[:, None]
        own = torch.zeros(len(self), width, dtype=torch.bool)
        for row, flags in enumerate(self.tool_mask):
            own[row, : len(flags)] = torch.tensor(flags, dtype=torch.bool)
        return own

    @cached_property
    def written(self) -> list[list[int]]:
        """The token ids that the model itself wrote, B lists."""
        if self.tool_mask is None:
            return [list(ids[:length]) for ids, length in zip(self.completion_ids, self.lengths, strict=True)]
        rows = zip(self.completion_ids, self.tool_mask, strict=True)
        return [[token for token, own in zip(ids, flags, strict=True) if own] for ids, flags in rows]

    @cached_property
    def lengths(self) -> list[int]:
        """How many tokens of each completion the model itself wrote."""
        return self.own.sum(dim=1).tolist()

    @property
    def longest(self) -> int:
        """Tokens of the longest rollout, prompt and completion together."""
        return max(len(p) + len(c) for p, c in zip(self.prompt_ids, self.completion_ids, strict=True))

    def take(self, rows: Sequence[int]) -> RolloutBatch:
        """Some of the rollouts, each a group of its own."""

        def of(column: Any) -> Any:
            return None if column is None else [column[row] for row in rows]

        return replace(
            self,
            prompts=of(self.prompts),
            completions=of(self.completions),
            prompt_ids=of(self.prompt_ids),
            completion_ids=of(self.completion_ids),
            columns={name: of(values) for name, values in self.columns.items()},
            tool_mask=of(self.tool_mask),
            trust=None if self.trust is None else self.trust[list(rows)],
            dropped=None if self.dropped is None else self.dropped[list(rows)],
            flags=of(self.flags),
            num_generations=1,
        )

    def mask(self, read_last: bool = False) -> Tensor:
        """``[B, T]`` bool, T the longest completion: the completion tokens that are to be read.

        The final sampled token is never fed back during generation, so the tap there cannot read it; it is left out
        on every tap, unless ``read_last``, so that a reward never depends on which tap served it.
        """
        if read_last:
            return self.own.clone()
        last = torch.tensor([len(ids) for ids in self.completion_ids], dtype=torch.long) - 1
        if self.tool_mask is None:
            last = self.own.sum(dim=1) - 1
        return self.own & (torch.arange(self.own.shape[1]) != last[:, None])

    def last_written(self) -> Tensor:
        """``[B, T]`` bool: the last token of each completion that the model itself wrote."""
        return self.own & (self.own.cumsum(dim=1) == self.own.sum(dim=1, keepdim=True))

    def decoded(self, tokenizer: Any) -> RolloutBatch:
        """Return this batch with completions decoded from the tokens that the model itself wrote.

        Each run of them is decoded by itself, so that no word spans what stood in between.
        """
        texts = []
        for ids, flags in zip(self.completion_ids, self.own.tolist(), strict=True):
            runs = groupby(zip(ids, flags, strict=False), key=lambda pair: pair[1])
            texts.append(
                "\n".join(tokenizer.decode([t for t, _ in run], skip_special_tokens=True) for own, run in runs if own)
            )
        return replace(self, completions=texts)

    def grouped(self, rows: Tensor) -> Tensor:
        """``[B, ...] -> [groups, num_generations, ...]`` over all processes.

        Raises:
            RewardError: The rows do not divide into groups.
        """
        everyone = self.gather(rows)
        if len(everyone) % self.num_generations:
            raise RewardError(
                f"{len(everyone)} rollouts do not divide into groups of num_generations={self.num_generations}: "
                "group statistics need whole groups."
            )
        return everyone.view(-1, self.num_generations, *rows.shape[1:])

    def local(self, grouped: Tensor) -> Tensor:
        """The inverse of :meth:`grouped`: this process's own B rows."""
        start = self.process_index * len(self)
        return grouped.reshape(-1, *grouped.shape[2:])[start : start + len(self)]

    def guarded(self, trust: Tensor, dropped: Tensor, flags: Sequence[Sequence[str]]) -> RolloutBatch:
        """This batch with a further guard's verdict, as its attributes say it: guards can only lower."""
        if self.trust is not None and self.dropped is not None and self.flags is not None:
            trust, dropped = torch.minimum(self.trust, trust), self.dropped | dropped
            flags = [list(dict.fromkeys([*old, *new])) for old, new in zip(self.flags, flags, strict=True)]
        return replace(self, trust=trust, dropped=dropped, flags=flags)


@dataclass(frozen=True, eq=False)
class Dense:
    """Per-token rewards, which become part of the advantages.

    Attributes:
        weight: lambda in A_t = A + lambda z(r_t).
        values: r_t, ``[B, T]`` float32.
        mask: ``[B, T]`` bool, the tokens that have one.
    """

    weight: float
    values: Tensor
    mask: Tensor


@dataclass(frozen=True, eq=False)
class Scores:
    """What a reward says of a batch.

    Attributes:
        values: ``[B]`` float32 on the CPU; NaN where a rollout cannot be scored.
        dense: Per-token parts.
        parts: Named values ``[B]`` for the logs: raw readings, components.
        metrics: Named numbers for the logs.
    """

    values: Tensor
    dense: Sequence[Dense] = ()
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
