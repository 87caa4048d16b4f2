"""Labelled rollouts for a command: read from a file, or sampled on questions and labelled by a verifier."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechreward import pocket, verifiers
from mechreward.errors import ConfigError, DataError, nearest
from mechreward.features.discover import digest
from mechreward.rollout.labelled import Labelled, holds_rollouts, read_rollouts, sample_rollouts, write_rollouts
from mechreward.rollout.sampling import as_training
from mechreward.train.config import QuestionSource, validated
from mechreward.train.data import load
from mechreward.unfinished import Unfinished


@dataclass(frozen=True)
class Sampling:
    """How rollouts are sampled and labelled.

    Attributes:
        verifier: Name of a verifier in :mod:`mechreward.verifiers`.
        split: Split of the dataset. Default: ``train``, or pocket's own for discovery or the gate.
        subset: The configuration of the hub dataset.
        prompt: What the model reads, with the dataset's columns in braces.
        answer: The column with the gold answer.
        questions: Maximum number of questions.
        rollouts: Rollouts per question.
        max_new_tokens: Maximum number of tokens of a completion.
        batch_size: Rollouts sampled at once.
        seed: Random seed of the sampling.
        keep: Write the labelled rollouts to this .jsonl.
    """

    verifier: str
    split: str | None
    subset: str | None
    prompt: str
    answer: str
    questions: int
    rollouts: int
    max_new_tokens: int
    batch_size: int
    seed: int
    keep: Path | None = None

    def check(self) -> None:
        """Check the options before anything is loaded.

        Raises:
            ConfigError: There is no such verifier.
        """
        if self.verifier not in verifiers.__all__:
            raise ConfigError(f"There is no verifier '{self.verifier}'.{nearest(self.verifier, verifiers.__all__)}")

    def labelled(
        self,
        model: Any,
        tokenizer: Any,
        data: str,
        of_pocket: str,
        used: Collection[str] = (),
        unfinished: Unfinished | None = None,
    ) -> Labelled:
        """Read rollouts from a file; or sample them on questions that were not used before, and label them.

        Args:
            model: The model that writes the rollouts.
            tokenizer: Its tokenizer.
            data: A .jsonl of rollouts or of questions, ``mechreward/pocket``, or a dataset of the hub.
            of_pocket: The pocket split to use when no split is named.
            used: Digests of questions that must not be asked.
            unfinished: Saves the rollouts batch by batch, so that sampling can be resumed.

        Raises:
            DataError: The data cannot be read, all questions were used before, or all rollouts have the same label.
            ConfigError: An option has an impossible value.
        """
        if data.endswith(".jsonl") and holds_rollouts(Path(data)):
            return read_rollouts(data, model, tokenizer)
        self.check()
        found, split = self.asked(data, of_pocket, len(used))
        fresh = [i for i, asked in enumerate(found["prompt"]) if digest(asked) not in used][: self.questions]
        if len(fresh) < 2:
            raise DataError(
                f"Discovery has used the questions of {data} ({split}): gate on others, or another --split."
            )
        asked = found.select(fresh)
        labelled = sample_rollouts(
            model,
            tokenizer,
            asked,
            getattr(verifiers, self.verifier),
            self.rollouts,
            f"{len(asked) * self.rollouts} rollouts on {data} ({split}), seed {self.seed}, by {self.verifier}",
            self.seed,
            self.batch_size,
            unfinished,
            **as_training(self.max_new_tokens),
        )
        if self.keep is not None:
            write_rollouts(labelled, self.keep)
        return labelled

    def asked(self, data: str, of_pocket: str, more: int = 0) -> tuple[Any, str]:
        """Load the questions.

        Args:
            data: As for :meth:`labelled`, without rollouts.
            of_pocket: The pocket split to use when no split is named.
            more: Load so many more than ``questions``, to replace those that were used before.

        Returns:
            A dataset with the columns ``prompt`` and ``answer``, and the split.

        Raises:
            ConfigError: They cannot be loaded, or lack a column.
        """
        ours = pocket.resolve(data) == pocket.path()
        fields = {
            "path": data,
            "subset": self.subset,
            "split": self.split or (of_pocket if ours else "train"),
            "rows": self.questions + more,
            "prompt": self.prompt,
            "answer": self.answer,
        }
        source = validated(QuestionSource, fields, "--data: ", "source")
        return load([source]), source.split
