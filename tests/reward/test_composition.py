"""CompositeReward against sums by hand and HERO's formula in float64, and what it promises for all inputs."""

import json
import math
import statistics
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rewards import NAN, Told, World, one_column, plain_trainer, readings_of, rollouts, sentence

from mechreward.errors import ConfigError, RewardError
from mechreward.hacking import OneSidedPenalty, RepetitionDetector, Verdict
from mechreward.reward.base import Reward
from mechreward.reward.composition import CompositeReward, Hero, warn_if_weight_cancels
from mechreward.reward.feature_reward import FeatureReward
from mechreward.reward.outcome import OutcomeReward
from mechreward.rollout.batch import Scores


class Given(Reward):
    """A reward whose values are in the batch, in the column of its own name."""

    def score(self, batch, readings, sense=1.0):
        return Scores(torch.tensor(batch.columns[self.__name__], dtype=torch.float32))


def outcome(name="right"):
    """An outcome whose verdicts are its golds."""

    def verify(completions, golds):
        return [None if gold in ("", "nan") else float(gold) for gold in golds]

    return OutcomeReward(verify, gold_column=name, name=name)


def score(reward, num_generations=None, **columns):
    batch = rollouts(len(next(iter(columns.values()))), num_generations, columns=columns)
    return reward.score(batch, {})


def close(got, want, tolerance=1e-4):
    np.testing.assert_allclose(np.asarray(got, dtype=np.float64), np.asarray(want), rtol=tolerance, atol=tolerance)


def hybrid(mode="hero", **options):
    return CompositeReward([outcome(), Given("f")], mode=mode, **options)


# -- sum ---------------------------------------------------------------------------------------------------------------


def filled(values, sign, group):
    """What a part counts as, one rollout at a time: the least favourable of its group, else of all, stands for NaN."""
    out = []
    for i, value in enumerate(values):
        start = i - i % group
        known = [v for v in values[start : start + group] if not math.isnan(v)]
        known = known or [v for v in values if not math.isnan(v)] or [NAN]
        out.append((min(known) if sign > 0 else max(known)) if math.isnan(value) else value)
    return out


def test_a_sum_by_hand_with_the_least_favourable_for_none():
    reward = CompositeReward([Given("a"), Given("b"), Given("c")], weights=[1, -0.5, 10])
    got = score(reward, 4, a=[1, NAN, NAN, 4], b=[2, 6, NAN, NAN], c=[0.25, NAN, NAN, NAN])
    close(got.values, [1 - 1 + 2.5, 1 - 3 + 2.5, 1 - 3 + 2.5, 4 - 3 + 2.5])
    assert got.metrics == {"a/unscored": 2, "b/unscored": 2, "c/unscored": 3}
    close(got.parts["b"], [2, 6, NAN, NAN])  # what is logged was really read
    # Two groups: the second has no c of its own, and takes the batch's least; nobody has d.
    reward = CompositeReward([Given("c"), Given("d")], weights=[1, -1])
    got = score(reward, 2, c=[3, 5, NAN, NAN], d=[NAN] * 4)
    close(got.values, [3, 5, 3, 3])
    close(score(CompositeReward([Given("d")]), d=[NAN] * 4).values, [NAN] * 4)
    # What a subtracted composite adds is subtracted: its least favourable is the largest.
    nested = CompositeReward([CompositeReward([Given("c")], weights=[2.0])], weights=[-1.0])
    close(score(nested, 3, c=[1, 4, NAN]).values, [-2, -8, -8])


@given(
    st.integers(1, 4),
    st.lists(st.lists(st.one_of(st.floats(-100, 100), st.just(NAN)), min_size=3, max_size=3), min_size=1),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_a_sum_equals_a_loop(group, rows, data):
    rows = rows * group
    weights = data.draw(st.lists(st.floats(-5, 5), min_size=3, max_size=3))
    reward = CompositeReward([Given("a"), Given("b"), Given("c")], weights=weights)
    columns = {name: [row[i] for row in rows] for i, name in enumerate("abc")}
    parts = [filled(values, math.copysign(1, w), group) for values, w in zip(columns.values(), weights, strict=True)]
    want = []
    for row in zip(*parts, strict=True):
        known = [w * r for w, r in zip(weights, row, strict=True) if not math.isnan(r)]
        want.append(sum(known) if known else NAN)
    close(score(reward, group, **columns).values, want, 1e-3)


@given(
    st.integers(2, 5),
    st.integers(1, 3),
    st.sampled_from([{"mode": "sum"}, {"mode": "gated"}, {"mode": "gated", "gate": "penalty"}, {"mode": "hero"}]),
    st.lists(st.floats(-3, 3).filter(bool), min_size=2, max_size=2),
    st.floats(0.1, 2),
    st.data(),
)
@settings(max_examples=150, deadline=None)
def test_what_cannot_be_read_never_outranks_a_right_answer_nor_escapes_a_penalty(
    group, groups, options, weights, outcomes_weight, data
):
    n, value = group * groups, st.one_of(st.integers(-20, 20).map(float), st.just(NAN))
    right = data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=n, max_size=n))
    a, b = (data.draw(st.lists(value, min_size=n, max_size=n)) for _ in "ab")
    reward = CompositeReward([outcome(), Given("a"), Given("b")], [outcomes_weight, *weights], **options)
    got = score(reward, group, right=right, a=a, b=b).values.tolist()
    for i in range(n):
        if not (math.isnan(a[i]) and math.isnan(b[i])):
            continue
        for j in range(i - i % group, i - i % group + group):
            if right[i] < right[j]:
                # Where features count for right answers alone, they can cost these more than the outcome is worth, and
                # no wrong answer, readable or not, pays that.
                assert got[i] < got[j] or options == {"mode": "gated"}
            elif right[i] == right[j]:
                assert got[i] <= got[j] + 1e-4


def test_an_unknown_outcome_is_not_the_least_favourable_one():
    concept = FeatureReward(one_column("concept"))
    penalised = OneSidedPenalty(outcome(), concept)
    read = {concept.request: readings_of([[(1.0, True)]] * 4)}
    batch = rollouts(4, columns={"right": [1.0, None, 0.0, 0.0]})
    close(CompositeReward([penalised]).score(batch, read).values, [1, NAN, 0, 0])
    gated = hybrid("gated", name="inner")
    batch = rollouts(4, columns={"right": [1.0, None, 0.0, 0.0], "f": [1.0] * 4, "g": [0.5] * 4})
    close(CompositeReward([gated, Given("g")]).score(batch, {}).values, [2.5, 0.5, 0.5, 0.5])


def test_nothing_to_score():
    assert CompositeReward([outcome(), Given("f")])([], [], right=[], f=[]) == []


def test_a_part_that_raises_in_one_process_leaves_the_others_in_step():
    class Raises(Given):
        def score(self, batch, readings, sense=1.0):
            if batch.process_index == 0:
                raise ValueError("only here")
            return super().score(batch, readings, sense)

    def work(rank, gather):
        batch = rollouts(2, 2, columns={"a": [1.0, 2.0], "b": [3.0, NAN]}, gather=gather, process_index=rank)
        try:
            return CompositeReward([Raises("a"), Given("b")]).score(batch, {}).values.tolist()
        except ValueError as error:
            return str(error)

    assert World(2).run(work) == ["only here", [4.0, 5.0]]  # a barrier would break if one of them gathered less


def test_reading_nothing_at_all():
    reward = CompositeReward([outcome(), FeatureReward(one_column())])
    source = Told(readings_of([[], [(2.0, True)], []]))
    assert reward(["p"] * 3, ["c"] * 3, source=source, right=[None, None, 1.0]) == [2.0, 2.0, 3.0]
    source = Told(readings_of([[], [], []]))
    assert reward(["p"] * 3, ["c"] * 3, source=source, right=[None, 0.0, 1.0]) == [None, 0.0, 1.0]


def test_composites_nest():
    inner = CompositeReward([Given("a"), Given("b")], weights=[2, 3], name="inner")
    outer = CompositeReward([inner, Given("c")], weights=[10, 1])
    got = score(outer, a=[1.0, NAN], b=[1.0, NAN], c=[0.5, 0.5])
    close(got.values, [50.5, 50.5])
    assert set(got.parts) == {"inner", "inner/a", "inner/b", "c"}
    close(got.parts["inner"], [5, 5])


def test_parts_of_the_same_name_are_all_logged():
    policy, reference = (FeatureReward(one_column("steps"), reads=reads) for reads in ("policy", "reference"))
    reward = CompositeReward([policy, reference])
    readings = {policy.request: readings_of([[(1.0, True)]]), reference.request: readings_of([[(5.0, True)]])}
    parts = reward.score(rollouts(1), readings).parts
    assert sorted(float(v) for name, v in parts.items() if name.endswith("raw")) == [1.0, 5.0]
    assert len(parts) == 4


def test_requests_are_those_of_all_parts_once():
    a, b = FeatureReward(one_column()), FeatureReward(one_column())
    inner = CompositeReward([a, b])
    assert CompositeReward([inner, a, outcome()]).requests == [a.request, b.request]


@pytest.mark.parametrize(
    ("rewards", "options", "error_type", "says"),
    [
        (lambda: [], {}, RewardError, "at least one"),
        (lambda: [Given("a"), Given("b")], {"weights": [1.0]}, RewardError, "2 rewards and 1 weights"),
        (lambda: [Given("a")], {"weights": [1.0, 2.0]}, RewardError, "1 rewards and 2 weights"),
        (lambda: [Given("a")], {"weights": [NAN]}, RewardError, "NaN or infinite"),
        (lambda: [Given("a")], {"weights": [-math.inf]}, RewardError, "NaN or infinite"),
        (lambda: [Given("a"), len], {}, RewardError, "not a mechreward reward"),
        (lambda: [None, Given("a")], {}, RewardError, "None is not a mechreward reward"),
        (lambda: ["math_boxed"], {}, RewardError, "OutcomeReward"),
        (lambda: [outcome(), Given("a")], {"mode": "heros"}, ConfigError, "'hero'"),
        (lambda: [outcome(), Given("a")], {"mode": "gate"}, ConfigError, "'gated'"),
        (lambda: [outcome(), Given("a")], {"mode": "gated", "gate": "pass"}, ConfigError, "'passes'"),
        (lambda: [Given("a"), Given("b")], {"mode": "hero"}, RewardError, "exactly one OutcomeReward"),
        (lambda: [outcome()], {"mode": "gated"}, RewardError, "at least one other"),
        (lambda: [outcome(), outcome("b"), Given("a")], {"mode": "hero"}, RewardError, "exactly one"),
    ],
)
def test_impossible_composites_are_refused_in_one_sentence(rewards, options, error_type, says):
    with pytest.raises(error_type) as error:
        CompositeReward(rewards(), **options)
    assert says in sentence(error)


# -- dense -------------------------------------------------------------------------------------------------------------


def test_lambda_is_the_weight_and_enters_once():
    dense = FeatureReward(one_column(), aggregation="per_token")
    rows = [[(4.0, True), (2.0, True)], [(-1.0, True)]]
    reward = CompositeReward([outcome(), dense], weights=[1.0, 0.3])
    got = reward.score(rollouts(2, columns={"right": [1, 0]}), {dense.request: readings_of(rows)})
    (part,) = got.dense
    assert part.weight == 0.3 and part.values.tolist() == [[4.0, 2.0], [-1.0, 0.0]]
    assert got.values.tolist() == [1.0, 0.0]  # the scalar has nothing of it
    assert got.metrics["d/lambda"] == 0.3
    outer = CompositeReward([reward], weights=[0.5])
    (part,) = outer.score(rollouts(2, columns={"right": [1, 0]}), {dense.request: readings_of(rows)}).dense
    assert part.weight == pytest.approx(0.15) and part.values.tolist() == [[4.0, 2.0], [-1.0, 0.0]]


@pytest.mark.parametrize("mode", ["hero", "gated"])
def test_dense_parts_would_pass_by_the_verifiers_gate_and_are_refused(mode):
    dense = FeatureReward(one_column(), aggregation="per_token")
    for part in (dense, CompositeReward([dense])):
        with pytest.raises(RewardError) as error:
            CompositeReward([outcome(), part], mode=mode)
        assert "per_token" in sentence(error) and mode in str(error.value)


# -- HERO --------------------------------------------------------------------------------------------------------------


def test_hero_by_hand():
    reward = hybrid()
    got = score(reward, right=[1, 0, 1, 0], f=[2.0, 1.0, 4.0, 5.0])
    # sigma = sqrt((1 + 4 + 1 + 4) / 4) = 1.5811 = sigma_bar at the first step, so w = .5 + 1.5 / 2 = 1.25.
    close(got.values, [1.25 * 0.95, 1.25 * -0.05, 1.25 * 1.05, 1.25 * 0.05])
    assert reward.sigma_bar == pytest.approx(math.sqrt(2.5))
    # A flat group next: sigma = 0, w = .5 + 1.5 / (1 + exp(5 x 1.5811)) = .500553; everyone at the low end.
    got = score(reward, right=[1, 0, 1, 0], f=[3.0] * 4)
    w = 0.5 + 1.5 / (1 + math.exp(5 * math.sqrt(2.5)))
    close(got.values, [0.95 * w, -0.05 * w] * 2, 1e-6)
    assert reward.sigma_bar == pytest.approx(0.9 * math.sqrt(2.5)) == got.metrics["hero_sigma_bar"]


def by_loop(right, features, group, hero, sigma_bar):
    """HERO in float64, one rollout at a time; returns rewards and the next sigma_bar."""
    sigmas, out = [], []
    for start in range(0, len(right), group):
        known = [f for f in features[start : start + group] if not math.isnan(f)]
        sigmas.append(statistics.pstdev(known) if known else 0.0)
    mean_sigma = sum(sigmas) / len(sigmas)
    sigma_bar = mean_sigma if sigma_bar is None else sigma_bar
    for i, (r, f) in enumerate(zip(right, features, strict=True)):
        if math.isnan(r):
            out.append(NAN)
            continue
        start = i - i % group
        stratum = [features[j] for j in range(start, start + group) if right[j] == r and not math.isnan(features[j])]
        z = 0.0 if math.isnan(f) else (f - min(stratum)) / (max(stratum) - min(stratum) + 1e-8)
        x = hero.k * (sigmas[i // group] - sigma_bar)
        w = hero.w_min + (hero.w_max - hero.w_min) * (1 / (1 + math.exp(-x)) if x > -700 else 0.0)
        band = (1 - hero.beta) + 2 * hero.beta * z if r == 1 else -hero.alpha + 2 * hero.alpha * z
        out.append(w * band)
    return out, hero.memory * sigma_bar + (1 - hero.memory) * mean_sigma


verdicts = st.sampled_from([0.0, 1.0, NAN])
huge = st.floats(allow_nan=True, allow_infinity=False, width=32)
modest = st.one_of(st.integers(-40, 40).map(lambda i: i / 8), st.just(NAN))


@given(st.sampled_from([1, 2, 3, 4]), st.integers(1, 3), st.integers(1, 3), st.data())
@settings(max_examples=100, deadline=None)
def test_hero_equals_a_loop_step_after_step(group, groups, steps, data):
    n = group * groups
    hero = Hero(alpha=0.1, beta=0.2, w_min=0.4, w_max=3.0, k=6.0, memory=0.8)
    reward, sigma_bar = hybrid(hero=hero), None
    for _ in range(steps):
        right = data.draw(st.lists(verdicts, min_size=n, max_size=n))
        features = data.draw(st.lists(modest, min_size=n, max_size=n))
        want, sigma_bar = by_loop(right, filled(features, 1, group), group, hero, sigma_bar)
        close(score(reward, group, right=right, f=features).values, want)
        assert reward.sigma_bar == pytest.approx(sigma_bar, abs=1e-5)


@given(
    st.integers(2, 6), st.integers(1, 3), st.floats(0, 0.6), st.floats(0, 0.39), st.floats(0.1, 2), st.floats(0, 3),
    st.data(),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_a_wrong_rollout_never_outranks_a_right_one_and_rewards_keep_their_bounds(
    group, groups, alpha, beta, w_min, wider, data
):
    n, hero = group * groups, Hero(alpha=alpha, beta=beta, w_min=w_min, w_max=w_min + wider)
    reward = hybrid(hero=hero)
    for _ in range(2):  # the second step meets whatever the first left in sigma_bar
        right = data.draw(st.lists(verdicts, min_size=n, max_size=n))
        features = data.draw(st.one_of(st.lists(huge, min_size=n, max_size=n), huge.map(lambda f: [f] * n)))
        values = score(reward, group, right=right, f=features).values.tolist()
        assert [math.isnan(v) for v in values] == [math.isnan(r) for r in right]
        for start in range(0, n, group):
            members = list(zip(right[start : start + group], values[start : start + group], strict=True))
            wrong, good = [v for r, v in members if r == 0], [v for r, v in members if r == 1]
            assert max(wrong, default=-math.inf) < min(good, default=math.inf)
            assert all(abs(v) <= alpha * hero.w_max + 1e-5 for v in wrong)
            assert all((1 - beta) * w_min - 1e-5 <= v <= (1 + beta) * hero.w_max + 1e-5 for v in good)
        assert math.isfinite(reward.sigma_bar)


def test_a_lone_right_rollout_gets_the_low_end_of_its_band():
    got = score(hybrid(), right=[1, 0, 0, 0], f=[9.0, 1.0, 2.0, 3.0]).values
    w = float(got[0]) / 0.95
    assert 0.5 <= w <= 2
    close(got, [0.95 * w, -0.05 * w, 0.0, 0.05 * w])
    close(score(hybrid(), right=[1, 0], f=[9.0, 1.0]).values, [0.95 * 1.25, -0.05 * 1.25])


def test_hero_ranks_by_the_weighted_sum_of_the_features():
    reward = CompositeReward([Given("a"), outcome(), Given("b")], weights=[1.0, 1.0, -2.0], mode="hero")
    got = score(reward, right=[1, 1, 1], a=[1.0, 4.0, 2.0], b=[0.0, 3.0, NAN]).values  # a - 2b = 1, -2, 2 - 2 x 3
    close(got / got.min(), np.array([1.05, 0.95 + 0.1 * 2 / 5, 0.95]) / 0.95)


@pytest.mark.parametrize(
    "options",
    [{"alpha": 0.5, "beta": 0.5}, {"alpha": 0.9, "beta": 0.2}, {"alpha": -0.1}, {"beta": -0.1}, {"alpha": NAN},
     {"w_min": 0.0}, {"w_min": 3.0}, {"w_min": NAN}, {"w_max": math.inf}, {"k": NAN}, {"k": math.inf}, {"memory": 1.5},
     {"memory": -0.1}, {"memory": NAN}],
)  # fmt: skip
def test_impossible_constants_are_refused(options):
    with pytest.raises(ConfigError) as error:
        Hero(**options)
    assert "HERO needs" in sentence(error)


@given(st.sampled_from([2, 3, 4]), st.sampled_from([2, 3, 4, 6, 12]), st.data())
@settings(max_examples=20, deadline=None)
def test_hero_over_processes_equals_one_process(processes, group, data):
    right, features = (data.draw(st.lists(of, min_size=12, max_size=12)) for of in (verdicts, modest))
    whole = hybrid()
    want = score(whole, group, right=right, f=features).values
    per = 12 // processes

    def work(rank, gather):
        mine = slice(rank * per, (rank + 1) * per)
        reward = hybrid()
        columns = {"right": right[mine], "f": features[mine]}
        got = reward.score(rollouts(per, group, columns=columns, gather=gather, process_index=rank), {})
        return got.values, reward.sigma_bar

    parts = World(processes).run(work)
    close(torch.cat([values for values, _ in parts]), want, 1e-6)
    assert {sigma_bar for _, sigma_bar in parts} == {whole.sigma_bar}


def test_the_running_mean_comes_back_from_a_checkpoint():
    steps = [([1, 0, 1, 0], [2.0, 1.0, 4.0, 5.0]), ([1, 0, 0, 0], [0.0, 9.0, 4.0, 5.0]), ([1, 1, 0, 0], [3.0] * 4)]
    first = CompositeReward([hybrid(name="inner"), Given("g")])
    for right, f in steps[:2]:
        score(first, right=right, f=f, g=[0.0] * 4)
    saved = json.loads(json.dumps(first.state_dict()))
    again = CompositeReward([hybrid(name="inner"), Given("g")])
    again.load_state_dict(saved)
    assert again.rewards[0].sigma_bar == first.rewards[0].sigma_bar is not None
    right, f = steps[2]
    got, want = (score(r, right=right, f=f, g=[0.0] * 4).values for r in (again, first))
    assert torch.equal(got, want)
    fresh = score(CompositeReward([hybrid(), Given("g")]), right=right, f=f, g=[0.0] * 4).values
    assert not torch.equal(fresh, want)


def test_a_checkpoint_of_other_rewards_is_refused():
    saved = CompositeReward([Given("a"), Given("b")]).state_dict()
    with pytest.raises(RewardError) as error:
        CompositeReward([Given("a")]).load_state_dict(saved)
    assert "2 rewards" in sentence(error)


def test_a_scaling_that_cancels_the_difficulty_weight_is_warned_of():
    with pytest.warns(UserWarning, match="scale_rewards='none'"):
        warn_if_weight_cancels(hybrid(), "group")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_weight_cancels(hybrid(), "none")
        warn_if_weight_cancels(hybrid(), "batch")  # one deviation for all groups: their weights stay apart
        warn_if_weight_cancels(hybrid("gated"), "group")
        warn_if_weight_cancels(len, "group")


# -- gated -------------------------------------------------------------------------------------------------------------


def test_gated_by_hand():
    right, f = [1, 1, 1, 0, 0, NAN], [2.0, -3.0, NAN, 2.0, -3.0, 7.0]
    passes, penalty = (hybrid("gated", gate=gate, weights=[2.0, 0.5]) for gate in ("passes", "penalty"))
    close(score(passes, right=right, f=f).values, [3, 0.5, 0.5, 0, 0, NAN])
    close(score(penalty, right=right, f=f).values, [2, 0.5, 0.5, 0, -1.5, NAN])
    assert score(hybrid("gated"), right=[0.25, 0.75], f=[1.0, 1.0]).values.tolist() == [0.25, 1.75]


# -- guards inside a composite -----------------------------------------------------------------------------------------

LOOP, CLEAN = [11, 12] * 20, list(range(10, 50))


class Says:
    """A guard with a verdict of its own."""

    requests = ()

    def __init__(self, trust, drop=False, flag="said so"):
        self.trust, self.drop, self.flag = trust, drop, flag

    def __call__(self, batch, readings):
        n = len(batch)
        return Verdict(torch.full((n,), self.trust), torch.full((n,), self.drop), [[self.flag]] * n)


def guarded_call(reward, rows, ids, **options):
    metrics, extra = {}, {}
    n = len(rows)
    values = reward(
        ["p"] * n, ["c"] * n, ids, source=Told(readings_of(rows), **options), log_metric=metrics.__setitem__,
        log_extra=extra.__setitem__, right=[1.0] * n,
    )  # fmt: skip
    return values, metrics, extra


def test_the_repetition_detector_runs_by_default_and_leaves_outcomes_alone():
    reward = CompositeReward([outcome(), FeatureReward(one_column())])
    rows = [[(3.0, True)]] * 2 + [[(-3.0, True)]]
    values, metrics, extra = guarded_call(reward, rows, [LOOP, CLEAN, LOOP])
    assert values == [1.0, 4.0, -2.0]
    assert metrics["composite/flagged"] == pytest.approx(2 / 3)
    assert extra["composite/flags"][1] == "" and "repeat" in extra["composite/flags"][0]
    assert {len(column) for column in extra.values()} == {3}


def test_the_default_guard_stands_back_where_the_batch_is_guarded_already():
    reward = CompositeReward([FeatureReward(one_column())])
    already = {"trust": torch.tensor([0.5]), "dropped": torch.tensor([False]), "flags": [[]]}
    values, metrics, _ = guarded_call(reward, [[(4.0, True)]], [LOOP], **already)
    assert values == [2.0] and "composite/flagged" not in metrics
    own = CompositeReward([FeatureReward(one_column())], guards=[RepetitionDetector()])
    assert guarded_call(own, [[(4.0, True)]], [LOOP], **already)[0] == [0.0]


def test_guards_of_ones_own_replace_the_default():
    rows, ids = [[(4.0, True)]], [LOOP]
    assert guarded_call(CompositeReward([FeatureReward(one_column())], guards=[]), rows, ids)[0] == [4.0]
    reward = CompositeReward([FeatureReward(one_column())], guards=[Says(0.75), Says(0.25)])
    values, _, extra = guarded_call(reward, rows, ids)
    assert values == [1.0] and extra["composite/flags"] == ["said so"]


def test_a_dropped_rollout_is_none():
    reward = CompositeReward([FeatureReward(one_column()), outcome()], guards=[RepetitionDetector(action="drop")])
    values, _, extra = guarded_call(reward, [[(4.0, True)]] * 2, [LOOP, CLEAN])
    assert values == [None, 5.0]
    assert "repeat" in extra["composite/flags"][0] and extra["composite/flags"][1] == ""


def test_guards_of_a_nested_composite_are_refused_and_the_outer_ones_reach_all_parts():
    """A drop by a nested composite's guard would not reach the trainer."""
    with pytest.raises(RewardError) as error:
        CompositeReward([CompositeReward([FeatureReward(one_column())], guards=[RepetitionDetector()])])
    assert "outermost" in sentence(error)
    inner = CompositeReward([FeatureReward(one_column())], name="inner")
    for guards, want in ((None, 0.0), ([], 8.0), ([Says(0.25)], 2.0)):
        reward = CompositeReward([inner, FeatureReward(one_column())], guards=guards)
        assert guarded_call(reward, [[(4.0, True)]], [LOOP])[0] == [want]


def test_a_feature_that_counts_against_a_rollout_keeps_counting_when_it_is_flagged():
    """+1 facts - 0.5 hedging: to loop must not be the way out of the penalty for hedging."""
    facts, hedging = FeatureReward(one_column("facts")), FeatureReward(one_column("hedging"))
    reward = CompositeReward([facts, hedging], weights=[1.0, -0.5])
    assert guarded_call(reward, [[(4.0, True)]] * 2, [CLEAN, LOOP])[0] == [2.0, -2.0]
    nested = CompositeReward([CompositeReward([facts, hedging], weights=[-1.0, 0.5])], weights=[-1.0])
    assert guarded_call(nested, [[(4.0, True)]] * 2, [CLEAN, LOOP])[0] == [2.0, -2.0]


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=6),
    st.lists(st.floats(-3, 3, width=32), min_size=3, max_size=3),
    st.sampled_from(["sum", "gated passes", "gated penalty"]),
    st.data(),
)
@settings(max_examples=100, deadline=None)
def test_guards_never_raise_a_composite(raw, weights, mode, data):
    n = len(raw)
    trust = torch.tensor(data.draw(st.lists(st.floats(0, 1, width=32), min_size=n, max_size=n)))
    right = data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=n, max_size=n))
    mode, _, gate = mode.partition(" ")
    parts = [FeatureReward(one_column()) for _ in range(2)]
    inner = CompositeReward([parts[0]], weights=[weights[2]])
    reward = CompositeReward([outcome(), inner, parts[1]], [1.0, *weights[:2]], mode=mode, gate=gate or "passes")
    readings = {part.request: readings_of([[(value, True)] for value in raw]) for part in parts}
    batch = rollouts(n, columns={"right": right})
    free = reward.score(batch, readings).values
    lowered = reward.score(batch.guarded(trust, torch.zeros(n, dtype=torch.bool), [[]] * n), readings).values
    assert (lowered <= free + 1e-4).all()


def test_a_guards_requests_are_the_composites():
    class Reads(Says):
        requests = FeatureReward(one_column("guard")).requests

    part = FeatureReward(one_column())
    assert CompositeReward([part], guards=[Reads(1.0)]).requests == [part.request, *Reads.requests]


# -- as TRL calls it ---------------------------------------------------------------------------------------------------


def test_a_composite_is_a_trl_reward_function():
    reward = hybrid("sum", name="mix")
    trainer = plain_trainer(torch.nn.Linear(1, 1), lambda prompts: type("T", (), {"input_ids": [[5]] * len(prompts)}))
    values = reward(
        prompts=["p"] * 2, completions=["c"] * 2, completion_ids=[[7, 2]] * 2, right=[1.0, None], f=[0.5, NAN],
        trainer_state=trainer.state, log_extra=trainer._log_completion_extra, log_metric=trainer._log_metric,
        environments=None,
    )  # fmt: skip
    assert values == [1.5, 0.5] and all(type(v) in (float, type(None)) for v in values)
    assert reward.__name__ == "mix" and callable(reward)
    assert {"mix/right", "mix/f", "mix/flags"} == set(trainer.extra)
    assert all(len(column) == 2 for column in trainer.extra.values())
    assert trainer.metrics["mix/right"] == 1.0 and trainer.metrics["mix/f"] == 0.5


def test_a_whole_column_that_cannot_be_scored_is_not_averaged():
    metrics = {}
    got = hybrid("sum")(["p"], ["c"], source=Told(), log_metric=metrics.__setitem__, right=[None], f=[1.0])
    assert got == [1.0] and "composite/right" not in metrics and metrics["composite/f"] == 1.0


def test_scoring_leaves_the_batch_alone():
    batch = rollouts(2, columns={"right": [1, 0], "f": [1.0, 2.0]})
    copy = replace(batch)
    hybrid().score(batch, {})
    assert copy == batch


# -- per token ---------------------------------------------------------------------------------------------------------

TOKENS = st.lists(st.tuples(st.floats(-100, 100, width=32), st.booleans()), min_size=1, max_size=6)


@given(
    st.lists(st.tuples(TOKENS, st.sampled_from([0.0, 1.0, NAN]), st.sampled_from([0.0, 0.3, 1.0])), min_size=1),
    st.floats(-3, 3),
    st.sampled_from([{"mode": "sum"}, {"mode": "gated"}, {"mode": "gated", "gate": "penalty"}]),
    st.sampled_from(["mean", "sum"]),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_tokens_sum_to_the_reward_whatever_guards_and_gates_say(rows, weight, options, how, guarded):
    width = max(len(tokens) for tokens, _, _ in rows) + 1  # the last token is not read
    part = FeatureReward(one_column(), aggregation=how)
    reward = CompositeReward([part, outcome()], [weight, 2.0], **options)
    readings = {
        part.request: readings_of([[*tokens, *[(9.0, False)] * (width - len(tokens))] for tokens, _, _ in rows])
    }
    batch = replace(
        rollouts(len(rows), len(rows), columns={"right": [right for _, right, _ in rows]}),
        completion_ids=[[*range(len(tokens) + 1)] for tokens, _, _ in rows],
    )
    if guarded:
        trust = torch.tensor([trust for _, _, trust in rows])
        batch = batch.guarded(trust, torch.zeros(len(rows), dtype=torch.bool), [[] for _ in rows])
    rewards = reward.score(batch, readings).values
    found = reward.per_token(batch, readings)[:, : max(len(ids) for ids in batch.completion_ids)]
    for (tokens, right, _), got, value in zip(rows, found, rewards, strict=True):
        if value.isnan():
            assert got.isnan().all()
            continue
        close(got.nansum(), value, 1e-3)
        read = [read for _, read in tokens]
        counted = not any(read) and any(read for other, _, _ in rows for _, read in other)  # as another rollout's
        has = [*read, counted or not math.isnan(right)]
        assert (~got.isnan()).tolist() == has + [False] * (len(got) - len(has))


def test_tokens_by_hand_with_a_guard_and_a_gate():
    part = FeatureReward(one_column())
    readings = {part.request: readings_of([[(4.0, True), (-1.0, True), (7.0, False)]] * 3)}
    batch = replace(rollouts(3, 1, columns={"right": [1.0, 1.0, 0.0]}), completion_ids=[[5, 6, 7]] * 3)
    batch = batch.guarded(torch.tensor([1.0, 0.5, 1.0]), torch.zeros(3, dtype=torch.bool), [[], ["x"], []])
    for options, want in [
        ({"mode": "sum"}, [[4, -1, 3], [2, -0.5, 3], [4, -1, 0]]),
        ({"mode": "gated"}, [[4, -1, 3], [2, -0.5, 3], [0, 0, 0]]),
    ]:
        reward = CompositeReward([part, outcome()], [2.0, 3.0], **options)
        close(reward.per_token(batch, readings), want)
    close(CompositeReward([part], [-2.0]).per_token(batch, readings)[1], [-4, 1, NAN])  # a guard takes no penalty away


def test_what_is_no_number_of_a_token_goes_to_the_last_one():
    ranked = FeatureReward(one_column(), normalize="group")
    nested = CompositeReward([CompositeReward([FeatureReward(one_column("inner"))], [2.0]), Given("g")])
    readings = {r: readings_of([[(1.0, True), (0.0, False)], [(3.0, True), (0.0, False)]]) for r in
                [*ranked.requests, *nested.requests]}  # fmt: skip
    batch = replace(rollouts(2, 2, columns={"g": [5.0, NAN]}), completion_ids=[[5, 6], [5, 6]])
    close(ranked.per_token(batch, readings), [[NAN, -0.7071], [NAN, 0.7071]], 1e-3)
    close(nested.per_token(batch, readings), [[2, 5], [6, 5]])
    with pytest.raises(RewardError, match="whole rollouts"):
        hybrid().per_token(batch, {})
