"""Tasks of lm-eval with other examples, shorter answers, or questions from local files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from mechreward.errors import ConfigError
from mechreward.train.config import Count, NonEmpty, Positive
from mechreward.train.lm_eval import LmEvalTask

FORMATS = {".jsonl": "json", ".json": "json", ".arrow": "arrow", ".parquet": "parquet"}


class ChangedTask(LmEvalTask):
    """A task (or group) of lm-eval with changes to its own definition.

    Attributes:
        fewshot: Examples in the prompt. Default: the task's own number.
        max_new_tokens: For tasks that generate. Default: lm-eval's (256).
        data: Local files instead of the hub's dataset, by split: .jsonl, .json, .arrow or .parquet, ``{subset}``
            where a group's tasks differ (MMLU's subject).
    """

    fewshot: Count | None = None
    max_new_tokens: Positive | None = None
    data: dict[str, NonEmpty] = Field(default_factory=dict)

    @field_validator("data")
    @classmethod
    def _has_questions(cls, data: dict[str, str]) -> dict[str, str]:
        if data and not data.keys() & {"test", "validation"}:
            raise ValueError("names no file for test or validation: the questions are read from these")
        return data

    def changes(self, own: dict[str, Any]) -> dict[str, Any]:
        """Return what differs from lm-eval's definition: the source of the questions, and the tokens of an answer."""
        changed: dict[str, Any] = {}
        if self.fewshot is not None:
            changed["num_fewshot"] = self.fewshot
        if self.max_new_tokens is not None:
            if own.get("output_type") != "generate_until":
                raise ConfigError(f"lm-eval's task '{self.task}' generates nothing: leave max_new_tokens out.")
            changed["generation_kwargs"] = {**own.get("generation_kwargs", {}), "max_gen_toks": self.max_new_tokens}
        if not self.data:
            return changed
        files, formats = {}, set()
        for split, pattern in self.data.items():
            path = pattern.replace("{subset}", str(own.get("dataset_name")))
            found = [str(Path(file).resolve()) for file in matching(path)]
            if not found:
                raise ConfigError(f"There is no file {path}: lm_eval's `data` of '{self.task}' names it for {split}.")
            files[split] = found
            formats |= {FORMATS.get(Path(file).suffix, file) for file in found}
        if len(formats) > 1 or not formats <= set(FORMATS.values()):
            raise ConfigError(
                f"`data` of '{self.task}' should be .jsonl, .json, .arrow or .parquet files, all of one kind."
            )
        shots = own.get("num_fewshot", 0) if self.fewshot is None else self.fewshot
        fewshot_split = own.get("fewshot_split") or own.get("training_split") or own.get("validation_split")
        if shots and fewshot_split not in files:
            raise ConfigError(
                f"lm-eval's task '{self.task}' takes {shots} examples from its split '{fewshot_split}', for which "
                "`data` names no file: name one, or set fewshot: 0."
            )
        return {
            **changed,
            "training_split": own.get("training_split") if own.get("training_split") in files else None,
            "validation_split": "validation" if "validation" in files else None,
            "test_split": "test" if "test" in files else None,
            "fewshot_split": fewshot_split if shots else None,
            "dataset_path": formats.pop(),
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
        }


def matching(pattern: str) -> list[str]:
    """Return the files or folders that a pattern names, in order."""
    parts = Path(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), None)
    if fixed is None:
        return [pattern] if Path(pattern).exists() else []
    return sorted(str(path) for path in Path(*parts[:fixed]).glob(str(Path(*parts[fixed:]))))
