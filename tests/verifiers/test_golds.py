"""Golds: what becomes of a dataset's cell, in every place that hands one to a verifier."""

import datetime
import functools
import json
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechreward import OutcomeReward, pocket
from mechreward.errors import ConfigError, RewardError
from mechreward.hacking.redteam.target import questions_that_can_be_judged
from mechreward.train import data
from mechreward.train.config import QuestionSource
from mechreward.verifiers import exact_match, gsm8k, math_boxed, unit_tests
from mechreward.verifiers.golds import gold, golds, verdicts

NOTHING = [None, math.nan, -math.nan, math.inf, np.nan, np.float32("nan"), np.float64("nan"), np.array(np.nan)]
NOTHING += [pd.NA, pd.NaT, np.datetime64("NaT"), Decimal("NaN"), Decimal("sNaN"), Decimal("1E+999999999")]
NOTHING += [torch.tensor(math.nan), torch.tensor([math.nan]), pa.scalar(None), [], [None], [math.nan], np.array([])]
NOTHING += [str(one) for one in (math.nan, pd.NaT, pd.NA)]

WRITTEN = [
    ("7", "7"),
    (np.str_(" x "), " x "),
    (7, "7"),
    (np.int64(-7), "-7"),
    (3.0, "3"),
    (-0.0, "0"),
    (0.1, "0.1"),
    (0.00001, "0.00001"),
    (2.5e-6, "0.0000025"),
    (1e16, "10000000000000000"),
    (3e20, "3" + "0" * 20),
    (1e22, "1" + "0" * 22),
    (123456789.123, "123456789.123"),
    (np.float32(0.1), "0.1"),
    (np.float16(0.1), "0.1"),
    (np.float64(1e-7), "0.0000001"),
    (torch.tensor(0.1), "0.1"),
    (torch.tensor(3), "3"),
    (torch.tensor(0.5, dtype=torch.bfloat16), "0.5"),
    (pa.scalar(2.5), "2.5"),
    (Decimal("1.50"), "1.5"),
    (Decimal("1E-7"), "0.0000001"),
    (Fraction(1, 3), "1/3"),
    (True, "True"),
    (np.False_, "False"),
    (["3"], "3"),
    ([[3.0]], "3"),
    (np.array(["B"], dtype=object), "B"),
    ("Nan", "Nan"),  # a grandmother
    ("None", "None"),  # an answer to "which of these?"
]


@pytest.mark.parametrize("cell", NOTHING)
def test_nothing_is_no_gold_for_any_verifier(cell):
    assert gold(cell, "answer") is None
    texts = [r"\boxed{nan}", "nan", "#### nan", "#### 0", r"\boxed{}", r"\boxed{NaN}"]
    for verifier in (math_boxed, gsm8k, exact_match, lambda texts, golds: [True] * len(texts)):
        assert OutcomeReward(verifier)(["q"] * len(texts), texts, answer=[cell] * len(texts)) == [None] * len(texts)


@pytest.mark.parametrize(("cell", "text"), WRITTEN)
def test_cells_are_written_out(cell, text):
    assert gold(cell, "answer") == text


def test_a_number_too_long_to_write_out_is_no_gold():
    assert gold(10**5000, "answer") is None


@settings(max_examples=300, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_is_written_out_without_an_exponent_and_reads_back(number):
    text = gold(number, "answer")
    assert float(text) == pytest.approx(number, rel=1e-13, abs=0)
    assert "e" not in text.lower() and not text.endswith(".0")
    assert gsm8k([f"#### {text}"], [text]) == ([None] if len(text) > 500 else [True])


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 15), st.data(), st.integers(-30, 10))
def test_every_decimal_a_person_writes_survives(size, data, exponent):
    number = data.draw(st.integers(1, 10**size - 1)) * Fraction(10) ** exponent
    assert Fraction(gold(float(number), "answer")) == number
    if size <= 6 and exponent > -30:
        for narrow in (np.float32(float(number)), torch.tensor(float(number)), pa.scalar(float(number), pa.float32())):
            assert Fraction(gold(narrow, "answer")) == number or number >= 2**24


@pytest.mark.parametrize("cell", [12345.67, 99999.99, 8388607.5, 33.3])
def test_money_in_single_precision_keeps_its_cents(cell):
    assert float(gold(np.float32(cell), "answer")) == cell


FLOATS = [
    (0.1 + 0.2, "0.3"),
    (2.3 * 3, "6.9"),
    (3 - 1e-16 * 3, "3"),
    (2**0.5, r"\sqrt{2}"),
    (math.pi, r"\pi"),
    (2 / 3, r"\frac{2}{3}"),
    (np.float32(1 / 3), r"\frac13"),
    (np.float32(2**0.5), r"\sqrt2"),
    (torch.tensor(2 / 3), r"\frac23"),
    (pa.scalar(2 / 3, pa.float32()), r"\frac23"),
    (1 / 3, "0.333333"),
    (1 / 3, "0.3333333333333333"),
]


@pytest.mark.parametrize(("cell", "answer"), FLOATS)
def test_a_float_is_the_number_that_it_was_made_of(cell, answer):
    assert math_boxed([rf"\boxed{{{answer}}}"], [gold(cell, "answer")]) == [True]


def test_a_float_of_a_fraction_is_that_fraction_and_no_other():
    pairs = [(p, q) for q in range(1, 60) for p in range(1, 60) if math.gcd(p, q) == 1]
    assert len(pairs) > 2112
    for shift in (0, 1):
        texts = [rf"\boxed{{\frac{{{p * 1009 + shift}}}{{{q * 1009}}}}}" for p, q in pairs]
        assert math_boxed(texts, [gold(p / q, "answer") for p, q in pairs]) == [not shift] * len(pairs)


@pytest.mark.parametrize("cell", [["3", "4"], (3, 4), [3, None], np.array([3, 4]), torch.tensor([3, 4]), [["3"], "4"]])
@pytest.mark.parametrize("verifier", [math_boxed, gsm8k, exact_match])
def test_a_list_of_several_values_is_refused_by_name(cell, verifier):
    with pytest.raises(RewardError, match=r"^The gold column 'final_answer' holds a list of 2 values[^.]*: keep one"):
        OutcomeReward(verifier, gold_column="final_answer")(["q"], [r"\boxed{3}"], final_answer=[cell])


@pytest.mark.parametrize("cell", [{}, {"value": 3}, b"3", 3j, datetime.date(2020, 1, 1), {"3"}, object()])
def test_what_is_no_answer_is_refused_by_name(cell):
    with pytest.raises(RewardError, match=f"^The gold column 'mine' holds a value of type {type(cell).__name__}, "):
        OutcomeReward(math_boxed, gold_column="mine")(["q"], [r"\boxed{3}"], mine=[cell])


def test_a_verifier_that_takes_lists_says_so():
    def any_of(texts, golds):
        return [text in ([one] if isinstance(one, str) else one) for text, one in zip(texts, golds, strict=True)]

    with pytest.raises(RewardError):
        OutcomeReward(any_of)(["q"], ["3"], answer=[["3", "4"]])
    any_of.structured_golds = True  # pyright: ignore[reportFunctionMemberAccess]
    call = (["q"] * 4, ["3", "4", "5", "3"])
    for verifier in (any_of, functools.partial(any_of), functools.wraps(any_of)(lambda *both: any_of(*both))):
        assert OutcomeReward(verifier)(*call, answer=[["3", "4"]] * 3 + [None]) == [1.0, 1.0, 0.0, None]
    assert golds(unit_tests, [np.array(["assert f()"], dtype=object), {"test": ["x"]}], "tests") == [
        ["assert f()"],
        {"test": ["x"]},
    ]


def test_the_verifier_that_miscounts_is_named():
    with pytest.raises(RewardError, match="'lazy' gave 1 verdicts for 2 completions"):
        verdicts(lambda texts, golds: [True], ["a", "b"], ["a", "b"], "lazy")


def test_of_two_columns_the_value_is_taken_and_the_choice_said_once(caplog):
    reward = OutcomeReward(math_boxed)
    prose = r"Either \boxed{3} or \boxed{5}."
    for _ in range(3):
        assert reward(["q"], [r"\boxed{3, 5}"], solution=[prose], answer=["3, 5"]) == [1.0]
    assert [record.getMessage() for record in caplog.records] == [
        "'math_boxed' takes the column 'answer' for the gold answers, not 'solution': name another with "
        "gold_column=...."
    ]
    # The column, not the row, decides: a missing answer is not looked for elsewhere.
    assert reward(["q"] * 2, [r"\boxed{5}"] * 2, solution=[prose] * 2, answer=[None, "5"]) == [None, 1.0]
    assert OutcomeReward(math_boxed)(["q"], [r"\boxed{5}"], solution=[prose]) == [1.0]
    assert len(caplog.records) == 1


def test_on_pocket_answer_and_solution_give_the_same_verdicts():
    rows = pocket.dataset("test", 40)
    texts = [solution if i % 2 else "#### 7" for i, solution in enumerate(rows["solution"])]
    call = (list(rows["prompt"]), texts)
    by_value = OutcomeReward(math_boxed, gold_column="answer")(*call, answer=rows["answer"])
    assert by_value == OutcomeReward(math_boxed, gold_column="solution")(*call, solution=rows["solution"])
    assert by_value[1::2] == [1.0] * 20


def rows_of(tmp_path, answers):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "q", "answer": answer}) + "\n" for answer in answers))
    return QuestionSource(path=str(file))


def test_questions_of_experiments_hold_golds(tmp_path):
    assert data.load([rows_of(tmp_path, [0.00001, 3.0, 1e16])])["answer"] == ["0.00001", "3", "1" + "0" * 16]


def test_experiments_keep_lists_for_verifiers_of_code_and_refuse_mappings(tmp_path):
    assert data.load([rows_of(tmp_path, [["assert f()"], ["a", "b"]])])["answer"] == [["assert f()"], ["a", "b"]]
    with pytest.raises(RewardError, match="'answer' holds a value of type dict"):
        data.load([rows_of(tmp_path, [{"a": 1}])])


def test_an_experiment_says_which_row_has_no_answer(tmp_path):
    with pytest.raises(ConfigError, match="has a row without an answer in 'answer'"):
        data.load([rows_of(tmp_path, [3.0, math.nan])])


def test_the_red_team_asks_only_what_can_be_judged():
    datasets = pytest.importorskip("datasets")
    answers = [1.0, math.nan, 1e-05, 3.0, 4.0, None]
    kept = questions_that_can_be_judged(datasets.Dataset.from_dict({"prompt": ["q"] * 6, "answer": answers}), gsm8k)
    assert kept["answer"] == [1.0, 1e-05, 3.0, 4.0]
