"""Monitors: their figures against independent ones, their alarms on made-up series, and that they move nothing."""

import json
import logging
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from test_trl import POINT, VECTOR, options

import mechreward as mr
from mechreward.errors import ConfigError
from mechreward.hacking import (
    Collapse,
    EntropyFloor,
    Flagged,
    HeldOut,
    Monitor,
    ProxyGoldGap,
    Report,
    RepresentationShift,
)
from mechreward.hacking.monitor import log_diversity, rank, recall_of_the_wrong, rewarded_columns, show
from mechreward.integrations.trl_grpo import STATE_FILE, MechRewardGRPOConfig, MechRewardGRPOTrainer
from mechreward.readout import HookPoint, Readings, direction
from mechreward.reward.base import Reward
from mechreward.rollout.batch import RolloutBatch, Scores
from mechreward.rollout.sampling import untouched_randomness
from mechreward.stats import grouped_auc

OUTCOME = mr.OutcomeReward(mr.verifiers.math_boxed)
FEATURE = mr.FeatureReward(direction("d", VECTOR, POINT), name="feature")


def readout(columns, seed=0):
    """Some directions, as one readout."""
    weight = torch.randn(128, columns, generator=torch.Generator().manual_seed(seed))
    one = direction("one", weight[:, 0], POINT)
    return replace(
        one, name=f"r{columns}", labels=tuple(map(str, range(columns))), weight=weight, bias=torch.zeros(columns)
    )


def judge(monitor, **rows):
    return monitor.judge({name: np.asarray(values, dtype=float) for name, values in rows.items()}, {})


# -- statistics --------------------------------------------------------------------------------------------------------


def clustered(rng, groups=60, size=8, signal=1.0):
    """Scores and labels of rollouts whose prompts differ, in difficulty and in level."""
    level = rng.normal(size=(groups, 1))
    right = rng.random((groups, size)) < 1 / (1 + np.exp(-rng.normal(size=(groups, 1))))
    return level + signal * right + rng.normal(size=(groups, size)), right


def test_auc_equals_sklearns_with_ties_and_unknowns():
    rng = np.random.default_rng(0)
    scores, right = clustered(rng)
    scores = np.round(scores)  # many ties
    left_out = rng.random(scores.shape) < 0.2
    area, _ = grouped_auc(scores, right & ~left_out, ~right & ~left_out)
    assert area == pytest.approx(roc_auc_score(right[~left_out], scores[~left_out]), abs=1e-12)


def test_error_without_groups_is_delongs_by_hand():
    rng = np.random.default_rng(1)
    scores, right = rng.normal(size=40), rng.random(40) < 0.5
    wins = np.array([[float(x > y) for y in scores[~right]] for x in scores[right]])
    m, n = wins.shape
    delong = wins.mean(axis=1).var(ddof=1) / m + wins.mean(axis=0).var(ddof=1) / n
    _, error = grouped_auc(scores[:, None], right[:, None], ~right[:, None])
    assert error == pytest.approx(math.sqrt(delong), rel=1e-9)


def test_intervals_cover_the_truth_where_rollouts_of_a_prompt_are_alike():
    rng = np.random.default_rng(2)
    many, truths = clustered(rng, 20_000)
    truth = grouped_auc(many, truths, ~truths)[0]
    grouped, naive = [], []
    for _ in range(400):
        scores, right = clustered(rng)
        for found, shape in ((grouped, scores.shape), (naive, (-1, 1))):
            s, r = scores.reshape(shape), right.reshape(shape)
            area, error = grouped_auc(s, r, ~r)
            found.append((area - truth) / error)
    assert 0.9 < np.std(grouped) < 1.1
    assert np.std(naive) > 1.12, "without groups the errors are too small"


def test_perfect_separation_is_no_certainty():
    scores = np.arange(20.0)[:, None]
    area, error = grouped_auc(scores, scores >= 10, scores < 10)
    assert area == 1.0 and error == pytest.approx(0.05)


def test_recall_at_one_percent_by_hand():
    right = np.arange(200.0)  # 1 % of 200 are 2: rollouts 0 and 1 may be flagged, so the threshold is 2
    assert recall_of_the_wrong(right, np.array([-1.0, 1.5, 2.0, 3.0])) == 0.5
    assert recall_of_the_wrong(np.arange(100.0), np.array([0.5])) == 1.0
    assert recall_of_the_wrong(np.zeros(150), np.zeros(5)) == 0.0, "a tie with the right ones is not flagged"
    assert math.isnan(recall_of_the_wrong(np.arange(99.0), np.array([-1.0])))


@pytest.mark.parametrize(
    ("power", "expected"), [([0.5, 0.3, 0.15, 0.05], 3), ([0.6, 0.3, 0.1], 2), ([1.0, 0.0, 0.0], 1), ([1.0] * 10, 9)]
)
def test_rank_of_hand_made_shifts(power, expected):
    rng = np.random.default_rng(3)
    k = len(power)
    left, right = np.linalg.qr(rng.normal(size=(30, k)))[0], np.linalg.qr(rng.normal(size=(k, k)))[0]
    shifts = left @ np.diag(np.sqrt(power)) @ right.T
    assert rank(shifts) == expected
    eigenvalues = np.sort(np.linalg.eigvalsh(shifts.T @ shifts))[::-1]
    assert (np.cumsum(eigenvalues) / eigenvalues.sum() >= 0.9 - 1e-9).argmax() + 1 == expected


def test_diversity_and_its_error():
    assert log_diversity(np.ones((9, 5)))[0] == pytest.approx(math.log(5))
    assert log_diversity(np.array([[3.0, 1.0, 0.0]] * 4)) == (
        pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))),
        pytest.approx(0.0, abs=1e-12),
    )
    rng = np.random.default_rng(4)
    rows = rng.gamma([0.5, 1.0, 2.0, 8.0], size=(200, 4))
    draws = [log_diversity(rows[rng.integers(200, size=200)])[0] for _ in range(500)]
    assert log_diversity(rows)[1] == pytest.approx(np.std(draws), rel=0.15)


# -- monitors on made-up rows ------------------------------------------------------------------------------------------


def test_held_out_rings_when_the_probe_stops_telling_and_not_before():
    rng = np.random.default_rng(5)
    rings = {"held_out/low": 0, "held_out/fell": 0}
    for _ in range(100):
        monitor = HeldOut(FEATURE, OUTCOME, every=2)
        for signal in (2.5, 2.5, 2.5, 2.5, 0.0, 0.0):
            scores, right = clustered(rng, 16, 8, signal)
            report = judge(monitor, score=scores, right=right)
            if report is not None and signal > 0:
                assert report.metrics["auc"] > 0.8
                for name in report.alarms:
                    rings[name] -= 1000
        assert set(report.metrics) == {"auc", "auc_low", "auc_high", "recall_at_1pct_fpr"}
        for name in report.alarms:
            rings[name] += 1
    assert rings["held_out/fell"] >= 95 and rings["held_out/low"] >= 90
    assert "AUC 0." in report.alarms["held_out/fell"] and "256 rollouts" in report.alarms["held_out/fell"]


def test_held_out_says_nothing_of_too_little():
    monitor = HeldOut(FEATURE, OUTCOME, every=1)
    scores = np.random.default_rng(0).normal(size=(10, 4))
    assert judge(monitor, score=scores, right=np.zeros((10, 4))) is None
    right = np.zeros((10, 4))
    right[:, :2] = 1
    report = judge(monitor, score=scores, right=right)
    assert report is not None and math.isnan(report.metrics["recall_at_1pct_fpr"])  # 20 right ones


def test_gap_by_hand():
    monitor = ProxyGoldGap(FEATURE, OUTCOME, every=1)
    base = np.array([[0.0, 2.0]] * 8)  # mean 1, deviation 1; gold: mean 1/2, deviation 1/2
    first = judge(monitor, proxy=base, gold=base / 2)
    assert first.metrics["gap"] == 0 and not first.alarms
    later = judge(monitor, proxy=base + 3, gold=np.array([[0.0, 1.0]] * 6 + [[1.0, 1.0]] * 2))
    # The proxy gains 3 deviations; the gold 5/8 - 1/2 = 1/8, which is 1/4 of its deviation.
    assert later.metrics == {
        "proxy_gain": pytest.approx(3.0),
        "gold_gain": pytest.approx(0.25),
        "gap": pytest.approx(2.75),
        # The gold's group means: six of 1/2, two of 1; their variance over 8, in units of the deviation 1/2.
        "gap_error": pytest.approx(math.sqrt(np.var([0.5] * 6 + [1.0] * 2, ddof=1) / 8) / 0.5),
    }
    assert "3.00 clean deviations" in later.alarms["proxy_gold_gap/grown"]


def series(rng, proxy_gain, gold_gain, windows=6, groups=40, size=8):
    """Window by window the proxy's values and the gold's: the gains grow in a straight line, in clean deviations."""
    for w in range(windows):
        share = w / (windows - 1)
        level = rng.normal(size=(groups, 1)) * 0.6
        proxy = level + rng.normal(size=(groups, size)) * 0.8 + proxy_gain * share
        accuracy = np.clip(0.4 + 0.2 * level + gold_gain * 0.5 * share, 0.02, 0.98)
        yield proxy, (rng.random((groups, size)) < accuracy).astype(float)


@pytest.mark.parametrize(
    ("proxy_gain", "gold_gain", "rings"),
    [(0.0, 0.0, 0.0), (2.0, 0.8, 0.0), (0.0, -0.6, 0.0), (2.0, 0.0, 1.0), (2.0, -0.5, 1.0)],
)
def test_gap_alarm_at_the_end_of_a_series(proxy_gain, gold_gain, rings):
    rng = np.random.default_rng(6)
    rang = []
    for _ in range(60):
        monitor = ProxyGoldGap(FEATURE, OUTCOME, every=1)
        reports = [judge(monitor, proxy=p, gold=g) for p, g in series(rng, proxy_gain, gold_gain)]
        rang.append(bool(reports[-1].alarms))
        assert not reports[0].alarms
    assert np.mean(rang) == pytest.approx(rings, abs=0.05)


def test_a_gold_that_is_never_right_cannot_hide_the_gap():
    monitor = ProxyGoldGap(FEATURE, OUTCOME, every=1)
    rng = np.random.default_rng(7)
    proxy, nothing = rng.normal(size=(20, 4)), np.zeros((20, 4))
    assert not judge(monitor, proxy=proxy, gold=nothing).alarms
    assert judge(monitor, proxy=proxy + 2, gold=nothing).alarms


def test_collapse_on_few_features_and_on_one_value():
    monitor = Collapse(mr.FeatureReward(readout(4), weights=[1.0, -1.0, 0.5, 2.0]), every=1)
    rng = np.random.default_rng(8)
    share = rng.gamma(4.0, size=(20, 4, 4))
    reward = rng.normal(size=(20, 4))
    first = judge(monitor, reward=reward, share=share)
    assert first.metrics["spread"] == 1.0 and 3.5 < first.metrics["diversity"] <= 4 and not first.alarms
    narrow = share * np.array([1.0, 0.03, 0.03, 0.03])
    report = judge(monitor, reward=reward, share=narrow)
    assert set(report.alarms) == {"collapse/diversity"}
    pooled = narrow.mean(axis=(0, 1)) / narrow.mean(axis=(0, 1)).sum()
    assert report.metrics["diversity"] == pytest.approx(math.exp(-(pooled * np.log(pooled)).sum()))
    half = reward * 0.3
    half[:10] = 7.0
    report = judge(monitor, reward=half, share=share)
    assert set(report.alarms) == {"collapse/spread"} and report.metrics["flat_groups"] == 0.5
    assert report.metrics["spread"] == pytest.approx(
        math.sqrt(half.var(axis=1, ddof=1).mean() / reward.var(axis=1, ddof=1).mean())
    )


def observation(request_values, groups=2, size=4, tokens=5, rewards=None):
    """Rollouts of ``tokens`` tokens, the last one of each unread, with these readings ``[B, T, K]``."""
    n = groups * size
    batch = RolloutBatch(["p"] * n, ["c"] * n, [[1]] * n, [[2] * tokens] * n, {"answer": ["1"] * n}, size)
    read = {request: Readings(values, batch.mask()) for request, values in request_values.items()}
    return show(3, batch, read, torch.zeros(n) if rewards is None else rewards, set())


def test_collapse_measures_the_contributions():
    reward = mr.FeatureReward(readout(3), weights=[1.0, -2.0, 0.5], aggregation="max")
    values = torch.randn(8, 5, 3)
    rows = Collapse(reward).measure(observation({reward.request: values}, rewards=torch.arange(8.0)))
    for i in range(8):
        for k, weight in enumerate([1.0, -2.0, 0.5]):
            by_hand = sum(abs(weight * values[i, t, k].item()) for t in range(4)) / 4
            assert rows["share"][i, k].item() == pytest.approx(by_hand, rel=1e-5)
    assert rows["reward"].tolist() == list(range(8))


@pytest.mark.parametrize("d_model", [6, 512])
def test_shift_of_known_size_and_rank(d_model):
    torch.manual_seed(0)
    monitor = RepresentationShift(HookPoint(0), d_model, every=1)
    n, tokens = 24, 5
    reference = torch.randn(n, tokens, d_model)
    axes = torch.linalg.qr(torch.randn(d_model, 3)).Q.T
    moved = reference + 3.0 * axes[0] + torch.randn(n, 1, 3) @ (torch.tensor([2.0, 2.0, 2.0])[:, None] * axes)
    weight = monitor.policy.readout.weight
    seen = observation({monitor.policy: moved @ weight, monitor.reference: reference @ weight}, 6, 4)
    rows = monitor.measure(seen)
    delta = (moved - reference)[:, :-1].mean(dim=1)
    size = delta.mean(dim=0).norm() / reference[:, :-1].square().sum(dim=2).mean().sqrt()
    report = judge(monitor, **{name: values.view(6, 4, *values.shape[1:]) for name, values in rows.items()})
    assert report.metrics["size"] == pytest.approx(size.item(), rel=1e-4 if d_model == 6 else 0.3)
    assert report.metrics["rank"] == rank(delta.numpy()) == 3
    still = observation({monitor.policy: reference @ weight, monitor.reference: reference @ weight}, 6, 4)
    same = judge(monitor, **{k: v.view(6, 4, *v.shape[1:]) for k, v in monitor.measure(still).items()})
    assert same.metrics["size"] == 0 and math.isnan(same.metrics["rank"]), "rounding has no rank"


def test_windows_and_what_is_saved_of_them():
    rng = np.random.default_rng(9)
    steps = [clustered(rng, 10, 4) for _ in range(5)]
    whole, before = HeldOut(FEATURE, OUTCOME, every=2), HeldOut(FEATURE, OUTCOME, every=2)
    reports = [judge(whole, score=s, right=r) for s, r in steps]
    assert [r is None for r in reports] == [True, False, True, False, True]
    for s, r in steps[:3]:
        judge(before, score=s, right=r)
    after = HeldOut(FEATURE, OUTCOME, every=2)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.first == pytest.approx(before.first, nan_ok=True)
    s, r = steps[3]
    assert judge(after, score=s, right=r).metrics == pytest.approx(reports[3].metrics, nan_ok=True)
    both = np.concatenate([steps[2][1], steps[3][1]]).ravel(), np.concatenate([steps[2][0], steps[3][0]]).ravel()
    assert reports[3].metrics["auc"] == pytest.approx(roc_auc_score(*both))


def test_entropy_floor():
    monitor = EntropyFloor(0.5)
    assert monitor.judge({}, {}) is None
    assert not monitor.judge({}, {"entropy": 0.6}).alarms
    assert "0.4000 nats, below 0.5" in monitor.judge({}, {"entropy": 0.4}).alarms["entropy_floor/low"]


def test_held_out_columns_are_compared_by_what_they_read():
    held = readout(3)
    again = replace(held, name="again", labels=("x",), weight=held.weight[:, 1:2].clone(), bias=torch.zeros(1))
    elsewhere = replace(again, hook_point=HookPoint(2))
    assert rewarded_columns(held, [again]) == 1 and rewarded_columns(held, [held]) == 3
    assert rewarded_columns(held, [elsewhere, readout(3, seed=1)]) == 0


def test_bad_options():
    for build, says in (
        (lambda: HeldOut(FEATURE, OUTCOME, every=0), "every 0 steps"),
        (lambda: HeldOut(FEATURE, OUTCOME, floor=1.2), "0 to 1"),
        (lambda: EntropyFloor(-1.0), "positive number"),
    ):
        with pytest.raises(ConfigError, match=says) as caught:
            build()
        assert "\n" not in str(caught.value)


# -- in training -------------------------------------------------------------------------------------------------------


def trained(folder, reward, monitors=(), resume=None, stop_on=None, size=8, **changes):
    args = MechRewardGRPOConfig(**options(folder, per_device_train_batch_size=size, **changes))
    data = mr.pocket.dataset("train", 64)
    trainer = MechRewardGRPOTrainer(mr.pocket.path(), reward, args, data, monitors=monitors, stop_on=stop_on)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def all_monitors(feature, outcome=OUTCOME):
    held = mr.FeatureReward(readout(3), name="held")
    return [
        HeldOut(held, outcome, every=1),
        RepresentationShift(POINT, 128, every=1),
        ProxyGoldGap(feature, outcome, every=1),
        Collapse(feature, every=1),
        EntropyFloor(0.01),
        mr.FeatureReward(readout(2, seed=1), reads="reference", name="watched"),
    ]


class Vandal(Monitor):
    """Overwrites all that it is shown, and throws every die."""

    def __init__(self, request):
        super().__init__("vandal")
        self.requests_ = [request]
        self.came = 0

    @property
    def requests(self):
        return self.requests_

    def measure(self, seen):
        self.came += 1
        for read in seen.readings.values():
            read.values.fill_(1e3)
            read.mask.fill_(False)
        seen.rewards.fill_(-5.0)
        seen.batch.trust.fill_(0.0)
        seen.batch.dropped.fill_(True)
        for ids in (*seen.batch.prompt_ids, *seen.batch.completion_ids):
            ids.clear()
        for column in seen.batch.columns.values():
            column[:] = ["?"] * len(column)
        seen.batch.prompts[:], seen.batch.completions[:] = [""] * len(seen.batch), [""] * len(seen.batch)
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        torch.set_grad_enabled(False)
        return {"rows": torch.zeros(len(seen.batch))}


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_monitors_do_not_move_the_policy(tmp_path, beta):
    """The same seed without monitors, with all, and with one that tries to: the same weights, bit for bit."""

    def reward():
        scalar = mr.FeatureReward(direction("d", VECTOR, POINT), name="feature")
        dense = mr.FeatureReward(direction("t", VECTOR.flip(0), POINT), name="tokens", aggregation="per_token")
        return mr.CompositeReward([scalar, dense, OUTCOME], [0.1, 0.1, 1.0]), scalar

    alone = trained(tmp_path, reward()[0], beta=beta)
    composite, feature = reward()
    vandal = Vandal(composite.requests[1])
    crowd = trained(tmp_path, composite, [vandal, *all_monitors(feature)], beta=beta)
    assert vandal.came == 2 and not crowd.watch.disabled
    assert torch.equal(weights(alone), weights(crowd))
    assert weights(alone).ne(weights(trained(tmp_path, OUTCOME, beta=beta))).any(), "the features do move it"


def test_a_rewarded_composite_may_be_watched_without_moving_its_statistics(tmp_path):
    def hero():
        return mr.CompositeReward(
            [mr.FeatureReward(direction("d", VECTOR, POINT)), OUTCOME], [0.3, 1.0], mode="hero", guards=[]
        )

    alone, watched = hero(), hero()
    changes = {"scale_rewards": "none"}
    ends = [
        weights(trained(tmp_path, alone, **changes)),
        weights(trained(tmp_path, watched, [ProxyGoldGap(watched, OUTCOME)], **changes)),
    ]
    assert alone.sigma_bar == watched.sigma_bar and torch.equal(*ends)


def test_dice_are_given_back():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with pytest.raises(KeyError), untouched_randomness():
        random.random(), np.random.rand(), torch.rand(7)
        raise KeyError
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


class Notes(Reward):
    """A reward of 0 that notes each rollout's held-out score and verdict."""

    def __init__(self, feature):
        super().__init__("notes")
        self.feature, self.scores, self.right = feature, [], []

    @property
    def requests(self):
        return self.feature.requests

    def score(self, batch, readings, sense=1.0):
        self.scores += self.feature.score(replace(batch, trust=None), readings).parts["raw"].tolist()
        self.right += OUTCOME.score(batch, {}).values.tolist()
        return Scores(torch.zeros(len(batch)))


def test_held_out_in_training_equals_sklearn_and_is_saved(tmp_path):
    held = mr.FeatureReward(readout(3), name="held")
    changes = {"size": 32, "max_completion_length": 40, "save_strategy": "steps", "save_steps": 2}
    notes, monitor = Notes(held), HeldOut(held, OUTCOME, every=2)
    with pytest.warns(UserWarning, match="'held_out' holds 'r3' out, but 3 of its 3 columns are rewarded"):
        trainer = trained(tmp_path, notes, [monitor], **changes)
    log = trainer.state.log_history
    assert "monitor/held_out/auc" not in log[0]
    assert log[1]["monitor/held_out/auc"] == pytest.approx(roc_auc_score(notes.right, notes.scores), abs=1e-6)
    assert log[1]["monitor/alarm/held_out/fell"] == 0.0 and "monitor/held_out/recall_at_1pct_fpr" not in log[1]
    saved = json.loads((tmp_path / "checkpoint-2" / STATE_FILE).read_text())["monitors"]["held_out"]
    assert saved["first"] == pytest.approx(monitor.first, nan_ok=True) and saved["first"]["rollouts"] == 64


def test_checkpoints_of_the_first_version_are_read(tmp_path):
    def hero():
        return mr.CompositeReward(
            [mr.FeatureReward(direction("d", VECTOR, POINT)), OUTCOME], [0.3, 1.0], mode="hero", guards=[]
        )

    first = hero()
    trained(tmp_path, first, scale_rewards="none", max_steps=1, save_strategy="steps", save_steps=1)
    file = tmp_path / "checkpoint-1" / STATE_FILE
    states = json.loads(file.read_text())
    for saved in (states, states["rewards"]):
        file.write_text(json.dumps(saved))
        second = hero()
        args = MechRewardGRPOConfig(**options(tmp_path, scale_rewards="none"))
        data = mr.pocket.dataset("train", 8)
        trainer = MechRewardGRPOTrainer(mr.pocket.path(), second, args, data, monitors=[EntropyFloor(0.1)])
        trainer.create_optimizer_and_scheduler(2)
        trainer._load_optimizer_and_scheduler(str(tmp_path / "checkpoint-1"))
        assert second.sigma_bar == first.sigma_bar is not None


class Rings(Monitor):
    """Rings at the given calls, and breaks where it is told to."""

    def __init__(self, *at, breaks=None, name="rings"):
        super().__init__(name)
        self.at, self.breaks, self.calls = at, breaks, 0
        self.alarms = (f"{name}/now",)

    def measure(self, seen):
        self.calls += 1
        if self.breaks == "measure":
            raise ZeroDivisionError("no rows")
        return {"x": torch.zeros(3 if self.breaks == "rows" else len(seen.batch))}

    def judge(self, rows, logged):
        assert rows["x"].shape == (2, 4)
        if self.breaks == "judge":
            raise KeyError("x")
        return Report({"calls": self.calls}, {"rings/now": "It rings, 7 of 8."} if self.calls in self.at else {})

    def state_dict(self):
        return {"calls": self.calls} if self.breaks != "state" else {"calls": torch.ones(1)}

    def load_state_dict(self, state):
        self.calls = state["calls"]


class Broken(mr.FeatureReward):
    def score(self, batch, readings, sense=1.0):
        raise RuntimeError("no")


def test_a_monitor_that_raises_is_disabled_and_training_goes_on(tmp_path, caplog):
    monitors = [
        *(Rings(breaks=what, name=what) for what in ("measure", "rows", "judge")),
        Rings(breaks="state", name="state"),
        Broken(direction("b", VECTOR, POINT), name="broken"),
    ]
    monitors[-2].alarms = ()
    with caplog.at_level(logging.WARNING):
        trainer = trained(tmp_path, OUTCOME, monitors, stop_on={"judge/now": 1}, save_strategy="steps", save_steps=1)
    assert trainer.state.global_step == 2 and trainer.watch.disabled == {"measure", "rows", "judge", "state", "broken"}
    said = [r.getMessage() for r in caplog.records if "is disabled" in r.getMessage()]
    assert len(said) == 5 and sum("no longer stop" in s for s in said) == 1
    assert "'measure' is disabled from step 0 on, because it raised ZeroDivisionError: no rows." in said[0]
    assert trainer.state.log_history[1]["monitor/broken/disabled"] == 1.0
    assert [m.calls for m in monitors[:3]] == [1, 1, 1]


def test_an_alarm_ends_training(tmp_path, caplog):
    """It rings at checks 1, 3 and 4: two in a row are reached at the fourth."""
    with caplog.at_level(logging.WARNING):
        trainer = trained(tmp_path, OUTCOME, [Rings(1, 3, 4, 5)], stop_on={"rings/now": 2}, max_steps=8)
    assert trainer.state.global_step == 4 and (tmp_path / "checkpoint-4" / "model.safetensors").exists()
    sentence = trainer.stopped_because
    assert sentence.startswith("Training ends at step 4: the alarm rings/now has rung at 2 checks in a row.")
    assert sentence.endswith("It rings, 7 of 8.") and "\n" not in sentence
    history = [log for log in trainer.state.log_history if log["step"] == 4]
    assert history[0]["stopped_because"] == sentence and history[0]["monitor/alarm/rings/now"] == 1.0
    assert sentence in [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert sum("Alarm rings/now" in r.getMessage() for r in caplog.records) == 2, "said once each time it begins"

    again = Rings(5)
    resumed = trained(tmp_path, OUTCOME, [again], tmp_path / "checkpoint-4", {"rings/now": 3}, max_steps=8)
    assert again.calls == 5 and resumed.state.global_step == 5, "the checks in a row are counted on"


def test_what_cannot_be_watched_is_refused(tmp_path):
    def build(monitors, stop_on=None):
        args = MechRewardGRPOConfig(**options(tmp_path))
        data = mr.pocket.dataset("train", 8)
        return MechRewardGRPOTrainer(mr.pocket.path(), OUTCOME, args, data, monitors=monitors, stop_on=stop_on)

    for monitors, stop_on, says in (
        ([Rings()], {"rings/nwo": 1}, r"there are rings/now\. Did you mean 'rings/now'\?"),
        ([], {"rings/now": 1}, "there are none"),
        ([Rings()], {"rings/now": 0}, "from 1 on"),
        ([Rings(), Rings()], None, "Two monitors are called 'rings'"),
        ([print], None, "is no monitor"),
    ):
        with pytest.raises(ConfigError, match=says) as caught:
            build(monitors, stop_on)
        assert "\n" not in str(caught.value)


def test_monitors_judge_the_rows_of_all_processes(tmp_path):
    """With a gather that brings a second process's rows, groups of both are judged."""
    trainer = trained(tmp_path, OUTCOME, max_steps=1)
    n, seen_rows = 4, []

    class Looks(Monitor):
        def measure(self, seen):
            return {"x": torch.arange(float(len(seen.batch)))}

        def judge(self, rows, logged):
            seen_rows.append(rows["x"].tolist())

    trainer.monitors[:] = [Looks("looks")]
    # The other process has each row + 10, and has not failed either: that flag is gathered too.
    batch = RolloutBatch(
        ["p"] * n,
        ["c"] * n,
        [[1]] * n,
        [[2, 3]] * n,
        num_generations=4,
        gather=lambda rows: torch.cat([rows, rows + 10]) if len(rows) == n else rows,
    )
    trainer._show_monitors(batch, {}, torch.zeros(2 * n, 1))
    assert seen_rows == [[[0.0, 1.0, 2.0, 3.0], [10.0, 11.0, 12.0, 13.0]]]


# -- flags -------------------------------------------------------------------------------------------------------------


def test_flagged_rings_where_the_share_is_significantly_above_what_is_usual():
    monitor = Flagged()
    shares = np.array([1, 0, 2, 1, 3, 0, 1, 2]) / 8
    rows = [[1.0] * int(8 * s) + [0.0] * int(8 - 8 * s) for s in shares]
    report = judge(monitor, flagged=rows)
    low = shares.mean() - 2.58 * shares.std(ddof=1) / np.sqrt(8)
    assert report.metrics == pytest.approx({"share": shares.mean(), "low": low})
    assert report.alarms == {"flagged/high": "flagged: 16% of rollouts are flagged, significantly more than 3%."}
    assert not judge(Flagged(), flagged=[[0.0] * 8] * 7 + [[1.0] * 2 + [0.0] * 6]).alarms
    assert judge(Flagged(), flagged=rows[:7]) is None  # too few groups


def test_flagged_counts_the_trainers_flags_or_asks_a_guard_of_its_own():
    batch = RolloutBatch(["p"] * 3, ["c"] * 3, [[1]] * 3, [[2, 3]] * 3)
    batch = batch.guarded(torch.ones(3), torch.zeros(3, dtype=torch.bool), [[], ["filler: much"], []])
    seen = show(0, batch, {}, torch.zeros(3), [])
    assert Flagged().measure(seen)["flagged"].tolist() == [0, 1, 0]
    assert Flagged(mr.hacking.RepetitionDetector(n=1, threshold=0.0, min_ngrams=1)).measure(
        show(0, replace(batch, completion_ids=[[2, 2], [2, 3], [3, 3]]), {}, torch.zeros(3), [])
    )["flagged"].tolist() == [1, 0, 1]
    with pytest.raises(ConfigError, match="usual is a share"):
        Flagged(usual=3)
