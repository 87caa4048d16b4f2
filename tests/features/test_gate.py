"""Discovery and the gate: effects against slow definitions, and verdicts on worlds whose truth is known."""

from types import SimpleNamespace

import numpy as np
import pytest

from mechreward.errors import PackError
from mechreward.features.discover import select
from mechreward.features.gate import P_BELOW, Measured, gate, surface_features, surface_gain
from mechreward.features.judge import by_chance_figures
from mechreward.features.scan import permuted, scan
from mechreward.stats import spearman

# Discovery -----------------------------------------------------------------------------------------------------------


def test_effects_match_a_slow_float64_loop():
    rng = np.random.default_rng(0)
    activations = np.maximum(rng.normal(size=(151, 30)) * np.logspace(-4, 3, 30) + 0.3, 0).astype(np.float32)
    activations[:, 4] += 100  # a large offset, of which a one-pass variance in float32 would make nonsense
    labels = rng.random(151) < 0.3
    for f, d in enumerate(scan([activations], labels, permutations=0).effect):
        a, b = activations[labels, f].astype(np.float64), activations[~labels, f].astype(np.float64)
        pooled = ((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2)
        assert d == pytest.approx((a.mean() - b.mean()) / np.sqrt(pooled), rel=1e-7)


def test_effects_of_latents_that_do_not_vary():
    labels = np.array([True, False] * 40)
    activations = np.zeros((80, 3), dtype=np.float32)
    activations[:, 1] = 0.1  # constant but not 0: its mean rounds
    activations[labels, 2] = 1.0  # varies only between the sets
    effects = scan([activations], labels, permutations=0).effect
    assert effects[0] == effects[1] == 0 and effects[2] > 1e6


def test_select_takes_float16_and_says_what_is_wrong():
    rng = np.random.default_rng(0)
    activations, labels = rng.random((140, 5)).astype(np.float16), np.arange(140) < 70
    assert select(activations, labels)[0].tolist() == select(activations.astype(float), labels)[0].tolist()
    with pytest.raises(PackError, match="with and without"):
        select(activations, np.ones(140, dtype=bool))
    with pytest.raises(PackError, match="139 labels"):
        select(activations, labels[:-1])
    activations[3, 2] = np.nan
    with pytest.raises(PackError, match="NaN"):
        select(activations, labels)


def test_select_finds_planted_features_and_weighs_them_alike():
    rng = np.random.default_rng(0)
    labels = rng.random(400) < 0.4
    activations = np.maximum(rng.normal(size=(400, 300)), 0)
    activations[:, [10, 20, 30]] += labels[:, None] * np.array([3, 2, 1.5])
    activations[:, [40, 50]] += ~labels[:, None] * np.array([2.0, 1.5])
    activations[:, 20] *= 1000
    ids, weights = select(activations, labels, n_positive=3, n_negative=2)
    assert ids.tolist() == [10, 20, 30, 40, 50] and ids.dtype == np.int64
    np.testing.assert_allclose(np.abs(weights) * activations[:, ids].std(axis=0), 1 / 5)
    assert np.sign(weights).tolist() == [1, 1, 1, -1, -1]


def test_select_breaks_ties_by_id_and_leaves_out_latents_that_hardly_fire():
    labels = np.arange(200) < 100
    one = np.maximum(np.random.default_rng(0).normal(size=200) + labels, 0)
    rare = np.zeros(200)
    rare[0] = 1e3
    activations = np.stack([one, rare, one, -one - 1, one], axis=1)  # the fourth never fires at all
    ids, _ = select(activations, labels, n_positive=2, n_negative=2)
    assert ids.tolist() == [0, 2]
    with pytest.raises(PackError, match="min_firing"):
        select(activations[:, [1, 3]], labels)


# Worlds whose truth is known -----------------------------------------------------------------------------------------

WORDS = "so then it is has more left takes gives plus".split()


def world(seed, n=480, latents=120, per_prompt=4):
    """Rollouts whose label follows a hidden quality (latents 0-9) and, in part, the way of answering (10-19)."""
    rng = np.random.default_rng(seed)
    careful = rng.random(n) < 0.6
    quality = 0.4 * rng.normal(size=n // per_prompt).repeat(per_prompt) + rng.normal(size=n)
    lengths = rng.integers(8, 30, n)
    activations = rng.normal(size=(n, latents))
    signs = np.repeat([1, -1], 5)
    activations[:, :10] += 1.2 * signs * quality[:, None]
    activations[:, 10:20] += 1.2 * signs * careful[:, None]
    return SimpleNamespace(
        activations=np.maximum(activations, 0).astype(np.float32),
        labels=quality + 0.5 * careful + 0.5 * rng.normal(size=n) > 0.3,
        groups=np.arange(n) // per_prompt,
        texts=[" ".join(rng.choice(WORDS, length)) + f" #### {rng.integers(100)}" for length in lengths],
        lengths=lengths,
        ways=np.where(careful, "careful", "direct").tolist(),
    )


def measured(gated, scores, null, **more):
    rollouts = {name: value for name, value in vars(gated).items() if name != "activations"}
    known = {"null_of": "selections by chance", "aggregation": "mean", "temperature": 1.0, "data": "A made-up world."}
    return Measured(scores=scores, null=null, **rollouts | known | more)


def judged(gated, scores, null, careful=True, draws=200):
    evidence = gate(measured(gated, scores, null, ways=gated.ways if careful else None), draws=draws)
    return evidence, {test.name: test.passed for test in evidence.verdict}


def null_of(found, gated, draws=100, seed=0):
    """What selections on shuffled labels reach, as discovery and the judge make it."""
    null = []
    for labels in permuted(found.labels, found.groups, draws, np.random.default_rng(seed)):
        ids, weights = select(found.activations, labels, 5, 5)
        null.append(by_chance_figures(gated.activations[:, ids] @ weights, gated.labels))
    return np.array(null)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_causal_features_pass_and_features_of_the_way_or_of_nothing_fail(seed):
    found, gated = world(2 * seed), world(2 * seed + 1)
    null = null_of(found, gated)
    ids, weights = select(found.activations, found.labels, 5, 5)
    evidence, passed = judged(gated, gated.activations[:, ids] @ weights, null)
    assert set(ids) <= set(range(20))
    assert evidence.passed() and len(passed) == 6, evidence.reason()
    assert evidence.p_value < P_BELOW and evidence.auc_within_careful and evidence.gain.low > 0

    _, way = judged(gated, gated.activations[:, 10:20] @ np.repeat([1.0, -1.0], 5), null)
    assert not way["auc"] and not way["gain_over_surface"]
    random_ids = np.random.default_rng(seed).choice(np.arange(20, 120), 10, replace=False)
    noise, nothing = judged(gated, gated.activations[:, random_ids].sum(axis=1), null)
    assert not any(nothing.values()) and "not above" in noise.reason()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_reading_that_is_only_length_fails_the_surface_test(seed):
    gated = world(seed)
    rng = np.random.default_rng(seed)
    gated.labels = np.abs(gated.lengths - 18) + rng.normal(size=480) > 6  # not even monotone in the length
    scores = (gated.lengths - 18.0) ** 2 + 3 * rng.normal(size=480)
    evidence, passed = judged(gated, scores, np.full((100, 2), [0.1, 0.55]), careful=False)
    would_do = {"auc": True, "spearman": True, "permutation": True}
    assert passed == would_do | {"length_controlled": False, "gain_over_surface": False}
    assert evidence.auc_within_careful is None and evidence.n_within_careful is None
    assert set(evidence.surface) == {"length", "ngrams"} and evidence.surface["length"] > 0.9
    assert "the text alone would do" in evidence.reason()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_reading_that_is_only_the_share_of_a_cue_word_has_no_gain(seed):
    gated, rng = world(seed), np.random.default_rng(seed)
    share = np.array([text.split().count("so") / len(text.split()) for text in gated.texts])
    labels = share + 0.03 * rng.normal(size=480) > 0.1
    surface = surface_features(gated.texts, gated.lengths)
    gain = surface_gain(share + 0.05 * rng.normal(size=480), labels, gated.groups, surface, draws=200)
    assert gain.alone["ngrams"] > 0.85 > 0.6 > gain.alone["length"]
    assert gain.gain.low <= 0 and abs(gain.gain.value) < 0.005


def test_p_values_of_selections_on_meaningless_labels_are_not_too_small():
    small = 0
    for seed in range(30):
        found, gated = world(100 + seed, n=120, latents=40), world(200 + seed, n=120, latents=40)
        found.labels = np.random.default_rng(seed).permutation(found.labels)
        ids, weights = select(found.activations, found.labels, 5, 5)
        observed = abs(spearman(gated.activations[:, ids] @ weights, gated.labels))
        null = null_of(found, gated, draws=19, seed=seed)[:, 0]
        small += (1 + (null >= observed).sum()) / 20 <= 0.1
    assert small <= 8  # expected 3; P(more than 8) < .001


def test_the_gate_says_what_is_wrong_with_its_input():
    gated, null = world(0), np.full((100, 2), 0.1)
    scores = gated.activations[:, 0].astype(float)
    with pytest.raises(PackError, match="same label"):
        judged(SimpleNamespace(**{**vars(gated), "labels": np.ones(480, dtype=bool)}), scores, null)
    with pytest.raises(PackError, match="two prompts"):
        judged(SimpleNamespace(**{**vars(gated), "groups": np.zeros(480)}), scores, null)
    one_prompt = SimpleNamespace(**{**vars(gated), "labels": np.arange(480) < 4})
    with pytest.raises(PackError, match="sample more prompts"):
        judged(one_prompt, scores, null)


def test_a_careful_subset_that_says_nothing_fails_and_few_draws_say_so():
    gated = world(0)
    gated.ways = np.where(gated.labels, "careful", "direct").tolist()  # every careful answer shows the behaviour
    evidence, passed = judged(gated, gated.activations[:, 0].astype(float), np.full((20, 2), 0.1), draws=50)
    assert not passed["auc_within_careful"] and evidence.auc_within_careful is None
    assert evidence.n_within_careful == gated.labels.sum()
    assert not passed["permutation"] and "100 are the least" in evidence.reason()


def test_surface_features_hide_which_number_it_is_but_not_how_long_it_is():
    texts = ["12 + 7 = 19\n#### 19", "45 + 3 = 48\n#### 48"] * 5
    ngrams = surface_features(texts, np.arange(10), ["careful"] * 10)["ngrams"].toarray()
    np.testing.assert_array_equal(ngrams[0], ngrams[1])
    longer = [text.replace("19", "119") for text in texts]
    ngrams = surface_features(longer, np.arange(10))["ngrams"].toarray()
    assert (ngrams[0] != ngrams[1]).any()
    assert "ngrams" not in surface_features([""] * 10, np.arange(10))
