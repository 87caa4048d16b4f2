"""Experiment 06: what its configuration means, the aware attacker's costs, and the report's figures by hand."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hacking import defences, page
from hacking.defences import Detection, HackingConfig, Ledger
from hacking.results import _gap, _over, _ringing, fell_at, first_alarms
from mechreward.errors import ConfigError
from mechreward.hacking.monitor import Observation
from mechreward.probes.linear_probe import linear_probe
from mechreward.readout import HookPoint, Readings, direction
from mechreward.reward.feature_reward import FeatureReward
from mechreward.reward.outcome import OutcomeReward
from mechreward.rollout.batch import RolloutBatch
from mechreward.train.config import read_config
from mechreward.train.results import Run

CONFIG = """
output: {folder}
model: mechreward/pocket
pack: pocket/reasoning_pack
data:
  train: [{{path: mechreward/pocket, split: train, rows: 20}}]
  discovery: [{{path: mechreward/pocket, split: discovery, rows: 20}}]
  test: [{{path: mechreward/pocket, split: test, rows: 20}}]
training: {{max_steps: 2}}
arms:
  none: {{features: {{pack: pocket/reasoning_pack}}}}
  all: {{outcome: 1, features: {{pack: pocket/reasoning_pack}}, mode: gated, suite: standard, dual: true, aware: 3}}
seeds: [0]
{more}
"""


def written(folder, more=""):
    file = folder / "hacking.yaml"
    file.write_text(CONFIG.format(folder=folder / "runs", more=more))
    return file


def test_what_defends_an_arm_is_part_of_the_run(tmp_path):
    config = read_config(written(tmp_path), HackingConfig)
    decides = config.run("all", 0)
    assert decides["arm"]["suite"] == "standard" and decides["arm"]["dual"] is True and decides["arm"]["aware"] == 3
    assert config.run("none", 0)["arm"]["beta"] == 0  # the attack has no KL unless it is said
    assert decides["pack"] == "pocket/reasoning_pack" and decides["held_out_layer"] != decides["dual_layer"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("held_out_layer: 1", "one layer for both probes"),
        ("clean: 0", "clean"),
        ("entropy_floor: -1", "entropy_floor"),
    ],
)
def test_a_wrong_configuration_gets_one_sentence(tmp_path, more, says):
    with pytest.raises(ConfigError, match=says):
        read_config(written(tmp_path, more), HackingConfig)


@pytest.mark.parametrize(("aware", "knows"), [("{aware: 1}", "both"), ("{aware: 1, blind: true}", "features")])
def test_a_blind_attackers_detectors_are_given_the_features_only(tmp_path, monkeypatch, aware, knows):
    attacked = "none: {features: {pack: pocket/reasoning_pack}"
    file = written(tmp_path)
    file.write_text(file.read_text().replace(attacked, f"{attacked}, {aware[1:-1]}"))
    features = FeatureReward(direction("features", torch.ones(128), HookPoint(2)))
    given = []
    defence = SimpleNamespace(
        features=features,
        outcome=OutcomeReward(lambda c, g: [1.0], "answer"),
        watched="both",
        held_out=linear_probe("held_out", torch.ones(128), 0.0, HookPoint(3)),
        suite=lambda preset, reward: given.append(reward) or Suite([], []),
        disagreement=Dual,
        typical={},
        deviation=1.0,
    )
    monkeypatch.setattr(defences, "prepared", lambda config: defence)
    defences.setup(read_config(file, HackingConfig), "none", 0, tmp_path)
    assert given == [{"both": "both", "features": features}[knows]]


def test_a_blind_attacker_must_pay(tmp_path):
    file = written(tmp_path)
    file.write_text(file.read_text().replace("dual: true, aware: 3", "dual: true, blind: true"))
    with pytest.raises(ConfigError, match="`blind` without `aware`"):
        read_config(file, HackingConfig)


class Suite:
    requests = ()

    def __init__(self, a, b):
        self.thresholds = {"a": 3.0, "b": 1.0}
        self.given = {"a": torch.tensor(a), "b": torch.tensor(b)}

    def scores(self, batch, readings):
        return self.given


class Dual:
    threshold = 0.3
    requests = ()

    def said(self, batch, readings):
        return torch.tensor([0.9, 0.2, math.nan]), torch.tensor([0.1, 0.1, 0.5])


def test_the_aware_attacker_pays_for_each_detector_in_thresholds():
    costs = Detection(Suite([1.0, 5.0, 99.0], [0.5, math.nan, 0.0]), Dual(), {"a": 1.0, "b": 0.0, "dual": 0.0})
    batch = RolloutBatch(["p"] * 3, ["c"] * 3, [[1]] * 3, [[2]] * 3)
    # shares of the way: a (s - 1) / 2 = 0, 2, 49; b .5, unknown, 0; dual .8/.3, .1/.3, unknown. Half of it is free.
    at = [0 + 0 + 2.0, 2.0 + 0 + 0, 2.0 + 0 + 0]  # clipped at 2: dual 4.3; a 3; a 97
    assert costs.score(batch, {}).values.tolist() == pytest.approx(at)
    near = Detection(Suite([2.6, 3.0, 1.0], [0.0, 0.0, 0.75]), Dual(), {"a": 1.0, "b": 0.0, "dual": -10.0})
    assert near.score(batch, {}).values.tolist() == pytest.approx(
        [0.6 + 2 * 10.8 / 10.3 - 1, 1 + 2 * 10.1 / 10.3 - 1, 0.5]
    )


def test_the_ledger_keeps_the_step_under_way(tmp_path):
    features = FeatureReward(direction("f", torch.ones(2), HookPoint(0)))
    ledger = Ledger(tmp_path / "rollouts.jsonl", features, OutcomeReward(lambda c, g: [1.0, 0.0], "answer"))
    batch = RolloutBatch(["p", "q"], ["c", "d"], [[1]] * 2, [[2, 3], [4, 5]], {"answer": ["1", "2"]})
    batch = batch.guarded(torch.ones(2), torch.zeros(2, dtype=torch.bool), [[], ["filler: too much: of it"]])
    readings = {features.request: Readings(torch.tensor([[[1.5], [0.0]], [[0.25], [0.0]]]), batch.mask())}
    ledger.measure(Observation(7, batch, readings, torch.zeros(2)))
    kept = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [(k["step"], k["reward"], k["right"], k["ids"], k["flags"]) for k in kept] == [
        (8, 1.5, 1.0, [2, 3], []),
        (8, 0.25, 0.0, [4, 5], ["filler"]),
    ]


def test_the_collapse_is_where_accuracy_stays_5_points_below_its_start():
    steps = [0, 10, 20, 30]
    assert fell_at(steps, np.array([0.4, 0.5, 0.6, 0.7])) is None
    assert fell_at(steps, np.array([0.4, 0.3, 0.6, 0.7])) is None  # it recovered
    assert fell_at(steps, np.array([0.4, 0.45, 0.25, 0.0])) == pytest.approx(15)  # .35 lies half way
    assert fell_at(steps, np.array([0.4, 0.3, 0.2, 0.1])) == pytest.approx(5)


def test_the_first_ring_of_each_alarm_counts():
    logged = [
        {"step": 4, "monitor/alarm/gap": 0.0, "monitor/gap": 3.0},
        {"step": 8, "monitor/alarm/gap": 1.0, "monitor/alarm/low": "1.0"},
        {"step": 12, "monitor/alarm/gap": 1.0},
    ]
    assert first_alarms(logged) == {"gap": 8, "low": 8}


def test_the_flagged_share_rings_at_the_second_unlikely_step_running():
    # of 64 at 3 %: P(8 or more) = 7e-4, P(7 or more) = 3e-3
    assert _ringing([(8, 64), (7, 64), (8, 64), (9, 64)]) == {"flagged": 4}
    assert _ringing([(2, 64)] * 40) == {}


def test_the_gap_is_in_standard_deviations_of_the_start():
    rows = [
        {"pack": np.array([0.0, 2.0]), "right": np.array([0.0, 1.0])},
        {"pack": np.array([3.0, 5.0]), "right": np.array([0.0, 0.0])},
    ]
    assert _gap(Run(0, [0, 1], rows, [], []), "pack") == pytest.approx(3 / 1 + 0.5 / 0.5)


def test_intervals_are_students_and_one_seed_has_none():
    assert _over([0.5])["interval"] is None and _over([math.nan])["mean"] is None
    low, high = _over([0.1, 0.2, 0.3])["interval"]
    assert (low, high) == pytest.approx((0.2 - 4.3027 * 0.1 / 3**0.5, 0.2 + 4.3027 * 0.1 / 3**0.5), abs=1e-4)


def test_the_page_says_what_was_not_measured():
    nothing = {"mean": None, "interval": None, "per_seed": []}
    assert page._with(nothing) == page._mean(nothing) == "n/a"
    assert page._each([None, 12.4]) == "- 12"
