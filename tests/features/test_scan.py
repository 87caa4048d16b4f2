"""The streaming scan against two-pass effect sizes, brute-force permutations, and what it must not find."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planting import effect_sizes

from mechreward.errors import PackError
from mechreward.features.scan import permuted, scan


def rollouts(n=60, latents=40, seed=0, planted=()):
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < 0.4
    labels[:2] = [True, False]
    acts = rng.gamma(1.0, size=(n, latents)) * (rng.random((n, latents)) < 0.5)
    for latent in planted:
        acts[:, latent] += 2.0 * labels
    return acts.astype(np.float32), labels


def in_blocks(acts, size):
    return [acts[i : i + size] for i in range(0, len(acts), size)]


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 60), seed=st.integers(0, 10_000), scale=st.sampled_from([1e-4, 1.0, 1e5]))
def test_any_way_of_cutting_gives_the_two_pass_effect_sizes(size, seed, scale):
    acts, labels = rollouts(seed=seed)
    acts *= scale
    acts[:, 3] = 12345.678  # never varies
    found = scan(in_blocks(acts, size), labels, permutations=3)
    np.testing.assert_allclose(found.effect, effect_sizes(acts, labels), rtol=1e-8, atol=1e-10)
    assert found.effect[3] == 0
    np.testing.assert_allclose(found.spread, acts.astype(np.float64).std(axis=0), rtol=1e-6, atol=1e-9 * scale)
    np.testing.assert_allclose(found.firing_gap, (acts[labels] > 0).mean(axis=0) - (acts[~labels] > 0).mean(axis=0))


def test_adjusted_p_is_that_of_brute_force_on_the_same_permutations():
    acts, labels = rollouts(planted=[7])
    found = scan(in_blocks(acts, 11), labels, permutations=99, seed=5)
    largest = [np.abs(effect_sizes(acts, perm)).max() for perm in permuted(labels, None, 99, np.random.default_rng(5))]
    np.testing.assert_allclose(found.largest_by_chance, largest, rtol=1e-9)
    effect = np.abs(effect_sizes(acts, labels))
    expected = [(1 + sum(chance >= e for chance in largest)) / 100 for e in effect]
    np.testing.assert_allclose(found.adjusted_p, expected)
    assert found.adjusted_p[7] == 0.01 and np.sort(found.adjusted_p)[1] > 0.01


def test_pure_noise_is_called_significant_in_about_one_scan_of_twenty():
    """Family-wise: any of 40 latents at .05. 100 scans, so 5 expected; 13 or more has probability below .001."""
    hits = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        labels = rng.permutation(np.arange(40) < 16)
        hits += (scan([rng.normal(size=(40, 40))], labels, permutations=59, seed=seed).adjusted_p <= 0.05).any()
    assert hits < 13


def test_rollouts_of_one_question_move_together():
    rng = np.random.default_rng(0)
    labels, groups = rng.random(40) < 0.5, np.repeat(np.arange(10), 4)
    blocks = {tuple(labels[groups == g]) for g in range(10)}
    for perm in permuted(labels, groups, 50, rng):
        assert perm.sum() == labels.sum()
        assert all(tuple(perm[groups == g]) in blocks for g in range(10))


def test_a_latent_that_follows_the_question_alone_is_not_found_where_questions_move_together():
    """Four rollouts a question with one label each way make 40 rollouts look like 40 cases, where there are ten."""
    false_alarms = {"rollouts": 0, "questions": 0}
    for seed in range(30):
        rng = np.random.default_rng(seed)
        groups = np.repeat(np.arange(10), 4)
        labels = np.repeat(rng.permutation(np.arange(10) < 5), 4)
        acts = np.repeat(rng.normal(size=(10, 20)), 4, axis=0) + 0.1 * rng.normal(size=(40, 20))
        for name, which in (("rollouts", None), ("questions", groups)):
            false_alarms[name] += (scan([acts], labels, which, permutations=39, seed=seed).adjusted_p <= 0.05).any()
    assert false_alarms["rollouts"] > 20 and false_alarms["questions"] <= 6


@pytest.mark.parametrize(
    ("blocks", "labels", "says"),
    [
        ([np.zeros((4, 2))], [True] * 4, "4 of 4"),
        ([np.zeros((4, 2))], [True, False, True], "more rows"),
        ([np.zeros((2, 2))], [True, False, True], "2 rows"),
        ([np.array([[1.0], [np.nan], [2.0]])], [True, False, True], "NaN"),
        ([], [True, False, True], "0 rows"),
    ],
)
def test_bad_input_is_one_sentence(blocks, labels, says):
    with pytest.raises(PackError, match=says):
        scan(blocks, labels)


def test_questions_of_different_sizes_exchange_their_labels_too():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), np.arange(1, 13))  # no two questions have as many rollouts
    labels = np.isin(groups, [1, 4, 7, 11])
    drawn = permuted(labels, groups, 100, rng)
    assert (drawn.sum(axis=1) == labels.sum()).all()
    assert len({tuple(row) for row in drawn}) > 90 and (drawn == labels).all(axis=1).mean() < 0.05


def test_contrasts_exchange_their_labels_within_the_pair():
    labels, groups = np.tile([True, False], 20), np.repeat(np.arange(20), 2)
    drawn = permuted(labels, groups, 200, np.random.default_rng(0))
    assert (drawn.reshape(200, 20, 2).sum(axis=2) == 1).all()
    assert 0.4 < (drawn == labels).mean() < 0.6
