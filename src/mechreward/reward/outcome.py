"""OutcomeReward: is the answer right? The gold comes from the dataset's columns, never from the prompt."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import torch

from mechreward.errors import RewardError, nearest
from mechreward.readout import Readings, Request
from mechreward.reward.base import VERIFIER_SECONDS, Reward
from mechreward.rollout.batch import RolloutBatch, Scores
from mechreward.verifiers.golds import GOLD_COLUMNS, Verifier, gold_columns, golds, verdicts

logger = logging.getLogger(__name__)


class OutcomeReward(Reward):
    """1 for a right answer, 0 for a wrong one, None where the gold cannot be used.

    Args:
        verifier: E.g. ``mr.verifiers.math_boxed``.
        gold_column: The dataset's column with the right answers; by default the first of ``answer``, ``gold``,
            ``target``, ``ground_truth``, ``solution``, ``label`` that there is. Where there are several, the choice is
            logged once. How cells are read: see ``mechreward.verifiers.golds``.
        name: What it is called in logs; the verifier's name by default.
        **options: Passed to the verifier, e.g. ``strict=True``.
    """

    def __init__(self, verifier: Verifier, gold_column: str | None = None, name: str | None = None, **options: Any):
        super().__init__(name or getattr(verifier, "__name__", "outcome"))
        self.verifier, self.gold_column, self.options = verifier, gold_column, options
        self._last: tuple[Any, list[Any]] | None = None
        self._said = False

    def score(self, batch: RolloutBatch, readings: Mapping[Request, Readings], sense: float = 1.0) -> Scores:
        """Verify every completion.

        Raises:
            RewardError: The dataset has no gold column, or a cell of it is a mapping or a list of several values.
        """
        column = self._gold(batch)
        began = time.perf_counter()
        said = self._verified(batch.texts, golds(self.verifier, batch.columns[column], column))
        spent = time.perf_counter() - began
        values = [torch.nan if verdict is None else float(verdict) for verdict in said]
        return Scores(torch.tensor(values, dtype=torch.float32), metrics={VERIFIER_SECONDS: spent})

    def _verified(self, texts: list[str], golds: list[Any]) -> list[Any]:
        """The verdicts; of the same rollouts once only, since guards and monitors ask, too."""
        if self._last is None or self._last[0] != (texts, golds):
            said = verdicts(self.verifier, texts, golds, self.__name__, **self.options)
            self._last = (texts, golds), said
        return self._last[1]

    def _gold(self, batch: RolloutBatch) -> str:
        found = gold_columns(batch.columns, self.gold_column)
        if len(found) > 1 and not self._said:
            self._said = True
            logger.warning(
                "'%s' takes the column '%s' for the gold answers, not %s: name another with gold_column=....",
                self.__name__,
                found[0],
                ", ".join(f"'{name}'" for name in found[1:]),
            )
        if found:
            return found[0]
        wanted = GOLD_COLUMNS if self.gold_column is None else (self.gold_column,)
        there = ", ".join(batch.columns) or "none"
        hint = next(filter(None, (nearest(name, batch.columns) for name in wanted)), "")
        raise RewardError(
            f"'{self.__name__}' finds no gold answers: it looked for the dataset columns {', '.join(wanted)}, and "
            f"there are: {there}. Name the right one with OutcomeReward(gold_column=...).{hint}"
        )
