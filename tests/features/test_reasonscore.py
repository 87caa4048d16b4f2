"""ReasonScore against loops over Hugging Face's hidden states and SAELens' activations, and by hand."""

import math
import shutil

import numpy as np
import pytest
import torch
from by_hand import ours, per_token, rollouts
from hypothesis import given, settings
from hypothesis import strategies as st
from planting import pocket
from safetensors.torch import load_file, save_file

import mechreward as mr
from mechreward.errors import PackError
from mechreward.features.reasonscore import WORDS, _around, reason_scores, scores_of


def by_loops(kind, words, batch, lengths=1.0):
    """The module's docstring, word for word, in loops over single tokens."""
    tokenizer = pocket()[1]
    around, anywhere, elsewhere = [[] for _ in words], [], []
    for row in range(len(batch)):
        ids, acts = list(batch.completion_ids[row]), per_token(batch, row, kind, folded=True) * lengths
        for t in range(len(acts)):
            inside = set()
            for number, forms in enumerate(words):
                for form in forms:
                    wanted = tokenizer(form, add_special_tokens=False).input_ids
                    for start in range(len(ids)):
                        matches = ids[start : start + len(wanted)] == wanted
                        if matches and start - 1 <= t <= start + len(wanted) - 1 + 2:
                            inside.add(number)
            for number in inside:
                around[number].append(acts[t])
            (anywhere if inside else elsewhere).append(acts[t])
    zero = np.zeros(2048)
    positive = np.mean(anywhere, axis=0)
    negative = np.mean(elsewhere, axis=0) if elsewhere else zero
    single = [np.mean(each, axis=0) if each else zero for each in around]
    scores = []
    for i in range(2048):
        total, entropy = sum(mean[i] for mean in single), 0.0
        for mean in single:
            p = mean[i] / (total + 1e-12)
            entropy -= p * math.log(p) if p > 0 else 0.0
        h = entropy / math.log(len(words)) if len(words) > 1 else 1.0
        scores.append(positive[i] / (positive.sum() + 1e-12) * h**0.7 - negative[i] / (negative.sum() + 1e-12))
    return np.array(scores)


def some(count):
    return rollouts().batch.take(range(count))


# '####' and the sign of a step overlap with their neighbours; '\n####' is two tokens; ' wait' does not occur.
PHRASES = [["\n####", "never"], ["+", "-"], [" I am not sure", "="], [" wait", "wait"]]


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_scores_are_those_of_the_loops(kind):
    got = reason_scores(*pocket(), some(12), ours(kind), PHRASES)
    expected = by_loops(kind, PHRASES, some(12))
    assert got.shape == (2048,) and (np.abs(expected) > 1e-5).sum() > 100
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-7)
    assert np.argmax(got) == np.argmax(expected)


def test_activations_count_by_the_length_of_their_decoder_row(tmp_path):
    """Those of pocket's dictionaries are all 1."""
    lengths = np.random.default_rng(0).uniform(0.2, 5, size=2048)
    folder = tmp_path / "sae"
    shutil.copytree(mr.pocket.files() / "saes" / "jumprelu", folder)
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["W_dec"] = tensors["W_dec"] * torch.tensor(lengths, dtype=torch.float32)[:, None]
    save_file(tensors, folder / "sae_weights.safetensors")
    got = reason_scores(*pocket(), some(6), mr.load_sae(path=folder), PHRASES)
    np.testing.assert_allclose(got, by_loops("jumprelu", PHRASES, some(6), lengths), rtol=1e-3, atol=1e-7)


def test_one_word_has_no_entropy_to_weigh_by():
    got = reason_scores(*pocket(), some(6), ours("jumprelu"), [["="]])
    np.testing.assert_allclose(got, by_loops("jumprelu", [["="]], some(6)), rtol=1e-3, atol=1e-7)


def test_a_piece_at_a_time_gives_the_same(monkeypatch):
    whole = reason_scores(*pocket(), some(8), ours("jumprelu"), PHRASES)
    monkeypatch.setattr("mechreward.rollout.source.MAX_NUMBERS", 3 * some(8).longest * 2048)
    pieces = reason_scores(*pocket(), some(8), ours("jumprelu"), PHRASES)
    np.testing.assert_allclose(pieces, whole, rtol=1e-4, atol=1e-9)


def test_words_that_do_not_occur_are_one_sentence():
    with pytest.raises(PackError, match=r"None of the reasoning words \(alternatively, .*wait.*\) occurs") as error:
        reason_scores(*pocket(), some(3), ours("jumprelu"))
    assert "another method" in str(error.value) and "\n" not in str(error.value)


def test_the_words_are_the_published_ones():
    assert len(WORDS) == 10 and [each[0] for each in WORDS[-2:]] == ["But", "Another"]
    assert ["wait", " wait", "Wait", " Wait"] in WORDS and ["let me", " let me", "Let me", " Let me"] in WORDS
    assert not any("but" in each or "another" in each for each in WORDS)


def test_words_that_the_tokenizer_cannot_write_are_passed_over():
    """Else every unknown token would be taken for the word."""

    class Unknowing:
        unk_token_id = 31  # that of '=' in pocket

        def __call__(self, text, **options):
            return pocket()[1](text, **options)

    with pytest.raises(PackError, match="occurs in the rollouts"):
        reason_scores(pocket()[0], Unknowing(), some(3), ours("jumprelu"), [["="]])


# Windows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "forms", "expected"),
    [
        ([9, 9, 9, 5, 9, 9, 9, 9], [[5]], {2, 3, 4, 5}),  # one to the left, two to the right
        ([5, 9, 9, 9], [[5]], {0, 1, 2}),
        ([9, 9, 9, 5], [[5]], {2, 3}),
        ([9, 9, 5, 6, 9, 9, 9], [[5, 6]], {1, 2, 3, 4, 5}),
        ([9, 5, 9, 6, 9], [[5, 6]], set()),  # the first token alone is not the phrase
        ([9, 5, 5, 9, 9, 9], [[5]], {0, 1, 2, 3, 4}),
        ([5, 5, 5, 9], [[5, 5]], {0, 1, 2, 3}),
        ([5, 9, 9, 9, 9, 6], [[6], [5]], {0, 1, 2, 4, 5}),
        ([], [[5]], set()),
        ([5], [[5, 6]], set()),
        ([5, 6], [], set()),
    ],
)
def test_windows_by_hand(ids, forms, expected):
    assert _around(ids, forms) == expected
    assert _around(tuple(ids), forms) == expected


# The formula ---------------------------------------------------------------------------------------------------------


def test_the_formula_by_hand():
    """Three latents, two words: at both alike, at one alone, nowhere near a word."""
    single = np.array([[2.0, 4.0, 0.0], [2.0, 0.0, 0.0]])
    positive, negative = np.array([2.0, 2.0, 0.0]), np.array([1.0, 1.0, 2.0])
    got = scores_of(single, positive, negative)
    np.testing.assert_allclose(got, [2 / 4 * 1 - 1 / 4, 2 / 4 * 0 - 1 / 4, -2 / 4], atol=1e-9)
    uneven = scores_of(np.array([[3.0], [1.0]]), np.array([2.0]), np.array([0.0]))
    h = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    np.testing.assert_allclose(uneven, [h**0.7], rtol=1e-9)


MEANS = st.floats(0, 1e4, allow_subnormal=False).map(lambda x: 0.0 if x < 1e-3 else x)


@settings(max_examples=60, deadline=None)
@given(words=st.integers(1, 4), latents=st.integers(1, 5), data=st.data())
def test_the_formula_on_anything(words, latents, data):
    def numbers(count):
        return np.array(data.draw(st.lists(MEANS, min_size=count, max_size=count)))

    single, positive, negative = numbers(words * latents).reshape(words, latents), numbers(latents), numbers(latents)
    got = scores_of(single, positive, negative)
    assert np.isfinite(got).all() and (got >= -1).all() and (got <= 1 + 1e-9).all()
    for i in range(latents):
        shares = [mean / single[:, i].sum() for mean in single[:, i] if mean > 0]
        h = sum(-p * math.log(p) for p in shares) / math.log(words) if words > 1 else 1.0
        expected = positive[i] / (positive.sum() or 1) * max(h, 0) ** 0.7 - negative[i] / (negative.sum() or 1)
        assert got[i] == pytest.approx(expected, abs=1e-5)  # h**.7 is steep at 0
