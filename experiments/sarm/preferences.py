"""Preference pairs: of two answers to one prompt, the one that is preferred, from a local file or the hub.

A line of a JSONL file (``.jsonl`` or ``.jsonl.gz``) is one pair, in one of three forms::

    {"prompt": "1+1=", "chosen": " 2", "rejected": " 3"}
    {"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [...]}
    {"chosen": "\\n\\nHuman: Hi!\\n\\nAssistant: Hello.", "rejected": "\\n\\nHuman: Hi!\\n\\nAssistant: What?"}

The second is that of Skywork-Reward-Preference, the third that of hh-rlhf, whose dialogues become messages. Where there
is no ``prompt``, it is what the two have in common at their beginning. A ``prompt`` may be a conversation, too; then
each answer is a list of messages, or a text, which stands for one message of the assistant.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from mechreward.errors import DataError
from mechreward.extras import require
from mechreward.rollout.batch import Text
from mechreward.schema import shown


@dataclass(frozen=True)
class Preference:
    """A pair.

    Attributes:
        prompt: What both sides answer: a text, or a conversation.
        chosen, rejected: The answers, texts or messages like the prompt.
    """

    prompt: Text
    chosen: Text
    rejected: Text


def read_preferences(path: str | Path, split: str = "train", rows: int | None = None) -> list[Preference]:
    """Read pairs from a local file or the hub.

    Args:
        path: A ``.jsonl`` or ``.jsonl.gz`` file, or a dataset on the Hugging Face hub.
        split: Split of the hub's dataset.
        rows: Read only the first so many. Default: all.

    Raises:
        DataError: It cannot be read, holds no pairs, or a row is not a pair: the sentence names the row.
    """
    local = str(path).endswith((".jsonl", ".jsonl.gz"))
    source = _lines(Path(path)) if local else _hub(str(path), split)
    found = []
    for where, row in source:
        if rows is not None and len(found) == rows:
            break
        found.append(preference(row, where))
    if not found:
        raise DataError(f"{path} holds no pairs: give one JSON object a line, with 'chosen' and 'rejected'.")
    return found


def write_preferences(pairs: Iterable[Preference], file: Path) -> None:
    """Write pairs as :func:`read_preferences` reads them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    unfinished.write_text("".join(json.dumps(vars(pair)) + "\n" for pair in pairs), encoding="utf-8")
    unfinished.replace(file)  # a file that is there counts as finished


def preference(row: Any, where: str) -> Preference:
    """Read the pair in a row.

    Raises:
        DataError: The row is not a pair.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where} is {shown(row)}, not an object with 'chosen' and 'rejected'.")
    sides = [_side(row, name, where) for name in ("chosen", "rejected")]
    if row.get("prompt") is None:
        chosen, rejected = (_turns(side, where) for side in sides)
        pair = Preference(*_common_beginning(chosen, rejected, where))
    else:
        pair = Preference(*_with_prompt(row["prompt"], sides, where))
    if pair.chosen == pair.rejected:
        raise DataError(f"{where}: chosen and rejected are the same, {shown(pair.chosen)}: leave such a pair out.")
    return pair


def _side(row: dict[str, Any], name: str, where: str) -> str | list[dict[str, str]]:
    side = row.get(name)
    if (isinstance(side, str) and side.strip()) or _are_messages(side):
        return side  # pyright: ignore[reportReturnType]
    raise DataError(f"{where}: {name} is {shown(side)}, but it should be a text or a list of messages.")


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _with_prompt(prompt: Any, sides: Sequence[Any], where: str) -> tuple[Text, Text, Text]:
    """Bring both answers into the prompt's form."""
    if isinstance(prompt, str):
        if not all(isinstance(side, str) for side in sides):
            raise DataError(f"{where}: prompt is a text and an answer is messages: give both in one form.")
        return prompt, sides[0], sides[1]
    if not _are_messages(prompt):
        raise DataError(f"{where}: prompt is {shown(prompt)}, but it should be a text or a list of messages.")
    chosen, rejected = (
        [{"role": "assistant", "content": side}] if isinstance(side, str) else _messages(side) for side in sides
    )
    return _messages(prompt), chosen, rejected


def _messages(side: Any) -> list[dict[str, str]]:
    return [{"role": message["role"], "content": message["content"]} for message in side]


_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def _turns(side: str | list[dict[str, str]], where: str) -> list[dict[str, str]]:
    """Return a dialogue's messages; for hh-rlhf's text, its turns."""
    if not isinstance(side, str):
        return _messages(side)
    before, *parts = re.split(r"\n\n(Human|Assistant):", side)
    if before.strip() or not parts:
        raise DataError(
            f"{where}: a text without 'prompt' should be a dialogue of turns '\\n\\nHuman: ...' and "
            f"'\\n\\nAssistant: ...', but it begins with {shown(side[:40])}."
        )
    return [
        {"role": _SPEAKERS[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _common_beginning(chosen: list, rejected: list, where: str) -> tuple[list, list, list]:
    """Return (prompt, chosen, rejected): what two dialogues share, and the rest of each."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if same in (len(chosen), len(rejected)):
        raise DataError(f"{where}: one dialogue is the beginning of the other, or both are the same: leave it out.")
    if same == 0:
        raise DataError(f"{where}: chosen and rejected do not begin with the same message, so they share no prompt.")
    return chosen[:same], chosen[same:], rejected[same:]


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{file}, line {number}"
                if not line.strip():
                    continue
                try:
                    yield where, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{where}, is not JSON ({error}): write one object a line.") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({type(error).__name__}): give a JSONL file in UTF-8.") from None


def _hub(path: str, split: str) -> Iterator[tuple[str, Any]]:
    datasets = require("datasets", "trl")
    try:
        rows = datasets.load_dataset(path, split=split)
    except Exception as error:  # `datasets` has no base class for its errors: network, names, formats
        message = " ".join(str(error).split())
        raise DataError(
            f"{path} ({split}) cannot be loaded ({type(error).__name__}: {message[:200]}): check its name and split, "
            "and the network, or download it and give a local .jsonl or .jsonl.gz file."
        ) from error
    for number, row in enumerate(rows):
        yield f"{path} ({split}), row {number}", row
