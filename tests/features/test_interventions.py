"""Cues, injections, formats and surprise against loops, plain forward passes and scipy."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from by_hand import ours, rollouts, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from planting import SAMPLING, pocket
from scipy.stats import entropy

from mechreward.features.interventions import (
    CUES,
    FORMATS,
    INJECTIONS,
    LEAST_RATE,
    SEEN,
    Cues,
    Rewards,
    cues,
    injected,
    reformatted,
    rewritten,
    surprise,
)
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.hf import sample

IDS, OTHERS = [922, 233, 762, 1222], [5, 233, 1905]
WEIGHTS, MORE = [1.0, -0.5, 2.0, 0.25], [3.0, 1.0, -1.0]


def reward(aggregation="mean"):
    weights = torch.tensor([WEIGHTS, WEIGHTS[::-1]]).T  # two columns
    more = torch.tensor([MORE, [0.0, 0.0, 0.0]]).T
    readouts = [ours("jumprelu").features(IDS), ours("topk").features(OTHERS)]
    return Rewards(readouts, [weights, more], aggregation)


def per_token(row):
    """r_t of one rollout, both columns, by numpy."""
    one, two = tokens(row, "jumprelu")[:, IDS], tokens(row, "topk")[:, OTHERS]
    return np.stack([one @ WEIGHTS + two @ MORE, one @ WEIGHTS[::-1]], axis=1)


# Rewards -------------------------------------------------------------------------------------------------------------


def test_rewards_per_token_are_the_weighted_sums(monkeypatch):
    some = rollouts().batch.take(range(7))
    monkeypatch.setattr("mechreward.rollout.source.MAX_NUMBERS", 3 * 7 * some.longest)  # three at a time
    seen = list(reward().per_token(pocket()[0], some))
    assert [len(piece) for piece, _ in seen] == [3, 3, 1]
    assert [list(ids) for piece, _ in seen for ids in piece.completion_ids] == some.completion_ids
    row = 0
    for piece, readings in seen:
        assert readings.values.shape == (*readings.mask.shape, 2)
        for k in range(len(piece)):
            values = readings.values[k, readings.mask[k]]
            np.testing.assert_allclose(values, per_token(row), rtol=1e-3, atol=1e-4)
            row += 1


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("mean", lambda r: r.mean(axis=0)),
        ("max", lambda r: r.max(axis=0)),
        ("mean_last_32_tokens", lambda r: r[-32:].mean(axis=0)),
        ("mean_last_4_tokens", lambda r: r[-4:].mean(axis=0)),
        ("last", lambda r: r[-1]),
    ],
)
def test_rewards_are_aggregated_after_they_are_summed(name, by_hand):
    """max of a sum is no sum of maxima."""
    got = reward(name)(pocket()[0], rollouts().batch)
    expected = np.stack([by_hand(per_token(row)) for row in range(len(rollouts()))])
    assert got.dtype == np.float64 and got.shape == (len(rollouts()), 2)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


# Cues ----------------------------------------------------------------------------------------------------------------


def single():
    return Rewards([ours("jumprelu").features(IDS)], [torch.tensor(WEIGHTS)[:, None]], "mean")


def test_cues_are_the_tokens_of_the_highest_mean_reading():
    some = rollouts()
    found = cues(pocket()[0], some, single())
    readings, before, shares = {}, {}, {True: [], False: []}
    for row, ids in enumerate(some.batch.completion_ids):
        values = tokens(row, "jumprelu")[:, IDS] @ WEIGHTS
        for t, value in enumerate(values):
            readings.setdefault(ids[t], []).append(value)
            if t:
                before.setdefault(ids[t], Counter())[ids[t - 1]] += 1
    often = {token: np.mean(values) for token, values in readings.items() if len(values) >= SEEN}
    ranked = sorted(often, key=lambda token: -often[token])
    assert found.tokens == ranked[:CUES] and len(often) > 10
    for token, previous in zip(found.tokens, found.before, strict=True):
        assert len(previous) == 1 and before[token][previous[0]] == max(before[token].values())
    for ids, label in zip(some.batch.completion_ids, some.labels, strict=True):
        shares[bool(label)].append(len([i for i in ids if i in found.tokens]) / len(ids))
    more = np.mean(shares[True]) - np.mean(shares[False])
    assert found.rate == pytest.approx(min(0.5, max(LEAST_RATE, more)))


def test_rare_tokens_are_cues_only_where_all_are_rare_and_the_end_is_none():
    few = rollouts().take([0])  # no token five times
    found = cues(pocket()[0], replace(rollouts().take([0, 1]), labels=np.array([True, False])), single())
    assert 1 <= len(found.tokens) <= CUES and LEAST_RATE <= found.rate <= 0.5
    longer = [*few.batch.completion_ids[0][:-1], 2, 2, 2, 2, 2, 2]  # what follows the first end does not count
    batch = replace(few.batch.take([0, 0]), completion_ids=[longer, longer])
    two = replace(few.take([0, 0]), batch=batch, labels=np.array([True, False]))
    found = cues(pocket()[0], two, single())
    assert len(found.tokens) == CUES and 2 not in found.tokens


# Injections ----------------------------------------------------------------------------------------------------------

ENDS = frozenset({2, 3})
COMPLETIONS = st.lists(
    st.tuples(st.lists(st.integers(10, 40), min_size=1, max_size=60), st.sampled_from([[], [2], [3], [2, 2, 9]])),
    min_size=1,
    max_size=6,
)


def subsequence(short, long):
    rest = iter(long)
    return all(token in rest for token in short)


@settings(max_examples=100, deadline=None)
@given(
    completions=COMPLETIONS,
    rate=st.floats(LEAST_RATE, 0.5),
    count=st.integers(1, CUES),
    how=st.sampled_from(INJECTIONS),
    seed=st.integers(0, 99),
)
def test_injected_rollouts_are_the_old_ones_with_cues(completions, rate, count, how, seed):
    found = Cues([100 + i for i in range(count)], [[200 + i] if i else [] for i in range(count)], rate)
    batch = RolloutBatch(
        prompts=["a"] * len(completions),
        completions=["b"] * len(completions),
        prompt_ids=[[1, 7]] * len(completions),
        completion_ids=[own + end for own, end in completions],
        eos_token_ids=ENDS,
    )
    changed = injected(batch, found, how, seed)
    assert changed.prompt_ids == batch.prompt_ids and changed.prompts == batch.prompts
    assert changed.eos_token_ids == ENDS and len(changed) == len(batch)
    assert batch.completion_ids == [own + end for own, end in completions]  # untouched
    assert injected(batch, found, how, seed).completion_ids == changed.completion_ids
    for (own, end), ids in zip(completions, changed.completion_ids, strict=True):
        ids, wanted = list(ids), max(CUES, math.ceil(rate * len(own)))
        assert ids[len(ids) - len(end[:1]) :] == end[:1]  # one end, at the end
        middle = ids[: len(ids) - len(end[:1])]
        assert not set(middle) & ENDS
        assert sum(token >= 100 and token < 200 for token in middle) == wanted
        assert subsequence(own, middle) and [t for t in middle if t < 100] == own
        if how == "prepended":
            assert middle[wanted:] == own
        elif how == "appended":
            assert middle[: len(own)] == own
        if how == "in_context":
            assert sum(t >= 200 for t in middle) == sum(t > 100 and t < 200 for t in middle)
        else:
            assert not any(t >= 200 for t in middle)


def test_injections_reach_every_place():
    found = Cues([100], [[]], 0.5)
    batch = RolloutBatch([""] * 200, [""] * 200, [[1]] * 200, [[10, 11, 12, 2]] * 200, eos_token_ids=ENDS)
    for how, places in (("interspersed", range(6)), ("prepended", range(3)), ("appended", range(3, 6))):
        ids = injected(batch, found, how).completion_ids
        assert {t for row in ids for t, token in enumerate(row) if token == 100} == set(places)
    assert injected(batch, found, "interspersed", 1).completion_ids != injected(batch, found, "interspersed", 2)


def test_the_injected_cue_stands_behind_what_usually_stands_before_it():
    batch = RolloutBatch([""] * 50, [""] * 50, [[1]] * 50, [[10] * 40] * 50, eos_token_ids=ENDS)
    ids = injected(batch, Cues([100], [[200]], 0.1), "in_context").completion_ids
    behind = [row[t - 1] for row in ids for t, token in enumerate(row) if token == 100]
    assert behind.count(200) > 0.8 * len(behind)  # two may fall into one place


# Formats -------------------------------------------------------------------------------------------------------------


def test_reformatted_rollouts_are_what_the_tokenizer_makes_of_the_changed_text():
    tokenizer, some = pocket()[1], rollouts()
    for name, expected in {
        "a line for each sentence": "33+31=64.\n64-49=15.",
        "one line": "15. #### 15",
        "double spaces": "  33+31=64.  64-49=15.\n####  15",
        "bullets": "-  33+31=64. 64-49=15.\n- #### 15",
    }.items():
        batch = reformatted(some, tokenizer, FORMATS[name])
        assert batch is not None and expected in "".join(batch.texts)
        for text, ids, old in zip(batch.texts, batch.completion_ids, some.batch.completion_ids, strict=True):
            end = [2] if old[-1] == 2 else []
            assert list(ids) == tokenizer(text, add_special_tokens=False).input_ids + end
        assert batch.prompt_ids == some.batch.prompt_ids
    assert reformatted(some, tokenizer, FORMATS["lower case"]) is None  # there are no capitals
    assert reformatted(some, tokenizer, lambda text: text) is None
    assert FORMATS["lower case"]("I Am") == "i am"


def test_a_rollout_without_an_end_gets_none():
    tokenizer, some = pocket()[1], rollouts().take([0, 1])
    cut = replace(some, batch=replace(some.batch, completion_ids=[ids[:-1] for ids in some.batch.completion_ids]))
    assert all(ids[-1] != 2 for ids in rewritten(cut, tokenizer, [" a", " b"]).completion_ids)


def test_texts_that_the_tokenizer_cannot_write_are_refused():
    class Lossy:
        """Writes no capitals."""

        def __call__(self, texts, **options):
            return pocket()[1]([text.lower() for text in texts], **options)

        def batch_decode(self, ids, **options):
            return pocket()[1].batch_decode(ids, **options)

    some = rollouts().take([0, 1])
    assert rewritten(some, Lossy(), [" a fine one", " another"]) is not None
    assert rewritten(some, Lossy(), [" a fine one", " Another"]) is None
    assert rewritten(some, Lossy(), ["", " another"]) is None  # nothing to read
    assert reformatted(some, Lossy(), lambda text: text + " A") is None


# Surprise ------------------------------------------------------------------------------------------------------------


def slowly(batch, row, temperature=1.0):
    """One plain forward pass, unpadded, and scipy's entropy."""
    model, _ = pocket()
    prompt, completion = list(batch.prompt_ids[row]), list(batch.completion_ids[row])
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0].double() / temperature
    total = 0.0
    for t, token in enumerate(completion):
        p = logits[len(prompt) + t - 1].softmax(dim=0).numpy()
        total += -math.log(p[token]) - entropy(p)
        if token == 2:
            return total, t + 1
    return total, len(completion)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_surprise_is_that_of_plain_forward_passes(temperature, monkeypatch):
    some = rollouts().batch.take(range(12))
    after = [[*ids, 5, 6] if row == 3 else ids for row, ids in enumerate(some.completion_ids)]  # behind the end
    some = replace(some, completion_ids=after)
    expected = [slowly(some, row, temperature) for row in range(12)]
    got = surprise(pocket()[0], some, temperature)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=2e-3)
    monkeypatch.setattr("mechreward.features.interventions.MAX_NUMBERS", 4 * 5 * 512 * some.longest)
    np.testing.assert_allclose(surprise(pocket()[0], some, temperature), expected, rtol=1e-3, atol=2e-3)


def standard_score(found):
    """The sum over rollouts in units of its standard error: independent sums of expectation 0 stay within a few."""
    return found[:, 0].sum() / (found[:, 0].std(ddof=1) * math.sqrt(len(found)))


def test_surprise_is_0_for_samples_below_for_greedy_and_above_for_somebody_elses_text():
    model, tokenizer = pocket()
    own = rollouts().batch
    assert abs(standard_score(surprise(model, own))) < 4
    prompts = list(dict.fromkeys(own.prompts))
    greedy = surprise(model, sample(model, tokenizer, prompts, 1, do_sample=False, max_new_tokens=60))
    assert (greedy[:, 0] < 0).mean() > 0.9 and standard_score(greedy) < -4
    rng = np.random.default_rng(0)
    shuffled = replace(own, completion_ids=[[*rng.permutation(ids[:-1]), ids[-1]] for ids in own.completion_ids])
    mixed = surprise(model, shuffled)
    assert mixed[:, 0].sum() / mixed[:, 1].sum() > 1 and standard_score(mixed) > 4
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cool = sample(model, tokenizer, prompts, 1, **SAMPLING | {"temperature": 0.5})
    assert abs(standard_score(surprise(model, cool, temperature=0.5))) < 4
    assert standard_score(surprise(model, cool)) < -4
