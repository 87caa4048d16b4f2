"""A red team's campaign: the clean rollouts that everything is compared with, and each attack carried out on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mechreward import progress
from mechreward.errors import DataError
from mechreward.features.interventions import Cues, Rewards
from mechreward.features.interventions import cues as find_cues
from mechreward.hacking.dual_verifier import DualVerifier
from mechreward.hacking.redteam.options import Kind, Options
from mechreward.hacking.redteam.policy import Aware, attack_policy, typical_suspicion
from mechreward.hacking.redteam.report import Attack, Clean
from mechreward.hacking.redteam.search import curve, search_suffix, with_suffix
from mechreward.hacking.redteam.target import Judged, Target, questions_that_can_be_judged
from mechreward.hacking.redteam.templates import attacks
from mechreward.readout import Readings
from mechreward.reward.feature_reward import FeatureReward
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.labelled import Labelled
from mechreward.rollout.source import read_in_pieces
from mechreward.unfinished import Unfinished

SEARCHED = 8
"""Rollouts on which a suffix is searched."""

WIDTH = 24
"""Tokens that are tried for each replacement in a suffix."""


@dataclass(frozen=True)
class Campaign:
    """Clean rollouts of the untrained model, and the attacks that start from them.

    Attributes:
        target: What is attacked; its detectors are calibrated.
        options: How.
        questions: Thresholds were set on these; policies train on them, and a suffix is searched on their rollouts.
        calibration: Clean rollouts on these.
        held_out: The other questions: everything that is reported was measured on them.
        rollouts: Clean rollouts on these, groups contiguous.
        judged: What those earn.
        clean: The same in figures.
        cues: The tokens on which the reward reads highest, where it is a feature reward.
        unfinished: Keeps sampled rollouts and trained policies, so that a campaign can be interrupted.
    """

    target: Target
    options: Options
    questions: Any
    calibration: RolloutBatch
    held_out: Any
    rollouts: RolloutBatch
    judged: Judged
    clean: Clean
    cues: Cues | None
    unfinished: Unfinished = field(default_factory=Unfinished)

    @classmethod
    def prepare(
        cls,
        target: Target,
        questions: Any,
        options: Options,
        unfinished: Unfinished | None = None,
    ) -> Campaign:
        """Sample clean rollouts, set the detectors' thresholds on half of the questions, and judge the other half.

        Args:
            target: What is attacked.
            questions: A dataset with columns ``prompt`` and ``answer``.
            options, unfinished: See the class.

        Raises:
            DataError: Too few questions, or rewards that are all the same.
        """
        questions = questions_that_can_be_judged(questions, target.verifier)
        order = np.random.default_rng(options.seed).permutation(len(questions))
        # A question that occurs twice stays in one half.
        prompts = list(dict.fromkeys(questions[int(i)]["prompt"] for i in order))
        first = set(prompts[: len(prompts) // 2])
        known = questions.select([i for i in range(len(questions)) if questions[i]["prompt"] in first])
        held_out = questions.select([i for i in range(len(questions)) if questions[i]["prompt"] not in first])
        if min(len(known), len(held_out)) < 2:
            raise DataError(f"{len(questions)} questions are too few: thresholds are set on half of them. Give more.")
        each, seed = options.rollouts, options.seed
        calibration = target.sampled(known, each, seed, None, "calibration rollouts", unfinished)
        rollouts = target.sampled(held_out, each, seed + 1, None, "clean rollouts", unfinished)
        target.calibrated(calibration)
        judged = target.judged(rollouts)
        if np.isnan(judged.reward).all() or np.nanstd(judged.reward) == 0:
            raise DataError(
                f"All {len(judged)} clean rollouts earn the same reward, so there is no unit to measure a gain in: use "
                "other questions, or longer completions."
            )
        clean = Clean.of(judged, len(calibration))
        cues = cue_tokens(target, calibration)
        return cls(
            target, options, known, calibration, held_out, rollouts, judged, clean, cues,
            unfinished or Unfinished(),
        )  # fmt: skip

    def attacks(self, trainer: Callable[..., Any], cache_key: Mapping[str, Any] | None = None) -> list[Attack]:
        """Carry out all attacks that the options name, one after the other.

        After an interruption, rollouts that were sampled and policies that were trained are kept; the rest runs again.

        Args:
            trainer: For policies, :class:`mechreward.integrations.trl_grpo.MechRewardGRPOTrainer`.
            cache_key: What trained policies depend on besides the options.
        """
        chosen, found = self.options.attacks, []
        if "templates" in chosen:
            found += self.templates()
        if "best-of-n" in chosen:
            found.append(self.best_of_n())
        if "suffix" in chosen:
            found.append(self.suffix())
        key = {**(cache_key or {}), **self.options.settings()}
        for name, alpha in (("policy", None), ("aware", self.options.alpha)):
            for kind in self.options.kinds if name in chosen else ():
                stage = f"{kind} policies" if alpha is None else f"aware {kind} policies"
                kept = self.unfinished.steps(stage, key)
                if kept.done:
                    found.append(Attack.model_validate_json(kept.done[0]))
                else:
                    found.append(self.policy(trainer, kind, alpha))
                    kept.add(found[-1].model_dump_json())
        return found

    def some(self, count: int) -> list[int]:
        """Return rows of at most ``count`` clean held-out rollouts, spread over the questions."""
        order = np.random.default_rng(self.options.seed).permutation(len(self.rollouts))
        return sorted(order[:count].tolist())

    def templates(self) -> list[Attack]:
        """Attack some held-out rollouts by every family of templates in both styles."""
        rows, options, found = self.some(self.options.instances), self.options, []
        made = attacks(self.rollouts.take(rows), self.target.tokenizer, self.cues, options.seed, options.family)
        before = self.judged.take(rows)
        for name, batch in progress.track(made.items(), "Templates", len(made)):
            found.append(Attack.of(f"templates/{name}", before, self.target.judged(batch), self.clean))
        return found

    def best_of_n(self) -> Attack:
        """Choose the best of up to n rollouts by the reward, on some held-out questions."""
        n, seed = self.options.best_of, self.options.seed
        asked = self.held_out.select(range(min(self.options.best_of_questions, len(self.held_out))))
        batch = self.target.sampled(asked, n, seed + 1000, None, "best-of-n rollouts", self.unfinished)
        judged = self.target.judged(batch)
        proxy = judged.reward.reshape(-1, n)
        points = curve(proxy, judged.right.reshape(-1, n), judged.caught.reshape(-1, n), seed)
        best = n * np.arange(len(asked)) + np.nan_to_num(proxy, nan=-np.inf).argmax(axis=1)
        peak = max(points, key=lambda point: point.gold.value)
        notes = [
            f"{len(asked)} questions with {n} rollouts each; before is N = 1, after is N = {n}. Most are right at N = "
            f"{peak.n} ({peak.gold.value:.0%}, against {points[-1].gold.value:.0%} at N = {n})."
        ]
        return Attack.of("best-of-n", judged, judged.take(best), self.clean, curve=points, notes=notes)

    def suffix(self) -> Attack:
        """Search one suffix on calibration rollouts, on a line of its own, and measure it on held-out ones."""
        target, options, rng = self.target, self.options, np.random.default_rng(self.options.seed)
        few = self.calibration.take(sorted(rng.permutation(len(self.calibration))[:SEARCHED].tolist()))
        found = search_suffix(
            target.rewards,
            few,
            self._candidates(rng),
            options.suffix_length,
            options.suffix_steps,
            WIDTH,
            lead=target.tokenizer("\n", add_special_tokens=False).input_ids,
            seed=options.seed,
        )
        rows = self.some(options.instances)
        after = target.judged(with_suffix(self.rollouts.take(rows), found.ids, target.tokenizer))
        searched = {
            "text": target.tokenizer.decode(found.ids),
            "ids": found.ids,
            "searched_on": len(few),
            "reward_where_searched_before": found.before,
            "reward_where_searched_after": found.after,
            "queries": found.queries,
        }
        return Attack.of("suffix", self.judged.take(rows), after, self.clean, suffix=searched)

    def _candidates(self, rng: np.random.Generator) -> list[int]:
        """Return tokens that the model uses, the cues, and as many others of the vocabulary again; no special ones."""
        used = {token for ids in self.calibration.completion_ids for token in ids}
        used |= set(self.cues.tokens) if self.cues is not None else set()
        size = self.target.model.get_input_embeddings().weight.shape[0]
        others = rng.choice(size, min(size, len(used)), replace=False).tolist()
        special = set(self.target.tokenizer.all_special_ids)
        return sorted({int(token) for token in [*used, *others]} - special)

    def policy(self, trainer: Callable[..., Any], kind: Kind, alpha: float | None = None) -> Attack:
        """Train a policy on the reward alone; with ``alpha``, one that knows the detectors.

        Args:
            trainer: As for :meth:`attacks`.
            kind: ``lora`` or ``full``.
            alpha: What a detector's score costs, see :class:`mechreward.hacking.redteam.policy.Aware`.
        """
        target, options, objective = self.target, self.options, None
        stage, name = ("policy", f"policy/{kind}") if alpha is None else ("aware", f"aware/{kind}")
        file = options.out / f"{stage}-{kind}.jsonl"
        if alpha is not None:
            objective = Aware(target, self.clean, typical_suspicion(target, self.calibration), alpha)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about its own options
            policy, steps = attack_policy(
                trainer,
                target,
                kind,
                self.questions,
                options,
                self.clean,
                file,
                objective,
            )
        batch = target.sampled(self.held_out, options.rollouts, options.seed + 1, policy)
        after = target.judged(batch, policy)
        stopped = "because the objective no longer rose" if len(steps) < options.steps else "as many as were asked for"
        notes = [f"{len(steps)} steps, {stopped}. One of its rollouts: {batch.texts[0]!r}"]
        del policy
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return Attack.of(name, self.judged, after, self.clean, trajectory=str(file), notes=notes)


# -- cues --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PerToken(Rewards):
    """A feature reward's own r_t, whatever its pooling."""

    reward: FeatureReward

    def per_token(self, model: Any, batch: RolloutBatch) -> Iterator[tuple[RolloutBatch, Readings]]:
        for piece, (readings,) in read_in_pieces(model, batch, self.readouts):
            yield piece, Readings(self.reward.raw(readings)[..., None], readings.mask)


def cue_tokens(target: Target, batch: RolloutBatch) -> Cues | None:
    """Return the tokens on which the reward reads highest; None where it is not a feature reward."""
    reward = target.reward.feature_reward if isinstance(target.reward, DualVerifier) else target.reward
    if not isinstance(reward, FeatureReward):
        return None
    earned = np.nan_to_num(target.rewards(batch), nan=-np.inf)
    high = np.zeros(len(batch), dtype=bool)
    high[np.argsort(earned, kind="stable")[len(batch) // 2 :]] = True  # an attacker knows what is rewarded, not gold
    labelled = Labelled(batch, high, np.arange(len(batch)), "clean rollouts")
    return find_cues(target.model, labelled, _PerToken([reward.readout], [], "mean", reward))
