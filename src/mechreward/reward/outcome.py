"""OutcomeReward: is the answer right? The gold comes from the dataset's columns, never from the prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mechreward.errors import RewardError, nearest
from mechreward.readout import Readings, Request
from mechreward.reward.base import VERIFIER_SECONDS, Reward, Scores
from mechreward.rollout.batch import RolloutBatch

GOLD_COLUMNS = ("solution", "answer", "gold", "target", "ground_truth", "label")

Verifier = Callable[..., Sequence[bool | float | None]]
"""(completions, golds) -> a verdict for each; None where the gold says nothing."""


class OutcomeReward(Reward):
    """1 for a right answer, 0 for a wrong one, None where the gold cannot be used.

    Args:
        verifier: E.g. ``mr.verifiers.math_boxed``.
        gold_column: The dataset's column with the right answers; by default the first of ``solution``, ``answer``,
            ``gold``, ``target``, ``ground_truth``, ``label`` that there is.
        name: What it is called in logs; the verifier's name by default.
        **options: Passed to the verifier, e.g. ``strict=True``.
    """

    def __init__(self, verifier: Verifier, gold_column: str | None = None, name: str | None = None, **options: Any):
        super().__init__(name or getattr(verifier, "__name__", "outcome"))
        self.verifier, self.gold_column, self.options = verifier, gold_column, options
        self._last: tuple[Any, Sequence[Any]] | None = None

    def score(self, batch: RolloutBatch, readings: Mapping[Request, Readings], sense: float = 1.0) -> Scores:
        """Verify every completion.

        Raises:
            RewardError: The dataset has no gold column.
        """
        column = batch.columns[self._gold(batch)]
        golds = [str(gold) if gold is not None else "" for gold in column]
        began = time.perf_counter()
        verdicts = self._verified(batch.texts, golds)
        spent = time.perf_counter() - began
        if len(verdicts) != len(batch):
            raise RewardError(f"'{self.__name__}' gave {len(verdicts)} verdicts for {len(batch)} completions.")
        values = [
            torch.nan if verdict is None or gold is None else float(verdict)
            for verdict, gold in zip(verdicts, column, strict=True)
        ]
        return Scores(torch.tensor(values, dtype=torch.float32), metrics={VERIFIER_SECONDS: spent})

    def _verified(self, texts: list[str], golds: list[str]) -> Sequence[Any]:
        """The verdicts; of the same rollouts once only, since guards and monitors ask, too."""
        if self._last is None or self._last[0] != (texts, golds):
            self._last = (texts, golds), self.verifier(texts, golds, **self.options)
        return self._last[1]

    def _gold(self, batch: RolloutBatch) -> str:
        wanted = GOLD_COLUMNS if self.gold_column is None else (self.gold_column,)
        for column in wanted:
            if column in batch.columns:
                return column
        there = ", ".join(batch.columns) or "none"
        hint = nearest(wanted[0], batch.columns)
        raise RewardError(
            f"'{self.__name__}' finds no gold answers: it looked for the dataset columns {', '.join(wanted)}, and "
            f"there are: {there}. Name the right one with OutcomeReward(gold_column=...).{hint}"
        )
