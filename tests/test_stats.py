"""Statistics against slow definitions, scipy and scikit-learn, and by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechreward.errors import PackError
from mechreward.stats import (
    Interval,
    auc,
    bootstrap,
    grouped_auc,
    resampled_interval,
    spearman,
    t_interval,
    wilson,
    with_interval,
)

# Scores and labels ---------------------------------------------------------------------------------------------------

SCORED = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30).filter(
    lambda pairs: len({label for _, label in pairs}) == 2
)


@given(SCORED)
def test_auc_counts_pairs(pairs):
    positives = [score for score, label in pairs if label]
    negatives = [score for score, label in pairs if not label]
    won = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    scores, labels = zip(*pairs, strict=True)
    assert auc(scores, labels) == pytest.approx(won / (len(positives) * len(negatives)))


@settings(deadline=None)  # the first call imports scikit-learn
@given(SCORED)
def test_spearman_and_auc_agree_with_scipy_and_sklearn(pairs):
    from scipy.stats import spearmanr
    from sklearn.metrics import roc_auc_score

    scores, labels = zip(*pairs, strict=True)
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    if len(set(scores)) > 1:  # scipy gives NaN where we say 0
        assert spearman(scores, labels) == pytest.approx(spearmanr(scores, labels)[0])


def test_spearman_by_hand():
    # Ranks 1, 2.5, 2.5, 4 against 1.5, 1.5, 3.5, 3.5: r = 3 / sqrt(4.5 * 4).
    assert spearman([10, 20, 20, 30], [False, False, True, True]) == pytest.approx(3 / np.sqrt(18))
    assert spearman([1, 2, 3], [0.1, 5.0, 70.0]) == pytest.approx(1)
    assert spearman([5, 5, 5], [False, True, True]) == 0


@pytest.mark.parametrize("statistic", [spearman, auc])
def test_statistics_refuse_what_cannot_be_compared(statistic):
    with pytest.raises(PackError, match="same label"):
        statistic([1.0, 2.0], [True, True])
    with pytest.raises(PackError, match="NaN"):
        statistic([1.0, np.nan], [True, False])
    with pytest.raises(PackError, match="shapes"):
        statistic([1.0], [True, False])
    with pytest.raises(PackError, match="All 0 rollouts"):
        statistic([], [])


def test_a_grouped_auc_is_the_auc_and_leaves_out_what_is_neither():
    scores = np.random.default_rng(0).normal(size=(12, 4)).round(1)
    right, wrong = np.arange(48).reshape(12, 4) % 3 == 0, np.arange(48).reshape(12, 4) % 3 == 1
    area, error = grouped_auc(scores, right, wrong)
    assert area == pytest.approx(auc(scores[right | wrong], right[right | wrong]))
    assert 0.05 < error < 0.2


# Intervals -----------------------------------------------------------------------------------------------------------


def mean(values):
    return float(values.mean())


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [bootstrap(mean, rng.normal(size=60), draws=200, seed=i) for i in range(120)]
    covered = np.mean([interval.low <= 0 <= interval.high for interval in intervals])
    assert 0.88 <= covered <= 0.99


def test_bootstrap_over_prompts_covers_where_single_rollouts_do_not():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(30), 8)
    covered = {"prompts": 0, "rollouts": 0}
    for i in range(60):
        values = rng.normal(size=30)[groups] + 0.3 * rng.normal(size=240)  # rollouts of one prompt resemble each other
        for name, by in (("prompts", groups), ("rollouts", None)):
            interval = bootstrap(mean, values, groups=by, draws=100, seed=i)
            covered[name] += interval.low <= 0 <= interval.high
    assert covered["prompts"] >= 50 > 40 > covered["rollouts"]


def test_bootstrap_is_paired_and_seeded_and_says_when_it_cannot():
    x = np.arange(50.0)
    same = bootstrap(lambda a, b: float(np.abs(a - b).max()), x, x, draws=20)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert bootstrap(mean, x, seed=3, draws=50) == bootstrap(mean, x, seed=3, draws=50)
    with pytest.raises(PackError, match="at least two prompts"):
        bootstrap(mean, x, groups=np.zeros(50))
    with pytest.raises(PackError, match="too few"):  # five prompts, four of which leave the statistic undefined

        def fragile(values):
            return auc(values, values > 45)

        bootstrap(fragile, x[:47], groups=np.minimum(np.arange(47) // 46, 1), draws=1)


def test_a_t_interval_by_hand():
    # 1, 2, 3: mean 2, s = 1, t(.975, 2) = 4.3027 (Student 1908).
    assert t_interval([1, 2, 3]) == pytest.approx((2 - 4.302653 / np.sqrt(3), 2 + 4.302653 / np.sqrt(3)))
    assert t_interval([5.0]) == (-np.inf, np.inf)


def test_wilsons_interval_by_hand():
    z, k, n = 1.959964, 7, 20
    middle, half = (k + z * z / 2) / (n + z * z), z / (n + z * z) * np.sqrt(k * (n - k) / n + z * z / 4)
    assert wilson(k, n) == pytest.approx((middle - half, middle + half), abs=1e-6)
    assert wilson(0, 10)[0] == 0


def test_seeds_and_questions_are_both_resampled():
    per_seed = [np.full(50, value) for value in (0.0, 1.0, 2.0, 3.0)]  # seeds differ, their questions do not
    low, high = resampled_interval(per_seed, 2000)
    assert low < 0.75 and high > 2.25
    alike = [np.append(np.arange(100) % 2.0, np.nan)] * 4  # and the other way round: 400 draws of a fair coin
    low, high = resampled_interval(alike, 2000)
    assert low == pytest.approx(0.5 - 1.96 * 0.5 / 20, abs=0.01) and high == pytest.approx(0.549, abs=0.01)


def test_a_value_is_shown_with_its_interval():
    interval = Interval(value=0.8124, low=0.774, high=0.846)
    assert interval.shown() == "0.812 (0.774 to 0.846)"
    assert interval.shown("+.2f", "95 % interval ") == "+0.81 (95 % interval +0.77 to +0.85)"
    assert with_interval(None, (None, 1.0), unknown="?") == "? (? to 1.000)"
