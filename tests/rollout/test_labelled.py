"""Labelled rollouts: what a JSONL file stands for, sampling, and one sentence for whatever is wrong with either."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planting import SAMPLING, pocket, sampled

import mechreward as mr
from mechreward.errors import DataError
from mechreward.rollout.hf import load_model
from mechreward.rollout.labelled import (
    holds_rollouts,
    read_lines,
    read_rollouts,
    sample_rollouts,
    write_rollouts,
)

RIGHT = {"prompt": "Question: a\nAnswer:", "completion": " 1+1=2.", "label": True}
WRONG = {"prompt": "Question: b\nAnswer:", "completion": " 1+1=3.", "label": False}


def written(tmp_path, *rows):
    file = tmp_path / "rollouts.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def read(file):
    return read_rollouts(file, *pocket())


def ids_of(text, end=True):
    tokenizer = pocket()[1]
    return tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * end


# Files ---------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_token_for_token(tmp_path):
    rollouts = sampled("discovery", 40, 2)
    file = tmp_path / "new" / "rollouts.jsonl"
    write_rollouts(rollouts, file)
    back = read(file)
    for part in ("prompts", "prompt_ids", "completion_ids", "completions"):
        assert [list(row) for row in getattr(back.batch, part)] == [list(row) for row in getattr(rollouts.batch, part)]
    assert back.batch.lengths == rollouts.batch.lengths
    np.testing.assert_array_equal(back.labels, rollouts.labels)
    np.testing.assert_array_equal(back.groups[:, None] == back.groups, rollouts.groups[:, None] == rollouts.groups)
    assert back.temperature == 1.0 and back.ways is None and back.paraphrases is None
    assert back.source == f"{len(rollouts)} rollouts of rollouts.jsonl"


def test_the_sampled_tokens_count_not_the_text(tmp_path):
    """The text " 12" is one way of writing it; the model may have sampled another."""
    spelled = [t for c in " buys" for t in ids_of(c, end=False)] + [2]
    assert spelled != ids_of(" buys")
    file = written(tmp_path, RIGHT | {"completion": " buys", "completion_ids": spelled}, WRONG)
    batch = read(file).batch
    assert batch.completion_ids == [spelled, ids_of(" 1+1=3.")]  # a row without ids costs the others nothing
    assert batch.num_generations == 1


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1, max_size=8), min_size=2, max_size=4
    ),
    separator=st.sampled_from(["", "\u2028", "\u2029", "\x85", "\x1c", "\n", "\x0b", "\x0c"]),
)
def test_any_text_survives(tmp_path_factory, texts, separator):
    """Some characters end a line for Python, and none in JSONL."""
    rows = [RIGHT | {"completion": " 1" + separator + t, "label": i == 0} for i, t in enumerate(texts)]
    file = tmp_path_factory.mktemp("any") / "a.jsonl"
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    first = read(file)
    assert list(first.batch.completions) == [row["completion"] for row in rows]
    write_rollouts(first, file)
    again = read(file)
    assert list(again.batch.completions) == list(first.batch.completions)
    assert again.batch.completion_ids == first.batch.completion_ids


def test_a_contrast_is_two_rollouts_of_one_question(tmp_path):
    pair = {"prompt": "", "positive": " Let me check.", "negative": " Surely so."}
    found = read(written(tmp_path, pair, pair | {"prompt": RIGHT["prompt"]}))
    assert found.labels.tolist() == [True, False, True, False] and found.labels.dtype == bool
    assert found.groups.tolist() == [0, 0, 1, 1]
    assert found.batch.texts == [" Let me check.", " Surely so."] * 2
    assert found.temperature is None
    assert found.batch.prompt_ids[0] == [pocket()[1].bos_token_id]


def test_texts_without_a_prompt_have_nothing_in_common(tmp_path):
    bare = [{"completion": " 1", "label": True}, {"completion": " 2", "label": False, "prompt": ""}]
    assert read(written(tmp_path, *bare)).groups.tolist() == [0, 1]


def test_an_empty_prompt_begins_with_the_end_token_where_there_is_no_other(tmp_path, monkeypatch):
    model, tokenizer = load_model("mechreward/pocket")
    file = written(tmp_path, RIGHT | {"prompt": ""}, WRONG)

    class Bare:
        """A tokenizer like GPT-2's, which writes nothing for an empty text."""

        bos_token_id = None
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, **options):
            return tokenizer(text, add_special_tokens=False)

    assert read_rollouts(file, model, Bare()).batch.prompt_ids[0] == [tokenizer.eos_token_id]
    monkeypatch.setattr(Bare, "eos_token_id", None)
    with pytest.raises(DataError, match="no token to begin with"):
        read_rollouts(written(tmp_path, *(r | {"prompt": "", "completion_ids": [5, 6]} for r in (RIGHT, WRONG))),
                      model, Bare())  # fmt: skip


def test_conversations_are_read_by_the_chat_template(tmp_path):
    talk = [{"role": "user", "content": "How many?"}]
    found = read(written(tmp_path, RIGHT | {"prompt": talk}, WRONG | {"prompt": talk}))
    expected = pocket()[1]("Question: How many?\nAnswer:").input_ids
    assert [list(ids) for ids in found.batch.prompt_ids] == [expected] * 2
    assert found.groups.tolist() == [0, 0] and found.batch.prompts[0] == talk


def test_groups_are_prompts_unless_they_are_named(tmp_path):
    rows = [RIGHT, WRONG, RIGHT | {"prompt": WRONG["prompt"]}]
    assert read(written(tmp_path, *rows)).groups.tolist() == [0, 1, 1]
    rows = [row | {"group": name} for row, name in zip(rows, ["x", "x", 7], strict=True)]
    assert read(written(tmp_path, *rows)).groups.tolist() == [0, 0, 1]


QUESTIONS = [f"Question: {i}\nAnswer:" for i in range(4)]
EIGHT = [{"prompt": q, "completion": f" {k}.", "label": k == 1} for q in QUESTIONS for k in (0, 1)]
ABSENT = [None, float("nan")]  # JSON has no NaN, but Python's writer makes one of pandas' empty cells


@pytest.mark.parametrize("absent", ABSENT, ids=str)
def test_a_row_without_a_group_is_of_its_prompts_question(tmp_path, absent):
    by_prompt = [0, 0, 1, 1, 2, 2, 3, 3]
    assert read(written(tmp_path, *EIGHT)).groups.tolist() == by_prompt
    assert read(written(tmp_path, *(row | {"group": absent} for row in EIGHT))).groups.tolist() == by_prompt
    half = [row | {"group": "x" if i >= 4 else absent} for i, row in enumerate(EIGHT)]
    assert read(written(tmp_path, *half)).groups.tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
    # A group that is 0 or empty is one all the same.
    named = [row | {"group": 0 if i < 4 else ""} for i, row in enumerate(EIGHT)]
    assert read(written(tmp_path, *named)).groups.tolist() == [0] * 4 + [1] * 4


OPTIONAL = ["prompt", "completion_ids", "temperature", "way", "paraphrase", "group", "positive", "negative", "whatever"]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.sets(st.sampled_from(OPTIONAL)), min_size=2, max_size=5),
    absent=st.sampled_from(ABSENT),
)
def test_null_says_what_a_missing_key_says(tmp_path_factory, rows, absent):
    folder = tmp_path_factory.mktemp("null")
    full = {"completion_ids": ids_of(" 1."), "temperature": 0.5, "way": "careful", "paraphrase": " one.", "group": 3}
    kept, nulled = [], []
    for i, keys in enumerate(rows):
        row = EIGHT[i] | full
        missing = keys | {"positive", "negative"}
        kept.append({key: value for key, value in row.items() if key not in missing})
        nulled.append({**row, **dict.fromkeys(missing, absent)})
    one, two = read(written(folder, *kept)), read(written(folder, *nulled))
    assert one.fingerprint() == two.fingerprint()
    assert (one.temperature, one.ways, one.paraphrases) == (two.temperature, two.ways, two.paraphrases)


def test_contrasts_and_rollouts_in_one_table(tmp_path):
    """Whose rows have all columns, as `datasets` and pandas write them."""
    nothing = dict.fromkeys(("prompt", "completion", "label", "positive", "negative", "group"))
    contrast = {"prompt": "a", "positive": "Let me check.", "negative": "Surely."}
    file = written(tmp_path, nothing | RIGHT, nothing | contrast)
    assert holds_rollouts(file)
    found = read(file)
    assert found.labels.tolist() == [True, True, False] and found.groups.tolist() == [0, 1, 1]
    assert not holds_rollouts(written(tmp_path, {"prompt": "a", "answer": "b", "completion": None, "positive": None}))


def test_a_tokenizer_that_knows_no_end(tmp_path):
    """Its model's end token counts; without one, each completion was cut off, and its last token is not read."""
    model, tokenizer = load_model("mechreward/pocket")
    end, file = tokenizer.eos_token_id, written(tmp_path, RIGHT, WRONG)
    tokenizer.eos_token = None
    with_models = read_rollouts(file, model, tokenizer).batch
    assert [list(ids)[-1] for ids in with_models.completion_ids] == [end] * 2
    model.generation_config.eos_token_id = None
    without = read_rollouts(file, model, tokenizer).batch
    for ids, bare in zip(with_models.completion_ids, without.completion_ids, strict=True):
        assert list(bare) == list(ids)[:-1]
    assert without.eos_token_ids == frozenset()
    assert without.mask().sum(dim=1).tolist() == [len(ids) - 1 for ids in without.completion_ids]


def test_labels_may_be_0_and_1(tmp_path):
    """As numbers they would index where they should choose."""
    found = read(written(tmp_path, *[row | {"label": int(row["label"])} for row in (WRONG, RIGHT, WRONG)]))
    assert found.labels.dtype == bool and found.labels.tolist() == [False, True, False]


def test_optional_columns(tmp_path):
    rows = [row | {"way": "careful", "temperature": 0.7, "paraphrase": " two"} for row in (RIGHT, WRONG)]
    found = read(written(tmp_path, *rows))
    assert found.ways == ["careful"] * 2 and found.temperature == 0.7 and found.paraphrases == [" two"] * 2
    write_rollouts(found, tmp_path / "again.jsonl")
    again = read(tmp_path / "again.jsonl")
    assert (again.ways, again.temperature, again.paraphrases) == (found.ways, found.temperature, found.paraphrases)
    mixed = read(written(tmp_path, rows[0], WRONG | {"temperature": 1}))
    assert mixed.ways is None and mixed.temperature is None and mixed.paraphrases is None


def test_rollouts_in_which_no_token_can_be_read_are_left_out(tmp_path):
    rows = [RIGHT, RIGHT | {"completion": ""}, WRONG, WRONG | {"completion_ids": [31]}, WRONG | {"completion_ids": []}]
    found = read(written(tmp_path, *rows))
    assert found.batch.texts == [" 1+1=2.", " 1+1=3."] and found.labels.tolist() == [True, False]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{", "is not JSON"),
        ("[1]", "not an object"),
        ("[" * 100_000, "is not JSON"),
        (RIGHT | {"prompt": 3}, "prompt is 3"),
        (RIGHT | {"prompt": ["Hello"]}, "prompt is"),
        (RIGHT | {"prompt": []}, "prompt is"),
        (RIGHT | {"prompt": [{"content": "Hello"}]}, "role and content"),
        ({"prompt": "a", "label": True}, "completion is None"),
        ({"prompt": "a", "positive": "b"}, "completion is None"),
        ({"prompt": "a", "positive": "b", "negative": None}, "completion is None"),
        (RIGHT | {"completion": ["a"]}, "completion is"),
        (RIGHT | {"label": "yes"}, "label is 'yes'"),
        (RIGHT | {"label": None}, "label is None"),
        (RIGHT | {"label": float("nan")}, "label is None"),
        (RIGHT | {"completion": None}, "completion is None"),
        (RIGHT | {"completion_ids": [None]}, "completion_ids is [None]"),
        (RIGHT | {"label": 2}, "label is 2"),
        (RIGHT | {"completion_ids": "12"}, "completion_ids is '12'"),
        (RIGHT | {"completion_ids": [1.5]}, "completion_ids is"),
        (RIGHT | {"completion_ids": [True]}, "completion_ids is"),
        (RIGHT | {"completion_ids": [-1]}, "completion_ids is"),
        (RIGHT | {"completion_ids": [512, 3]}, "token 512 is not in the model's vocabulary of 512"),
        (RIGHT | {"temperature": "1"}, "temperature is '1'"),
        (RIGHT | {"temperature": [1]}, "temperature is"),
        (RIGHT | {"temperature": -1}, "temperature is -1"),
        (RIGHT | {"way": 3}, "way is 3"),
        (RIGHT | {"paraphrase": ["a"]}, "paraphrase is"),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, says):
    file = written(tmp_path, RIGHT, "", bad, WRONG)
    with pytest.raises(DataError) as error:
        read(file)
    said = str(error.value)
    assert f"{file}, line 3" in said and says in said and "\n" not in said and len(said) < 400


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "holds no rollouts"),
        ([RIGHT, RIGHT], "2 of 2 rollouts"),
        ([WRONG, WRONG], "0 of 2 rollouts"),
        ([RIGHT, WRONG | {"completion": ""}], "1 of 1 rollouts"),
        ([RIGHT | {"completion": "\ud800"}, WRONG], "cannot write the texts"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, rows, says):
    with pytest.raises(DataError, match=says):
        read(written(tmp_path, *rows))


def test_a_conversation_needs_a_chat_template(tmp_path):
    model, tokenizer = load_model("mechreward/pocket")
    tokenizer.chat_template = None
    file = written(tmp_path, RIGHT | {"prompt": [{"role": "user", "content": "a"}]}, WRONG)
    with pytest.raises(DataError, match="plain text"):
        read_rollouts(file, model, tokenizer)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl cannot be read"):
        read(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="UTF-8"):
        read(tmp_path / "latin.jsonl")


def test_rollouts_are_told_from_questions(tmp_path):
    assert holds_rollouts(written(tmp_path, "", RIGHT))
    assert holds_rollouts(written(tmp_path, {"positive": "a", "negative": "b"}))
    assert not holds_rollouts(written(tmp_path, {"prompt": "a", "answer": "b"}))
    assert not holds_rollouts(written(tmp_path))
    assert list(read_lines(written(tmp_path, "", {"a": 1}, "  ", {"b": 2}))) == [(2, {"a": 1}), (4, {"b": 2})]


# Halves --------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), which=st.lists(st.integers(0, 9), min_size=1, max_size=60))
def test_halves_share_no_question_and_lose_no_rollout(seed, which):
    rollouts = sampled("discovery", 40, 2)
    rows = [2 * w for w in which]
    some = rollouts.take(rows)
    first, second = some.halves(seed)
    assert not set(first.groups) & set(second.groups)
    assert sorted([*first.batch.prompts, *second.batch.prompts]) == sorted(some.batch.prompts)
    questions = [len(set(half.groups)) for half in (first, second)]
    assert sum(questions) == len(set(some.groups)) and 0 <= questions[0] - questions[1] <= 1
    for half in (first, second):
        for prompt, group, label, ids in zip(
            half.batch.prompts, half.groups, half.labels, half.batch.completion_ids, strict=True
        ):
            row = next(r for r in rows if rollouts.batch.prompts[r] == prompt)
            assert rollouts.groups[row] == group and rollouts.labels[row] == label
            assert rollouts.batch.completion_ids[row] == ids


def test_take_keeps_every_column_together(tmp_path):
    rows = [row | {"way": way, "paraphrase": f" {way}"} for row, way in ((RIGHT, "a"), (WRONG, "b"), (WRONG, "c"))]
    taken = read(written(tmp_path, *rows)).take(np.array([2, 0]))
    assert taken.ways == ["c", "a"] and taken.paraphrases == [" c", " a"] and taken.labels.tolist() == [False, True]
    assert taken.batch.texts == [" 1+1=3.", " 1+1=2."] and taken.groups.tolist() == [1, 0] and len(taken) == 2


# Sampling ------------------------------------------------------------------------------------------------------------


def by_length(undecided=()):
    """A verifier of its own: whether a completion has an even number of characters."""
    return lambda texts, golds: [None if gold in undecided else len(text) % 2 == 0 for text, gold in zip(texts, golds)]  # noqa: B905


def questions_of(n):
    rows = mr.pocket.dataset("discovery", n)
    return {"prompt": list(rows["prompt"]), "answer": [str(i) for i in range(n)]}


def test_samples_are_labelled_by_the_verifier_and_those_it_does_not_decide_left_out():
    found = sample_rollouts(*pocket(), questions_of(6), by_length({"1", "4"}), 3, "six", seed=3, **SAMPLING)
    assert found.labels.tolist() == [len(text) % 2 == 0 for text in found.batch.texts] and found.labels.dtype == bool
    assert found.source == "six" and found.temperature == 1.0
    prompts = questions_of(6)["prompt"]
    assert set(found.groups.tolist()) <= {0, 2, 3, 5}
    assert [prompts[g] for g in found.groups] == list(found.batch.prompts)


def test_sampling_leaves_torchs_generator_as_it_was_and_its_seed_decides():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    once = sample_rollouts(*pocket(), questions_of(4), by_length(), 2, "four", seed=1, **SAMPLING)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(99)
    again = sample_rollouts(*pocket(), questions_of(4), by_length(), 2, "four", seed=1, **SAMPLING)
    other = sample_rollouts(*pocket(), questions_of(4), by_length(), 2, "four", seed=2, **SAMPLING)
    assert once.batch.completion_ids == again.batch.completion_ids != other.batch.completion_ids


@pytest.mark.parametrize(
    ("options", "temperature"), [({}, 1.0), ({"temperature": 0.5, "do_sample": True}, 0.5), ({"do_sample": False}, 0.0)]
)
def test_the_temperature_is_the_one_that_was_sampled_at(options, temperature):
    """Greedy decoding must not pass for sampling at temperature 1: the gate has a test of that."""
    found = sample_rollouts(*pocket(), questions_of(8), by_length(), 1, "eight", max_new_tokens=20, **options)
    assert found.temperature == temperature


def test_samples_of_one_kind_are_refused():
    with pytest.raises(DataError, match=r"4 of 4 rollouts of two show the behaviour.*nothing to contrast"):
        sample_rollouts(*pocket(), questions_of(2), lambda t, g: [True] * len(t), 2, "two", **SAMPLING)
    with pytest.raises(DataError, match=r"decides on none of the 4 rollouts of two.*'0'"):
        sample_rollouts(*pocket(), questions_of(2), lambda t, g: [None] * len(t), 2, "two", **SAMPLING)


def test_a_tokenizer_without_a_token_to_pad_with_samples_the_same():
    """Llama's and GPT-2's have none."""
    model, tokenizer = load_model("mechreward/pocket")
    tokenizer.pad_token = None
    with_one = sample_rollouts(*pocket(), questions_of(4), by_length(), 2, "four", seed=1, **SAMPLING).batch
    without = sample_rollouts(model, tokenizer, questions_of(4), by_length(), 2, "four", seed=1, **SAMPLING).batch
    assert without.completion_ids == with_one.completion_ids and without.prompt_ids == with_one.prompt_ids
    assert len({len(ids) for ids in without.prompt_ids}) > 1  # else nothing was padded
    assert [list(ids) for ids in without.prompt_ids] == [
        list(pocket()[1](prompt).input_ids) for prompt in without.prompts
    ]
