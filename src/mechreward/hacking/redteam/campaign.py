"""A red team's campaign: the clean rollouts that everything is compared with, and each attack carried out on them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mechreward.errors import DataError
from mechreward.features.interventions import Cues, Rewards
from mechreward.features.interventions import cues as find_cues
from mechreward.hacking.redteam.report import Attack, Clean
from mechreward.hacking.redteam.search import curve, search_suffix, with_suffix
from mechreward.hacking.redteam.target import Judged, Target, questions_that_can_be_judged
from mechreward.hacking.redteam.templates import attacks
from mechreward.readout import Readings
from mechreward.reward.feature_reward import FeatureReward
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.labelled import Labelled
from mechreward.rollout.source import read_in_pieces
from mechreward.unfinished import Steps, Tell, TellStage, Unfinished, silent

NAMES = ("templates", "best-of-n", "suffix", "policy", "aware")
"""The attacks, by what ``--attack`` calls them."""

SEARCHED = 8
"""Rollouts on which a suffix is searched."""


@dataclass(frozen=True)
class Ground:
    """Where attacks start: clean rollouts of the untrained model, and what is known of them.

    Attributes:
        target: What is attacked; its detectors are calibrated.
        questions: On which thresholds were set; policies train on them, and a suffix is searched on their rollouts.
        calibration: Clean rollouts on these.
        held_out: The other questions: everything that is reported was measured on them.
        rollouts: Clean rollouts on these, ``each`` a question, groups contiguous.
        judged: What those earn.
        clean: The same in figures.
        cues: The tokens on which the reward reads highest, where it is a feature reward.
        each: Rollouts a question.
        seed: Of everything random.
    """

    target: Target
    questions: Any
    calibration: RolloutBatch
    held_out: Any
    rollouts: RolloutBatch
    judged: Judged
    clean: Clean
    cues: Cues | None
    each: int
    seed: int

    def some(self, count: int) -> list[int]:
        """Rows of at most so many clean held-out rollouts, spread over the questions."""
        order = np.random.default_rng(self.seed).permutation(len(self.rollouts))
        return sorted(order[:count].tolist())


def prepare(
    target: Target,
    questions: Any,
    each: int,
    seed: int = 0,
    unfinished: Unfinished | None = None,
    tell: TellStage = silent,
) -> Ground:
    """Sample clean rollouts, set the detectors' thresholds on one half of the questions, and judge the other half.

    Args:
        target: What is attacked.
        questions: A dataset with columns ``prompt`` and ``answer``.
        each: Rollouts a question.
        seed: Of the halves and the sampling.
        unfinished: Keeps the rollouts batch by batch, so that sampling can be interrupted.
        tell: Called with the stage, what is done of it, and of how many.

    Raises:
        DataError: Too few questions, or rewards that are all the same.
    """
    questions = questions_that_can_be_judged(questions, target.verifier)
    order = np.random.default_rng(seed).permutation(len(questions))
    # A question that occurs twice stays in one half.
    prompts = list(dict.fromkeys(questions[int(i)]["prompt"] for i in order))
    first = set(prompts[: len(prompts) // 2])
    known = questions.select([i for i in range(len(questions)) if questions[i]["prompt"] in first])
    held_out = questions.select([i for i in range(len(questions)) if questions[i]["prompt"] not in first])
    if min(len(known), len(held_out)) < 2:
        raise DataError(f"{len(questions)} questions are too few: thresholds are set on half of them. Give more.")
    calibration, rollouts = (
        target.sampled(asked, each, own, None, unfinished, name, functools.partial(tell, f"Sampling {name}"))
        for asked, own, name in ((known, seed, "calibration rollouts"), (held_out, seed + 1, "clean rollouts"))
    )
    target.calibrated(calibration)
    judged = target.judged(rollouts)
    if np.isnan(judged.reward).all() or np.nanstd(judged.reward) == 0:
        raise DataError(
            f"All {len(judged)} clean rollouts earn the same reward, so there is no unit to measure a gain in: use "
            "other questions, or longer completions."
        )
    clean = Clean.of(judged, len(calibration))
    found = cue_tokens(target, calibration)
    return Ground(target, known, calibration, held_out, rollouts, judged, clean, found, each, seed)


@dataclass(frozen=True)
class _PerToken(Rewards):
    """A feature reward's own r_t, whatever its pooling."""

    reward: FeatureReward

    def per_token(
        self, model: Any, batch: RolloutBatch, tell: Tell = silent
    ) -> Iterator[tuple[RolloutBatch, Readings]]:
        for piece, (readings,) in read_in_pieces(model, batch, self.readouts, tell):
            yield piece, Readings(self.reward.raw(readings)[..., None], readings.mask)


def cue_tokens(target: Target, batch: RolloutBatch) -> Cues | None:
    """The tokens on which the reward reads highest; None where it is no feature reward."""
    reward = getattr(target.reward, "feature_reward", target.reward)  # of a DualVerifier
    if not isinstance(reward, FeatureReward):
        return None
    earned = np.nan_to_num(target.rewards(batch), nan=-np.inf)
    high = np.zeros(len(batch), dtype=bool)
    high[np.argsort(earned, kind="stable")[len(batch) // 2 :]] = True  # an attacker knows what is rewarded, not gold
    labelled = Labelled(batch, high, np.arange(len(batch)), "clean rollouts")
    return find_cues(target.model, labelled, _PerToken([reward.readout], [], "mean", reward))


def by_templates(
    ground: Ground,
    instances: int,
    families: Sequence[str] | None = None,
    kept: Steps | None = None,
    tell: Tell = silent,
) -> list[Attack]:
    """Every family in both styles, on at most so many held-out rollouts each; ``kept`` are attacks made before."""
    rows, found = ground.some(instances), []
    before = ground.judged.take(rows)
    clean = ground.rollouts.take(rows)
    made = attacks(clean, ground.target.tokenizer, ground.cues, ground.seed, families)

    def carried_out(named: tuple[str, RolloutBatch]) -> str:
        name, batch = named
        return Attack.of(f"templates/{name}", before, ground.target.judged(batch), ground.clean).model_dump_json()

    for done, attack in enumerate((Steps() if kept is None else kept).each(made.items(), carried_out), 1):
        found.append(Attack.model_validate_json(attack))
        tell(done, len(made))
    return found


def by_best_of_n(ground: Ground, n: int, questions: int, kept: Steps | None = None, tell: Tell = silent) -> Attack:
    """The best of up to n rollouts by the reward, on at most so many held-out questions; ``kept`` were judged."""
    target, asked = ground.target, ground.held_out.select(range(min(questions, len(ground.held_out))))

    def judged(i: int) -> dict[str, Any]:
        return target.judged(target.sampled(asked.select([i]), n, ground.seed + 1000 + i)).as_lists()

    each = []
    for question in (Steps() if kept is None else kept).each(range(len(asked)), judged):
        each.append(Judged.of_lists(question))
        tell(len(each), len(asked))
    proxy, gold = np.stack([j.reward for j in each]), np.stack([j.right for j in each])
    points = curve(proxy, gold, np.stack([j.caught for j in each]), seed=ground.seed)
    best = [int(np.nan_to_num(row, nan=-np.inf).argmax()) for row in proxy]
    peak = max(points, key=lambda point: point.gold.value)
    notes = [
        f"{len(asked)} questions with {n} rollouts each; before is N = 1, after is N = {n}. Most are right at N = "
        f"{peak.n} ({peak.gold.value:.0%}, against {points[-1].gold.value:.0%} at N = {n})."
    ]
    return Attack.of(
        "best-of-n",
        _together(each),
        _together([j.take([i]) for j, i in zip(each, best, strict=True)]),
        ground.clean,
        curve=points,
        notes=notes,
    )


def by_suffix(
    ground: Ground, instances: int, length: int = 8, steps: int = 32, width: int = 24, tell: Tell = silent
) -> Attack:
    """One suffix on a line of its own, searched on calibration rollouts, measured on held-out ones."""
    target, tokenizer, rng = ground.target, ground.target.tokenizer, np.random.default_rng(ground.seed)
    few = ground.calibration.take(sorted(rng.permutation(len(ground.calibration))[:SEARCHED].tolist()))
    found = search_suffix(
        target.rewards,
        few,
        suffix_candidates(ground, rng),
        length,
        steps,
        width,
        lead=tokenizer("\n", add_special_tokens=False).input_ids,
        seed=ground.seed,
        tell=tell,
    )
    rows = ground.some(instances)
    after = target.judged(with_suffix(ground.rollouts.take(rows), found.ids, tokenizer))
    told = {
        "text": tokenizer.decode(found.ids),
        "ids": found.ids,
        "searched_on": len(few),
        "reward_where_searched_before": found.before,
        "reward_where_searched_after": found.after,
        "queries": found.queries,
    }
    return Attack.of("suffix", ground.judged.take(rows), after, ground.clean, suffix=told)


def suffix_candidates(ground: Ground, rng: np.random.Generator) -> list[int]:
    """Tokens that the model uses, the cues, and as many others of the vocabulary again; no special ones."""
    used = {token for ids in ground.calibration.completion_ids for token in ids}
    used |= set(ground.cues.tokens) if ground.cues is not None else set()
    size = ground.target.model.get_input_embeddings().weight.shape[0]
    others = rng.choice(size, min(size, len(used)), replace=False).tolist()
    special = set(ground.target.tokenizer.all_special_ids)
    return sorted({int(token) for token in [*used, *others]} - special)


def by_policy(
    ground: Ground,
    model_name: str,
    kind: str,
    training: Any,
    folder: Path,
    alpha: float | None = None,
    tell: Tell = silent,
) -> Attack:
    """A policy trained on the reward alone; with ``alpha``, one that knows the detectors.

    Args:
        ground: Policies train on its questions, and are measured on its held-out ones.
        model_name: The untrained model, loaded anew.
        kind: ``lora`` or ``full``.
        training: A :class:`mechreward.hacking.redteam.policy.Training`.
        folder: For the trajectory.
        alpha: What a detector's score costs, see :class:`mechreward.hacking.redteam.policy.Aware`.
        tell: Called with steps done, and of how many.
    """
    from mechreward.hacking.redteam.policy import Aware, attack_policy, typical_suspicion

    target, name = ground.target, f"{'policy' if alpha is None else 'aware'}/{kind}"
    objective, file = None, folder / f"{name.replace('/', '-')}.jsonl"
    if alpha is not None:
        objective = Aware(target, ground.clean, typical_suspicion(target, ground.calibration), alpha)
    policy, steps = attack_policy(
        target,
        model_name,
        kind,  # pyright: ignore[reportArgumentType] (it checks the name)
        ground.questions,
        training,
        ground.clean,
        file,
        objective,
        tell,
    )
    batch = target.sampled(ground.held_out, ground.each, ground.seed + 1, policy)
    after = target.judged(batch, policy)
    stopped = "because the objective no longer rose" if len(steps) < training.steps else "as many as were asked for"
    notes = [f"{len(steps)} steps, {stopped}. One of its rollouts: {batch.texts[0]!r}"]
    del policy
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Attack.of(name, ground.judged, after, ground.clean, trajectory=str(file), notes=notes)


@dataclass(frozen=True)
class Plan:
    """Which attacks are made, and how.

    Attributes:
        attacks: Of :data:`NAMES`.
        training: Of policies, a :class:`mechreward.hacking.redteam.policy.Training`.
        instances: Rollouts that each template and the suffix attack.
        families: Of templates; by default all.
        best_of: The largest N of best-of-N.
        best_of_questions: Questions for it.
        suffix_length: Tokens.
        suffix_steps: Replacements that are tried.
        kinds: What policies train: ``lora``, ``full`` or both.
        alpha: What standing at a detector's threshold costs an aware policy.
    """

    attacks: Sequence[str]
    training: Any
    instances: int = 100
    families: Sequence[str] | None = None
    best_of: int = 256
    best_of_questions: int = 20
    suffix_length: int = 8
    suffix_steps: int = 32
    kinds: Sequence[str] = ("lora",)
    alpha: float = 3.0


def carry_out(
    plan: Plan,
    ground: Ground,
    model_name: str,
    folder: Path,
    decides: dict[str, Any],
    unfinished: Unfinished | None = None,
    tell: TellStage = silent,
) -> list[Attack]:
    """All attacks of a plan, one after the other.

    Templates go on behind the last one that was finished, best-of-N behind the last question; a suffix or a policy
    that was cut off starts again.

    Args:
        plan: Which.
        ground: Where they start.
        model_name: The untrained model, which policies load anew.
        folder: For policies' trajectories.
        decides: What the clean rollouts, the reward and the guards depend on.
        unfinished: Keeps what is finished.
        tell: Called with the stage, what is done of it, and of how many.
    """
    unfinished = unfinished or Unfinished()

    def kept(name: str, **more: Any) -> Steps:
        return unfinished.steps(name, decides | more)

    found: list[Attack] = []
    if "templates" in plan.attacks:
        before = kept("templates", instances=plan.instances, families=plan.families)
        found += by_templates(ground, plan.instances, plan.families, before, functools.partial(tell, "Templates"))
    if "best-of-n" in plan.attacks:
        before = kept("best of n", best_of=plan.best_of)
        telling = functools.partial(tell, "Best of N")
        found.append(by_best_of_n(ground, plan.best_of, plan.best_of_questions, before, telling))
    if "suffix" in plan.attacks:
        size = plan.instances, plan.suffix_length, plan.suffix_steps
        telling = functools.partial(tell, "Suffix")
        found.append(_once(kept("suffix", size=size), lambda: by_suffix(ground, *size, tell=telling)))
    for which, price in (("policy", None), ("aware", plan.alpha)):
        for kind in plan.kinds if which in plan.attacks else ():
            name, telling = f"{which} {kind}", functools.partial(tell, f"Training ({which}, {kind})")
            before = kept(name, training=asdict(plan.training), alpha=price)
            attack = functools.partial(by_policy, ground, model_name, kind, plan.training, folder, price, telling)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of transformers, about its own options
                found.append(_once(before, attack))
    return found


def _once(kept: Steps, attack: Callable[[], Attack]) -> Attack:
    """An attack that is kept when it is finished, and not before."""
    (told,) = kept.each([attack], lambda made: made().model_dump_json())
    return Attack.model_validate_json(told)


def _together(each: Sequence[Judged]) -> Judged:
    """Several groups' rollouts as one."""
    names = dict.fromkeys(name for judged in each for name in judged.flags)
    return Judged(
        *(np.concatenate([getattr(judged, name) for judged in each]) for name in ("reward", "guarded", "right")),
        flags={
            name: np.concatenate([judged.flags.get(name, np.zeros(len(judged), dtype=bool)) for judged in each])
            for name in names
        },
    )
