"""Linear probes: saved and loaded again, read as the formula says, and refused in one sentence when damaged."""

import functools
import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechreward.errors import ConfigError, MechRewardError, ModelMismatchError, PackError
from mechreward.features.pack import Calibration
from mechreward.probes import linear_probe as probes
from mechreward.probes.linear_probe import ProbeCalibration, as_probe, linear_probe, load_probe, save_probe
from mechreward.readout import HookPoint, Readings, ReadoutBank, direction
from mechreward.reward import feature_reward
from mechreward.reward.feature_reward import FeatureReward
from mechreward.rollout.batch import RolloutBatch

POINT = HookPoint(2)


def read(probe, x):
    """What a bank reads with one probe: ``[N, d] -> [N]``."""
    out = torch.zeros(len(x), 1)
    ReadoutBank([probe]).encode(probe.hook_point, x, out)
    return out[:, 0]


def made(d=6, seed=0, **options):
    weight = torch.randn(d, generator=torch.Generator().manual_seed(seed))
    return linear_probe("correctness", weight, 0.75, POINT, "pocket", **options)


@pytest.fixture
def saved(tmp_path):
    save_probe(made(), tmp_path / "my_probe", {"description": "It is right."})
    return tmp_path / "my_probe"


def refused(name) -> str:
    with pytest.raises(MechRewardError) as error:
        load_probe(str(name))
    assert "\n" not in str(error.value)
    return str(error.value)


@given(st.integers(0, 10**6), st.floats(-20, 20), st.floats(0.01, 30))
@settings(max_examples=50, deadline=None)
def test_logits_equal_float64(seed, bias, scale):
    rng = np.random.default_rng(seed)
    weight, x = rng.normal(size=5).astype(np.float32), (scale * rng.normal(size=(7, 5))).astype(np.float32)
    logits = x.astype(np.float64) @ weight.astype(np.float64) + bias
    probe = linear_probe("p", torch.tensor(weight), bias, POINT)
    np.testing.assert_allclose(read(probe, torch.tensor(x)), logits, rtol=1e-4, atol=1e-4 * scale)


def test_a_probe_comes_back_as_it_was_saved(saved):
    probe, again = made(), load_probe(str(saved))
    assert torch.equal(probe.weight, again.weight) and torch.equal(probe.bias, again.bias)
    assert (again.name, again.hook_point, again.model_name) == ("correctness", POINT, "pocket")
    x = torch.randn(4, 6)
    assert torch.equal(read(again, x), read(probe, x))
    card = json.loads(saved.with_suffix(".json").read_text())
    assert (
        card["description"] == "It is right."
        and card["hook_point"] == "blocks.2.hook_resid_post"
        and card["schema_version"] == 1
    )


def test_logits_are_what_a_probe_gives_and_nothing_else(saved):
    x = torch.randn(4, 6)
    for make in (functools.partial(load_probe, str(saved)), made):
        with pytest.warns(DeprecationWarning, match="by default") as warned:
            assert torch.equal(read(make(logits=True), x), read(make(), x))
        assert warned[0].filename == __file__
        with pytest.raises(PackError, match=r"logits=False.*scale=") as error:
            make(logits=False)
        assert "\n" not in str(error.value)


def test_either_file_names_the_probe(saved):
    for suffix in (".json", ".safetensors"):
        assert load_probe(str(saved) + suffix).name == "correctness"


def test_a_dot_in_a_name_is_part_of_the_name(tmp_path):
    for version, seed in (("probe_v1.1", 1), ("probe_v1.2", 2)):
        save_probe(made(seed=seed), tmp_path / version, {})
    for version, seed in (("probe_v1.1", 1), ("probe_v1.2", 2)):
        assert torch.equal(load_probe(str(tmp_path / version)).weight, made(seed=seed).weight)


def test_a_shipped_probe_is_found_by_its_name_and_a_mistyped_one_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "CATALOGS", tmp_path)
    save_probe(made(), tmp_path / "pocket" / "correctness_probe", {})
    assert probes.shipped_probes() == ["pocket/correctness_probe"]
    assert load_probe("pocket/correctness_probe").name == "correctness"
    assert "Did you mean 'pocket/correctness_probe'?" in refused("pocket/corectness_probe")


@pytest.mark.parametrize("lost", [".json", ".safetensors"])
def test_a_missing_file_is_named(saved, lost):
    saved.with_suffix(lost).unlink()
    assert f"my_probe{lost}" in refused(saved)


@pytest.mark.parametrize(
    "card",
    [
        "{not json",
        "[]",
        "null",
        '"text"',
        "\xff\xfe",
        "{}",
        '{"schema_version": 1, "name": "p"}',
        '{"schema_version": 1, "name": "p", "hook_point": 7}',
        "[" * 100_000,
    ],
)
def test_a_damaged_card_is_refused(saved, card):
    saved.with_suffix(".json").write_text(card, encoding="latin-1")
    assert "damaged" in refused(saved)


def test_another_schema_version_is_refused(saved):
    file = saved.with_suffix(".json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": 2}))
    assert "schema_version 2" in refused(saved)
    with pytest.raises(PackError):
        load_probe(str(saved))


def test_a_place_that_is_not_on_the_residual_stream_is_refused(saved):
    file = saved.with_suffix(".json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hook_point": "blocks.2.attn"}))
    with pytest.raises(ModelMismatchError):
        load_probe(str(saved))


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": torch.ones(6)},
        {"bias": torch.ones(1)},
        {"weight": torch.ones(6), "bias": torch.tensor(1.0)},
        {"weight": torch.ones(6), "bias": torch.ones(0)},
        {"weight": torch.ones(6, 2), "bias": torch.ones(1)},
        {"weight": torch.tensor(1.0), "bias": torch.ones(1)},
        {"weight": torch.full((6,), torch.nan), "bias": torch.ones(1)},
        {"weight": torch.ones(6), "bias": torch.tensor([torch.inf])},
    ],
)
def test_damaged_weights_are_refused(saved, tensors):
    from safetensors.torch import save_file

    save_file(tensors, saved.with_suffix(".safetensors"))
    assert "damaged" in refused(saved)


def test_a_broken_off_file_is_refused(saved):
    file = saved.with_suffix(".safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    assert "damaged" in refused(saved)
    file.write_bytes(b"")
    assert "damaged" in refused(saved)


# As a reward ---------------------------------------------------------------------------------------------------------

SLOPE, INTERCEPT = 0.5, -0.25


def calibrated(pooling="mean"):
    """A probe that makes sigmoid(s / 2 - 1/4) of a pooled logit s."""
    figures = {"brier_of_the_share": 0.2, "ece": 0.0, "brier_uncalibrated": 0.1, "ece_uncalibrated": 0.1, "bins": []}
    brier = {"value": 0.1, "low": 0.1, "high": 0.1}
    card = made().card.model_copy(
        update={
            "aggregation": pooling,
            "calibration": ProbeCalibration(slope=SLOPE, intercept=INTERCEPT, brier=brier, **figures),
        }
    )
    return as_probe(
        card, torch.ones(6, 2 if pooling == "attention" else 1), torch.zeros(2 if pooling == "attention" else 1)
    )


def probability(logit):
    return 1 / (1 + math.exp(-(SLOPE * logit + INTERCEPT)))


def scored(reward, logits, trust=None, sense=1.0):
    """Rewards, and the rewards of the tokens, of rollouts whose tokens have these logits; the last is not read."""
    width, n = max(map(len, logits)) + 1, len(logits)
    mask = torch.tensor([[t < len(row) for t in range(width)] for row in logits])
    values = torch.tensor([[*row, *[77.0] * (width - len(row))] for row in logits])
    batch = RolloutBatch(["p"] * n, ["c"] * n, [[1]] * n, [[*range(len(row) + 1)] for row in logits], num_generations=n)
    if trust is not None:
        batch = batch.guarded(torch.tensor(trust), torch.zeros(n, dtype=torch.bool), [[] for _ in logits])
    read = {reward.request: Readings(values[..., None] * mask[..., None], mask)}
    return reward.score(batch, read, sense), reward.per_token(batch, read, sense)


ROWS = st.lists(st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=6), min_size=1, max_size=4)


@given(ROWS, st.sampled_from(["mean", "max", "last", "mean_last_2_tokens"]), st.floats(-2, 2), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_logits_are_pooled_then_made_a_probability_then_weighted_then_guarded(rows, how, weight, trust):
    pool = {"mean": np.mean, "max": max, "last": lambda row: row[-1], "mean_last_2_tokens": lambda r: np.mean(r[-2:])}
    want = np.array([weight * probability(float(pool[how](row))) for row in rows])
    reward = FeatureReward(calibrated(how), weights=[weight])
    scores, _ = scored(reward, rows)
    np.testing.assert_allclose(scores.values, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(scores.parts["raw"], scores.values)
    guarded, tokens = scored(reward, rows, [trust] * len(rows))
    np.testing.assert_allclose(guarded.values, want * (trust if weight > 0 else 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(guarded.parts["raw"], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tokens.nansum(dim=1), guarded.values, rtol=1e-6)  # on the last token
    subtracted, _ = scored(reward, rows, [trust] * len(rows), sense=-1.0)
    np.testing.assert_allclose(subtracted.values, want * (trust if weight < 0 else 1), rtol=1e-5, atol=1e-6)
    logits, _ = scored(FeatureReward(calibrated(how), weights=[weight], scale="logit"), rows)
    np.testing.assert_allclose(logits.values, [weight * pool[how](row) for row in rows], rtol=1e-4, atol=1e-5)


@given(ROWS)
@settings(max_examples=30, deadline=None)
def test_tokens_of_a_logit_sum_to_it_and_dense_rewards_are_logits(rows):
    scores, tokens = scored(FeatureReward(calibrated(), scale="logit"), rows)
    np.testing.assert_allclose(tokens.nansum(dim=1), scores.values, rtol=1e-4, atol=1e-5)
    (dense,) = scored(FeatureReward(calibrated(), aggregation="per_token"), rows)[0].dense
    for row, got in zip(rows, dense.values, strict=True):
        np.testing.assert_array_equal(got[: len(row)], np.float32(row))


def test_what_is_not_read_has_no_probability_and_groups_compare_probabilities():
    scores, _ = scored(FeatureReward(calibrated()), [[1.0], []])
    assert scores.values[0] == pytest.approx(probability(1)) and scores.values[1].isnan()
    ranked, _ = scored(FeatureReward(calibrated(), normalize="group"), [[4.0], [-4.0], [0.0]])
    p = np.array([probability(s) for s in (4, -4, 0)])
    np.testing.assert_allclose(ranked.values, (p - p.mean()) / (p.std(ddof=1) + 1e-4), rtol=1e-5)


@pytest.mark.parametrize(
    ("probe", "options", "why"),
    [
        (made, {}, "no calibration"),
        (calibrated, {"aggregation": "max"}, "calibration is for aggregation 'mean', not 'max'"),
        (calibrated, {"aggregation": "mean_last_2_tokens"}, "not 'mean_last_2_tokens'"),
        (calibrated, {"read_last": True}, "read_last=True"),
        (functools.partial(calibrated, "attention"), {"read_last": True}, "read_last=True"),
        (calibrated, {"aggregation": "per_token"}, "rewards each token's logit"),
    ],
)
def test_where_no_calibration_holds_the_logit_is_the_default_and_that_is_said_once(caplog, probe, options, why):
    feature_reward._say_once.cache_clear()
    for _ in range(2):
        assert FeatureReward(probe(), **options).scale == "logit"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (options.get("aggregation") != "per_token") and all(why in each for each in said)
    caplog.clear()
    assert FeatureReward(probe(), scale="logit", **options).scale == "logit" and not caplog.records
    with pytest.raises(ConfigError, match=re.escape(why)) as error:
        FeatureReward(probe(), scale="probability", **options)
    assert "\n" not in str(error.value) and "scale='logit'" in str(error.value)


def test_scales_that_make_no_sense_are_refused():
    quantiles = Calibration(quantiles=np.linspace(0, 1, 101).tolist(), aggregation="mean")
    for build, said in (
        (lambda: FeatureReward(calibrated(), scale="probabilty"), "Did you mean 'probability'"),
        (lambda: FeatureReward(direction("d", torch.ones(6), POINT), scale="logit"), "not a probe"),
        (lambda: FeatureReward(calibrated(), normalize="quantile", calibration=quantiles), "what its quantiles are of"),
    ):
        with pytest.raises(ConfigError, match=said):
            build()
    reward = FeatureReward(calibrated(), normalize="quantile", calibration=quantiles, scale="probability")
    scores, _ = scored(reward, [[1.0], [-3.0]])
    np.testing.assert_allclose(scores.values, [probability(1), probability(-3)], atol=0.011)
