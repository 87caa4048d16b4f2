"""Linear probes: saved and loaded again, read as the formula says, and refused in one sentence when damaged."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechreward.errors import MechRewardError, ModelMismatchError, PackError
from mechreward.probes import linear_probe as probes
from mechreward.probes.linear_probe import linear_probe, load_probe, save_probe
from mechreward.readout import HookPoint, ReadoutBank

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
def test_probabilities_and_logits_equal_float64(seed, bias, scale):
    rng = np.random.default_rng(seed)
    weight, x = rng.normal(size=5).astype(np.float32), (scale * rng.normal(size=(7, 5))).astype(np.float32)
    logits = x.astype(np.float64) @ weight.astype(np.float64) + bias
    as_logits, as_odds = (linear_probe("p", torch.tensor(weight), bias, POINT, logits=raw) for raw in (True, False))
    np.testing.assert_allclose(read(as_logits, torch.tensor(x)), logits, rtol=1e-4, atol=1e-4 * scale)
    np.testing.assert_allclose(read(as_odds, torch.tensor(x)), 1 / (1 + np.exp(-logits)), atol=3e-5 * scale)


def test_a_probe_comes_back_as_it_was_saved(saved):
    probe, again = made(), load_probe(str(saved))
    assert torch.equal(probe.weight, again.weight) and torch.equal(probe.bias, again.bias)
    assert (again.name, again.hook_point, again.model_name) == ("correctness", POINT, "pocket")
    x = torch.randn(4, 6)
    assert torch.equal(read(again, x), read(probe, x))
    assert torch.equal(read(load_probe(str(saved), logits=True), x), read(made(logits=True), x))
    card = json.loads(saved.with_suffix(".json").read_text())
    assert (
        card["description"] == "It is right."
        and card["hook_point"] == "blocks.2.hook_resid_post"
        and card["schema_version"] == 1
    )


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
