"""Frozen packs: bit-identical readings without the SAE, the file they were frozen with and no other, and the CLI."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import mechreward as mr
from conftest import SAE_KINDS, WIDTH, random_sae, save_sae
from mechreward.cli import app
from mechreward.errors import CandidateWarning, MechRewardError, PackError
from mechreward.features.catalog import CATALOGS, load_pack, push, shipped_packs
from mechreward.features.frozen import freeze, frozen_readout
from mechreward.features.pack import FeaturePack, PackFeature, SAERef, read_pack
from mechreward.readout import ReadoutBank

IDS = [41, 0, 17, 5]


def encode(readout, x):
    bank = ReadoutBank([readout])
    out = torch.full((len(x), len(bank)), torch.nan)
    bank.encode(readout.hook_point, x, out)
    return out


def vectors(count=400, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=g) * (torch.rand(count, 1, generator=g) * 2 + 0.2) + 0.3


def pack_for(handle, ids=IDS):
    return FeaturePack(
        name="tests/some_pack",
        description="Some behaviour.",
        model=handle.model_name or "tests/model",
        sae=SAERef(release="tests", sae_id=handle.kind),
        hook_point=str(handle.hook_point),
        d_model=handle.d_model,
        d_sae=handle.d_sae,
        features=[PackFeature(id=i, weight=0.5) for i in ids],
        status="candidate",
        status_reason="Made by a test.",
        provenance={"seed": 0},
        licence="Apache-2.0",
    )


@pytest.fixture
def handle_of(tmp_path):
    def make(kind, norm="none"):
        folder = tmp_path / f"{kind}-{norm}"
        save_sae(random_sae(kind, norm, True), folder)
        return mr.load_sae(path=folder)

    return make


@pytest.mark.parametrize("kind", SAE_KINDS)
@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
def test_readings_are_bit_identical_to_those_of_the_full_sae(handle_of, tmp_path, kind, norm):
    handle = handle_of(kind, norm)
    card = freeze(pack_for(handle), tmp_path / "frozen", handle)
    x = vectors()
    want = encode(handle.features(IDS), x)
    got = encode(frozen_readout(read_pack(card)), x)
    assert torch.equal(got, want)
    assert (want > 0).any()


def test_a_sliceable_encoder_is_frozen_as_its_columns_alone_and_topk_whole(handle_of, tmp_path):
    for kind in ("jumprelu", "topk"):
        handle = handle_of(kind)
        card = freeze(pack_for(handle), tmp_path / kind, handle)
        columns = load_file(card.with_suffix(".safetensors"))["weight"].shape[1]
        assert columns == (len(IDS) if kind == "jumprelu" else handle.d_sae)


def test_a_frozen_pack_needs_no_sae_and_gives_the_same_rewards(tmp_path, monkeypatch):
    pack = load_pack("pocket/reasoning_pack")
    card = freeze(pack, tmp_path)
    assert card.with_suffix(".safetensors").stat().st_size < 50_000
    whole = mr.FeatureReward.from_pack(pack)
    monkeypatch.setattr("mechreward.sae.registry.load_sae", lambda *_: pytest.fail("the SAE was loaded"))
    alone = mr.FeatureReward.from_pack(str(card))
    x = torch.randn(50, 128) * 5
    assert torch.equal(encode(alone.readout, x), encode(whole.readout, x))
    assert torch.equal(alone.weights, whole.weights)
    assert alone.readout.labels == whole.readout.labels


def test_a_threshold_in_the_place_of_topk_is_marked_and_its_error_is_right(handle_of, tmp_path):
    handle, x = handle_of("topk"), vectors()
    card = freeze(pack_for(handle), tmp_path / "near", handle, approximate_on=x)
    pack = read_pack(card)
    assert pack.frozen is not None and (near := pack.frozen.approximation) is not None
    readout = frozen_readout(pack)
    assert readout.weight.shape[1] == len(IDS)
    exact, got = encode(handle.features(IDS), x), encode(readout, x)
    assert near.tokens == len(x)
    assert near.changed == pytest.approx(((exact > 0) != (got > 0)).double().mean().item(), abs=1e-6)
    assert near.relative_error == pytest.approx(((exact - got).norm() / exact.norm()).item(), rel=1e-4)
    assert near.changed > 0  # else this test could not tell an approximation from the encoder
    with pytest.warns(CandidateWarning, match="threshold in the place of topk"):
        mr.FeatureReward.from_pack(pack)


def test_what_is_exact_is_not_approximated(handle_of, tmp_path):
    handle = handle_of("jumprelu")
    with pytest.raises(PackError, match="exact on its columns"):
        freeze(pack_for(handle), tmp_path, handle, approximate_on=vectors())


def test_another_file_than_the_one_frozen_is_refused(handle_of, tmp_path):
    handle = handle_of("jumprelu")
    card = freeze(pack_for(handle), tmp_path, handle)
    weights = card.with_suffix(".safetensors")
    tensors = load_file(weights)
    save_file({**tensors, "bias": tensors["bias"] + 1}, weights)
    with pytest.raises(PackError, match="checksum"):
        frozen_readout(read_pack(card))
    weights.unlink()
    with pytest.raises(PackError, match="not beside its JSON"):
        frozen_readout(read_pack(card))


def test_a_file_elsewhere_cannot_be_named(handle_of, tmp_path):
    handle = handle_of("jumprelu")
    card = freeze(pack_for(handle), tmp_path / "a", handle)
    raw = json.loads(card.read_text())
    raw["frozen"]["file"] = "../b/some_pack.safetensors"
    card.write_text(json.dumps(raw))
    with pytest.raises(PackError, match=r"frozen\.file"):
        read_pack(card)


def test_freezing_for_another_sae_or_from_a_recipe_is_refused(handle_of, tmp_path):
    handle = handle_of("jumprelu")
    with pytest.raises(PackError, match="was made for"):
        freeze(pack_for(handle).model_copy(update={"d_sae": 7}), tmp_path, handle)
    with pytest.raises(PackError, match="recipe"):
        freeze(load_pack("gemma-2-9b/reasoning_pack"), tmp_path, handle)


# -- the command line -------------------------------------------------------------------------------------------------


def run(*arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CliRunner().invoke(app, list(arguments))


def test_the_list_has_every_shipped_pack():
    listed = json.loads(run("packs", "list", "--json").stdout)
    assert [p["name"] for p in listed] == shipped_packs()
    assert all(name in run("packs", "list").stdout for name in shipped_packs())


def test_show_prints_the_evidence_and_json_round_trips(tmp_path):
    said = run("packs", "show", "pocket/reasoning_pack").stdout
    assert "candidate" in said and "FAILED  auc_within_careful" in said and "1905" in said
    file = tmp_path / "again.json"
    file.write_text(run("packs", "show", "pocket/reasoning_pack", "--json").stdout)
    assert read_pack(file).model_dump() == load_pack("pocket/reasoning_pack").model_dump()


def test_freeze_then_validate(tmp_path):
    assert run("packs", "freeze", "pocket/reasoning_pack", "--out", str(tmp_path)).exit_code == 0
    card = tmp_path / "reasoning_pack.json"
    assert "sound candidate pack" in run("packs", "validate", str(card)).stdout
    (tmp_path / "reasoning_pack.safetensors").write_bytes(b"something else")
    broken = run("packs", "validate", str(card))
    assert broken.exit_code == 2 and "checksum" in broken.stderr


def test_errors_are_one_sentence_unless_debugging():
    result = run("packs", "show", "pocket/reasoning_pak")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: There is no pack 'pocket/reasoning_pak'")
    assert "Did you mean 'pocket/reasoning_pack'?" in result.stderr and "Traceback" not in result.output
    assert isinstance(run("--debug", "packs", "show", "pocket/reasoning_pak").exception, MechRewardError)


def test_the_shipped_json_schema_is_the_one_that_is_checked():
    shipped = json.loads((CATALOGS / "pack.schema.json").read_text())
    assert shipped == FeaturePack.model_json_schema()
    assert json.loads(run("packs", "schema").stdout) == shipped


# -- the hub ----------------------------------------------------------------------------------------------------------


class FakeHub:
    """The two calls that pushing makes, and the files that came of them."""

    def __init__(self, folder):
        self.folder, self.repositories = folder, {}

    def create_repo(self, repo, private, exist_ok):
        assert exist_ok
        self.repositories[repo] = private

    def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
        target = self.folder / repo_id / path_in_repo
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path_or_fileobj.read_bytes())


def test_what_is_pushed_is_what_is_loaded(tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("mechreward.sae.registry.download", lambda repo, file: hub.folder / repo / file)
    card = freeze(load_pack("pocket/reasoning_pack"), tmp_path / "mine")
    name = push(card, "me/packs", private=True)
    assert hub.repositories == {"me/packs": True}
    assert sorted(f.name for f in (hub.folder / "me/packs").iterdir()) == [
        "reasoning_pack.json",
        "reasoning_pack.safetensors",
    ]
    there = load_pack(name)
    assert there.model_dump() == read_pack(card).model_dump()
    assert torch.equal(frozen_readout(there).weight, frozen_readout(read_pack(card)).weight)


def test_a_hub_that_refuses_is_one_sentence(tmp_path, monkeypatch):
    class Refusing(FakeHub):
        def create_repo(self, *_, **__):
            raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Refusing(tmp_path))
    card = freeze(load_pack("pocket/reasoning_pack"), tmp_path / "mine")
    with pytest.raises(PackError, match="could not be uploaded to me/packs"):
        push(card, "me/packs")
    with pytest.raises(PackError, match="hf:user/repository"):
        load_pack("hf:nothing")
