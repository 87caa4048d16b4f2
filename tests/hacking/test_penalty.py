"""OneSidedPenalty by hand: who is lowered, by how much, and that nobody is ever raised."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trl import POINT, VECTOR, options

import mechreward as mr
from mechreward.errors import ConfigError, RewardError
from mechreward.hacking import OneSidedPenalty
from mechreward.integrations.trl_grpo import MechRewardGRPOConfig, MechRewardGRPOTrainer
from mechreward.readout import HookPoint, Readings, direction
from mechreward.reward.base import Reward
from mechreward.reward.guards import RepetitionDetector
from mechreward.rollout.batch import Dense, RolloutBatch, Scores

CONCEPT = mr.FeatureReward(direction("hack", torch.ones(4), HookPoint(1)), name="hack")


class Fixed(Reward):
    """A reward that is known beforehand."""

    def __init__(self, values):
        super().__init__("fixed")
        self.values = torch.tensor(values)

    def score(self, batch, readings, sense=1.0):
        return Scores(self.values)

    def state_dict(self):
        return {"n": len(self.values)}

    def load_state_dict(self, state):
        self.loaded = state


def read(concept, group=4):
    """One-token rollouts whose concept scores are these; NaN: a rollout without a token that is read."""
    n = len(concept)
    batch = RolloutBatch(["p"] * n, ["c"] * n, [[1]] * n, [[2, 3]] * n, {"answer": ["1"] * n}, num_generations=group)
    mask = torch.tensor([[not math.isnan(c), False] for c in concept])
    values = torch.tensor([[c, 0.0] for c in concept])[..., None].nan_to_num()
    return batch, {CONCEPT.request: Readings(values, mask)}


def lowered(rewards, concept, group=4, **options):
    batch, readings = read(concept, group)
    return OneSidedPenalty(Fixed(rewards), CONCEPT, **options).score(batch, readings)


# Deviations from the group's mean 2: -1, -1, 0, 2. The unbiased deviation is sqrt(6 / 3), so z of the last is:
Z = 2 / (math.sqrt(2) + 0.1)
SIGMOID = 1 / (1 + math.exp(-Z))


def test_both_forms_by_hand():
    concept, rewards = [1.0, 1.0, 2.0, 4.0], [1.0, 0.0, 0.5, 1.0]
    scores = lowered(rewards, concept)
    np.testing.assert_allclose(scores.values, [1.0, 0.0, 0.5, 1 - 2 * SIGMOID], atol=1e-6)
    assert scores.metrics["penalised"] == 0.25
    np.testing.assert_allclose(scores.parts["before_penalty"], rewards)
    np.testing.assert_allclose(scores.parts["concept"], concept)
    assert scores.parts["concept_z"][3] == pytest.approx(Z, rel=1e-6)
    np.testing.assert_allclose(lowered(rewards, concept, alpha=0.5).values[3], 1 - 0.5 * SIGMOID, atol=1e-6)
    np.testing.assert_allclose(lowered(rewards, concept, form="additive").values, [1.0, 0.0, 0.5, 1 - 2 * Z], atol=1e-6)


def test_a_negative_reward_is_not_raised():
    concept = [1.0, 1.0, 2.0, 4.0]
    np.testing.assert_allclose(lowered([-1.0, -1.0, -1.0, -1.0], concept).values, [-1.0] * 4)
    np.testing.assert_allclose(lowered([-1.0] * 4, concept, form="additive").values[3], -1 - 2 * Z, atol=1e-6)


def test_each_group_has_its_own_mean():
    scores = lowered([1.0] * 8, [1.0, 1.0, 2.0, 4.0, 101.0, 101.0, 102.0, 104.0])
    np.testing.assert_allclose(scores.values[:4], scores.values[4:], atol=1e-6)
    assert (lowered([1.0] * 4, [3.0] * 4).values == 1).all(), "nobody stands out"


def test_what_is_not_known():
    scores = lowered([1.0, math.nan, 1.0, 1.0], [math.nan, 4.0, 0.0, 2.0])
    # The concept's mean is 2 over three: the second stands out but has no reward; the first cannot be read, and counts
    # as the second.
    z = 2 / (2 + 0.1)
    assert scores.values[0] == pytest.approx(1 - 2 / (1 + math.exp(-z)), abs=1e-6)
    assert scores.values[1].isnan() and scores.values[2] == 1.0 and scores.values[3] == 1.0
    assert lowered([1.0] * 4, [math.nan] * 4).values.tolist() == [1.0] * 4


numbers = st.floats(-1e3, 1e3, width=32)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(numbers, numbers), min_size=4, max_size=4),
    st.sampled_from(["multiplicative", "additive"]),
    st.floats(0.01, 10),
    st.floats(0, 1e3, width=32),
)
def test_it_never_raises_a_reward_and_falls_with_the_concept(rollouts, form, alpha, more):
    rewards, concept = map(list, zip(*rollouts, strict=True))
    before = lowered(rewards, concept, form=form, alpha=alpha).values
    assert (before <= torch.tensor(rewards)).all()
    # More of the concept in one rollout, the others as they are: its own reward does not rise.
    after = lowered(rewards, [concept[0] + more, *concept[1:]], form=form, alpha=alpha).values
    assert after[0] <= before[0] + 1e-4 * (1 + abs(before[0]))


def test_in_a_composite_and_around_one():
    right = mr.OutcomeReward(lambda completions, golds: [1.0, 0.0, 1.0, 1.0], name="right")
    batch, readings = read([1.0, 1.0, 2.0, 4.0])
    inside = mr.CompositeReward([OneSidedPenalty(right, CONCEPT), CONCEPT], [2.0, 0.1], guards=[])
    np.testing.assert_allclose(
        inside.score(batch, readings).values, [2.1, 0.1, 2.2, 2 * (1 - 2 * SIGMOID) + 0.4], atol=1e-5
    )
    around = OneSidedPenalty(mr.CompositeReward([right, CONCEPT], [2.0, 0.1], guards=[]), CONCEPT, form="additive")
    np.testing.assert_allclose(around.score(batch, readings).values, [2.1, 0.1, 2.2, 2.4 - 2 * Z], atol=1e-5)
    assert around.requests == inside.requests == [CONCEPT.request]
    with pytest.raises(RewardError, match="negative weight"):
        mr.CompositeReward([OneSidedPenalty(right, CONCEPT)], [-1.0], guards=[]).score(batch, readings)


def test_guards_of_what_is_wrapped_still_run_and_do_not_touch_the_concept():
    feature = mr.FeatureReward(direction("f", torch.ones(4), HookPoint(1)), name="f")
    penalty = OneSidedPenalty(mr.CompositeReward([feature], guards=[RepetitionDetector(min_ngrams=4)]), CONCEPT)
    batch, readings = read([1.0, 1.0, 2.0, 4.0])
    readings[feature.request] = readings[CONCEPT.request]
    batch = replace(batch, completion_ids=[[2, 3], [2, 3], [2, 3], [2] * 12])
    guarded = penalty.guard(batch, readings)
    assert [bool(f) for f in guarded.flags] == [False, False, False, True]
    scores = penalty.score(guarded, readings)
    assert scores.parts["concept"].tolist() == [1.0, 1.0, 2.0, 4.0], "no trust lifts the penalty"
    assert scores.values.tolist() == [1.0, 1.0, 2.0, 0.0]


def test_running_statistics_are_the_wrapped_rewards():
    reward = Fixed([1.0] * 4)
    penalty = OneSidedPenalty(reward, CONCEPT)
    assert penalty.state_dict() == {"n": 4}
    penalty.load_state_dict({"n": 7})
    assert reward.loaded == {"n": 7}


class Tokens(Reward):
    def score(self, batch, readings, sense=1.0):
        ones = torch.ones(len(batch), 2)
        return Scores(ones[:, 0], [Dense(1.0, ones, ones.bool())])


def test_what_cannot_be_penalised_is_refused():
    dense = mr.FeatureReward(direction("d", torch.ones(4), HookPoint(1)), aggregation="per_token")
    for build, error, says in (
        (lambda: OneSidedPenalty(Fixed([1.0]), CONCEPT, form="multiplicativ"), ConfigError, "Did you mean 'multipl"),
        (lambda: OneSidedPenalty(Fixed([1.0]), CONCEPT, alpha=0.0), ConfigError, "alpha > 0"),
        (lambda: OneSidedPenalty(Fixed([1.0]), CONCEPT, eps=math.nan), ConfigError, "eps > 0"),
        (lambda: OneSidedPenalty(Fixed([1.0]), dense), RewardError, "per_token"),
        (lambda: OneSidedPenalty(mr.CompositeReward([dense]), CONCEPT), RewardError, "per_token"),
        (lambda: OneSidedPenalty(Tokens("t"), CONCEPT).score(*read([1.0] * 4)), RewardError, "rewards tokens"),
    ):
        with pytest.raises(error, match=says) as caught:
            build()
        assert "\n" not in str(caught.value)


def test_in_training_it_comes_before_trls_normalisation(tmp_path):
    concept = mr.FeatureReward(direction("c", VECTOR, POINT), name="concept")

    class Kept(MechRewardGRPOTrainer):
        def _calculate_rewards(self, *args):
            self.table = super()._calculate_rewards(*args)
            read = self.passes.read[concept.request]
            self.raw = concept.score(replace(self._step_state.batch, trust=None), {concept.request: read}).parts["raw"]
            return self.table

        def _generate_and_score_completions(self, inputs):
            self.output = super()._generate_and_score_completions(inputs)
            return self.output

    class Ones(Fixed):
        def score(self, batch, readings, sense=1.0):
            return Scores(torch.ones(len(batch)))

    args = MechRewardGRPOConfig(**options(tmp_path, max_steps=1))
    penalty = OneSidedPenalty(Ones([1.0]), concept)
    trainer = Kept(mr.pocket.path(), penalty, args, mr.pocket.dataset("train", 32))
    trainer.train()
    groups = trainer.raw.view(-1, 4).double()
    z = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 0.1)).flatten()
    wanted = torch.where(z > 0, 1 - 2 * z.sigmoid(), 1.0).float()
    assert torch.allclose(trainer.table[:, 0], wanted, atol=1e-5) and wanted.min() < 0
    means, stds = wanted.view(-1, 4).mean(1), wanted.view(-1, 4).std(1)
    advantages = (wanted - means.repeat_interleave(4)) / (stds.repeat_interleave(4) + 1e-4)
    assert torch.allclose(trainer.output["advantages"], advantages, atol=1e-4)
    log = trainer.state.log_history[0]
    assert log["penalised_fixed/penalised"] == pytest.approx(float((z > 0).float().mean()))
