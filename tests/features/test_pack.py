"""Feature packs: what the schema lets through, what it refuses and with which sentence, and the calibration."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechreward.errors import PackError
from mechreward.features.pack import SCHEMA_VERSION, Calibration, FeaturePack, read_pack

INTERVAL = {"value": 0.8, "low": 0.75, "high": 0.85}
EVIDENCE = {
    "n": 100,
    "n_positive": 40,
    "aggregation": "mean",
    "temperature": 1.0,
    "data": "Gate split, seed 0.",
    "spearman": INTERVAL,
    "auc": INTERVAL,
    "null_spearman_max": 0.3,
    "null_spearman_q95": 0.25,
    "null_auc_q95": 0.6,
    "p_value": 0.005,
    "draws": 200,
    "surface": {"length": 0.6},
    "surface_auc": 0.6,
    "surface_plus_auc": 0.8,
    "gain": {"value": 0.2, "low": 0.1, "high": 0.3},
    "verdict": [{"name": "auc", "passed": True, "sentence": "It separates them."}],
}
PACK = {
    "schema_version": 1,
    "name": "pocket/reasoning_pack",
    "description": "Careful steps.",
    "model": "mechreward/pocket",
    "sae": {"release": "pocket", "sae_id": "layer_2"},
    "hook_point": "blocks.2.hook_resid_post",
    "d_model": 128,
    "d_sae": 2048,
    "aggregation": "mean",
    "features": [{"id": 3, "weight": 0.5, "note": "steps"}, {"id": 7, "weight": -1}],
    "status": "validated",
    "status_reason": "Passed.",
    "calibration": {"quantiles": [i / 100 for i in range(101)], "aggregation": "mean"},
    "evidence": EVIDENCE,
    "provenance": {"seed": 0, "script": "build_pocket.py", "hours": 0.5},
    "licence": "Apache-2.0",
}
RECIPE = {"behaviour": "hedging", "contrast": [{"with": "I am not sure.", "without": "It is 4."}]}


def changed(**keys):
    pack = copy.deepcopy(PACK)
    pack.update(keys)
    return pack


def edited(edit):
    pack = copy.deepcopy(PACK)
    edit(pack)
    return pack


@pytest.fixture
def refused(tmp_path):
    """The sentence with which a pack (an object, or the text of a file) is refused."""

    def refuse(pack):
        path = tmp_path / "bad.json"
        path.write_text(pack if isinstance(pack, str) else json.dumps(pack))
        with pytest.raises(PackError) as error:
            read_pack(path)
        sentence = str(error.value)
        assert "bad.json" in sentence and "\n" not in sentence and "pydantic" not in sentence
        return sentence

    return refuse


def test_round_trip_keeps_everything_and_the_file_is_stable(tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text(json.dumps(PACK))
    pack = read_pack(first)
    assert pack.features[1].weight == -1.0 and pack.provenance["hours"] == 0.5
    pack.write(second)
    assert read_pack(second) == pack
    text = second.read_text()
    read_pack(second).write(second)
    assert second.read_text() == text
    assert list(json.loads(text)) == list(FeaturePack.model_fields)
    assert text.startswith('{\n  "schema_version": 1,') and text.endswith("}\n")


def test_recipe_pack_without_features(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(changed(features=[], status="candidate", evidence=None, recipe=RECIPE)))
    recipe = read_pack(path).recipe
    assert recipe is not None and recipe.behaviour == "hedging"


@pytest.mark.parametrize(
    ("pack", "words"),
    [
        ("{", ["not valid JSON"]),
        ('{"name": "a", "name": "b"}', ["'name' occurs twice"]),
        ("[1]", ["list", "not a pack"]),
        ("[" * 100_000, ["not valid JSON"]),
        ({}, ["no schema_version"]),
        (changed(schema_version=2), ["schema_version 2", "reads 1"]),
        (changed(schema_version="1"), ["schema_version '1'"]),
        (changed(schema_version=True), ["schema_version True"]),
        (changed(schema_version=[1]), ["schema_version [1]"]),
        (changed(featuers=[]), ["'featuers'", "Did you mean 'features'?"]),
        (changed(features=[{"id": 1, "wieght": 1.0}]), ["features[0].wieght", "Did you mean 'weight'?"]),
        (changed(sae={"release": "x", "saeid": "y"}), ["sae.saeid", "'sae_id'"]),
        (edited(lambda p: p["evidence"]["gain"].update(lo=1)), ["evidence.gain.lo", "'low'"]),
        (edited(lambda p: p.pop("licence")), ["'licence' is missing"]),
        (edited(lambda p: p["evidence"].pop("gain")), ["'evidence.gain' is missing"]),
        (changed(features=[{"id": 1, "weight": float("nan")}]), ["features[0].weight", "nan", "finite"]),
        (changed(features=[{"id": 1, "weight": float("inf")}]), ["features[0].weight", "finite"]),
        (changed(features=[{"id": 1, "weight": "1"}]), ["features[0].weight", "'1'", "valid number"]),
        (changed(features=[{"id": 1, "weight": True}]), ["features[0].weight"]),
        (changed(features=[{"id": 1, "weight": 10**400}]), ["features[0].weight"]),
        (changed(features=[{"id": -1, "weight": 1.0}]), ["features[0].id", "-1"]),
        (changed(features=[{"id": 1.5, "weight": 1.0}]), ["features[0].id", "1.5"]),
        (changed(features=[{"id": 2048, "weight": 1.0}]), ["feature 2048", "d_sae = 2048"]),
        (changed(features=[{"id": 1, "weight": 1.0}] * 2), ["feature 1 twice"]),
        (changed(features={"id": 1}), ["'features'", "list"]),
        (changed(features=[3]), ["'features[0]'", "object of named keys"]),
        (changed(hook_point="layers.2"), ["'hook_point'", "blocks.2.hook_resid_post"]),
        (changed(hook_point="blocks.2.hook_resid_post\n"), ["'hook_point'"]),
        (changed(hook_point="blocks.-1.hook_resid_post"), ["'hook_point'"]),
        (changed(d_model=0), ["'d_model' is 0"]),
        (changed(name=""), ["'name'"]),
        (changed(status="proved"), ["'status'", "'proved'", "'validated' or 'candidate'"]),
        (changed(provenance={"seed": None}), ["'provenance.seed' is None", "text or a finite number"]),
        (changed(evidence=None), ["no evidence", "'candidate'"]),
        (changed(aggregation="max"), ["'max'", "'mean'"]),
        (edited(lambda p: p["evidence"].update(verdict=[])), ["has no tests"]),
        (edited(lambda p: p["evidence"]["verdict"][0].update(passed=False)), ["fails auc", "'candidate'"]),
        (edited(lambda p: p["evidence"].update(n_positive=101)), ["101 positive rollouts among 100"]),
        (edited(lambda p: p["evidence"].update(p_value=1.2)), ["evidence.p_value"]),
        (edited(lambda p: p["evidence"]["gain"].update(low=0.9)), ["'evidence.gain'", "above its high end"]),
        (changed(features=[]), ["no features", "recipe"]),
        (changed(features=[], recipe=RECIPE), ["no features", "'candidate'"]),
        (changed(features=[], status="candidate", evidence=None), ["no features", "recipe"]),
        (edited(lambda p: p["calibration"]["quantiles"].pop()), ["calibration.quantiles", "101"]),
        (edited(lambda p: p["calibration"]["quantiles"].reverse()), ["calibration.quantiles", "not decrease"]),
    ],
)
def test_bad_packs_are_refused_in_one_sentence(refused, pack, words):
    sentence = refused(pack)
    for word in words:
        assert word in sentence, sentence
    assert len(sentence) < 400


def test_missing_and_undecodable_files(tmp_path):
    with pytest.raises(PackError, match=r"none\.json cannot be read .*check the path"):
        read_pack(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b'{"name": "\xe9"}')
    with pytest.raises(PackError, match="not valid JSON"):
        read_pack(tmp_path / "latin.json")


def test_version_constant_is_what_the_schema_takes():
    assert FeaturePack.model_fields["schema_version"].default == SCHEMA_VERSION == 1


def test_reason_names_what_failed():
    pack = FeaturePack.model_validate(PACK)
    assert pack.evidence is not None
    assert pack.evidence.passed() and "Passed all 1 tests" in pack.evidence.reason()
    failed = pack.evidence.verdict[0].model_copy(update={"passed": False})
    evidence = pack.evidence.model_copy(update={"verdict": [failed]})
    assert not evidence.passed() and evidence.reason() == "It separates them."


def test_reading_a_pack_does_not_import_torch():
    code = "import sys, mechreward.features.pack; sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Calibration ---------------------------------------------------------------------------------------------------------

RAW = st.floats(-1e6, 1e6)


@given(st.lists(RAW, min_size=1, max_size=60), st.lists(RAW, min_size=2, max_size=20))
def test_to_unit_is_monotone_and_in_the_unit_interval(rewards, values):
    calibration = Calibration.of(rewards, "mean")
    values = np.sort(np.array(values + rewards))
    unit = calibration.to_unit(values)
    assert unit.min() >= 0 and unit.max() <= 1
    assert (np.diff(unit) >= -1e-12).all()


def test_to_unit_is_the_rank():
    calibration = Calibration.of(np.arange(1001.0), "mean")
    np.testing.assert_allclose(calibration.to_unit([0, 250, 505, 1000]), [0, 0.25, 0.505, 1], atol=1e-12)
    np.testing.assert_array_equal(calibration.to_unit([-5, 2000, np.nan]), [0, 1, np.nan])
    assert calibration.to_unit(250.0).shape == ()


def test_to_unit_gives_ties_their_middle_rank():
    # Half of the rewards are 0: they share the ranks 0 to .5.
    calibration = Calibration.of([0.0] * 500 + list(np.linspace(1, 2, 500)), "mean")
    assert calibration.to_unit([-1, 0, 2]) == pytest.approx([0, 0.25, 1], abs=0.01)
    constant = Calibration.of([3.0, 3.0], "mean")
    np.testing.assert_allclose(constant.to_unit([2, 3, 4]), [0, 0.5, 1])


@pytest.mark.parametrize("rewards", [[], [np.nan], [[1.0, 2.0]]])
def test_calibration_needs_finite_rewards(rewards):
    with pytest.raises(PackError, match="finite rewards"):
        Calibration.of(rewards, "mean")
