"""Sparse autoencoders on disk: parity with SAELens and with Gemma Scope's formula, the registry, and damaged files."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import mechreward as mr
from conftest import LATENTS, NORMS, SAE_KINDS, WIDTH, assert_readings, random_sae, save_sae
from mechreward.errors import MechRewardError, ModelMismatchError, SAEError
from mechreward.readout import HookPoint, ReadoutBank
from mechreward.sae import registry


def encode(handle, ids, x):
    readout = handle.features(ids)
    bank = ReadoutBank([readout])
    out = torch.full((len(x), len(bank)), torch.nan)
    bank.encode(readout.hook_point, x, out)
    return out


def vectors(count=300, d=WIDTH, seed=0):
    """Residual vectors with a mean and with quite different norms, as real ones have."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(count, d, generator=g) + 0.5) * (torch.rand(count, 1, generator=g) * 2 + 0.2)


def one_sentence(call, *parts):
    """The call is refused by an exception of ours, in one line that names what is wrong."""
    with pytest.raises(MechRewardError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500, text
    assert text.endswith((".", "?"))
    for part in parts:
        assert str(part) in text, text
    return caught.value


# Parity


@pytest.mark.parametrize("kind", SAE_KINDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("b_dec", [True, False], ids=["b_dec", "no_b_dec"])
def test_all_and_chosen_latents_equal_saelens(saved_sae, kind, norm, b_dec):
    sae, handle = saved_sae(kind, norm, b_dec)
    x = vectors()
    whole = encode(handle, range(LATENTS), x)
    left_out, compared = assert_readings(whole, sae, x, range(LATENTS))
    assert left_out <= 0.001 * compared
    assert 0.02 < (whole > 0).float().mean() < 0.98
    chosen = [63, 0, 17, 5]
    assert_readings(encode(handle, chosen, x), sae, x, chosen)
    assert (handle.d_model, handle.d_sae, handle.hook_point) == (WIDTH, LATENTS, HookPoint(1))
    assert handle.model_name == "a-model"
    assert handle.features(chosen).labels == ("feature_63", "feature_0", "feature_17", "feature_5")
    assert handle.features(chosen).width == 4


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka"])
@pytest.mark.parametrize("norm", NORMS)
def test_batchtopk_equals_the_formula_of_the_one_that_was_trained(tmp_path, norm, kind):
    trained = random_sae(kind, norm)
    save_sae(trained, tmp_path)
    x = vectors()
    v = trained.process_sae_in(x)
    z = ((v @ trained.W_enc + trained.b_enc) * trained.W_dec.norm(dim=-1)).detach()
    expected = torch.where(z > 1.5, z, 0.0)
    clear = (z - 1.5).abs() > 1e-4
    got = encode(mr.load_sae(path=tmp_path), range(LATENTS), x)
    assert clear.float().mean() > 0.99 and (expected > 0).any() and ((z > 0) & (z < 1.5)).any()
    torch.testing.assert_close(got[clear], expected[clear], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", SAE_KINDS)
@pytest.mark.parametrize("norm", NORMS)
def test_reconstructions_equal_saelens(saved_sae, kind, norm):
    sae, handle = saved_sae(kind, norm, True)
    x = vectors(50)
    activations = sae.encode(x).detach()
    torch.testing.assert_close(handle.decode(activations, x), sae.decode(activations).detach(), atol=1e-4, rtol=1e-4)


def test_only_the_chosen_columns_are_kept_unless_topk(saved_sae):
    for kind in SAE_KINDS:
        readout = saved_sae(kind)[1].features([4, 2])
        assert readout.weight.shape == (WIDTH, LATENTS if kind.startswith("topk") else 2)
        assert readout.width == 2


def test_norm_scaling_factor_equals_saelens_folding(tmp_path):
    """SAELens folds it after loading from its registry: only if the configuration asks for it."""
    from mechreward.sae import formats

    saved = random_sae("jumprelu", "expected_average_only_in")
    saved.save_model(tmp_path)
    one_sentence(lambda: mr.load_sae(path=tmp_path), tmp_path, "scaling factor")
    x = vectors()
    sae = random_sae("jumprelu", "expected_average_only_in")
    sae.fold_activation_norm_scaling_factor(0.37)
    handle = formats.saelens(tmp_path, scale=0.37)
    assert_readings(encode(handle, range(LATENTS), x), sae, x, range(LATENTS))
    activations = sae.encode(x).detach()
    torch.testing.assert_close(handle.decode(activations, x), sae.decode(activations).detach(), atol=1e-4, rtol=1e-4)

    unscaled = save_sae(random_sae("jumprelu"), tmp_path / "none")
    handle = formats.saelens(tmp_path / "none", scale=0.37)
    assert_readings(encode(handle, range(LATENTS), x), unscaled, x, range(LATENTS))


KINDS_OF_CHECKPOINTS = ["standard", "jumprelu", "topk", "gated"]


def checkpoint(folder, kind, norm, b_dec=True):
    """What SAELens writes while it trains: unfolded weights, and the input's statistics beside them."""
    from sae_lens.training.activation_scaler import ActivationScaler

    scaler = ActivationScaler()
    if norm == "expected_average_only_in":
        scaler.scaling_factor = 0.37
    else:
        generator = torch.Generator().manual_seed(3)
        mixed = torch.randn(2000, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator) + 0.5
        batches = iter(mixed.split(100))
        scaler.estimate_whitening(WIDTH, batches, n_batches_for_norm_estimate=20)
    random_sae(kind, norm, b_dec).save_model(folder)
    scaler.save(str(folder / "activation_scaler.json"))
    return scaler


@pytest.mark.parametrize("kind", KINDS_OF_CHECKPOINTS)
@pytest.mark.parametrize("norm", ["expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize("b_dec", [True, False], ids=["b_dec", "no_b_dec"])
def test_a_checkpoint_of_training_equals_what_saelens_folds_at_the_end(tmp_path, kind, norm, b_dec):
    scaler = checkpoint(tmp_path, kind, norm, b_dec)
    # In float64: the encoder as it is being trained, on the input as it is scaled for it.
    x = vectors()
    trained = random_sae(kind, norm, b_dec).double()
    trained.cfg.dtype = "float64"
    want = trained.encode(scaler.scale(x.double())).detach()
    handle = mr.load_sae(path=tmp_path)
    got = encode(handle, range(LATENTS), x).double()
    close = (got - want).abs() <= 1e-4 * want.abs().amax(-1, keepdim=True)
    assert close.float().mean() > 0.999 and 0.02 < (want > 0).double().mean() < 0.98
    decoded = scaler.unscale(trained.decode(want)).detach()
    difference = (handle.decode(want.float(), x).double() - decoded).abs()
    assert (difference <= 1e-4 * decoded.abs().amax(-1, keepdim=True)).all()
    few = handle.features([63, 0, 17])
    assert few.weight.shape[1] == (LATENTS if kind == "topk" else 3)
    assert encode(handle, [63, 0, 17], x).allclose(got[:, [63, 0, 17]].float(), atol=1e-4, rtol=1e-4)


def test_a_checkpoint_without_its_statistics_or_with_damaged_ones_is_refused(tmp_path):
    checkpoint(tmp_path / "scale", "standard", "expected_average_only_in")
    file = tmp_path / "scale" / "activation_scaler.json"
    for text in ('{"scaling_factor": null}', "{}"):
        file.write_text(text)
        one_sentence(lambda: mr.load_sae(path=tmp_path / "scale"), "scaling factor")
    for value in ("-1", "0", "NaN", "Infinity", '"x"', "[1]"):
        file.write_text(f'{{"scaling_factor": {value}}}')
        one_sentence(lambda: mr.load_sae(path=tmp_path / "scale"), file)
    checkpoint(tmp_path / "whiten", "standard", "covariance_whitening")
    file = tmp_path / "whiten" / "activation_whitening.safetensors"
    whole = load_file(file)
    for name in whole:
        save_file(whole | {name: whole[name][1:].contiguous()}, file)
        one_sentence(lambda: mr.load_sae(path=tmp_path / "whiten"), file, name)
        save_file({k: v for k, v in whole.items() if k != name}, file)
        one_sentence(lambda: mr.load_sae(path=tmp_path / "whiten"), file, name)
    file.unlink()
    one_sentence(lambda: mr.load_sae(path=tmp_path / "whiten"), "covariance_whitening", file.name)


@pytest.mark.parametrize("kind", ["abstopk", "matching_pursuit", "temporal", "transcoder", "batchtopk"])
def test_saelens_other_architectures_are_named_when_they_are_refused(tmp_path, kind):
    random_sae("standard").save_model(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text()) | {"architecture": kind}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    one_sentence(lambda: mr.load_sae(path=tmp_path), f"'{kind}'", "standard, jumprelu, topk and gated")


# Configurations from before SAELens 6, whose own reader tells what they mean


OLD = {
    "architecture": "standard",
    "d_in": WIDTH,
    "d_sae": LATENTS,
    "dtype": "float32",
    "device": "cpu",
    "model_name": "gpt2-small",
    "hook_name": "blocks.6.hook_resid_post",
    "hook_layer": 6,
    "activation_fn_str": "relu",
    "prepend_bos": True,
}


VERSION_6 = {"sae_lens_version": "6.0.0-rc.1"}


@pytest.mark.parametrize(
    "changes, kind",
    [
        ({}, "standard"),
        ({"apply_b_dec_to_input": False}, "standard"),
        ({"normalize_activations": False}, "standard"),
        ({"normalize_activations": None}, "standard"),
        ({"normalize_activations": "layer_norm", "architecture": None}, "standard"),
        ({"hook_name": None, "hook_point": "blocks.6.hook_resid_post"}, "standard"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 8}}, "topk"),  # GPT-2 by OpenAI
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 8}, "normalize_activations": "layer_norm"}, "topk"),
        ({"architecture": "topk", "k": 3, "activation_fn_kwargs": {"k": 8}}, "topk"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {}}, "standard"),  # no k: by its architecture
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": None}}, "standard"),
        ({"activation_fn_str": "topk"}, "standard"),
        ({"architecture": "jumprelu"}, "jumprelu"),
        ({"architecture": "jumprelu", "activation_fn_str": "topk", "activation_fn_kwargs": {}}, "jumprelu"),
        ({"architecture": "gated", "activation_fn": "topk"}, "gated"),
        ({"architecture": "gated"}, "gated"),
        # from version 6 on the architecture says all
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 8}, **VERSION_6}, "standard"),
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 8}, "metadata": VERSION_6}, "standard"),
        ({"architecture": "topk", "k": 8, **VERSION_6}, "topk"),
    ],
)
def test_old_configurations_mean_what_saelens_says(tmp_path, changes, kind):
    import sae_lens

    random_sae(kind).save_model(tmp_path)
    config = {k: v for k, v in (OLD | changes).items() if v is not None or k == "normalize_activations"}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    sae = sae_lens.SAE.load_from_disk(tmp_path)
    handle, x = mr.load_sae(path=tmp_path), vectors()
    assert sae.cfg.architecture() == kind and handle.kind == {"standard": "relu"}.get(kind, kind)
    assert (handle.hook_point, handle.model_name) == (HookPoint(6), "gpt2-small")
    assert_readings(encode(handle, range(LATENTS), x), sae, x, range(LATENTS))


def test_old_scaled_configuration_is_not_read_unscaled(tmp_path):
    random_sae("standard").save_model(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(OLD | {"normalize_activations": True}))
    one_sentence(lambda: mr.load_sae(path=tmp_path), "scaling factor")


def named(folder, name, **entries):
    """The folder's cfg.json with another model's name, and more entries."""
    config = json.loads((folder / "cfg.json").read_text())
    for part in (config, config.setdefault("metadata", {})):
        part |= {"model_name": name, **entries}
    (folder / "cfg.json").write_text(json.dumps(config))


CENTERS = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}


@pytest.mark.parametrize(
    "name, centers",
    [
        *[(name, True) for name in ("gpt2-small", "pythia-70m-deduped", "EleutherAI/gpt-j-6B", "opt-125m", "phi-2")],
        *[(name, False) for name in ("gemma-2-2b", "meta-llama/Llama-3.1-8B", "mistral-7b", "gpt-oss-20b", "Qwen3-8B")],
    ],
)
def test_centered_writing_weights_are_those_of_models_with_layernorm(tmp_path, name, centers):
    """TransformerLens ignores `center_writing_weights` where a model has RMSNorm."""
    sae, x = save_sae(random_sae("standard"), tmp_path), vectors()
    named(tmp_path, name, **CENTERS)
    seen = x - x.mean(-1, keepdim=True) if centers else x
    assert_readings(encode(mr.load_sae(path=tmp_path), range(LATENTS), x), sae, seen, range(LATENTS))
    for other in ("fold_ln", "center_unembed", "fold_value_biases"):  # these leave the stream as it is
        named(tmp_path, name, model_from_pretrained_kwargs={other: True, "center_writing_weights": False})
        assert_readings(encode(mr.load_sae(path=tmp_path), range(LATENTS), x), sae, x, range(LATENTS))


@pytest.mark.parametrize("name", ["something-unheard-of", "bigscience/bloom-560m", "gpt2-into-llama", None])
def test_centered_writing_weights_of_a_model_that_may_be_either_are_refused(tmp_path, name):
    save_sae(random_sae("standard"), tmp_path)
    named(tmp_path, name, **CENTERS)
    one_sentence(lambda: mr.load_sae(path=tmp_path), tmp_path / "cfg.json", "center_writing_weights", str(name))
    for kwargs in (None, {}, {"center_writing_weights": None}, {"center_writing_weights": False}):
        named(tmp_path, name, model_from_pretrained_kwargs=kwargs)
        mr.load_sae(path=tmp_path)


@pytest.mark.parametrize("kind", ["standard", "topk"])
def test_null_says_what_a_missing_entry_says(tmp_path, kind):
    save_sae(random_sae(kind), tmp_path)
    whole = json.loads((tmp_path / "cfg.json").read_text())
    x = vectors()
    want, handle = encode(mr.load_sae(path=tmp_path), range(LATENTS), x), mr.load_sae(path=tmp_path)
    nulls = dict.fromkeys(
        ("normalize_activations", "model_from_pretrained_kwargs", "activation_fn", "activation_fn_str",
         "activation_fn_kwargs", "hook_point", "sae_lens_version", "rescale_acts_by_decoder_norm", "threshold")
    )  # fmt: skip
    for top, inside in ((nulls, {}), ({}, nulls | dict.fromkeys(("hook_name", "architecture", "d_in", "k")))):
        config = whole | whole["metadata"] | top | {"metadata": whole["metadata"] | inside}
        (tmp_path / "cfg.json").write_text(json.dumps(config))
        found = mr.load_sae(path=tmp_path)
        assert (found.hook_point, found.kind, found.model_name) == (handle.hook_point, handle.kind, handle.model_name)
        assert torch.equal(encode(found, range(LATENTS), x), want)


@pytest.mark.parametrize("file", ["cfg.json", "activation_scaler.json"])
def test_a_byte_order_mark_is_no_damage(tmp_path, file):
    checkpoint(tmp_path, "standard", "expected_average_only_in")
    x = vectors()
    want = encode(mr.load_sae(path=tmp_path), range(LATENTS), x)
    (tmp_path / file).write_bytes(b"\xef\xbb\xbf" + (tmp_path / file).read_bytes().replace(b"\n", b"\r\n"))
    assert torch.equal(encode(mr.load_sae(path=tmp_path), range(LATENTS), x), want)


@pytest.mark.parametrize("where", ["metadata", "flat", "registry"])
def test_centered_writing_weights_read_the_centered_stream(tmp_path, where):
    """TransformerLens' `center_writing_weights` makes every residual vector's mean 0; the HF model's is not."""
    from mechreward.sae import formats

    sae = save_sae(random_sae("standard"), tmp_path)
    named(tmp_path, "gpt2-small")
    config = json.loads((tmp_path / "cfg.json").read_text())
    entry = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    overrides = None
    if where == "metadata":
        config["metadata"] |= entry
    elif where == "flat":
        config |= entry
    else:
        overrides = entry
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    handle, x = formats.saelens(tmp_path, overrides=overrides), vectors()
    centered = x - x.mean(-1, keepdim=True)
    assert_readings(encode(handle, range(LATENTS), x), sae, centered, range(LATENTS))
    activations = sae.encode(centered).detach()
    expected = sae.decode(activations).detach() + x.mean(-1, keepdim=True)
    torch.testing.assert_close(handle.decode(activations, x), expected, atol=1e-4, rtol=1e-4)


# Gemma Scope


def write_gemma_scope(folder, d=16, n=40, seed=0, name="params.npz"):
    g = np.random.default_rng(seed)
    arrays = {
        "W_enc": g.normal(size=(d, n)).astype(np.float32),
        "W_dec": g.normal(size=(n, d)).astype(np.float32),
        "b_enc": g.normal(size=n).astype(np.float32),
        "b_dec": g.normal(size=d).astype(np.float32),
        "threshold": g.uniform(0.5, 4, size=n).astype(np.float32),
    }
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / name, **arrays)
    return arrays


@pytest.mark.parametrize("by", ["folder", "file"])
def test_gemma_scope_equals_its_formula(tmp_path, by):
    folder = tmp_path / "layer_22" / "width_16k" / "average_l0_123"
    a = {name: array.astype(np.float64) for name, array in write_gemma_scope(folder).items()}
    handle = mr.load_sae(path=folder if by == "folder" else folder / "params.npz")
    assert (handle.d_model, handle.d_sae, handle.hook_point) == (16, 40, HookPoint(22))
    x = vectors(200, 16)
    z = x.double().numpy() @ a["W_enc"] + a["b_enc"]  # b_dec is not subtracted
    expected = np.maximum(z, 0) * (z > a["threshold"])
    clear = np.abs(z - a["threshold"]) > 1e-4
    assert clear.mean() > 0.99 and 0.02 < (expected > 0).mean() < 0.5 and ((z > 0) & (expected == 0)).any()
    for ids in (list(range(40)), [39, 0, 7]):
        got = encode(handle, ids, x).double().numpy()
        largest = np.abs(z).max(-1, keepdims=True)
        assert (np.abs(got - expected[:, ids]) <= 1e-5 * largest)[clear[:, ids]].all()
    reconstruction = expected @ a["W_dec"] + a["b_dec"]
    got = handle.decode(torch.tensor(expected, dtype=torch.float32), x)
    np.testing.assert_allclose(got.numpy(), reconstruction, rtol=1e-4, atol=1e-4)


def test_gemma_scope_without_its_folders_does_not_guess_the_layer(tmp_path):
    write_gemma_scope(tmp_path / "somewhere")
    one_sentence(lambda: mr.load_sae(path=tmp_path / "somewhere"), "params.npz", "layer")


# The registry


@pytest.fixture
def served(monkeypatch, tmp_path):
    """The hub, served from a folder: repository and file of each download."""
    asked = []

    def download(repo, file, revision=None):
        asked.append((repo, file, revision))
        return tmp_path / repo / file

    monkeypatch.setattr(registry, "download", download)
    return tmp_path, asked


def test_gemma_scope_canonical_release(served):
    root, asked = served
    file = "layer_22/width_16k/average_l0_123/params.npz"
    arrays = write_gemma_scope((root / "google/gemma-scope-9b-pt-res" / file).parent)
    handle = mr.load_sae(release="gemma-scope-9b-pt-res-canonical", sae_id="layer_22/width_16k/canonical", revision="v")
    assert asked == [("google/gemma-scope-9b-pt-res", file, "v")]
    assert str(handle.hook_point) == "blocks.22.hook_resid_post"
    assert handle.model_name == "gemma-2-9b"
    x = vectors(5, 16)
    z = x.numpy() @ arrays["W_enc"][:, [3]] + arrays["b_enc"][3]
    np.testing.assert_allclose(encode(handle, [3], x), np.where(z > arrays["threshold"][3], z, 0), rtol=1e-4, atol=1e-5)


def test_a_saelens_release_with_corrections_in_the_registry(served):
    """Mistral's configuration lacks its normalisation: SAELens' registry adds it."""
    root, asked = served
    folder = root / "JoshEngels/Mistral-7B-Residual-Stream-SAEs/mistral_7b_layer_8"
    sae = save_sae(random_sae("standard", "constant_norm_rescale"), folder)
    config = json.loads((folder / "cfg.json").read_text()) | {"normalize_activations": "none"}
    (folder / "cfg.json").write_text(json.dumps(config))
    handle = mr.load_sae(release="mistral-7b-res-wg", sae_id="blocks.8.hook_resid_pre")
    assert [file for _, file, _ in asked] == [
        f"mistral_7b_layer_8/{n}" for n in ("cfg.json", "sae_weights.safetensors")
    ]
    x = vectors()
    assert_readings(encode(handle, range(LATENTS), x), sae, x, range(LATENTS))


def test_gpt2_release_with_centered_weights(served):
    root, _ = served
    folder = root / "jbloom/GPT2-Small-SAEs-Reformatted/blocks.8.hook_resid_pre"
    sae = save_sae(random_sae("standard"), folder)
    handle = mr.load_sae(release="gpt2-small-res-jb", sae_id="blocks.8.hook_resid_pre")
    x = vectors()
    assert_readings(encode(handle, range(LATENTS), x), sae, x - x.mean(-1, keepdim=True), range(LATENTS))


@pytest.mark.parametrize(
    "release, sae_id, parts",
    [
        (
            "gemma-scope-9b-pt-res-canonial",
            "x",
            ["gemma-scope-9b-pt-res-canonial", "'gemma-scope-9b-pt-res-canonical'?"],
        ),
        (
            "gemma-scope-9b-pt-res-canonical",
            "layer_22/width_16k/cannonical",
            ["cannonical", "'layer_22/width_16k/canonical'?"],
        ),
        ("pocket-res-canonical", "layer_2/width_2k/canonica", ["'layer_2/width_2k/canonical'?"]),
        ("qqqqqq", "x", ["no release 'qqqqqq'"]),
        ("gemma-scope-2b-pt-mlp-canonical", "layer_0/width_16k/canonical", ["residual stream"]),
        ("gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6", ["embedding"]),
        ("temporal-sae-gemma-2-2b", "blocks.12.hook_resid_post", ["'temporal'"]),
        (None, None, ["release=", "path="]),
        ("gpt2-small-res-jb", None, ["sae_id="]),
    ],
)
def test_what_the_registry_does_not_have(served, release, sae_id, parts):
    assert isinstance(one_sentence(lambda: mr.load_sae(release=release, sae_id=sae_id), *parts), SAEError)
    assert served[1] == []


def test_offline_is_one_sentence(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    error = one_sentence(
        lambda: mr.load_sae(release="gemma-scope-9b-pt-res-canonical", sae_id="layer_22/width_16k/canonical"),
        "google/gemma-scope-9b-pt-res/layer_22/width_16k/average_l0_123/params.npz",
        "load_sae(path=...)",
    )
    assert isinstance(error, SAEError)


# Bad input


@pytest.mark.parametrize("ids, part", [([LATENTS], LATENTS), ([0, -1], -1), ([3, 5, 3], "twice")])
def test_feature_ids_that_make_no_sense(saved_sae, ids, part):
    for kind in ("jumprelu", "topk"):
        handle = saved_sae(kind)[1]
        assert isinstance(one_sentence(lambda handle=handle: handle.features(ids), handle.name, part), SAEError)


@pytest.fixture
def folder(tmp_path):
    random_sae("jumprelu").save_model(tmp_path)
    return tmp_path


def read_all(path):
    handle = mr.load_sae(path=path)
    return encode(handle, range(handle.d_sae), vectors(20, handle.d_model))


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 2000, -1])
def test_truncated_weights(folder, keep):
    file = folder / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert isinstance(one_sentence(lambda: read_all(folder), file), SAEError)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_flipped_bits_in_the_header(tmp_path_factory, saved_sae, data):
    _, handle = saved_sae("jumprelu")
    source = Path(handle.name)
    raw = bytearray((source / "sae_weights.safetensors").read_bytes())
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    place, bit = data.draw(st.integers(0, header - 1)), data.draw(st.integers(0, 7))
    raw[place] ^= 1 << bit
    target = tmp_path_factory.mktemp("flipped")
    (target / "cfg.json").write_text((source / "cfg.json").read_text())
    (target / "sae_weights.safetensors").write_bytes(raw)
    try:
        got = read_all(target)
    except MechRewardError as error:
        assert "\n" not in str(error) and len(str(error)) < 500 and str(target) in str(error)
    else:  # it was in something that does not matter
        assert got.equal(read_all(source))


def test_missing_tensor_and_wrong_shapes(folder):
    file = folder / "sae_weights.safetensors"
    whole = load_file(file)
    for name in ("W_enc", "b_enc", "threshold", "b_dec"):
        save_file({k: v for k, v in whole.items() if k != name}, file)
        one_sentence(lambda: read_all(folder), folder, name)
        save_file(whole | {name: whole[name][:-1].contiguous()}, file)
        one_sentence(lambda: read_all(folder), folder)


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "threshold", "b_dec"])
def test_nan_in_the_weights(folder, name):
    file = folder / "sae_weights.safetensors"
    weights = load_file(file)
    weights[name].view(-1)[0] = torch.nan
    save_file(weights, file)
    one_sentence(lambda: read_all(folder), folder, "NaN")


@pytest.mark.parametrize(
    "text, part",
    [
        ("", "not a SAELens configuration"),
        ("{", "not a SAELens configuration"),
        ("[]", "not a SAELens configuration"),
        ("null", "not a SAELens configuration"),
        ("{}", "not a SAELens configuration"),
        ('{"d_in": 32, "d_sae": 64}', "hook"),
        ('{"d_in": null, "d_sae": 64, "hook_name": "blocks.1.hook_resid_post"}', "not a SAELens configuration"),
        ('{"d_in": 32, "d_sae": "x", "hook_name": "blocks.1.hook_resid_post"}', "not a SAELens configuration"),
        ('{"d_in": 31, "d_sae": 64, "hook_name": "blocks.1.hook_resid_post"}', "W_enc"),
        ('{"architecture": "temporal", "d_in": 32, "d_sae": 64, "hook_name": "blocks.1.hook_resid_post"}', "temporal"),
        ('{"architecture": ["a"], "d_in": 32, "d_sae": 64, "hook_name": "blocks.1.hook_resid_post"}', "['a']"),
        ('{"architecture": "topk", "d_in": 32, "d_sae": 64, "hook_name": "blocks.1.hook_resid_post"}', "'k'"),
        ('{"architecture": "topk", "k": 65, "d_in": 32, "d_sae": 64, "hook_name": "blocks.1.hook_resid_post"}', "k=65"),
        ('{"architecture": "topk", "k": 0, "d_in": 32, "d_sae": 64, "hook_name": "blocks.1.hook_resid_post"}', "k=0"),
        ('{"d_in": 32, "d_sae": 64, "hook_name": 7}', "hook point"),
        ('{"d_in": 32, "d_sae": 64, "hook_name": "blocks.1.hook_mlp_out"}', "hook_mlp_out"),
        (
            '{"normalize_activations": "covariance_whitening", "d_in": 32, "d_sae": 64, '
            '"hook_name": "blocks.1.hook_resid_post"}',
            "covariance_whitening",
        ),
        (
            '{"normalize_activations": "something_new", "d_in": 32, "d_sae": 64, '
            '"hook_name": "blocks.1.hook_resid_post"}',
            "something_new",
        ),
    ],
)
def test_broken_configurations(folder, text, part):
    (folder / "cfg.json").write_text(text)
    error = one_sentence(lambda: mr.load_sae(path=folder), part)
    assert isinstance(error, ModelMismatchError if "hook point" in str(error) else SAEError)


def test_a_binary_configuration_is_not_quoted(folder):
    (folder / "cfg.json").write_bytes(b"\xff\xfe\n" * 5000)
    assert isinstance(one_sentence(lambda: mr.load_sae(path=folder), folder / "cfg.json"), SAEError)


def test_places_where_there_is_nothing(folder, tmp_path):
    for path in (tmp_path / "missing", folder / "sae_weights.safetensors", tmp_path / "missing.npz"):
        assert isinstance(one_sentence(lambda path=path: mr.load_sae(path=path), path), SAEError)
    (folder / "sae_weights.safetensors").unlink()
    one_sentence(lambda: mr.load_sae(path=folder), "sae_weights.safetensors", "missing")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl", ".bin", ".pickle"])
def test_pickles_are_not_opened(tmp_path, suffix):
    file = tmp_path / f"sae{suffix}"
    file.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    assert isinstance(one_sentence(lambda: mr.load_sae(path=file), file, "pickle"), SAEError)
    assert not (tmp_path / "ran").exists()


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (self.target, "w"))


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "threshold"])
def test_a_pickle_inside_an_npz_is_not_run(tmp_path, name):
    folder = tmp_path / "layer_3"
    arrays = write_gemma_scope(folder)
    arrays[name] = np.array([Bomb(str(tmp_path / "ran"))], dtype=object)
    np.savez(folder / "params.npz", **arrays)
    assert isinstance(one_sentence(lambda: read_all(folder), folder / "params.npz"), SAEError)
    assert not (tmp_path / "ran").exists()


def test_npz_with_missing_arrays_or_wrong_shapes(tmp_path):
    folder = tmp_path / "layer_3"
    arrays = write_gemma_scope(folder)
    for name in arrays:
        if name != "W_dec":
            np.savez(folder / "params.npz", **{k: v for k, v in arrays.items() if k != name})
            one_sentence(lambda: read_all(folder), folder, name)
        np.savez(folder / "params.npz", **arrays | {name: arrays[name].reshape(-1)[:-1]})
        one_sentence(lambda: read_all(folder), folder)
    np.savez(folder / "params.npz", **arrays | {"b_enc": np.full(40, np.nan, dtype=np.float32)})
    one_sentence(lambda: read_all(folder), folder, "NaN")


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_npz_files(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("npz") / "layer_3"
    arrays = write_gemma_scope(folder)
    file = folder / "params.npz"
    if data.draw(st.booleans(), "compressed"):
        np.savez_compressed(file, **arrays)
    whole = read_all(folder)
    raw = bytearray(file.read_bytes())
    if data.draw(st.booleans(), "truncated"):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        places = st.one_of(st.integers(0, 300), st.integers(len(raw) - 600, len(raw) - 1), st.integers(0, len(raw) - 1))
        raw[data.draw(places)] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(raw)
    try:
        got = read_all(folder)
    except MechRewardError as error:
        assert "\n" not in str(error) and len(str(error)) < 500 and str(file) in str(error)
    else:
        assert got.equal(whole)


def test_an_npz_header_that_reads_half_of_the_numbers(tmp_path):
    """The shape still fits: only the checksum, which zipfile compares at the end of the member, tells."""
    folder = tmp_path / "layer_3"
    write_gemma_scope(folder, n=4000)
    file = folder / "params.npz"
    raw = file.read_bytes()
    start = raw.index(b"b_enc.npy")
    file.write_bytes(raw[:start] + raw[start:].replace(b"'<f4'", b"'<f2'", 1))
    assert isinstance(one_sentence(lambda: read_all(folder), file), SAEError)
