"""The gate's later tests: length, injected cues, formats and whose text it is. By hand, and against scikit-learn."""

import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from test_gate import measured, world
from test_pack import EVIDENCE, PACK

from mechreward.errors import PackError
from mechreward.features import gate as g
from mechreward.features.catalog import load_pack, shipped_packs
from mechreward.features.gate import gate, length_controlled, rise
from mechreward.features.pack import Evidence, FormatChange, Injection, read_pack
from mechreward.stats import Interval, spearman

# Length --------------------------------------------------------------------------------------------------------------


def residual(values, lengths):
    """What scikit-learn's regression on the cubic and the tenths leaves of the ranks."""
    from sklearn.linear_model import LinearRegression
    from sklearn.preprocessing import OneHotEncoder, PolynomialFeatures

    rank = rankdata(lengths)
    z = ((rank - rank.mean()) / rank.std())[:, None] if rank.std() > 0 else np.zeros((len(rank), 1))
    edges = np.unique(np.quantile(z, np.linspace(0.1, 0.9, 9)))
    tenth = OneHotEncoder(sparse_output=False).fit_transform(np.searchsorted(edges, z, side="right"))
    known = np.hstack([PolynomialFeatures(3, include_bias=False).fit_transform(z), tenth])
    y = rankdata(values)
    return y - LinearRegression().fit(known, y).predict(known)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(30, 120), spread=st.sampled_from([1, 3, 10, 1000]))
def test_length_controlled_is_the_correlation_of_what_a_regression_leaves(seed, n, spread):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 5 + spread, n)  # 1: all the same
    labels = rng.random(n) < 0.4
    labels[:2] = [True, False]
    scores = rng.normal(size=n) + labels + 0.1 * lengths
    x, y = residual(scores, lengths), residual(labels, lengths)
    assert length_controlled(scores, labels, lengths) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)


def test_where_all_are_as_long_it_is_spearmans():
    rng = np.random.default_rng(0)
    labels = rng.random(80) < 0.5
    scores = rng.normal(size=80) + labels
    assert length_controlled(scores, labels, np.full(80, 7)) == pytest.approx(spearman(scores, labels))


def test_a_reading_of_the_length_alone_has_nothing_left():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 60, 400)
    labels = lengths + 8 * rng.normal(size=400) > 30
    for scores in (lengths, -2.0 * lengths, np.exp(lengths / 9)):
        assert length_controlled(scores, labels, lengths) == pytest.approx(0, abs=1e-9)
    # No cubic, and within a tenth it still rises: .10 is left, where 400 rollouts have a standard error of .05.
    assert abs(length_controlled((lengths - 32.0) ** 2, labels, lengths)) < g.LENGTH_LOW
    noisy = [length_controlled(lengths + 4 * rng.normal(size=400), labels, lengths) for _ in range(20)]
    assert spearman(lengths, labels) > 0.7 and abs(np.mean(noisy)) < 0.05
    binary = np.repeat([3, 9], 200)  # two lengths, each a rank of its own: all is explained
    assert length_controlled(binary, labels, binary) == 0


def test_what_does_not_come_from_the_length_stays():
    rng = np.random.default_rng(1)
    lengths = rng.integers(5, 60, 600)
    labels = rng.random(600) < 0.5
    scores = labels + rng.normal(size=600)
    free = length_controlled(scores, labels, lengths)
    assert free == pytest.approx(spearman(scores, labels), abs=0.05)
    hidden = scores + lengths  # mostly length, which says nothing here
    assert length_controlled(hidden, labels, lengths) > 3 * abs(spearman(hidden, labels))
    assert length_controlled(-scores, labels, lengths) == pytest.approx(-free)


def test_length_controlled_refuses_what_the_other_statistics_refuse():
    with pytest.raises(PackError, match="same label"):
        length_controlled([1.0, 2.0], [True, True], [1, 2])
    with pytest.raises(PackError, match="NaN"):
        length_controlled([1.0, np.nan], [True, False], [1, 2])


# Rise ----------------------------------------------------------------------------------------------------------------


def test_rise_by_hand():
    labels = [False, False, True, True]
    scores = [0.0, 2.0, 4.0, 6.0]  # 1 and 5: a way of 4
    assert rise([1.0, 3.0, 99.0, 99.0], scores, labels) == pytest.approx(0.25)
    assert rise(scores, scores, labels) == 0
    assert rise([5.0, 5.0, 0.0, 0.0], scores, labels) == 1
    assert rise([-1.0, -1.0, 0.0, 0.0], scores, labels) == pytest.approx(-0.5)
    assert rise(scores, scores[::-1], labels) == rise(scores, [1.0] * 4, labels) == float("inf")
    with pytest.raises(PackError, match="same label"):
        rise([1.0], [1.0], [True])


# Verdicts ------------------------------------------------------------------------------------------------------------


def around(value, half=0.05):
    return Interval(value=value, low=value - half, high=value + half)


def change(auc, up):
    return FormatChange(auc=around(auc, 0.01), rise=around(up, 0.01))


@pytest.mark.parametrize(("low", "passed"), [(g.LENGTH_LOW, True), (g.LENGTH_LOW - 1e-6, False)])
def test_the_length_tests_verdict(low, passed):
    found = Interval(value=0.3, low=low, high=0.5)
    test = g._lower_end_test("length_controlled", "Without the length it is", found, g.LENGTH_LOW)
    assert (test.name, test.passed) == ("length_controlled", passed)
    assert f"the lower end {'reaches' if passed else 'does not reach'} 0.15." in test.sentence
    assert "0.30 (95 % interval 0.15 to 0.50)" in test.sentence


@pytest.mark.parametrize(("high", "passed"), [(g.RISE_HIGH - 1e-6, True), (g.RISE_HIGH, False), (3.0, False)])
def test_the_injection_tests_verdict(high, passed):
    injection = Injection(
        cues=[" =", "\n"],
        rate=0.25,
        rise={"prepended": around(0.1), "in_context": Interval(value=0.2, low=0.1, high=high), "appended": around(-1)},
    )
    test = g._injection_test(injection)
    assert (test.name, test.passed) == ("token_injection", passed)
    assert "(' =', '\\n'; 25% of the length, in_context)" in test.sentence and "\n" not in test.sentence
    assert ("so the pack detects words" in test.sentence) is not passed


@pytest.mark.parametrize(
    ("formats", "passed", "says"),
    [
        ({"a": change(0.8, 0.1), "b": change(0.9, 0.2)}, True, "'a' (0.90 to 0.80;"),
        ({"a": change(0.79, 0.1), "b": change(0.9, 0.2)}, False, "'a' (0.90 to 0.79;"),
        ({"a": change(0.9, 0.1), "b": change(0.9, 0.5)}, False, "'b' brings rollouts without"),
        (
            {"a": change(0.9, 0.2), "b": FormatChange(auc=around(0.9), rise=around(0.0, 0.6))},
            False,  # by its upper end
            "'b' brings rollouts without",
        ),
        ({}, False, "the tokenizer cannot write"),
    ],
)
def test_the_format_tests_verdict(formats, passed, says):
    test = g._format_test(formats, 0.9)
    assert (test.name, test.passed) == ("format", passed) and says in test.sentence


@pytest.mark.parametrize(
    ("surprise", "temperature", "passed"),
    [
        (around(0.0), 1.0, True),
        (around(0.09), 1.0, True),  # 0.04 to 0.14: it comes near enough
        (around(0.11), 1.0, False),
        (around(-0.11), 1.0, False),
        (around(0.0), 0.7, False),
        (around(0.0), 0.0, False),
        (around(2.0), 1.0, False),
    ],
)
def test_the_on_policy_tests_verdict(surprise, temperature, passed):
    test = g._policy_test(surprise, temperature)
    assert (test.name, test.passed) == ("on_policy", passed)
    assert f"sampled at temperature {temperature:g}," in test.sentence
    assert ("do not come from the model" in test.sentence) is not passed


def test_the_whole_gate_with_everything_measured():
    gated = world(1, n=240)
    scores = gated.activations[:, :10] @ np.repeat([1.0, -1.0], 5)
    found = measured(
        gated,
        scores,
        np.full((100, 2), [0.1, 0.55]),
        injection=Injection(cues=["a"], rate=0.1, rise={"prepended": around(0.1)}),
        formats={"one line": change(0.9, 0.1)},
        surprise=around(0.0),
        without={"3": 0.8},
    )
    evidence = gate(found, draws=30)
    assert [test.name for test in evidence.verdict] == [
        "auc", "spearman", "length_controlled", "permutation", "auc_within_careful", "gain_over_surface",
        "token_injection", "format", "on_policy",
    ]  # fmt: skip
    value = length_controlled(scores, gated.labels, gated.lengths)
    assert evidence.length_controlled is not None and evidence.length_controlled.value == pytest.approx(value)
    assert evidence.passed(), evidence.reason()
    assert Evidence.model_validate(json.loads(evidence.model_dump_json())) == evidence


# The file ------------------------------------------------------------------------------------------------------------

BETWEEN = {"value": 0.1, "low": -0.2, "high": 0.4}
MEASURED = {
    "length_controlled": BETWEEN,
    "injection": {"cues": ["=", "\n"], "rate": 0.1, "rise": {"prepended": BETWEEN}},
    "formats": {"one line": {"auc": BETWEEN, "rise": BETWEEN}},
    "surprise": BETWEEN,
    "without": {"3": 0.7, "7": 0.5},
}


def pack_file(tmp_path, **evidence):
    pack = copy.deepcopy(PACK)
    pack["evidence"] = EVIDENCE | evidence
    file = tmp_path / "pack.json"
    file.write_text(json.dumps(pack))
    return file


def test_evidence_round_trips(tmp_path):
    pack = read_pack(pack_file(tmp_path, **MEASURED))
    pack.write(tmp_path / "again.json")
    again = read_pack(tmp_path / "again.json")
    assert again.model_dump() == pack.model_dump()
    kept = again.evidence.model_dump()
    assert {name: kept[name] for name in MEASURED} == MEASURED
    older = read_pack(pack_file(tmp_path)).evidence  # from before these were measured
    assert all(getattr(older, name) is None for name in MEASURED)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"without": {"3": 1.5}}, "evidence.without.3"),
        ({"injection": {"cues": [], "rate": 0.0, "rise": {}}}, "evidence.injection.rate"),
        ({"injection": {"cues": [], "rate": 0.1, "rises": {}}}, "Did you mean 'rise'"),
        ({"formats": {"one line": {"auc": BETWEEN}}}, "evidence.formats.one line.rise"),
        ({"surprise": {"value": 0.0, "low": 1.0, "high": 0.0}}, "low end"),
        ({"length_controlled": 0.5}, "evidence.length_controlled"),
    ],
)
def test_wrong_evidence_is_one_sentence(tmp_path, wrong, says):
    with pytest.raises(PackError) as error:
        read_pack(pack_file(tmp_path, **wrong))
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", shipped_packs())
def test_shipped_packs_still_load(name):
    assert load_pack(name).name == name


def test_the_thresholds_of_the_documentation_are_the_gates():
    from pathlib import Path

    from mechreward.features import gate as g

    lines = (Path(__file__).parents[2] / "docs" / "finding_features.md").read_text().splitlines()
    said = {line.split("`")[1]: line for line in lines if line.startswith("| `")}
    thresholds = {
        "auc": [g.AUC_LOW],
        "spearman": [g.SPEARMAN_LOW],
        "length_controlled": [g.LENGTH_LOW],
        "auc_within_careful": [g.CAREFUL_LOW],
        "token_injection": [g.RISE_HIGH],
        "format": [g.FORMAT_DROP, g.RISE_HIGH],
        "on_policy": [g.SURPRISE],
    }
    for name, values in thresholds.items():
        assert all(f"{value:.2f}" in said[name] for value in values), name
    assert (
        f"1 in {round(1 / g.P_BELOW)}" in said["permutation"]
        and g.GAIN_LOW == 0
        and "improves" in said["gain_over_surface"]
    )
