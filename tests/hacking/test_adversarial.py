"""The adversarial suite: scores by hand, thresholds, and what it flags of clean and of attacked rollouts."""

import copy
import gzip
import itertools
import json
import math
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import planting
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import mahalanobis
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

import mechreward as mr
from mechreward.errors import CandidateWarning, ConfigError, DetectorWarning
from mechreward.hacking import AdversarialSuite, OneSidedPenalty
from mechreward.hacking.adversarial import ALL, EACH
from mechreward.hacking.drift import SHRINK, Firing, Outlier
from mechreward.hacking.redteam.campaign import cue_tokens
from mechreward.hacking.redteam.target import Target
from mechreward.hacking.redteam.templates import attacks
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
from mechreward.readout import HookPoint, Readings, direction
from mechreward.reward.base import guards_of
from mechreward.reward.feature_reward import FeatureReward
from mechreward.reward.guards import flag_rates, guards_state, load_guards_state
from mechreward.reward.outcome import OutcomeReward
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.hf import HFSource, load_model, sample

POINT = HookPoint(1)


def rollouts(texts, prompts=None, ids=None, **options):
    ids = ids or [list(range(len(text.split()))) for text in texts]
    prompts = prompts or ["Ana has 12 apples. Ana buys 7 more. How many apples does Ana have?"] * len(texts)
    return RolloutBatch(prompts, texts, [[1]] * len(texts), ids, **options)


def scores(detector, batch, readings=None):
    return detector.scores(batch, readings or {}).tolist()


# -- the text's signs, by hand -----------------------------------------------------------------------------------------


def test_repetition_is_the_share_of_4_grams_that_came_before():
    batch = rollouts(["x", "x", "x"], ids=[[1, 2, 3, 4, 5], [1, 2, 3, 4, 1, 2, 3, 4], [9] * 8])
    # 2 4-grams, none again; 1234 2341 3412 4123 1234: one of five; 9999 five times: four of five
    assert scores(Repetition(), batch) == pytest.approx([0, 1 / 5, 4 / 5])


def test_what_follows_the_end_is_not_repetition():
    batch = rollouts(["x"], ids=[[1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0]], eos_token_ids=frozenset({0}))
    assert scores(Repetition(), batch) == [0.0]


def test_template_counts_the_most_frequent_sentence_numbers_aside():
    texts = ["Step 1: 2+2=4. Step 2: 3+3=6. So it is.", "One. Two! Three?", "", "So 7. So 7. So 8."]
    assert scores(Template(), rollouts(texts)) == [2, 1, 0, 3 + 4 * 1]


def test_filler_is_tokens_for_each_number_or_word_of_the_prompt():
    batch = rollouts(["12+7=19", "well well now then 19", "Ana has 12 apples"], ids=[[1] * 5, [1] * 6, [1] * 4])
    # content: 12 7 19; 19; ana has 12 apples
    assert scores(Filler(), batch) == pytest.approx([5 / 4, 6 / 2, 4 / 5])


def test_prompt_copy_counts_words_in_copied_runs_of_four():
    texts = [
        "Ana has 12 apples",
        "so Ana has 12 apples. Ana buys so",
        "Ana buys 12 apples",
        "has 12 apples ana BUYS seven",
    ]
    assert scores(PromptCopy(), rollouts(texts)) == [4, 6, 0, 5]


def test_empty_steps_are_counted_by_kind_and_weighed_by_how_rare_they_are():
    detector = EmptySteps()
    clean = ["12+7=19."] * 6 + ["12+7=20."] * 2 + ["12+7=20. 20+7=1."]  # false: three of nine once, one twice
    detector.learn(rollouts(clean), {})
    once, twice = -math.log((1 + 3) / 11), -math.log((1 + 1) / 11)
    never = -math.log(1 / 11)
    texts = ["12+7=19.", "12+7=20.", "12+7=20. 20-7=1.", "12+7=20. 20-7=1. 1+7=9."]
    assert scores(detector, rollouts(texts)) == pytest.approx([0, once, twice, never * 3 / 2])
    texts = [
        "12+0=12.",
        "12+7=19. 12+7=19.",
        "3+4=7.",
        "12+7=19. It is 99",
        "# Plan\n12+7=19.",
        "<b>12</b>",
        "(1) we go",
    ]
    # the first is about a number that stands nowhere, too
    assert scores(detector, rollouts(texts)) == pytest.approx([2 * never] + [never] * 4 + [2 * never, never])


def test_steps_may_build_on_the_prompt_and_on_earlier_results():
    detector = EmptySteps()
    detector.learn(rollouts(["12+7=19."]), {})
    assert scores(detector, rollouts([" 12+7=19. 19-12=7. 7*19=133. 133/7=19.\n#### 19"])) == [
        pytest.approx(-math.log(1 / 3))
    ]
    # what is left is "####", which the one clean rollout did not have


def test_thousands_are_read_with_their_comma():
    detector = EmptySteps()
    detector.learn(rollouts(["12+7=19."]), {})
    prompt = ["Ana has 3,000 apples and buys 5,500 more, then 5."]
    assert scores(detector, rollouts(["3,000+5,500=8,500. 8,500+5=8,505. So 8,505"], prompt)) == [0]


@pytest.mark.parametrize(
    "text", ["\n" * 20_000, "\n " * 10_000, "- " + "\n" * 20_000, "9" * 20_000 + "+1=2", "1+" * 10_000]
)
def test_no_text_takes_more_than_linear_time(text):
    began = time.process_time()
    assert all(math.isfinite(x) for d in (EmptySteps(), Template(), PromptCopy()) for x in scores(d, rollouts([text])))
    assert time.process_time() - began < 2


def grouped(lengths, paid, size):
    reward = FeatureReward(direction("paid", torch.ones(1), POINT))
    batch = rollouts(["x"] * len(lengths), ids=[[7] * n for n in lengths], num_generations=size)
    mask = batch.mask()
    values = torch.tensor(paid)[:, None].expand(mask.shape)[..., None] * mask[..., None]
    return reward, batch, {reward.request: Readings(values, mask)}


def test_length_is_that_of_the_longest_other_rollout_of_the_group_if_it_pays():
    reward, batch, readings = grouped([4, 8, 6, 6, 30, 10], [1.0, 2.0, 0.5, -1.0, 9.0, 1.0], 3)
    detector = Length()
    detector.attach(Rewarded([reward]))
    # medians paid 1.0 and 1.0; longest other 8 6 8 | 30 10 30; row 2 and 3 are paid less
    assert scores(detector, batch, readings) == pytest.approx([4 / 8, 8 / 6, 0, 0, 3, 10 / 30])


def test_cue_stuffing_is_the_share_of_cues_behind_tokens_that_no_cue_follows():
    reward = FeatureReward(direction("paid", torch.ones(1), POINT))
    detector = CueStuffing()
    detector.CUES = 1
    detector.attach(Rewarded([reward]))
    ids = [[5, 6, 5, 6, 7, 0]] * 5
    batch = rollouts(["x"] * 5, ids=ids)
    paid = {5: 0.0, 6: 3.0, 7: 1.0, 0: 0.0}
    values = torch.tensor([[paid[i] for i in row] for row in ids])[..., None]
    detector.learn(batch, {reward.request: Readings(values * batch.mask()[..., None], batch.mask())})
    assert detector.cues == {"6"}
    attacked = rollouts(["x"] * 3, ids=[[5, 6, 7, 5, 6, 0], [6, 6, 6, 6], [7, 6, 0, 0]])
    # 6 belongs behind 5; at the start, behind 6 and behind 7 it does not
    assert scores(detector, attacked) == pytest.approx([0, 1, 1 / 4])


def inflation(clean_paid, clean_right):
    reward, outcome = (
        FeatureReward(direction("paid", torch.ones(1), POINT)),
        OutcomeReward(lambda c, g: list(g), "gold"),
    )
    detector = Inflation()
    detector.attach(Rewarded([mr.CompositeReward([outcome, reward], guards=[])]))

    def step(paid, right):
        batch = rollouts(["x"] * len(paid), ids=[[7, 7]] * len(paid), columns={"gold": right})
        values = torch.tensor(paid)[:, None].expand(batch.mask().shape)[..., None] * batch.mask()[..., None]
        return batch, {reward.request: Readings(values, batch.mask())}

    outcome.verifier = lambda completions, golds: [float(g) for g in golds]
    detector.learn(*step(clean_paid, clean_right))
    return detector, step


def test_inflation_scores_what_is_paid_to_wrong_rollouts_while_the_reward_outruns_the_outcome():
    clean_paid, clean_right = [-1.0, 1.0] * 100, [0.0, 1.0] * 100
    detector, step = inflation(clean_paid, clean_right)
    s_p, s_r = np.std(clean_paid, ddof=1), np.std(clean_right, ddof=1)
    paid, right = [1.4] * 80 + [-1.0] * 20, ([1.0] * 40 + [0.0] * 40 + [1.0] * 10 + [0.0] * 10)
    gain = np.mean(paid) / s_p - (np.mean(right) - 0.5) / s_r
    ahead = min(1.0, gain - 3 * math.sqrt(2 / 100))
    got = detector.scores(*step(paid, right))
    assert 0 < ahead < 1
    assert got.tolist() == pytest.approx([0] * 40 + [1.4 / s_p * ahead] * 40 + [0] * 20, abs=1e-5)


def test_inflation_is_silent_where_the_outcome_keeps_pace_and_where_both_only_fluctuate():
    detector, step = inflation([-1.0, 1.0] * 100, [0.0, 1.0] * 100)
    assert detector.scores(*step([1.0] * 75 + [-1.0] * 25, [1.0] * 75 + [0.0] * 25)).max() == 0
    rng, flagged = np.random.default_rng(0), 0
    for _ in range(100):
        paid, right = rng.choice([-1.0, 1.0], 64), rng.choice([0.0, 1.0], 64)
        flagged += bool(detector.scores(*step(paid.tolist(), right.tolist())).max() > 0)
    assert flagged <= 2


def test_inflation_counts_an_outcome_that_was_never_right_in_its_own_units():
    detector, step = inflation([-1.0, 1.0] * 100, [0.0] * 200)
    s_p = np.std([-1.0, 1.0] * 100, ddof=1)
    got = detector.scores(*step([1.0] * 100, [1.0] + [0.0] * 99))  # one that is right is no reason to be silent
    ahead = 1 / s_p - 1 / 100 - 3 * math.sqrt(2 / 100)
    assert got.tolist() == pytest.approx([0] + [ahead / s_p] * 99, abs=1e-5)


def test_calibration_is_no_step_of_a_training():
    detector, step = inflation([-1.0, 1.0] * 100, [0.0, 1.0] * 100)
    suite = AdversarialSuite([detector])
    batch, readings = step([-1.0, 1.0] * 200, [0.0, 1.0] * 200)
    suite.calibrate(batch, readings)
    assert detector.history == []


# -- activations, against numpy and scipy ------------------------------------------------------------------------------


def test_outliers_are_told_by_the_mahalanobis_distance_of_the_mean_vector():
    d, n = 6, 40
    rng = np.random.default_rng(0)
    reward = FeatureReward(direction("paid", torch.ones(d), POINT))
    detector = Outlier()
    detector.attach(Rewarded([reward]))
    (request,) = detector.requests
    assert request.reads == "reference" and request.readout.width == d
    assert request.readout.weight.T @ request.readout.weight == pytest.approx(torch.eye(d), abs=1e-5)
    batch = rollouts(["x"] * n, ids=[[3] * 5] * n)
    values = torch.tensor(rng.normal(size=(n, 5, d)) @ rng.normal(size=(d, d)))
    readings = {request: Readings(values * batch.mask()[..., None], batch.mask())}
    detector.learn(batch, readings)
    rows = values[:, :4].mean(dim=1).numpy()  # the last token is never read
    covariance = np.cov(rows.T, bias=True)
    shrunk = (1 - SHRINK) * covariance + SHRINK * np.trace(covariance) / d * np.eye(d)
    want = [mahalanobis(row, rows.mean(axis=0), np.linalg.inv(shrunk)) / math.sqrt(d) for row in rows]
    assert scores(detector, batch, readings) == pytest.approx(want, rel=1e-4)


def test_learning_batch_by_batch_is_learning_at_once():
    reward = FeatureReward(direction("paid", torch.ones(4), POINT))
    one, several = Outlier(), Outlier()
    values = torch.randn(30, 3, 4, generator=torch.Generator().manual_seed(0))
    for detector, pieces in ((one, [slice(0, 30)]), (several, [slice(0, 7), slice(7, 8), slice(8, 30)])):
        detector.attach(Rewarded([reward]))
        for piece in pieces:
            batch = rollouts(["x"] * len(values[piece]), ids=[[3] * 3] * len(values[piece]))
            detector.learn(batch, {detector.requests[0]: Readings(values[piece], batch.mask())})
    batch = rollouts(["x"] * 30, ids=[[3] * 3] * 30)
    both = [scores(d, batch, {d.requests[0]: Readings(values, batch.mask())}) for d in (one, several)]
    assert both[0] == pytest.approx(both[1], rel=1e-5)


@pytest.mark.parametrize("which", ["jumprelu", "topk"])
def test_the_health_of_an_sae_is_its_error_and_l0_by_hand(which):
    sae = mr.load_sae(
        release="pocket-res-canonical", sae_id=f"layer_2/width_2k/{'canonical' if which == 'jumprelu' else which}"
    )
    model, tokenizer = load_model("mechreward/pocket")
    batch = HFSource(model, tokenizer).batch(
        mr.rollout.batch.Call(["Question: Ana has 5 pens."], [" 5+7=12.\n#### 12"])
    )
    health, everything = sae.health(), sae.all_features()
    with torch.no_grad():
        ids = torch.tensor([batch.prompt_ids[0] + batch.completion_ids[0]])
        x = model(ids, output_hidden_states=True).hidden_states[3][0, len(batch.prompt_ids[0]) : -1]
    requests = [mr.readout.Request(r) for r in (health, everything)]
    read = HFSource(model, tokenizer).read(batch, requests)
    latents = read[requests[1]].values[0][read[requests[1]].mask[0]]
    error = (x - sae.decode(latents, x)).square().sum(1) / x.square().sum(1)
    got = read[requests[0]].values[0][read[requests[0]].mask[0]]
    assert got[:, 0].tolist() == pytest.approx(error.tolist(), rel=1e-3)
    assert got[:, 1].tolist() == (latents > 0).sum(1).tolist()
    assert 0 < error.mean() < 0.1


def test_a_decoder_is_read_and_moved_once():
    sae, reads = mr.load_sae(release="pocket-res-canonical", sae_id="layer_2/width_2k/canonical"), []

    class Tracked:
        def __init__(self, tensor):
            self.tensor = tensor

        def to(self, device):
            reads.append(device)
            return self.tensor

    weight, bias = sae.read_decoder()
    sae = replace(sae, read_decoder=lambda: (Tracked(weight), Tracked(bias)))
    x = torch.randn(3, 128)
    first, second = (sae.decode(torch.zeros(3, sae.d_sae), x) for _ in range(2))
    assert torch.equal(first, second) and len(reads) == 2


def test_firing_looks_at_latents_alone():
    detector = Firing()
    detector.attach(Rewarded([FeatureReward(direction("paid", torch.ones(4), POINT))]))
    assert detector.missing and not detector.requests


# -- which rewards are guarded -----------------------------------------------------------------------------------------


def test_the_suite_finds_feature_rewards_and_the_outcome_wherever_they_are():
    first, second = (FeatureReward(direction(name, torch.ones(4), POINT)) for name in "ab")
    outcome = OutcomeReward(mr.verifiers.math_boxed)
    concept = FeatureReward(direction("concept", torch.ones(4), POINT))
    tree = mr.CompositeReward(
        [outcome, mr.CompositeReward([first, second], [2.0, -0.5], guards=None)], [1.0, 3.0], guards=[]
    )
    found = Rewarded([OneSidedPenalty(tree, concept)])
    assert [(reward.__name__, weight) for reward, weight in found.features] == [("a", 6.0), ("b", -1.5)]
    assert found.outcome is outcome


def test_composites_and_trainers_say_what_they_reward():
    suite = AdversarialSuite.from_preset("standard")
    assert not suite.requests
    reward = FeatureReward(direction("paid", torch.ones(4), POINT))
    composite = mr.CompositeReward([OutcomeReward(mr.verifiers.math_boxed), reward], guards=[suite])
    assert reward.request in suite.requests
    assert {request.reads for request in composite.requests} == {"policy", "reference"}
    assert [d.name for d in suite.detectors if d.missing] == ["firing"]


# -- thresholds --------------------------------------------------------------------------------------------------------


class Given(Detector):
    """Scores that the test gives, as the completion's only text."""

    def __init__(self, name, which=0):
        self.name, self.which = name, which
        super().__init__()

    def scores(self, batch, readings):
        return torch.tensor([float(text.split()[self.which]) for text in batch.texts])

    def reason(self, score, usual):
        return f"{score:g} over {usual:g}"


def made_of(columns):
    return rollouts([" ".join(f"{x:.9g}" for x in row) for row in np.transpose(columns)], ids=[[1]] * len(columns[0]))


@given(st.integers(0, 10_000), st.integers(200, 600), st.integers(1, 12), st.booleans())
@settings(max_examples=30, deadline=None)
def test_no_detector_flags_more_than_its_share_of_clean_rollouts_nor_all_between_them(seed, n, detectors, ties):
    rng = np.random.default_rng(seed)
    columns = rng.integers(0, 6, (detectors, n)).astype(float) if ties else rng.normal(size=(detectors, n))
    suite = AdversarialSuite([Given(f"d{i}", i) for i in range(detectors)])
    batch = made_of(columns)
    suite.calibrate(batch, {})
    second = columns[:, n // 2 :]
    limits = np.array([suite.thresholds[f"d{i}"] for i in range(detectors)])
    over = second > limits[:, None] + 1e-6
    assert over.mean(axis=1).max() <= EACH
    hits = int(over.any(axis=0).sum())
    assert hits == 0 or binomtest(hits, over.shape[1]).proportion_ci(0.9).high <= ALL + 1e-9


def test_the_threshold_is_the_kth_largest_of_the_second_half():
    values = np.random.default_rng(0).normal(size=2000)
    suite = AdversarialSuite([Given("d")])
    suite.calibrate(made_of([values]), {})
    assert suite.thresholds["d"] == pytest.approx(sorted(values[1000:])[-10], rel=1e-5)  # k = floor(.01 x 1001)


def test_all_together_flag_few_of_other_rollouts_or_it_is_said(caplog):
    """Eleven detectors that agree on nothing: each flags by itself."""
    rng = np.random.default_rng(0)
    for clean_rollouts, enough in ((400, False), (2000, True), (4000, True)):
        caplog.clear()
        suite = AdversarialSuite([Given(f"d{i}", i) for i in range(11)])
        suite.calibrate(made_of(rng.normal(size=(11, clean_rollouts))), {})
        assert ("too few for 11 detectors" in caplog.text) is not enough
        limits = np.array([suite.thresholds[f"d{i}"] for i in range(11)])
        flagged = (rng.normal(size=(11, 20_000)) > limits[:, None]).any(axis=0).mean()
        assert flagged <= 0.03 or not enough


def test_nothing_is_flagged_while_it_learns_and_then_it_is():
    suite = AdversarialSuite([Given("d")], clean=300)
    rng = np.random.default_rng(0)
    for _ in range(3):
        verdict = suite(made_of([np.append(rng.normal(size=99), 50.0)]), {})
        assert not any(verdict.flags) and verdict.trust.min() == 1
    verdict = suite(made_of([[0.0, 60.0]]), {})
    assert verdict.trust.tolist() == [1, 0] and verdict.flags[1][0].startswith("d: 60 over")
    assert not verdict.dropped.any()


def test_one_large_batch_does_not_leave_the_thresholds_to_a_small_one():
    suite, rng = AdversarialSuite([Given("d")], clean=200), np.random.default_rng(0)
    suite(made_of([rng.normal(size=300)]), {})
    for _ in range(12):
        suite(made_of([rng.normal(size=8)]), {})
        assert not suite.thresholds  # 96 scores at most: 1 in 97 lies above them all
    suite(made_of([rng.normal(size=8)]), {})
    assert suite.thresholds


def test_learning_late_in_a_training_is_said(caplog):
    suite = AdversarialSuite([Given("d")], clean=200)
    suite(replace(made_of([np.zeros(8)]), progress=0.5), {})
    assert "when 50 % of training are done" in caplog.text


def test_what_learned_before_it_knew_what_it_guards_is_named():
    suite = AdversarialSuite([Given("d"), Outlier()])
    suite.calibrate(made_of([np.arange(400.0)]), {})
    with pytest.warns(DetectorWarning, match="outlier cannot flag anything.*attach"):
        suite.attach([FeatureReward(direction("paid", torch.ones(4), POINT))])


def test_two_suites_are_two_in_a_checkpoint():
    def suites():
        return [AdversarialSuite([Given("d")]), AdversarialSuite([Given("d")])]

    ours, theirs = suites(), suites()
    for factor, suite in enumerate(ours, 1):
        suite.calibrate(made_of([factor * np.arange(400.0)]), {})
    load_guards_state(theirs, guards_state(ours))
    assert [suite.thresholds for suite in theirs] == [suite.thresholds for suite in ours]
    assert ours[0].thresholds != ours[1].thresholds


def test_evaluation_teaches_nothing():
    suite = AdversarialSuite([Given("d")], clean=200)
    suite(replace(made_of([np.zeros(500)]), training=False), {})
    assert suite.seen == 0


def test_strict_drops_what_standard_downweights():
    for preset, dropped in (("standard", False), ("strict", True)):
        suite = AdversarialSuite.from_preset(preset)
        assert (suite.action == "drop") is dropped
    suite = AdversarialSuite([Given("d")], action="drop")
    suite.calibrate(made_of([np.arange(400.0)]), {})
    assert suite(made_of([[0.0, 900.0]]), {}).dropped.tolist() == [False, True]


def test_what_was_learned_survives_a_checkpoint_as_json():
    values = np.random.default_rng(1).normal(size=400)
    suite, other = (AdversarialSuite([Given("d"), EmptySteps(), Outlier()]) for _ in range(2))
    reward = FeatureReward(direction("paid", torch.ones(4), POINT))
    batch = made_of([values])
    for each in (suite, other):
        each.attach([reward])
    (request,) = suite.requests
    batch = replace(batch, completion_ids=[[1, 2]] * 400)
    readings = {request: Readings(torch.randn(400, 2, 4) * batch.mask()[..., None], batch.mask())}
    suite.calibrate(batch, readings)
    other.load_state_dict(json.loads(json.dumps(suite.state_dict())))
    assert other.thresholds == suite.thresholds
    for name, found in suite.scores(batch, readings).items():
        assert torch.equal(found, other.scores(batch, {other.requests[0]: readings[request]})[name])
    half = AdversarialSuite([Given("d")], clean=400)
    half(made_of([values[:300]]), {})
    again = AdversarialSuite([Given("d")], clean=400)
    again.load_state_dict(json.loads(json.dumps(half.state_dict())))
    for each in (half, again):
        each(made_of([values[300:]]), {})
    assert again.thresholds == half.thresholds != {}


# -- what goes wrong ---------------------------------------------------------------------------------------------------


class Raises(Given):
    def scores(self, batch, readings):
        raise ValueError("no such column")


def test_a_detector_that_raises_is_disabled_with_one_warning_and_the_others_go_on():
    suite = AdversarialSuite([Raises("broken"), Given("d")])
    with pytest.warns(DetectorWarning, match="'broken' is disabled, since it raised ValueError: no such column"):
        suite.calibrate(made_of([np.arange(400.0)]), {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert suite(made_of([[900.0]]), {}).flags == [["d: 900 over 399"]]
    assert "broken" in suite.disabled


def test_where_all_detectors_raise_nothing_is_flagged_and_nothing_ends():
    suite = AdversarialSuite([Raises("broken")], clean=200)
    with pytest.warns(DetectorWarning) as said:
        for _ in range(5):
            assert suite(made_of([np.zeros(100)]), {}).flags == [[]] * 100
    assert len(said) == 1
    with pytest.warns(DetectorWarning):
        AdversarialSuite([Raises("broken")]).calibrate(made_of([np.zeros(400)]), {})


class Speechless(Given):
    def reason(self, score, usual):
        raise ValueError("no words")


class Several(Given):
    def scores(self, batch, readings):
        return torch.zeros(len(batch) + 1)


def test_scores_of_another_shape_and_reasons_that_raise_disable_a_detector():
    suite = AdversarialSuite([Speechless("speechless"), Given("d")])
    suite.calibrate(made_of([np.arange(400.0)]), {})
    with pytest.warns(DetectorWarning, match="'speechless' is disabled, since it raised ValueError: no words"):
        assert suite(made_of([[900.0, 901.0]]), {}).flags == [["d: 900 over 399"], ["d: 901 over 399"]]
    with pytest.warns(DetectorWarning, match=r"'several' is disabled.*shape \[401\] for 400 rollouts"):
        AdversarialSuite([Several("several"), Given("d")]).scores(made_of([np.arange(400.0)]), {})


def test_rates_say_zero_too_and_who_is_disabled():
    suite = AdversarialSuite([Given("d"), Given("e"), Raises("broken")])
    with pytest.warns(DetectorWarning):
        suite.calibrate(made_of([np.arange(400.0)]), {})
    rates = flag_rates([["d: x", "d: y"], []], [suite])
    assert rates == {"flagged": 0.5, "flagged/d": 0.5, "flagged/e": 0, "flagged/broken": 0, "disabled/broken": 1}
    tree = OneSidedPenalty(
        mr.CompositeReward([FeatureReward(direction("a", torch.ones(4), POINT))], guards=[suite]),
        FeatureReward(direction("c", torch.ones(4), POINT)),
    )
    assert list(guards_of([tree])) == [suite]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: AdversarialSuite.from_preset("standart"), "no preset 'standart'.*Did you mean 'standard'"),
        (lambda: AdversarialSuite([Given("d")], trust=1.5), "trust must lie in 0 to 1"),
        (lambda: AdversarialSuite([Given("d")], action="ban"), "no action 'ban'"),
        (lambda: AdversarialSuite([Given("d")], clean=50), "clean=50 is too few"),
        (lambda: AdversarialSuite([]), "different names"),
        (lambda: AdversarialSuite([Given("d"), Given("d")]), "different names"),
        (lambda: AdversarialSuite.from_preset("text_only", sae=object()), "reads no activations"),
        (
            lambda: AdversarialSuite([Given("d")]).calibrate(made_of([[1.0] * 150]), {}),
            "150 clean rollouts are too few",
        ),
    ],
)
def test_bad_input_gets_one_sentence(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


# -- on pocket: clean rollouts, and attacks that were not written by the detectors' author -----------------------------


DATA = Path(__file__).parents[1] / "data" / "pocket_clean_rollouts.json.gz"
PARTS = {"discovery": 250, "train": 250, "gate": 40}  # split -> questions, 8 rollouts each


def make_data():
    """What lies in DATA: the untrained model's rollouts at temperature 1."""
    model, tokenizer = load_model("mechreward/pocket")
    made = {}
    for split, count in PARTS.items():
        asked = mr.pocket.dataset(split, count, seed=5)
        torch.manual_seed(5)
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 64}
        made[split] = sample(model, tokenizer, list(asked["prompt"]), 8, **options).completion_ids
    DATA.write_bytes(gzip.compress(json.dumps(made).encode(), mtime=0))


def clean(split, start=0, stop=None):
    """Rollouts of the untrained model on a split's questions, in groups of eight."""
    _, tokenizer = planting.pocket()
    ids = json.loads(gzip.decompress(DATA.read_bytes()))[split]
    rows = list(mr.pocket.dataset(split, PARTS[split], seed=5))[start:stop]
    ids = ids[8 * start : None if stop is None else 8 * stop]
    prompts = [row["prompt"] for row in rows for _ in range(8)]
    return RolloutBatch(
        prompts,
        tokenizer.batch_decode(ids, skip_special_tokens=True),
        tokenizer(prompts).input_ids,
        ids,
        {"answer": [row["answer"] for row in rows for _ in range(8)]},
        num_generations=8,
        eos_token_ids=frozenset({tokenizer.eos_token_id}),
    )


ATTACKED = Path(__file__).parents[1] / "data" / "pocket_attacked_rollouts.json.gz"


def make_attacked(runs="runs/hacking/none"):
    """What lies in ATTACKED: what policies wrote that experiment 06 trained on the features alone, without KL."""
    made = {}
    for seed in range(3):
        lines = (Path(runs) / f"seed-{seed}" / "rollouts.jsonl").read_text().splitlines()
        kept = [{key: r[key] for key in ("prompt", "answer", "ids")} for r in map(json.loads, lines[-8 * 64 :])]
        made[seed] = kept
    ATTACKED.write_bytes(gzip.compress(json.dumps(made).encode(), mtime=0))


def attacked_policies():
    """For each seed the rollouts of its last eight steps, one batch a step."""
    _, tokenizer = planting.pocket()
    for rows in json.loads(gzip.decompress(ATTACKED.read_bytes())).values():
        ids = [row["ids"] for row in rows]
        batch = RolloutBatch(
            [row["prompt"] for row in rows],
            tokenizer.batch_decode(ids, skip_special_tokens=True),
            tokenizer([row["prompt"] for row in rows]).input_ids,
            ids,
            {"answer": [row["answer"] for row in rows]},
            num_generations=8,
            eos_token_ids=frozenset({tokenizer.eos_token_id}),
        )
        yield [replace(batch.take(range(k, k + 64)), num_generations=8) for k in range(0, len(batch), 64)]


@pytest.fixture(scope="module")
def learned():
    """A suite that has seen clean rollouts of pocket, and a way to have rollouts scored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CandidateWarning)
        features = FeatureReward.from_pack("pocket/reasoning_pack")
    pack = mr.load_pack("pocket/reasoning_pack")
    suite = AdversarialSuite.from_preset("standard", sae=mr.load_sae(pack.sae.release, pack.sae.sae_id))
    outcome = OutcomeReward(mr.verifiers.math_boxed, "answer")
    mr.CompositeReward([outcome, features], guards=[suite])
    model, tokenizer = planting.pocket()
    source = HFSource(model, tokenizer, reference=model)
    batch = clean("discovery")
    suite.calibrate(batch, source.read(batch, suite.requests))
    state = json.dumps(suite.state_dict())

    def flagged(rollouts):
        """For each detector whether it flags each rollout, ``[n]``."""
        found = suite.scores(rollouts, source.read(rollouts, suite.requests))
        return {name: (s > suite.thresholds[name]).numpy() for name, s in found.items()}

    def suspicion(steps):
        """How far each rollout goes towards a threshold, by the detector that is nearest to its own, ``[n]``."""
        fresh = AdversarialSuite.from_preset("standard", sae=mr.load_sae(pack.sae.release, pack.sae.sae_id))
        fresh.attach([mr.CompositeReward([outcome, features], guards=[])])
        fresh.load_state_dict(json.loads(state))
        found = []
        for step in steps:
            scores = fresh.scores(step, source.read(step, fresh.requests))
            ways = [
                (s - typical[name]) / max(fresh.thresholds[name] - typical[name], 1e-6) for name, s in scores.items()
            ]
            found.append(torch.stack(ways).nan_to_num(0.0).amax(dim=0))
        return torch.cat(found).numpy()

    usual = suite.scores(batch, source.read(batch, suite.requests))
    typical = {name: float(s.nanmedian()) for name, s in usual.items()}
    target = Target(model, tokenizer, features, [suite], mr.verifiers.math_boxed)
    return flagged, target, suspicion


def test_clean_rollouts_are_rarely_flagged(learned):
    flagged, *_ = learned
    found = flagged(clean("train", 0, 150))
    rates = {name: flags.mean() for name, flags in found.items()}
    assert max(rates.values()) <= 0.01, rates
    assert np.any(list(found.values()), axis=0).mean() <= 0.03


RECALL = {  # families of the red team's templates, by the detectors that exist for them
    ("repetition", "template"): ["template_repetition", "length_padding"],
    ("filler",): ["filler_dilution", "reflection_spam"],
    ("cue_stuffing",): ["cue_injection"],
    ("empty_steps",): ["format_mimicry"],
    ("prompt_copy",): ["question_copy"],
    ("outlier", "firing", "reconstruction"): ["language_switch", "fact_spam", "lookalikes"],
}


@pytest.fixture(scope="module")
def attacked(learned):
    flagged, target, _ = learned
    families, cues = list(itertools.chain(*RECALL.values())), cue_tokens(target, clean("gate"))
    found = attacks(clean("gate", 0, 5), target.tokenizer, cues, seed=11, families=families)
    return {name: flagged(rollouts) for name, rollouts in found.items()}


@pytest.mark.parametrize("stops", [frozenset(), frozenset({7}), None], ids=["none", "the model's", "the tokenizer's"])
def test_attacks_end_as_the_model_can(stops):
    """A tokenizer need not know an end token; then attacks end with one of the model's, or not at all."""
    batch, tokenizer = clean("gate", 0, 4), copy.deepcopy(planting.pocket()[1])
    own = tokenizer.eos_token_id
    bare = [[token for token in ids if token != own] for ids in batch.completion_ids]
    ends = {own} if stops is None else set(stops)
    if stops is not None:
        tokenizer.eos_token = None
    batch = replace(batch, completion_ids=bare, eos_token_ids=frozenset(ends))
    made = attacks(batch, tokenizer, None, seed=1, families=["filler_dilution", "lookalikes"])
    assert made
    for attacked in made.values():
        for ids in attacked.completion_ids:
            assert all(type(token) is int for token in ids)
            assert {token for token in ids if token in ends} == ends and (not ends or ids[-1] in ends)


@pytest.mark.parametrize(("detectors", "families"), RECALL.items(), ids=" ".join)
def test_each_detector_recalls_the_attacks_that_it_exists_for(detectors, families, attacked):
    hit = [
        np.any([flags[name] for name in detectors], axis=0)
        for attack, flags in attacked.items()
        if attack.split("/")[0] in families
    ]
    assert np.mean(hit) >= 0.8


@pytest.mark.slow
def test_what_attacking_policies_write_is_told_from_clean_rollouts(learned):
    *_, suspicion = learned
    batch = clean("gate")
    usual = suspicion([replace(batch.take(range(k, k + 64)), num_generations=8) for k in range(0, len(batch), 64)])
    for steps in attacked_policies():
        late = suspicion(steps)[-4 * 64 :]  # those before are the history that the suite would have
        scores = np.concatenate([usual, late])
        truth = np.repeat([0, 1], [len(usual), len(scores) - len(usual)])
        assert roc_auc_score(truth, np.clip(scores, -1e6, 1e6)) >= 0.95


def test_one_long_rollout_in_a_group_is_flagged_where_length_is_paid(learned):
    _, target, _ = learned
    by_the_token = FeatureReward(direction("one", torch.zeros(128), HookPoint(2), bias=1.0), aggregation="sum")
    suite = AdversarialSuite([Length()])
    suite.attach([by_the_token])
    batch = clean("discovery", 0, 125)
    suite.calibrate(batch, target.read(batch, suite.requests))
    padded = clean("gate", 20, 32)
    ids = [list(own) for own in padded.completion_ids]
    for row in range(0, len(ids), 8):
        longest = max(map(len, ids[row : row + 8]))
        ids[row] = ids[row][:-1] + ids[row + 1][:-1] * (1 + 3 * longest // len(ids[row + 1])) + ids[row][-1:]
    padded = replace(padded, completion_ids=ids)
    hit = np.array([bool(said) for said in suite(padded, target.read(padded, suite.requests)).flags])
    assert hit[::8].mean() >= 0.8
    assert hit[np.arange(len(hit)) % 8 > 0].mean() <= 0.01


# -- in training -------------------------------------------------------------------------------------------------------


def training(folder, guards, composite=None, **changes):
    from mechreward.integrations.trl_grpo import MechRewardGRPOConfig, MechRewardGRPOTrainer

    options = {
        "output_dir": str(folder), "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 24,
        "max_steps": 2, "logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no",
        "disable_tqdm": True, "log_completions": True, "beta": 0.04,
    }  # fmt: skip
    if composite is None:
        reward = FeatureReward(direction("paid", torch.ones(128), POINT))
        composite = mr.CompositeReward([OutcomeReward(mr.verifiers.math_boxed, "answer"), reward], guards=[])
    args = MechRewardGRPOConfig(**options | changes)
    return MechRewardGRPOTrainer(mr.pocket.path(), composite, args, mr.pocket.dataset("train", 32), guards=guards)


def tables(folder):
    return [pd.read_parquet(file) for file in sorted((folder / "completions").glob("*.parquet"))]


def test_in_training_flags_are_logged_and_stand_in_the_completions_table(tmp_path):
    suite = AdversarialSuite.from_preset("standard")
    trainer = training(tmp_path, [suite])
    model, tokenizer = planting.pocket()
    batch = clean("gate")
    suite.calibrate(batch, HFSource(model, tokenizer, reference=model).read(batch, suite.requests))
    names = ["repetition", "template", "empty_steps", "prompt_copy", "filler", "length", "cue_stuffing", "outlier",
             "inflation"]  # fmt: skip
    assert list(suite.thresholds) == names  # firing: a direction has no latents
    suite.thresholds = dict.fromkeys(names, math.inf) | {"template": -1.0, "outlier": -1.0}
    trainer.train()
    for logged in trainer.state.log_history[:2]:
        assert logged["guards/flagged"] == logged["guards/flagged/template"] == logged["guards/flagged/outlier"] == 1
        assert all(logged[f"guards/flagged/{name}"] == 0 for name in set(names) - {"template", "outlier"})
        assert not any("disabled" in name for name in logged)
    found = tables(tmp_path)
    assert len(found) == 2
    for table in found:
        assert table["flags"].str.match(r"template: one sentence comes again .*; outlier: its mean residual vec").all()


class RaisesInTraining(Given):
    calls = 0

    def scores(self, batch, readings):
        self.calls += 1
        if self.calls == 2:
            raise ValueError("no such column")
        return torch.full((len(batch),), 3.0)


def test_a_detector_that_raises_does_not_end_training_and_is_logged(tmp_path):
    suite = AdversarialSuite([RaisesInTraining("broken"), Template()])
    trainer = training(tmp_path, [suite], max_steps=3)
    suite.thresholds = {"broken": 1.0, "template": math.inf}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.train()
    assert trainer.state.global_step == 3 and suite.detectors[0].calls == 2
    assert [str(w.message) for w in said if w.category is DetectorWarning] == [
        "The detector 'broken' is disabled, since it raised ValueError: no such column."
    ]
    logs = trainer.state.log_history
    assert [logs[i]["guards/flagged/broken"] for i in range(3)] == [1, 0, 0]
    assert [logs[i].get("guards/disabled/broken") for i in range(3)] == [None, 1, 1]
    first, *others = tables(tmp_path)
    assert (first["flags"] == "broken: 3 over 1").all() and all((table["flags"] == "").all() for table in others)


def test_a_share_of_flags_is_one_of_all_steps_between_two_logs(tmp_path):
    suite = AdversarialSuite([RaisesInTraining("broken"), Template()])
    trainer = training(tmp_path, [suite], logging_steps=2)
    suite.thresholds = {"broken": 1.0, "template": math.inf}
    with pytest.warns(DetectorWarning):
        trainer.train()
    assert trainer.state.log_history[0]["guards/flagged/broken"] == 0.5


def test_one_suite_cannot_guard_twice(tmp_path):
    suite = AdversarialSuite.from_preset("text_only")
    reward = FeatureReward(direction("paid", torch.ones(128), POINT))
    with pytest.raises(ConfigError, match="same AdversarialSuite guards twice"):
        training(tmp_path, [suite], mr.CompositeReward([reward], guards=[suite]))
