"""The repetition detector against counts by hand, and how several guards become one verdict."""

import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechreward.errors import ConfigError, MechRewardError, RewardError
from mechreward.hacking import RepetitionDetector, Verdict
from mechreward.pocket.questions import KNOWN_PEOPLE, fact_completion, questions
from mechreward.reward.guards import apply_guards
from mechreward.rollout.batch import RolloutBatch


def rollouts(completion_ids, **options):
    n = len(completion_ids)
    return RolloutBatch(["p"] * n, ["c"] * n, [[5]] * n, completion_ids, **options)


def by_hand(ids, n):
    """The share of n-grams that have occurred before, counted one by one."""
    seen, repeated, total = [], 0, 0
    for i in range(len(ids)):
        if i + n <= len(ids):
            gram = ids[i : i + n]
            repeated += gram in seen
            seen.append(gram)
            total += 1
    return repeated / total if total else 0.0


def test_seq_rep_of_worked_examples():
    detector = RepetitionDetector(n=2, min_ngrams=1)
    assert detector.repetition([1, 2, 3, 4]) == 0.0
    assert detector.repetition([1, 2, 1, 2, 1]) == 0.5  # 12 21 12 21
    assert detector.repetition([7] * 5) == 0.75  # 77 77 77 77
    assert detector.repetition([7]) == detector.repetition([]) == 0.0


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5), st.integers(1, 20))
@settings(max_examples=150, deadline=None)
def test_seq_rep_equals_a_count_by_hand(ids, n, least):
    want = by_hand(ids, n) if len(ids) - n + 1 >= least else 0.0
    assert RepetitionDetector(n=n, min_ngrams=least).repetition(ids) == pytest.approx(want)


def characters(text):
    return [ord(c) for c in text]


def as_words(text):
    """Words, digits and signs as tokens, as pocket's tokenizer cuts them (about)."""
    return [hash(piece) for piece in re.findall(r"\d|[A-Za-z]+|\S|\n", text)]


@pytest.mark.parametrize("tokens", [as_words, characters])
def test_clean_answers_of_pocket_are_not_flagged(tokens):
    texts = [q.solution for q in itertools.islice(questions("discovery", 0, "reasoning"), 300)]
    texts += [fact_completion(name, "city", city) for name, (city, _) in list(KNOWN_PEOPLE.items())[:50]]
    assert not any(RepetitionDetector()(rollouts([tokens(text) for text in texts]), {}).flags)


@pytest.mark.parametrize("tokens", [as_words, characters])
def test_looping_completions_are_flagged_in_words(tokens):
    loops = [" 12+7=19." * 12, " so so so so" * 8, " Let me check again. 3+4=7." * 6 + "\n#### 7"]
    verdict = RepetitionDetector()(rollouts([tokens(text) for text in loops]), {})
    assert all(len(said) == 1 and said[0].startswith("repetition: ") for said in verdict.flags)
    assert verdict.trust.tolist() == [0.0] * 3 and not verdict.dropped.any()


def test_a_flag_names_the_share_and_the_threshold_is_not_itself_flagged():
    detector = RepetitionDetector(n=2, threshold=0.5, min_ngrams=4)
    verdict = detector(rollouts([[1, 2, 1, 2, 1], [7] * 5, [1, 2, 3, 4, 5]]), {})
    assert list(verdict.flags) == [[], ["repetition: 75% of 2-grams repeat"], []]
    assert verdict.trust.tolist() == [1.0, 0.0, 1.0]


def test_trust_and_drop_do_as_they_are_told():
    ids = [[7] * 40, list(range(40))]
    verdict = RepetitionDetector(trust=0.25)(rollouts(ids), {})
    assert verdict.trust.tolist() == [0.25, 1.0] and verdict.dropped.tolist() == [False, False]
    verdict = RepetitionDetector(action="drop")(rollouts(ids), {})
    assert verdict.trust.tolist() == [0.0, 1.0] and verdict.dropped.tolist() == [True, False]
    assert verdict.trust.dtype == torch.float32 and verdict.dropped.dtype == torch.bool


def test_only_what_comes_before_the_end_is_looked_at():
    ids = [[*range(10, 40), 2, *[7] * 60]]
    assert not any(RepetitionDetector()(rollouts(ids, eos_token_ids=frozenset({2})), {}).flags)
    assert any(RepetitionDetector()(rollouts(ids), {}).flags[0])


def test_an_empty_batch_gets_an_empty_verdict():
    verdict = RepetitionDetector()(rollouts([]), {})
    assert len(verdict.trust) == len(verdict.dropped) == len(verdict.flags) == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"action": "dropp"}, "'drop'"),
        ({"trust": 1.5}, "trust"),
        ({"trust": math.nan}, "trust"),
        ({"trust": -0.1}, "trust"),
        ({"n": 0}, "n="),
        ({"threshold": math.nan}, "threshold"),
        ({"threshold": 50}, "threshold"),
    ],
)
def test_impossible_options_are_refused_in_one_sentence(options, says):
    with pytest.raises(ConfigError) as error:
        RepetitionDetector(**options)
    assert says in str(error.value) and "\n" not in str(error.value)


# -- several guards ----------------------------------------------------------------------------------------------------


class Says:
    """A guard with a verdict of its own."""

    requests = ()

    def __init__(self, trust, dropped, flags):
        self.verdict = Verdict(torch.tensor(trust), torch.tensor(dropped), flags)

    def __call__(self, batch, readings):
        return self.verdict


def test_the_lowest_trust_wins_drops_add_up_and_flags_are_merged_once():
    batch = apply_guards(
        [
            Says([1.0, 0.5, 0.2], [False, False, True], [[], ["a"], ["b", "a"]]),
            Says([0.7, 0.9, 0.1], [False, True, False], [["c"], ["a"], ["c", "b"]]),
        ],
        rollouts([[1]] * 3),
        {},
    )
    assert batch.trust.tolist() == pytest.approx([0.7, 0.5, 0.1])
    assert batch.dropped.tolist() == [False, True, True]
    assert [list(said) for said in batch.flags] == [["c"], ["a"], ["b", "a", "c"]]


shares = st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3)


@given(st.lists(shares, min_size=1, max_size=4))
@settings(deadline=None)
def test_a_further_guard_never_gives_trust_back(verdicts):
    guards = [Says(trust, [False] * 3, [[]] * 3) for trust in verdicts]
    batch = apply_guards(guards, rollouts([[1]] * 3), {})
    assert batch.trust.tolist() == [min(column) for column in zip(*verdicts, strict=True)]


def test_without_guards_the_batch_stays_as_it_is():
    batch = rollouts([[1]])
    assert apply_guards([], batch, {}) is batch and batch.trust is None


@pytest.mark.parametrize("trust", [1.5, -0.5, math.nan, math.inf])
def test_a_guard_whose_trust_is_no_share_is_refused(trust):
    """More than 1 would raise a reward, below 0 turn it round."""
    with pytest.raises(RewardError) as error:
        apply_guards([Says([trust], [False], [[]])], rollouts([[1]]), {})
    assert isinstance(error.value, MechRewardError) and "Says" in str(error.value) and "\n" not in str(error.value)
