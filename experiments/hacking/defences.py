"""Experiment 06: a reward with and without defences, attacked by training against it.

What every run shares is made once and kept in the experiment's folder: two probes on different halves of the discovery
questions, at different layers (one for the dual verifier, one that is only watched), and what the adversarial suite has
learned from rollouts of the untrained model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from mechreward.features.catalog import load_pack
from mechreward.hacking.adversarial import AdversarialSuite
from mechreward.hacking.dual_verifier import Disagreement
from mechreward.hacking.monitor import (
    Collapse,
    EntropyFloor,
    HeldOut,
    Monitor,
    Observation,
    ProxyGoldGap,
    RepresentationShift,
    Rows,
)
from mechreward.hacking.redteam.policy import noticed
from mechreward.probes.linear_probe import Probe, load_probe, save_probe
from mechreward.probes.training import train_probe
from mechreward.readout import Readings, Request
from mechreward.reward.base import Reward
from mechreward.reward.composition import CompositeReward
from mechreward.reward.feature_reward import FeatureReward
from mechreward.reward.guards import Guard
from mechreward.reward.outcome import OutcomeReward
from mechreward.rollout.batch import RolloutBatch, Scores
from mechreward.rollout.sampling import sample
from mechreward.rollout.source import HFSource
from mechreward.sae.registry import load_sae
from mechreward.train import arms
from mechreward.train.config import Arm, Count, ExperimentConfig, Positive
from mechreward.train.data import load


class HackingArm(Arm):
    """One defence, and the attack that it stands against.

    Attributes:
        beta: KL coefficient of this arm.
        suite: The adversarial suite's preset; None for no suite.
        dual: Whether the dual verifier guards.
        aware: The attacker knows the defences: the price of standing at a detector's threshold, in standard deviations
            of the features' reward; 0 for an attacker who does not look.
        blind: The detectors that the attacker pays for do not know the outcome, so that the price does not teach what
            is right.
    """

    beta: float = Field(0.0, ge=0)
    suite: Literal["standard", "strict", "text_only"] | None = None
    dual: bool = False
    aware: float = Field(0.0, ge=0)
    blind: bool = False

    @model_validator(mode="after")
    def _blind_attackers_pay(self) -> HackingArm:
        if self.blind and not self.aware:
            raise ValueError("has `blind` without `aware`: it says what the detectors know that the attacker pays for")
        return self


class HackingConfig(ExperimentConfig):
    """Experiment 06.

    Attributes:
        pack: The pack that is rewarded, and that the guards are made for.
        clean: Number of rollouts of the untrained model that the suite learns from.
        dual_layer, held_out_layer: Layers of the two probes.
        every: Steps in a monitor's window.
        entropy_floor: Entropy in nats per token below which the alarm rings.
        arms: As in other experiments, with defences and attack.
    """

    pack: str
    clean: Positive = 2000
    dual_layer: Count = 1
    held_out_layer: Count = 3
    every: Positive = 4
    entropy_floor: float = Field(0.02, gt=0)
    arms: dict[str, HackingArm] = Field(min_length=1)  # pyright: ignore[reportIncompatibleVariableOverride]

    @model_validator(mode="after")
    def _layers_differ(self) -> HackingConfig:
        if self.dual_layer == self.held_out_layer:
            raise ValueError("has one layer for both probes: a held-out probe must read another layer")
        return self

    def budget(self) -> dict[str, Any]:
        shared = ("pack", "clean", "dual_layer", "held_out_layer", "every", "entropy_floor")
        return {**super().budget(), **{name: getattr(self, name) for name in shared}}


def setup(config: HackingConfig, arm: str, seed: int, folder: Path) -> arms.RunSetup:
    """Set a run up with its arm's reward and defences, and the monitors that every arm has."""
    chosen, defence = config.arms[arm], prepared(config)
    reward: Reward = arms.build(config, chosen, seed)
    guards: list[Guard] = []
    if chosen.suite is not None:
        guards.append(defence.suite(chosen.suite, reward))
    if chosen.dual:
        guards.append(defence.disagreement())
    if chosen.aware:
        knows = defence.features if chosen.blind else defence.watched
        costs = Detection(defence.suite("standard", knows), defence.disagreement(), defence.typical)
        reward = CompositeReward([reward, costs], [1 / defence.deviation, -chosen.aware])
    point = defence.features.readout.hook_point
    monitors: list[Reward | Monitor] = [
        Ledger(folder / arms.ROLLOUTS, defence.features, defence.outcome),
        HeldOut(FeatureReward(defence.held_out, scale="logit"), defence.outcome, every=config.every),
        ProxyGoldGap(defence.features, defence.outcome, every=config.every),
        RepresentationShift(point, defence.features.readout.d_model, every=config.every),
        Collapse(defence.features, every=config.every),
        EntropyFloor(config.entropy_floor),
    ]
    return arms.RunSetup(reward, guards, monitors, chosen.beta)


# -- what the defences are made of ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Defence:
    """What all runs share.

    Attributes:
        features: The rewarded features, as in the pack.
        outcome: The reward for right answers.
        dual: The probe of the dual verifier.
        held_out: The probe that is only watched.
        learned: The suite's state after the clean rollouts.
        typical: Each detector's median score on clean rollouts.
        deviation: Standard deviation of the features' reward over clean rollouts.
        sae: The pack's sparse autoencoder, for the suite.
    """

    features: FeatureReward
    outcome: OutcomeReward
    dual: Probe
    held_out: Probe
    learned: Mapping[str, Any]
    typical: Mapping[str, float]
    deviation: float
    sae: Any

    @property
    def watched(self) -> CompositeReward:
        """Features and outcome, as the suite reads them when they are not rewarded."""
        return CompositeReward([self.outcome, self.features], guards=[])

    def suite(self, preset: str, reward: Reward) -> AdversarialSuite:
        """Make a suite that guards a reward and has seen the clean rollouts."""
        suite = AdversarialSuite.from_preset(preset, sae=None if preset == "text_only" else self.sae)
        suite.attach([reward])
        suite.load_state_dict(json.loads(json.dumps(self.learned)))
        return suite

    def disagreement(self) -> Disagreement:
        """Make the dual verifier's guard."""
        return Disagreement(self.features, self.dual)


def prepared(config: HackingConfig) -> Defence:
    """Return the defences' parts, made once and kept in the experiment's folder."""
    folder, pack = Path(config.output) / "defence", load_pack(config.pack)
    features = FeatureReward.from_pack(pack)
    outcome = arms.outcome_reward(config)
    sae = load_sae(pack.sae.release, pack.sae.sae_id)
    if not (folder / "learned.json").exists():
        _prepare(config, folder, features, outcome, sae)
    learned = json.loads((folder / "learned.json").read_text(encoding="utf-8"))
    dual, held_out = (load_probe(str(folder / name)) for name in ("dual", "held_out"))
    return Defence(features, outcome, dual, held_out, sae=sae, **learned)


def _prepare(config: HackingConfig, folder: Path, features: FeatureReward, outcome: OutcomeReward, sae: Any) -> None:
    model, tokenizer = arms.untrained(config)
    questions = load(config.data.discovery)
    halves = arms.discovery_rollouts(config, model, tokenizer, questions).halves()
    for name, half, layer in zip(("dual", "held_out"), halves, (config.dual_layer, config.held_out_layer), strict=True):
        trained = train_probe(model, half, [layer], "last", name=name, model_name=config.model)
        save_probe(trained.probe, folder / name)
    dual = load_probe(str(folder / "dual"))
    batch = clean_rollouts(config, model, tokenizer, questions, config.clean, seed=config.discovery.seed + 1)
    suite = AdversarialSuite.from_preset("standard", sae=sae)
    watched = CompositeReward([outcome, features], guards=[])
    suite.attach([watched])
    suite.calibrate(batch, HFSource(model, tokenizer, reference=model).read(batch, suite.requests))
    disagreement = Disagreement(features, dual)
    readings = HFSource(model, tokenizer, reference=model).read(
        batch, list(dict.fromkeys([*suite.requests, *disagreement.requests]))
    )
    scores = {name: s.nanmedian() for name, s in suite.scores(batch, readings).items()}
    yes, agrees = disagreement.said(batch, readings)
    learned = {
        "learned": suite.state_dict(),
        "typical": {name: float(s) for name, s in scores.items()} | {"dual": float((yes - agrees).nanmedian())},
        "deviation": float(np.nanstd(features.aggregated(readings).numpy())),
    }
    unfinished = folder / f"learned.{os.getpid()}.part"
    unfinished.write_text(json.dumps(learned), encoding="utf-8")
    unfinished.replace(folder / "learned.json")


def clean_rollouts(
    config: ExperimentConfig, model: Any, tokenizer: Any, questions: Any, count: int, seed: int
) -> RolloutBatch:
    """Sample rollouts of the untrained model, in groups as in training, with the gold answers."""
    group = config.training.num_generations
    asked = questions.select(range(min(len(questions), -(-count // group))))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        batch = sample(
            model, tokenizer, list(asked["prompt"]), group, config.evaluation.batch_size, **arms.sampling(config)
        )
    return replace(batch, columns={"answer": [gold for gold in asked["answer"] for _ in range(group)]})


class Detection(Reward):
    """The penalty of an attacker who knows the defences: what each detector, and the dual verifier, has ``noticed``."""

    def __init__(self, suite: AdversarialSuite, disagreement: Disagreement, typical: Mapping[str, float]):
        super().__init__("detection")
        self.suite, self.disagreement, self.typical = suite, disagreement, typical

    @property
    def requests(self) -> list[Request]:
        return list(dict.fromkeys([*self.suite.requests, *self.disagreement.requests]))

    def score(self, batch: RolloutBatch, readings: Mapping[Request, Readings], sense: float = 1.0) -> Scores:
        yes, agrees = self.disagreement.said(batch, readings)
        limits = {**self.suite.thresholds, "dual": self.disagreement.threshold}
        scores = {**self.suite.scores(batch, readings), "dual": yes - agrees}
        each = [noticed(s.double().numpy(), self.typical[name], limits[name]) for name, s in scores.items()]
        return Scores(torch.tensor(np.sum(each, axis=0)).float())


class Ledger(Monitor):
    """Records every training rollout: step, question, tokens, the features' raw reward, and whether it is right."""

    def __init__(self, file: Path, features: FeatureReward, outcome: OutcomeReward):
        super().__init__("ledger")
        self.file, self.features, self.outcome = file, features, outcome

    @property
    def requests(self) -> list[Request]:
        return self.features.requests

    def measure(self, seen: Observation) -> Mapping[str, Tensor]:
        raw, right, batch = seen.raw(self.features), seen.raw(self.outcome), seen.batch
        with self.file.open("a", encoding="utf-8") as file:
            for i, ids in enumerate(batch.completion_ids):
                record = {
                    "step": seen.step + 1,  # the one under way
                    "prompt": batch.prompts[i],
                    "answer": batch.columns["answer"][i],
                    "ids": list(ids),
                    "reward": round(float(raw[i]), 4),
                    "right": float(right[i]),
                    "flags": [] if batch.flags is None else [flag.split(":")[0] for flag in batch.flags[i]],
                }
                file.write(json.dumps(record) + "\n")
        return {}

    def judge(self, rows: Rows, logged: Mapping[str, float]) -> None:
        return None
