"""Load questions from pocket's generator, a local JSONL file, or the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechreward import pocket
from mechreward.errors import ConfigError, nearest
from mechreward.extras import require
from mechreward.schema import shown
from mechreward.train.config import QuestionSource
from mechreward.verifiers.golds import gold

if TYPE_CHECKING:
    from datasets import Dataset


def load(sources: list[QuestionSource]) -> Dataset:
    """Load the sources' questions, one source after the other.

    Returns:
        Columns ``prompt`` and ``answer``; for pocket also ``solution``, whose steps can be checked.

    Raises:
        ConfigError: A source cannot be loaded, is empty, lacks a column that its prompt names, or an answer.
        RewardError: An answer is a mapping.
    """
    datasets = require("datasets", "trl")
    return datasets.concatenate_datasets([_load(source) for source in sources])


def _load(source: QuestionSource) -> Dataset:
    rows = _pocket(source) if source.path == pocket.MODEL_ID else _from_datasets(source)
    where = f"{source.path} ({source.split})"
    for column in source.columns:
        if column not in rows.column_names:
            there, meant = ", ".join(rows.column_names), nearest(column, rows.column_names)
            raise ConfigError(f"{where} has no column '{column}', which is asked for; it has {there}.{meant}")
    if source.rows is not None:
        rows = rows.select(range(min(source.rows, len(rows))))
    if len(rows) == 0:
        raise ConfigError(f"{where} has no rows: check its split.")

    def question(row: Any) -> dict[str, Any]:
        # Lists stay: they are golds of verifiers that run code, and other verifiers refuse them.
        answer = gold(row[source.answer], source.answer, structured=isinstance(row[source.answer], list))
        if answer is None:
            raise ConfigError(f"{where} has a row without an answer in '{source.answer}': {shown(row)}.")
        if empty := [column for column in source.columns if row[column] is None]:  # would be asked as "None"
            raise ConfigError(f"{where} has a row without '{empty[0]}', which its prompt names: {shown(row)}.")
        kept = {"prompt": source.prompt.format(**row), "answer": answer}
        return kept | ({"solution": row["solution"]} if source.path == pocket.MODEL_ID else {})

    return require("datasets", "trl").Dataset.from_list([question(row) for row in rows])  # `map` would keep old types


def _pocket(source: QuestionSource) -> Dataset:
    if source.rows is None:
        raise ConfigError(f"{source.path} makes questions without end: say how many with `rows`.")
    return pocket.dataset(source.split, source.rows)  # pyright: ignore[reportArgumentType] (it checks the split)


def _from_datasets(source: QuestionSource) -> Dataset:
    datasets = require("datasets", "trl")
    local = source.path.endswith((".jsonl", ".json"))
    if local and not Path(source.path).is_file():
        raise ConfigError(f"There is no file {source.path}: paths are relative to the folder you start from.")
    try:
        if local:
            return datasets.load_dataset("json", data_files={"train": source.path}, split=source.split)
        return datasets.load_dataset(source.path, source.subset, split=source.split)
    except Exception as error:  # `datasets` has no base class for its errors: network, names, formats
        message = " ".join(str(error).split())
        raise ConfigError(
            f"{source.path} ({source.split}) cannot be loaded ({type(error).__name__}: {message[:200]}): check its "
            "path, subset and split, and the network, or download it and give a local .jsonl file (whose split is "
            "train)."
        ) from error
