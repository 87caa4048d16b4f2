"""AdversarialSuite: detectors that look at every batch, with thresholds from clean rollouts.

A detector is worth what its false alarms are: each flags at most 1 % of clean rollouts, and all together about 2 %, by
a threshold that lies at a quantile of rollouts that taught it nothing (split conformal prediction; Vovk et al. 2005).
Clean are rollouts of the untrained model. ``docs/goodhart.md`` has what each detects, and misses.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from scipy.stats import beta
from torch import Tensor

from mechreward.errors import ConfigError, DetectorWarning, RewardError, nearest
from mechreward.hacking.drift import Firing, Outlier, Reconstruction
from mechreward.hacking.signs import (
    CueStuffing,
    Detector,
    EmptySteps,
    Filler,
    Inflation,
    Length,
    PromptCopy,
    Repetition,
    Rewarded,
    Template,
)
from mechreward.readout import Readings, Request
from mechreward.reward.guards import Verdict
from mechreward.rollout.batch import RolloutBatch
from mechreward.sae.handle import SAEHandle

logger = logging.getLogger(__name__)

EACH = 0.01
"""Share of clean rollouts that one detector may flag."""

ALL = 0.03
"""Share that all may flag between them, with 95 % confidence."""

PRESETS = ("standard", "strict", "text_only")


class AdversarialSuite:
    """A guard made of detectors: flags rollouts that look like gaming, and lowers what they earn, or drops them.

    It first learns what is usual: from :meth:`calibrate`, or else from the first ``clean`` rollouts of training,
    in which it flags nothing. Half of them teach the detectors; the other half set the thresholds.

    Args:
        detectors: Which signs to look for.
        action: ``"downweight"`` leaves ``trust`` of a positive feature reward; ``"drop"`` removes flagged rollouts from
            training.
        trust: What is left of it, 0..1.
        clean: Rollouts to learn from at the beginning of a training, per process.
        text_only: Read no activations, not even to see what a rollout is paid.

    Raises:
        ConfigError: An option makes no sense.
    """

    def __init__(
        self,
        detectors: Sequence[Detector],
        action: Literal["downweight", "drop"] = "downweight",
        trust: float = 0.0,
        clean: int = 2000,
        text_only: bool = False,
    ):
        if action not in ("downweight", "drop"):
            hint = nearest(action, ["downweight", "drop"])
            raise ConfigError(f"The suite has no action '{action}': use 'downweight' or 'drop'.{hint}")
        if not 0 <= trust <= 1:
            raise ConfigError(f"trust must lie in 0 to 1, not {trust}.")
        if clean < 2 / EACH:
            raise ConfigError(
                f"clean={clean} is too few: a threshold that {EACH:.0%} exceed needs {1 / EACH:.0f} rollouts, and as "
                f"many teach the detectors; give at least {2 / EACH:.0f}."
            )
        names = [detector.name for detector in detectors]
        if len(set(names)) < len(names) or not names:
            raise ConfigError(f"A suite needs detectors of different names, not {names}.")
        self.detectors, self.action, self.trust, self.clean = list(detectors), action, trust, clean
        self.text_only = text_only
        self.thresholds: dict[str, float] = {}
        self.disabled: dict[str, str] = {}
        self.seen = 0
        self._kept = 0  # of those seen, the rollouts whose scores set the thresholds
        self._clean_scores: list[dict[str, list[float]]] = []
        self.attach([])

    @classmethod
    def from_preset(cls, name: str = "standard", sae: SAEHandle | None = None, clean: int = 2000) -> AdversarialSuite:
        """Return a suite by name.

        Args:
            name: ``"standard"``: all detectors, flagged rollouts lose their positive feature reward. ``"strict"``: the
                same, and flagged rollouts are dropped from training. ``"text_only"``: the detectors that need no
                activations, for engines that give none.
            sae: A whole SAE of the model, for the reconstruction error and L0; left out without one.
            clean: Rollouts to learn from at the beginning of a training, per process.

        Raises:
            ConfigError: There is no such preset, or it cannot use an SAE.
        """
        if name not in PRESETS:
            raise ConfigError(f"There is no preset '{name}': use {', '.join(PRESETS)}.{nearest(name, PRESETS)}")
        text: list[Detector] = [Repetition(), Template(), EmptySteps(), PromptCopy()]
        if name == "text_only":
            if sae is not None:
                raise ConfigError("The preset 'text_only' reads no activations: leave sae out, or use 'standard'.")
            return cls([*text, Filler(), Length()], clean=clean, text_only=True)
        activations: list[Detector] = [CueStuffing(), Outlier(), Firing(), Inflation()]
        activations += [] if sae is None else [Reconstruction(sae)]
        action = "drop" if name == "strict" else "downweight"
        return cls([*text, Filler(), Length(), *activations], action=action, clean=clean)

    def attach(self, rewards: Sequence[Any]) -> None:
        """Set which rewards are guarded; trainers and composites do so themselves."""
        rewarded = Rewarded(() if self.text_only else rewards)
        for detector in self.detectors:
            detector.attach(rewarded)
        late = [detector.name for detector in self._active if self.thresholds and detector.name not in self.thresholds]
        if late:
            warnings.warn(
                f"{', '.join(late)} cannot flag anything: the suite had learned what is usual before it knew what it "
                "guards. Call attach(rewards) before calibrate().",
                DetectorWarning,
                stacklevel=2,
            )

    @property
    def names(self) -> list[str]:
        """The names with which flags may begin."""
        return [detector.name for detector in self.detectors if detector.missing is None]

    @property
    def _active(self) -> list[Detector]:
        return [d for d in self.detectors if d.missing is None and d.name not in self.disabled]

    @property
    def requests(self) -> list[Request]:
        """The readouts that the detectors need."""
        return list(dict.fromkeys(request for detector in self._active for request in detector.requests))

    # -- what is usual -------------------------------------------------------------------------------------------------

    def calibrate(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> None:
        """Learn from clean rollouts, as the untrained model writes them on the task's questions.

        Args:
            batch: At least 2 / :data:`EACH` of them, groups contiguous: half teach, half set the thresholds. They are
                no step of a training, whatever ``training`` says.
            readings: For each of :attr:`requests`.

        Raises:
            ConfigError: They are too few.
        """
        if len(batch) < 2 / EACH:
            raise ConfigError(f"{len(batch)} clean rollouts are too few for thresholds: give at least {2 / EACH:.0f}.")
        for detector in self.detectors:
            detector.forget()
        self.thresholds, self._clean_scores, self._kept = {}, [], 0
        half = len(batch) // 2 // batch.num_generations * batch.num_generations
        for start, stop, take_in in ((0, half, self._learn), (half, len(batch), self._keep_scores)):
            part = replace(batch.take(range(start, stop)), num_generations=batch.num_generations, training=False)
            width = part.mask().shape[1]
            take_in(
                part,
                {r: Readings(x.values[start:stop, :width], x.mask[start:stop, :width]) for r, x in readings.items()},
            )
        self.seen = len(batch)
        self._set_thresholds()

    def _learn(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> None:
        for detector in self._active:
            self._try(detector, lambda d: d.learn(batch, readings))

    def _keep_scores(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> None:
        self._kept += len(batch)
        self._clean_scores.append({name: s.tolist() for name, s in self.scores(batch, readings).items()})

    def _take_in(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> None:
        """Learn from another batch of a training's first rollouts."""
        if self.seen == 0 and batch.progress > 0:
            logger.warning(
                "The adversarial suite begins to learn what is usual when %.0f %% of training are done, from a policy "
                "that is not the untrained model's: calibrate() it, or resume with MechRewardGRPOTrainer.",
                100 * batch.progress,
            )
        (self._learn if self.seen < self.clean // 2 else self._keep_scores)(batch, readings)
        self.seen += len(batch)
        if self.seen >= self.clean and self._kept >= 1 / EACH:  # with fewer, more than EACH lie above the largest
            self._set_thresholds()

    def _set_thresholds(self) -> None:
        """Set thresholds at the k-th largest of n clean scores.

        A further clean rollout exceeds one with P <= k / (n + 1). k is the largest up to :data:`EACH` (n + 1) at which
        all together flag at most :data:`ALL` with 95 % confidence (Clopper and Pearson's one-sided limit). The fewer
        the clean rollouts, the higher the thresholds. Rollouts that the others' thresholds would flag are counted: none
        lies above a largest score that is its own.
        """
        names = [d.name for d in self._active if all(d.name in scores for scores in self._clean_scores)]
        if not names:  # all are disabled
            self._clean_scores = []
            return
        clean = torch.tensor([[x for scores in self._clean_scores for x in scores[name]] for name in names])  # [D, n]
        ordered = clean.masked_fill(clean.isnan(), -torch.inf).sort(dim=1, descending=True).values
        n = clean.shape[1]
        k = max(1, math.floor(EACH * (n + 1)))
        while (most := _at_most(_flagged_by_others(clean, ordered, k), n)) > ALL and k > 1:
            k -= 1
        if most > ALL:
            logger.warning(
                "%d clean rollouts are too few for %d detectors: together they may flag up to %.0f %% of clean ones. "
                "Give more.",
                self.seen,
                len(names),
                100 * most,
            )
        limits = ordered[:, k - 1]
        self.thresholds = dict(zip(names, limits.tolist(), strict=True))
        self._clean_scores = []
        away = {d.name: d.missing for d in self.detectors if d.missing} | self.disabled
        logger.info(
            "The adversarial suite has learned from %d rollouts: %s.%s",
            self.seen,
            ", ".join(f"{name} flags above {limit:.3g}" for name, limit in self.thresholds.items()),
            "".join(f" {name} is off: {why}." for name, why in away.items()),
        )

    # -- looking at a batch --------------------------------------------------------------------------------------------

    def scores(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> dict[str, Tensor]:
        """Return each detector's score of each rollout, ``[B]``: higher is more suspicious; NaN where it has none."""
        found = {d.name: self._try(d, lambda d: _one_each(d.scores(batch, readings), batch)) for d in self._active}
        return {name: scores for name, scores in found.items() if scores is not None}

    def _try(self, detector: Detector, act: Any) -> Any:
        """Run a detector; one that raises is disabled from then on, for it must not end a training."""
        try:
            return act(detector)
        except Exception as error:
            self.disabled[detector.name] = f"{type(error).__name__}: {error}"
            self.thresholds.pop(detector.name, None)
            warnings.warn(
                f"The detector '{detector.name}' is disabled, since it raised {type(error).__name__}: {error}.",
                DetectorWarning,
                stacklevel=2,
            )
            return None

    def __call__(self, batch: RolloutBatch, readings: Mapping[Request, Readings]) -> Verdict:
        """Flag what lies above the thresholds."""
        flags: list[list[str]] = [[] for _ in range(len(batch))]
        if not self.thresholds:
            if batch.training and self._active:
                self._take_in(batch, readings)
        else:
            by_name = {detector.name: detector for detector in self.detectors}
            for name, scores in self.scores(batch, readings).items():
                limit = self.thresholds.get(name, math.inf)
                for row, score in enumerate(scores.tolist()):
                    if score > limit and name not in self.disabled:
                        said = self._try(by_name[name], lambda d, score=score, limit=limit: d.reason(score, limit))
                        flags[row] += [] if said is None else [f"{name}: {said}"]
        flagged = torch.tensor([bool(said) for said in flags], dtype=torch.bool)
        return Verdict(torch.where(flagged, self.trust, 1.0), flagged & (self.action == "drop"), flags)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned, and the thresholds (JSON)."""
        return {
            "seen": self.seen,
            "kept": self._kept,
            "clean": self.clean,
            "thresholds": self.thresholds,
            "disabled": self.disabled,
            "clean_scores": self._clean_scores,
            "detectors": {detector.name: detector.state_dict() for detector in self.detectors},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.clean, self.thresholds = state["seen"], state["clean"], dict(state["thresholds"])
        self.disabled, self._clean_scores = dict(state["disabled"]), list(state["clean_scores"])
        self._kept = state.get("kept", 0)
        for detector in self.detectors:
            if detector.name in state["detectors"]:
                detector.load_state_dict(state["detectors"][detector.name])


def _at_most(hits: int, n: int) -> float:
    """Return the upper limit of a share of which hits of n were seen, with 95 % confidence (Clopper and Pearson)."""
    return 1.0 if hits == n else float(beta.ppf(0.95, hits + 1, n - hits))


def _flagged_by_others(clean: Tensor, ordered: Tensor, k: int) -> int:
    """Return how many of n rollouts any detector would flag above the k-th largest score of the other n - 1.

    For one of the k largest that is the (k + 1)-th largest of all; none of the rest lies above it.
    """
    return int((clean > ordered[:, k, None]).any(dim=0).sum())


def _one_each(scores: Tensor, batch: RolloutBatch) -> Tensor:
    if scores.shape != (len(batch),):
        raise RewardError(f"it gave scores of shape {list(scores.shape)} for {len(batch)} rollouts")
    return scores.float().cpu()
