"""SARM: every formula against hand-worked or float64 arithmetic, gradients of every train mode, the cut model."""

import functools
import gzip
import hashlib
import itertools
import json
import math
import random
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from common.comparison import read_runs
from mechreward import verifiers
from mechreward.errors import ConfigError, DataError, ModelMismatchError, SAEError
from mechreward.pocket.questions import OTHER_WORDING, WORDING, questions, reasoning_question
from mechreward.rollout.capture import decoder_layers
from mechreward.rollout.hf import load_model
from mechreward.train.config import read_config
from sarm import cells, results
from sarm import model as sarm
from sarm.config import SarmConfig
from sarm.model import Recipe, Sarm, SarmReward, SarmSettings, Tokens, TopKSAE, z_score
from sarm.pairs import PairSet
from sarm.preferences import Preference, preference, read_preferences, write_preferences

D, N, K = 16, 40, 5
SIZES = {"hidden_size": D, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama(layers=4, seed=0):
    torch.manual_seed(seed)
    sizes = {**SIZES, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, initializer_range=0.3, **sizes)).eval()


def gemma(layers=4):
    torch.manual_seed(0)
    sizes = {**SIZES, "head_dim": 8}
    config = Gemma2Config(num_hidden_layers=layers, vocab_size=50, sliding_window=8, initializer_range=0.3, **sizes)
    return Gemma2ForCausalLM(config).eval()


def built(mode, use_topk, *, dense=False, head=True, **options):
    """A SARM with a head that is not zero, so that gradients pass it."""
    torch.manual_seed(1)
    sae = None if dense else TopKSAE(D, N, K)
    model = Sarm(sarm.truncated(llama(), 2), sae, SarmSettings(2, use_topk, mode, **options), D)
    if head:
        torch.nn.init.normal_(model.head.weight)
    if sae is not None:
        torch.nn.init.normal_(sae.latent_bias, std=0.1)
        torch.nn.init.normal_(sae.pre_bias, std=0.1)
    return model


def some_pairs(count=3, seed=0):
    rng = np.random.default_rng(seed)

    def side():
        length = int(rng.integers(4, 12))
        return Tokens(rng.integers(1, 50, length).tolist(), int(rng.integers(1, length)))

    return [(side(), side()) for _ in range(count)]


def flat(pairs):
    return [pair[side] for side in (0, 1) for pair in pairs]


# -- formulas ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=30))
def test_z_score_in_float64(values):
    h = np.array(values, dtype=np.float64)
    want = (h - h.mean()) / (math.sqrt(((h - h.mean()) ** 2).sum() / (len(h) - 1)) + 1e-6)
    found = z_score(torch.tensor(h))
    assert found.numpy() == pytest.approx(want, rel=1e-9, abs=1e-9)


def test_z_score_is_of_each_token():
    h = torch.randn(2, 3, D)
    assert torch.allclose(z_score(h)[1, 2], z_score(h[1, 2]), atol=1e-6)


def test_normalised_mse_by_hand():
    x, x_hat = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 3.0], [0.0, 2.0]])
    assert sarm.normalised_mse(x, x_hat).tolist() == pytest.approx([1 / 25, 5 / 1])


def test_topk_by_hand_keeps_negative_values():
    sae = TopKSAE(4, 4, 3)
    z = torch.tensor([[-1.0, -5.0, 2.0, -3.0], [4.0, 3.0, 2.0, 1.0]])
    assert sae.topk(z).tolist() == [[-1.0, 0.0, 2.0, -3.0], [4.0, 3.0, 2.0, 0.0]]


def test_latents_and_reconstruction_in_float64():
    torch.manual_seed(0)
    sae = TopKSAE(D, N, K)
    for p in sae.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(7, D)
    e, d = sae.encoder.weight.detach().double().numpy(), sae.decoder.weight.detach().double().numpy()
    pre, bias = sae.pre_bias.detach().double().numpy(), sae.latent_bias.detach().double().numpy()
    latents, decoded = sae(x)
    for row, vector in enumerate(x.double().numpy()):
        z = e @ (vector - pre) + bias
        f = np.where(z >= np.sort(z)[-K], z, 0.0)
        assert latents[row].detach().numpy() == pytest.approx(f, abs=1e-4)
        assert decoded[row].detach().numpy() == pytest.approx(d @ f + pre, abs=1e-4)


def test_a_new_autoencoder_is_tied_with_unit_columns():
    sae = TopKSAE(D, N, K)
    assert sae.decoder.weight.norm(dim=0).tolist() == pytest.approx([1.0] * N, abs=1e-5)
    ratio = sae.decoder.weight.T / sae.encoder.weight
    assert (ratio > 0).all() and torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4)
    with pytest.raises(ConfigError, match="k = 41 of 40"):
        TopKSAE(D, N, 41)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 30)), min_size=1, max_size=8))
def test_preference_loss_in_float64(rewards):
    chosen, rejected = torch.tensor(rewards, dtype=torch.float64).T
    want = np.mean([np.logaddexp(0, -(c - r)) for c, r in rewards])
    assert float(sarm.preference_loss(chosen, rejected)) == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_a_zero_head_rewards_nothing_and_loses_ln_2():
    for topk in (True, False):
        model = built(3, topk, head=False)
        found = model.losses(*sarm.padded(flat(some_pairs())))
        assert model.head.bias is None
        assert model(*sarm.padded(flat(some_pairs()))[:2]).tolist() == [0.0] * 6
        assert float(found.preference.detach()) == pytest.approx(math.log(2)) and found.margins.tolist() == [0.0] * 3


@pytest.mark.parametrize("reconstructs", ["completion", "last"])
@pytest.mark.parametrize("use_topk", [True, False])
def test_the_loss_in_float64(use_topk, reconstructs):
    """Each sequence alone, without padding, in NumPy; the LM's vectors from the whole model's hidden states."""
    model, pairs = built(3, use_topk, rec_lambda=0.7, reconstructs=reconstructs), some_pairs()
    whole = llama()
    e, d = (w.weight.detach().double().numpy() for w in (model.sae.encoder, model.sae.decoder))
    pre, bias = (p.detach().double().numpy() for p in (model.sae.pre_bias, model.sae.latent_bias))
    head = model.head.weight[0].detach().double().numpy()
    rewards, errors = [], []
    for side in flat(pairs):
        hidden = whole(torch.tensor([side.ids]), output_hidden_states=True).hidden_states[2][0]
        h = hidden.detach().double().numpy()
        x = (h - h.mean(axis=1, keepdims=True)) / (h.std(axis=1, ddof=1, keepdims=True) + 1e-6)
        z = (x - pre) @ e.T + bias
        f = np.where(z >= np.sort(z, axis=1)[:, -K][:, None], z, 0.0)
        rewards.append(((f if use_topk else z) @ head)[-1])
        error = (((f @ d.T + pre) - x) ** 2).mean(axis=1) / (x**2).mean(axis=1)
        errors.append(error[-1] if reconstructs == "last" else error[side.start :].mean())
    chosen, rejected = np.array(rewards[:3]), np.array(rewards[3:])
    bt, rec = np.logaddexp(0, rejected - chosen).mean(), np.mean(errors)
    found = model.losses(*sarm.padded(flat(pairs)))
    assert float(found.preference.detach()) == pytest.approx(bt, rel=1e-4)
    assert float(found.reconstruction.detach()) == pytest.approx(rec, rel=1e-4)
    assert float(found.total.detach()) == pytest.approx(bt + 0.7 * rec, rel=1e-4)
    assert found.margins.tolist() == pytest.approx(chosen - rejected, rel=1e-3, abs=1e-4)


def test_the_two_readings_of_use_topk_differ_and_must_be_chosen():
    on, off = built(0, True), built(0, False)
    off.load_state_dict(on.state_dict())
    batch = sarm.padded(flat(some_pairs()))[:2]
    assert not torch.allclose(on(*batch), off(*batch))
    with pytest.raises(TypeError):
        SarmSettings(layers=2, mode=3)
    with pytest.raises(ConfigError, match="0 to 3"):
        SarmSettings(2, True, 4)


# -- gradients ---------------------------------------------------------------------------------------------------------


def gradients(loss, model):
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def separate_losses(model, pairs, target_is_detached):
    """Both losses, worked out without `Sarm.losses`, one sequence at a time."""
    rewards, errors = [], []
    for side in flat(pairs):
        ids = torch.tensor([side.ids])
        x = z_score(model.lm(input_ids=ids, use_cache=False).last_hidden_state)[0]
        z = model.sae.pre_acts(x)
        kept = z.topk(K, dim=-1).indices
        f = z * torch.zeros_like(z).scatter(1, kept, 1.0)
        rewards.append(((f if model.settings.use_topk else z)[-1] * model.head.weight[0]).sum())
        target = x.detach() if target_is_detached else x
        again = model.sae.pre_acts(target)
        f = again * torch.zeros_like(again).scatter(1, kept, 1.0)
        decoded = f @ model.sae.decoder.weight.T + model.sae.pre_bias
        error = (decoded - target).square().mean(dim=1) / target.square().mean(dim=1)
        errors.append(error[side.start :].mean())
    half = len(pairs)
    margins = torch.stack(rewards[:half]) - torch.stack(rewards[half:])
    return torch.nn.functional.softplus(-margins).mean(), torch.stack(errors).mean()


@pytest.mark.parametrize("use_topk", [True, False])
@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_who_learns_from_what(mode, use_topk):
    """Every parameter's gradient in every mode equals the sum of those of the losses that it is to learn from."""
    model, pairs = built(mode, use_topk, rec_lambda=0.6), some_pairs()
    found = model.losses(*sarm.padded(flat(pairs)))
    found.total.backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    open_model = built(mode, use_topk, rec_lambda=0.6).requires_grad_(True)
    by_hand, reconstruction = separate_losses(open_model, pairs, target_is_detached=mode == 3)
    by_bt = gradients(by_hand, open_model)
    _, reconstruction = separate_losses(open_model, pairs, target_is_detached=mode == 3)
    by_rec = gradients(reconstruction, open_model)

    takes = {  # part: (from the preferences, from the reconstruction)
        0: {"head": (1, 0)},
        1: {"head": (1, 0), "lm": (1, 0)},
        2: {"head": (1, 0), "lm": (1, 1), "sae": (1, 1)},
        3: {"head": (1, 0), "lm": (1, 0), "sae": (1, 1)},
    }[mode]
    want = {}
    for name, parameter in open_model.named_parameters():
        bt, rec = takes.get(name.split(".")[0], (0, 0))
        sources = [g for g in (bt * [by_bt.get(name)] + rec * [scaled(by_rec.get(name), 0.6)]) if g is not None]
        if sources:
            want[name] = sum(sources)
        assert parameter.grad is None
    assert set(got) == {name for name in want if not name.startswith("lm.norm")}
    for name, gradient in got.items():
        assert torch.allclose(gradient, want[name], atol=1e-5, rtol=1e-3), name
    if mode == 3:  # the paper's routing, said once more: nothing of the reconstruction reaches the language model
        assert not any(name.startswith("lm.") for name in by_rec)
        assert by_rec["sae.decoder.weight"].abs().sum() > 0 and "sae.decoder.weight" not in by_bt
    if mode == 2:
        assert any(name.startswith("lm.") and g.abs().sum() > 0 for name, g in by_rec.items())


def scaled(gradient, factor):
    return None if gradient is None else factor * gradient


def test_the_dense_control_is_a_head_on_x():
    model, pairs = built(1, False, dense=True), some_pairs()
    found = model.losses(*sarm.padded(flat(pairs)))
    assert model.head.weight.shape == (1, D) and float(found.reconstruction) == 0
    hidden = llama()(torch.tensor([pairs[0][0].ids]), output_hidden_states=True).hidden_states[2][0, -1]
    want = float((z_score(hidden) @ model.head.weight[0]).detach())
    assert float(model(*sarm.padded([pairs[0][0]])[:2]).detach()) == pytest.approx(want, rel=1e-4, abs=1e-5)


# -- the cut model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, gemma])
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_truncation_gives_the_residual_stream_after_the_last_layer(make, layers):
    """HF's hidden states and a hook; at the last layer HF's entry is normed, and only the hook is right."""
    ids = torch.randint(1, 50, (2, 12))
    whole, read = make(), []
    handle = decoder_layers(whole)[layers - 1].register_forward_hook(
        lambda _m, _a, out: read.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        hidden = whole(ids, output_hidden_states=True).hidden_states[layers]
        handle.remove()
        cut = sarm.truncated(make(), layers)
        found = cut(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
    assert torch.allclose(found, read[0], atol=1e-5)
    assert torch.allclose(found, hidden, atol=1e-5) == (layers < 4)
    kept = [name for name, _ in cut.named_parameters()]
    assert {int(name.split(".")[1]) for name in kept if name.startswith("layers.")} == set(range(layers))
    assert not any(name.startswith("norm") for name in kept)


def test_pocket_is_cut_where_its_pack_reads():
    model, tokenizer = load_model("mechreward/pocket")
    ids = torch.tensor([tokenizer("Question: Ana has 12 books. How many books does Ana have?\nAnswer:").input_ids])
    with torch.no_grad():
        want = model(ids, output_hidden_states=True).hidden_states[3]
        found = sarm.truncated(model, 3)(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert torch.allclose(found, want, atol=1e-5)


def test_what_cannot_be_cut():
    with pytest.raises(ModelMismatchError, match="has 4 layers"):
        sarm.truncated(llama(), 5)
    tiny = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50))
    with pytest.raises(ModelMismatchError, match="laid out as Llama's"):
        sarm.truncated(tiny, 1)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 14), min_size=1, max_size=5), st.integers(0, 6), st.booleans(), st.integers(0, 99))
def test_padding_and_company_change_nothing(lengths, extra, left, seed):
    """A sequence's reward is the same alone and in any batch, padded on either side."""
    model = built(3, True).eval()
    rng = np.random.default_rng(seed)
    rows = [rng.integers(1, 50, n).tolist() for n in lengths]
    width = max(lengths) + extra
    pads = [[0] * (width - len(row)) for row in rows]
    ids = torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)])
    ones = [[1] * len(row) for row in rows]
    attention = torch.tensor([pad + one if left else one + pad for one, pad in zip(ones, pads, strict=True)])
    with torch.no_grad():
        alone = [float(model(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long))) for row in rows]
        found = model(ids, attention)
    assert found.tolist() == pytest.approx(alone, rel=2e-3, abs=2e-3)


# -- training ----------------------------------------------------------------------------------------------------------


def test_pretraining_learns_to_reconstruct():
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(24, D), dim=1)
    codes = torch.zeros(4000, 24).scatter(1, torch.rand(4000, 24).topk(2).indices, 1.0)
    x = z_score(codes @ directions)
    sae = TopKSAE(D, N, 4)
    before = float(sarm.normalised_mse(x, sae(x)[1]).mean().detach())
    recipe = Recipe(3e-3, epochs=20, batch_size=200, weight_decay=0.0)
    reached = sarm.pretrain(sae, x, recipe, seed=0)
    after = float(sarm.normalised_mse(x, sae(x)[1]).mean().detach())
    assert after < 0.15 < before and reached == pytest.approx(after, rel=0.2)
    assert float(((sae(x)[0] != 0).sum(dim=1) - 4).abs().sum()) == 0


def learnable_pairs(count=64, seed=0):
    """The side that holds token 7 is preferred."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        a, b = (rng.integers(8, 50, 8).tolist() for _ in range(2))
        a[int(rng.integers(4, 7))] = 7
        pairs.append((Tokens(a, 2), Tokens(b, 2)))
    return pairs


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_training_learns_and_leaves_alone_what_is_frozen(mode):
    model = built(mode, True, head=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    log = sarm.train(model, learnable_pairs(), Recipe(3e-3, epochs=25, batch_size=16, micro_batch=5), seed=0)
    moved = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {0: {"head"}, 1: {"head", "lm"}, 2: {"head", "lm", "sae"}, 3: {"head", "lm", "sae"}}[mode]
    assert log[0]["preference"] == pytest.approx(math.log(2))
    assert np.mean([entry["preference"] for entry in log[-8:]]) < (0.68 if mode == 0 else 0.6)
    with torch.no_grad():
        scores = sarm.score(model, [side for pair in learnable_pairs() for side in pair]).view(-1, 2)
    assert (scores[:, 0] > scores[:, 1]).float().mean() > (0.6 if mode == 0 else 0.85)


def test_gradients_accumulate_to_the_whole_batch(monkeypatch):
    """A batch in micro-batches makes the gradients of the batch at once."""
    found = []
    step = torch.optim.AdamW.step
    for size in (None, 1, 4):
        model, gradients = built(3, False), {}

        def noted(self, *args, model=model, gradients=gradients, **kwargs):
            gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            return step(self, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", noted)
        sarm.train(model, some_pairs(6), Recipe(1e-3, batch_size=6, micro_batch=size, warmup=0.0), seed=0)
        found.append(gradients)
    for other in found[1:]:
        assert set(other) == set(found[0])
        for name, value in found[0].items():
            assert torch.allclose(value, other[name], atol=1e-5, rtol=1e-3), name


def test_mode_0_from_cached_vectors_is_mode_0_from_text():
    """The frozen model's vectors once, or anew for each step: one training."""
    cached, anew, pairs = built(0, True, head=False), built(0, True, head=False), some_pairs(12)
    recipe = Recipe(1e-2, epochs=3, batch_size=4)
    sarm.train(cached, pairs, recipe, seed=0, vectors=sarm.read_pairs(anew, pairs))
    generator, optimiser = (
        torch.Generator().manual_seed(0),
        torch.optim.AdamW([anew.head.weight], 1e-2, weight_decay=1e-3),
    )
    for step in range(9):
        if step % 3 == 0:
            order = torch.randperm(12, generator=generator).split(4)
        share = step / 9  # 0 steps of warm-up: round(.03 x 9)
        optimiser.param_groups[0]["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * share))
        optimiser.zero_grad()
        anew.losses(*sarm.padded(flat([pairs[i] for i in order[step % 3].tolist()]))).total.backward()
        optimiser.step()
    assert torch.allclose(cached.head.weight, anew.head.weight, atol=1e-5)


def test_a_loss_that_is_no_number_stops_training():
    model = built(1, False)
    torch.nn.init.constant_(model.head.weight, math.nan)
    with pytest.raises(DataError, match="lower the learning rate"):
        sarm.train(model, some_pairs(), Recipe(1e-3), seed=0)


def test_read_vectors_keeps_the_order_and_leaves_out_first_tokens():
    model, pairs = built(0, True).eval(), some_pairs(9)
    sides = flat(pairs)
    vectors = sarm.read_vectors(model, sides)
    for vector, side in zip(vectors, sides, strict=True):
        h = model.lm(input_ids=torch.tensor([side.ids]), use_cache=False).last_hidden_state[0, -1]
        assert torch.allclose(vector, z_score(h), atol=1e-4)
    everything = sarm.read_vectors(model, sides, everywhere=True)
    assert len(everything) == sum(len(side.ids) - 1 for side in sides)


# -- what latents say --------------------------------------------------------------------------------------------------


def test_feature_scores_by_hand():
    chosen, rejected = torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.tensor([[1.0, 4.0], [0.0, 0.0]])
    # c = (4, 2), j = (1, 4), c + j = (5, 6), their mean 5.5
    assert sarm.feature_scores(chosen, rejected).tolist() == pytest.approx([3 / 10.5, -2 / 11.5])


def test_steering_a_latent_moves_the_reward_by_its_weight():
    model, x = built(0, True), z_score(torch.randn(4, D))
    latents = model.features(x)
    changed = sarm.steered(latents, 3, factor=2.0, plus=0.5)
    moved = (model.head(changed) - model.head(latents))[:, 0]
    assert torch.allclose(moved, model.head.weight[0, 3] * (latents[:, 3] + 0.5), atol=1e-5)
    assert torch.equal(latents, model.features(x))


# -- files -------------------------------------------------------------------------------------------------------------


def test_the_published_checkpoints_names(tmp_path):
    torch.manual_seed(0)
    state = {
        "pre_bias": torch.randn(D),
        "latent_bias": torch.randn(N),
        "encoder.weight": torch.randn(N, D),
        "decoder.weight": torch.randn(D, N),
    }
    torch.save({k: v.bfloat16() for k, v in state.items()}, tmp_path / "sae.pt")
    sae = sarm.read_checkpoint(tmp_path / "sae.pt", k=K)
    assert all(torch.allclose(p, state[name], atol=0.05) for name, p in sae.named_parameters())
    assert sae.k == K and sae.pre_bias.dtype == torch.float32

    torch.save({**state, "more": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(SAEError, match="it should hold pre_bias"):
        sarm.read_checkpoint(tmp_path / "other.pt", k=K)
    torch.save({**state, "latent_bias": torch.zeros(3)}, tmp_path / "shapes.pt")
    with pytest.raises(SAEError, match="latent_bias"):
        sarm.read_checkpoint(tmp_path / "shapes.pt", k=K)


class Evil:
    def __reduce__(self):
        return print, ("code of a stranger",)


def test_a_checkpoint_runs_no_code(tmp_path, capsys):
    torch.save({"pre_bias": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(SAEError, match="cannot be read"):
        sarm.read_checkpoint(tmp_path / "evil.pt", k=K)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("mode", [0, 3])
def test_a_saved_sarm_is_the_same_model(tmp_path, mode):
    model, tokenizer = sarm.new_sarm("mechreward/pocket", SarmSettings(2, True, mode), TopKSAE(128, 64, 4))
    torch.nn.init.normal_(model.head.weight)
    if mode:
        torch.nn.init.normal_(model.lm.layers[1].mlp.down_proj.weight, std=0.05)
    sarm.save_sarm(model, tmp_path / "m" / "sarm.safetensors", "mechreward/pocket")
    loaded, _ = sarm.load_sarm(tmp_path / "m" / "sarm.safetensors")
    texts = [sarm.encoded(tokenizer, "Question: 1+1?\nAnswer:", a) for a in (" 2", " 3", " 1+1=2.\n#### 2")]
    assert sarm.score(loaded, texts).tolist() == pytest.approx(sarm.score(model, texts).tolist(), abs=1e-5)
    assert loaded.settings == model.settings and not any(p.requires_grad for p in loaded.parameters())
    size = (tmp_path / "m" / "sarm.safetensors").stat().st_size
    assert (size < 200_000) == (mode == 0)  # a frozen language model is not repeated


def test_what_is_no_sarm(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(SAEError, match="is no SARM"):
        sarm.load_sarm(tmp_path / "x.safetensors")
    with pytest.raises(ModelMismatchError, match="width 8"):
        sarm.new_sarm("mechreward/pocket", SarmSettings(2, True, 0), TopKSAE(8, 64, 4))


# -- tokens ------------------------------------------------------------------------------------------------------------


class TestTokens:
    def test_plain_texts_end_with_the_end_of_sequence(self):
        _, tokenizer = load_model("mechreward/pocket")
        found = sarm.encoded(tokenizer, "Question: 1+1?\nAnswer:", " 1+1=2.\n#### 2")
        asked = tokenizer("Question: 1+1?\nAnswer:").input_ids
        assert found.ids == [*tokenizer("Question: 1+1?\nAnswer: 1+1=2.\n#### 2").input_ids, tokenizer.eos_token_id]
        assert found.start == len(asked) and found.ids[: found.start] == asked

    def test_a_conversation_is_written_by_the_template_up_to_its_last_token(self):
        tokenizer = chatty()
        prompt = [{"role": "user", "content": "ab"}]
        found = sarm.encoded(tokenizer, prompt, [{"role": "assistant", "content": "cd"}])
        assert written(tokenizer, found.ids) == "<user>ab</user>\n<assistant>cd</assistant>"
        assert written(tokenizer, found.ids[found.start :]) == "cd</assistant>"
        assert sarm.encoded(tokenizer, "ab", "cd").ids[-1] == tokenizer.eos_token_id
        assert sarm.encoded(tokenizer, prompt, "cd") == found

    def test_a_tokenizer_that_cannot(self):
        tokenizer = chatty()
        tokenizer.chat_template = None
        with pytest.raises(DataError, match="cannot write a conversation"):
            sarm.encoded(tokenizer, [{"role": "user", "content": "ab"}], "cd")
        tokenizer.eos_token = None
        with pytest.raises(DataError, match="no end-of-sequence token"):
            sarm.encoded(tokenizer, "ab", "cd")

    def test_padding_marks_what_is_the_answer(self):
        ids, attention, answer = sarm.padded([Tokens([5, 6, 7], 2), Tokens([8, 9, 8, 9], 1)])
        assert ids.tolist() == [[5, 6, 7, 0], [8, 9, 8, 9]] and attention.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
        assert answer.tolist() == [[False, False, True, False], [False, True, True, True]]

    @given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(20, 200))
    @settings(max_examples=50, deadline=None)
    def test_batches_hold_everything_once_and_fit(self, lengths, most):
        sequences = [Tokens([1] * n, 0) for n in lengths]
        batches = list(sarm.by_length(sequences, most))
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= most


def chatty():
    """Letters as tokens, and a template that writes a line end after each message."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(["<eos>", *map(chr, range(32, 127)), "\n"])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", clean_up_tokenization_spaces=False)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def written(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(ids))


# -- preferences -------------------------------------------------------------------------------------------------------

USER, WELL, BADLY = (
    {"role": "user", "content": "Hi!"},
    {"role": "assistant", "content": "Hello."},
    {"role": "assistant", "content": "What?"},
)
HH = "\n\nHuman: Hi!\n\nAssistant: {}"


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ({"prompt": "1+1=", "chosen": " 2", "rejected": " 3"}, ("1+1=", " 2", " 3")),
        ({"prompt": [USER], "chosen": [WELL], "rejected": [BADLY]}, ([USER], [WELL], [BADLY])),
        ({"prompt": [USER], "chosen": "Hello.", "rejected": "What?"}, ([USER], [WELL], [BADLY])),
        ({"chosen": [USER, WELL], "rejected": [USER, BADLY], "score": 1.5}, ([USER], [WELL], [BADLY])),
        ({"chosen": HH.format("Hello."), "rejected": HH.format("What?")}, ([USER], [WELL], [BADLY])),
        (
            {"chosen": HH.format("Hello.") + HH.format("Hello."), "rejected": HH.format("What?") + HH.format("What?")},
            ([USER], [WELL, USER, WELL], [BADLY, USER, BADLY]),
        ),
        (
            {"chosen": HH.format("Hello.") + HH.format("Hello."), "rejected": HH.format("Hello.") + HH.format("What?")},
            ([USER, WELL, USER], [WELL], [BADLY]),
        ),
    ],
)
def test_rows_of_all_forms(row, want):
    assert preference(row, "here") == Preference(*want)


@pytest.mark.parametrize(
    ("row", "part"),
    [
        (3, "is 3, not an object"),
        ({"prompt": "a", "chosen": "b"}, "rejected is None"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, "chosen is ''"),
        ({"prompt": "a", "chosen": [], "rejected": "c"}, r"chosen is \[\]"),
        ({"prompt": "a", "chosen": [{"role": "user"}], "rejected": "c"}, "chosen is .*a list of messages"),
        ({"prompt": 7, "chosen": "b", "rejected": "c"}, "prompt is 7"),
        ({"prompt": "a", "chosen": "b", "rejected": [WELL]}, "give both in one form"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"chosen": "Hello.", "rejected": "What?"}, "should be a dialogue"),
        ({"chosen": [USER, WELL], "rejected": [USER, WELL]}, "both are the same"),
        ({"chosen": [USER, WELL], "rejected": [USER]}, "one dialogue is the beginning"),
        ({"chosen": [USER, WELL], "rejected": [BADLY]}, "share no prompt"),
    ],
)
def test_rows_that_are_no_pairs(row, part):
    with pytest.raises(DataError, match=part) as caught:
        preference(row, "pairs.jsonl, line 4")
    assert "pairs.jsonl, line 4" in str(caught.value) and "\n" not in str(caught.value)


def test_files_packed_and_not(tmp_path):
    rows = [{"prompt": "a", "chosen": f"b{i}", "rejected": "c"} for i in range(5)]
    text = "\n".join(map(json.dumps, rows)) + "\n\n"
    (tmp_path / "p.jsonl").write_text(text)
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    plain, packed = (read_preferences(tmp_path / name) for name in ("p.jsonl", "p.jsonl.gz"))
    assert plain == packed and [pair.chosen for pair in plain] == ["b0", "b1", "b2", "b3", "b4"]
    assert read_preferences(tmp_path / "p.jsonl", rows=2) == plain[:2]
    write_preferences(plain, tmp_path / "again" / "p.jsonl")
    assert read_preferences(tmp_path / "again" / "p.jsonl") == plain

    (tmp_path / "bad.jsonl").write_text(text.splitlines()[0] + "\n{")
    with pytest.raises(DataError, match=r"bad.jsonl, line 2, is not JSON"):
        read_preferences(tmp_path / "bad.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no pairs"):
        read_preferences(tmp_path / "empty.jsonl")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(text.encode())[:-9])
    for name in ("torn.jsonl.gz", "none.jsonl"):
        with pytest.raises(DataError, match="cannot be read"):
            read_preferences(tmp_path / name)


# -- the reward --------------------------------------------------------------------------------------------------------


def pocket_reward():
    model, tokenizer = sarm.new_sarm("mechreward/pocket", SarmSettings(3, True, 0), TopKSAE(128, 64, 4))
    torch.manual_seed(0)
    torch.nn.init.normal_(model.head.weight)
    return SarmReward(model.eval(), tokenizer), model, tokenizer


def test_the_reward_is_the_models_score_of_the_text():
    """Called by hand, with no trainer and no source: each text alone, through the whole model's hidden states."""
    reward, model, tokenizer = pocket_reward()
    whole, _ = load_model("mechreward/pocket")
    prompts = ["Question: Ana has 12 books. How many books does Ana have?\nAnswer:", "Question: 1+1?\nAnswer:"]
    completions = [" 12.\n#### 12", " 2"]
    assert reward.requests == []
    for prompt, completion, found in zip(prompts, completions, reward(prompts, completions), strict=True):
        ids = [*tokenizer(prompt + completion).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            x = z_score(whole(torch.tensor([ids]), output_hidden_states=True).hidden_states[3][0, -1])
            want = float(model.head.weight[0] @ model.sae(x)[0])
        assert found == pytest.approx(want, abs=1e-4)


def test_guards_can_only_lower_it():
    from mechreward.rollout.batch import RolloutBatch

    reward, _, _ = pocket_reward()
    texts = [f" {n}" for n in range(8)]
    batch = RolloutBatch(["1+1="] * 8, texts, [[]] * 8, [[]] * 8)
    raw = reward.score(batch, {}).values
    assert (raw > 0).any() and (raw < 0).any()
    guarded = batch.guarded(torch.full((8,), 0.25), torch.zeros(8, dtype=torch.bool), [[]] * 8)
    assert torch.allclose(reward.score(guarded, {}).values, torch.where(raw > 0, 0.25 * raw, raw))
    assert torch.allclose(reward.score(guarded, {}, sense=-1).values, torch.where(raw < 0, 0.25 * raw, raw))


# -- the experiment ----------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("sarm.yaml"))
TINY = """\
output: {0}
name: tiny
model: mechreward/pocket
train: {{path: mechreward/pocket, split: discovery, rows: 24}}
test:
  in distribution: {{path: mechreward/pocket, split: gate, rows: 24}}
reward_model:
  layers: 2
  latents: 64
  k: 4
  pretraining: {{corpus: 60, batch_size: 30}}
  learning_rate: 1e-3
  frozen_learning_rates: [1e-3, 1e-2]
  epochs: 1
  batch_size: 8
main: sarm
cells:
  sarm: {{head: sarm, mode: 3, use_topk: false, encoder: sequence}}
  token: {{head: sarm, mode: 0, use_topk: true, encoder: token}}
  dense: {{head: dense, mode: 0}}
  shuffled: {{head: sarm, mode: 0, use_topk: true, encoder: random, shuffled: true}}
  features: {{head: features, pack: pocket/reasoning_pack}}
  length: {{head: length}}
grpo:
  output: {0}/grpo
  model: mechreward/pocket
  watch: [pocket/reasoning_pack]
  data:
    train: [{{path: mechreward/pocket, split: train, rows: 8}}]
    discovery: [{{path: mechreward/pocket, split: discovery, rows: 4}}]
    test: [{{path: mechreward/pocket, split: test, rows: 6}}]
  training: {{max_steps: 1, prompts_per_step: 2, num_generations: 2, max_completion_length: 16, learning_rate: 1e-4}}
  evaluation: {{every: 1}}
  arms:
    outcome: {{outcome: 1.0}}
    sarm: {{cell: sarm}}
  seeds: [0, 1]
seeds: [0, 1]
"""


def tiny_config(folder, *changes):
    text = TINY.format(folder)
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "sarm.yaml").write_text(text)
    return folder / "sarm.yaml"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.parent.name)
def test_shipped_configurations_load(file):
    config = read_config(file, SarmConfig)
    assert config.cells[config.main].encoder == "sequence"
    heads = {cell.head for cell in config.cells.values()}
    assert {"sarm", "dense"} <= heads
    assert len(config.seeds) >= 3 or "NOT RUN BY US" in file.read_text()


def test_as_published():
    """SCIENCE's figures of the paper and its released recipe."""
    config = read_config(ROOT / "configs/llama-3.1-8b/sarm.yaml", SarmConfig)
    s = config.reward_model
    assert (s.layers, s.latents, s.k, s.rec_lambda) == (16, 65536, 192, 1.0)
    assert (s.learning_rate, s.warmup, s.weight_decay, s.epochs) == (2e-6, 0.03, 1e-3, 3)
    assert (s.batch_size, s.micro_batch, s.max_length, s.bf16) == (1 * 64 * 4, 1, 4096, True)
    cell = config.cells["sarm"]
    assert (cell.mode, cell.use_topk) == (3, False) and config.model == "meta-llama/Llama-3.1-8B-Instruct"


def test_grpo_has_the_budget_of_experiment_03():
    grpo, hybrid = read_config(ROOT / "configs/sarm.yaml", SarmConfig).grpo, read_config(ROOT / "configs/hybrid.yaml")
    assert grpo.budget() == hybrid.budget() and set(grpo.seeds) <= set(hybrid.seeds)


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("mode: 3, use_topk: false,", "mode: 3,", "needs use_topk"),
        ("dense: {head: dense, mode: 0}", "dense: {head: dense, mode: 0, use_topk: true}", "has no use_topk"),
        ("mode: 3, use_topk", "mode: 4, use_topk", "is 4"),
        ("main: sarm", "main: sram", "no such cell"),
        ("main: sarm", "main: length", "which is not trained"),
        ("sarm: {cell: sarm}", "sarm: {cell: sarm, outcome: 1.0}", "rewarded alone"),
        ("sarm: {cell: sarm}", "sarm: {scale_rewards: group}", "rewards nothing"),
        ("seeds: [0, 1]\nseeds: [0, 1]", "seeds: [0, 1]\nseeds: [0]", "no reward models of seed 1"),
        ("split: discovery, rows: 24", "split: discovery", "say how many"),
        ("layers: 2", "layres: 2", "Did you mean 'layers'"),
    ],
)
def test_wrong_configurations(tmp_path, old, new, part):
    with pytest.raises(ConfigError, match=part) as caught:
        read_config(tiny_config(tmp_path, (old, new)), SarmConfig)
    assert "sarm.yaml, line " in str(caught.value) and "\n" not in str(caught.value)


def test_other_wordings_leave_the_questions_as_they_were():
    """A fingerprint of what the generator made before it knew of other steps and wordings."""
    digest = hashlib.sha256()
    for split in ("corpus", "train", "gate", "test"):
        for kind in ("reasoning", "retrieval"):
            for seed in (0, 3):
                for question in itertools.islice(questions(split, seed, kind), 60):
                    digest.update(repr(question).encode())
            for question in itertools.islice(questions(split, 1, kind, 9), 60):
                digest.update(repr(question).encode())
    assert digest.hexdigest() == "8dea035728deb71c678fe446fee7e88ba730e9d98296e1ee374e4062a60ac858"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_longer_and_otherwise_worded_problems_are_problems(seed, other):
    """The solution's steps end at the answer, stay in 0..99, and every quantity of them is told."""
    question = reasoning_question(random.Random(seed), steps=(5, 6), wording=OTHER_WORDING if other else WORDING)
    assert len(question.changes) in (5, 6)
    totals = list(itertools.accumulate(question.changes, initial=question.start))
    assert str(totals[-1]) == question.answer and all(0 <= total <= 99 for total in totals)
    told = [int(n) for n in re.findall(r"\d+", question.prompt)]
    assert sorted(told) == sorted([question.start, *map(abs, question.changes), *question.distractors])
    assert question.prompt.startswith("Question: How many") == other


class FromPairs(cells.Pipeline):
    """A pipeline whose pairs are given: longer answers are preferred, whatever they say."""

    @functools.cached_property
    def sets(self):
        _, tokenizer = self.untrained
        made = {}
        for name, first in (("train", 0), ("in distribution", 40)):
            pairs = [Preference(f"Question {n // 2}:", f" {n} {n} {n}", f" {n}") for n in range(first, first + 30)]
            made[name] = PairSet.of(pairs, tokenizer, 100)
        return made


def test_cells_are_made_once_and_measured_by_prompt(tmp_path):
    config = read_config(tiny_config(tmp_path), SarmConfig)
    said = []
    pipeline = FromPairs(config, said.append)
    for cell in config.cells:
        for seed in config.seeds:
            folder = cells.make_cell(pipeline, cell, seed)
            assert (folder / "sarm.safetensors").exists() == (cell not in ("features", "length"))
    result = json.loads((tmp_path / "models/length/seed-0/result.json").read_text())
    assert result["sets"]["in distribution"]["correct"] == [1.0] * 15  # longer is better, as it learnt
    assert result["pairs"]["in distribution"] == {"pairs": 30, "prompts": 15, "left_out": 0}
    trained_one = json.loads((tmp_path / "models/dense/seed-0/result.json").read_text())
    assert trained_one["learning_rate"] in (1e-3, 1e-2) and trained_one["held_out_loss"] > 0
    loaded, _ = sarm.load_sarm(tmp_path / "models/sarm/seed-1/sarm.safetensors")
    scores = sarm.score(loaded, [side for both in pipeline.sets["in distribution"].tokens for side in both]).view(-1, 2)
    right = (scores[:, 0] > scores[:, 1]).float().view(15, 2).mean(dim=1).tolist()
    again = json.loads((tmp_path / "models/sarm/seed-1/result.json").read_text())
    assert again["sets"]["in distribution"]["correct"] == pytest.approx(right)
    count = len(said)
    cells.make_cell(pipeline, "dense", 0)
    assert len(said) == count

    found = results.report(config)
    cell = found["cells"]["dense"]["sets"]["in distribution"]
    means = [
        np.mean(
            json.loads((tmp_path / f"models/dense/seed-{n}/result.json").read_text())["sets"]["in distribution"][
                "correct"
            ]
        )
        for n in (0, 1)
    ]
    assert cell["per_seed"] == pytest.approx(means) and cell["mean"] == pytest.approx(np.mean(means))
    gap = found["differences"]["length"]["in distribution"]
    assert gap["mean"] == pytest.approx(found["cells"]["sarm"]["sets"]["in distribution"]["mean"] - 1)
    assert found["grpo"] is None and found["unfinished"] == []
    (tmp_path / "models/dense/seed-1/result.json").rename(tmp_path / "aside")
    assert results.report(config)["unfinished"] == ["dense"]
    (tmp_path / "aside").rename(tmp_path / "models/dense/seed-1/result.json")
    text = results.markdown(found)
    assert f"| dense | {cell['mean']:.3f}" in text and text.count("\n- ") == 5

    other = read_config(tiny_config(tmp_path, ("  k: 4", "  k: 5")), SarmConfig)
    with pytest.raises(ConfigError, match=r"reward_model.k is 4 there and 5 here"):
        cells.make_cell(FromPairs(other, said.append), "dense", 0)
    with pytest.raises(ConfigError, match="There is no reward model"):
        missing = config.model_copy(update={"output": str(tmp_path / "elsewhere")})
        cells.setup(missing)(config.grpo, "sarm", 0, tmp_path)


def test_an_autoencoder_is_pretrained_on_what_it_says(tmp_path):
    """One text, many tokens: last tokens are all alike, and those drawn from all are not."""
    pipeline = FromPairs(read_config(tiny_config(tmp_path), SarmConfig), lambda line: None)
    texts, (model, _) = pipeline.texts(), pipeline.untrained
    last, drawn = pipeline.pretraining_vectors("sequence"), pipeline.pretraining_vectors("token")
    assert last.shape == drawn.shape == (60, 128)
    assert torch.allclose(last, sarm.read_vectors(model, texts), atol=1e-5)
    everywhere = sarm.read_vectors(model, texts, everywhere=True)
    nearest = torch.cdist(drawn, everywhere).min(dim=1).values
    assert (nearest < 0.05).all() and not torch.allclose(last, drawn, atol=0.1)
    vectors, again = pipeline.vectors("train"), FromPairs(pipeline.config, lambda line: pytest.fail("read twice"))
    assert torch.equal(again.pretraining_vectors("token"), drawn) and torch.equal(again.vectors("train"), vectors)


def test_the_share_of_the_top_latents_by_hand(tmp_path):
    """Two pairs, a head on z of two latents: |w (z_chosen - z_rejected)| summed over pairs."""
    pipeline = FromPairs(read_config(tiny_config(tmp_path), SarmConfig), lambda line: None)
    model = Sarm(torch.nn.Identity(), TopKSAE(2, 2, 1), SarmSettings(1, False, 0), 2)
    with torch.no_grad():
        model.sae.encoder.weight.copy_(torch.eye(2))
        model.head.weight.copy_(torch.tensor([[2.0, -1.0]]))
    pipeline.vectors = lambda test: torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[2.0, 3.0], [1.0, 1.0]]])
    # differences (1, -1) and (1, 2): 2 + 2 of the first latent, 1 + 2 of the second
    assert cells.top_share(pipeline, model, "in distribution", top=1) == pytest.approx(4 / 7)
    assert cells.top_share(pipeline, model, "in distribution", top=9) == pytest.approx(1)
    assert cells.trained_margins(pipeline, model, "in distribution").tolist() == [3.0, 0.0]
    measured = cells._measured(pipeline.sets["in distribution"], torch.tensor([1.0, -1.0] * 15))
    assert measured["correct"] == [0.5] * 15


def test_shuffling_flips_about_half(tmp_path):
    vectors = torch.arange(12.0).view(3, 2, 2)
    found = cells._flipped(vectors, np.array([False, True, False]))
    assert torch.equal(found[1], vectors[1].flip(0)) and torch.equal(found[[0, 2]], vectors[[0, 2]])


def test_a_pair_in_both_sets_is_refused(tmp_path):
    rows = [{"prompt": f"{n}?", "chosen": " yes", "rejected": " no"} for n in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"{{path: {tmp_path / 'pairs.jsonl'}}}"
    file = tiny_config(
        tmp_path,
        ("train: {path: mechreward/pocket, split: discovery, rows: 24}", f"train: {source}"),
        ("in distribution: {path: mechreward/pocket, split: gate, rows: 24}", f"in distribution: {source}"),
    )
    with pytest.raises(DataError, match="in the training pairs too"):
        _ = cells.Pipeline(read_config(file, SarmConfig), lambda line: None).sets


def test_policies_against_stored_results_and_each_other(tmp_path):
    """Two seeds of two arms, four questions each, worked by hand."""
    ends = {"sarm": ([1, 1, 1, 0], [1, 1, 0, 0]), "dense": ([1, 0, 1, 0], [0, 1, 0, 0])}
    changes = [("    outcome: {outcome: 1.0}\n", "    dense: {cell: dense}\n")]
    file = tiny_config(tmp_path, *changes, ("main: sarm", f"main: sarm\nstored: {tmp_path / 'stored.json'}"))
    config = read_config(file, SarmConfig)
    for arm, seeds in ends.items():
        for seed, right in enumerate(seeds):
            folder = tmp_path / "grpo" / arm / f"seed-{seed}"
            folder.mkdir(parents=True)
            (folder / "config.yaml").write_text(yaml.safe_dump(config.grpo.run(arm, seed)))
            (folder / "summary.json").write_text("{}")
            rows = [(0, q, 0) for q in range(4)] + [(1, q, value) for q, value in enumerate(right)]
            samples = [
                {"step": step, "question": q, "right": value, "tokens": 3 + step, "right_steps": 0.5}
                for step, q, value in rows
            ]
            figures = [{"step": 0}, {"step": 1, "greedy_accuracy": 0.5}]
            log = {"step": 1, "kl": 0.25, "composite/sarm/raw": 2.0}
            for name, records in (("samples", samples), ("evaluations", figures), ("metrics", [log])):
                (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    budget = read_runs(config.grpo.output)[1]
    arm = {"seeds": [0, 1, 2], "curves": {"right": {"per_seed": [[0, 0.5], [0, 0.25], [0, 1.0]]}}}
    stored = {"budget": budget, "arms": {"outcome": arm}}
    (tmp_path / "stored.json").write_text(json.dumps(stored))
    found = results.of_policies(config)
    assert found["arms"]["sarm"]["per_seed"] == [0.75, 0.5] and found["arms"]["sarm"]["curve"] == [0, 0.625]
    assert found["arms"]["dense"]["tokens"] == [[3, 4], [3, 4]] and found["arms"]["dense"]["kl"] == [0.25, 0.25]
    assert found["unfinished"] == []
    gap = found["against_stored"]["sarm - outcome"]
    assert gap["per_seed"] == [0.25, 0.25] and gap["student"] == (0.25, 0.25)
    pair = found["pairs"]["sarm - dense"] if "sarm - dense" in found["pairs"] else found["pairs"]["dense - sarm"]
    assert [abs(v) for v in pair["per_seed"]] == [0.25, 0.25]
    (tmp_path / "stored.json").write_text(json.dumps({**stored, "budget": {**budget, "watch": []}}))
    with pytest.raises(ConfigError, match="another budget"):
        results.of_policies(config)
    (tmp_path / "stored.json").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        results.of_policies(config)


@pytest.mark.slow
def test_the_script_end_to_end(tmp_path, monkeypatch, capsys):
    """Pairs, models, policies, results on a tiny budget; a second time there is nothing left to do."""
    file = tiny_config(tmp_path)
    command = ["04", "--config", str(file), "--out", str(tmp_path / "results")]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", command)
        runpy.run_path(str(ROOT / "experiments" / "04_sarm_reproduction.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.count("dense, seed 1: in distribution") == 1 and printed.count("finished before") == 4
    report = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert report["grpo"]["arms"]["sarm"]["seeds"] == [0, 1]
    assert set(report["grpo"]["arms"]) == {"outcome", "sarm"} and report["grpo"]["stored"] == {}
    assert results.markdown(report) == (tmp_path / "results" / "tiny.md").read_text()
    pairs = read_preferences(next((tmp_path / "pairs").glob("train-*.jsonl")))
    golds = {q.prompt: q.answer for q in itertools.islice(questions("discovery"), 24)}
    for pair in pairs:
        gold = golds[pair.prompt]
        assert verifiers.math_boxed([pair.chosen, pair.rejected], [gold, gold]) == [True, False]
    monkeypatch.setattr(sys, "argv", [*command, "--cell", "sram"])
    with pytest.raises(SystemExit, match="Did you mean 'sarm'"):
        runpy.run_path(str(ROOT / "experiments" / "04_sarm_reproduction.py"), run_name="__main__")


# -- what is published -------------------------------------------------------------------------------------------------

RESULTS = ROOT / "experiments" / "results"


@pytest.mark.parametrize("name", ["sarm", "sarm-smollm2"])
def test_the_tables_are_made_from_the_json(name):
    found = json.loads((RESULTS / f"{name}.json").read_text())
    assert results.markdown(found) == (RESULTS / f"{name}.md").read_text()
    folder = "" if name == "sarm" else "smollm2/"
    config = read_config(ROOT / f"configs/{folder}sarm.yaml", SarmConfig).model_dump(mode="json")
    assert found["settings"]["reward_model"] == config["reward_model"] and found["settings"]["seeds"] == config["seeds"]
    assert set(found["cells"]) <= set(config["cells"])


def test_the_research_page_quotes_the_results():
    """Verdicts word for word; and every figure of three decimals in the section stands in the tables."""
    research = (ROOT / "RESEARCH.md").read_text()
    section = research.split("### Experiment 04")[1].split("\n### ")[0].split("\n## ")[0]
    tables = "".join((RESULTS / f"{name}.md").read_text() for name in ("sarm", "sarm-smollm2", "pocket"))
    quoted = section.split("<!-- from experiments/results/sarm.md -->")[1].split("<!-- end -->")[0]
    verdicts = [line for line in quoted.splitlines() if line]
    assert len(verdicts) >= 2 and all(line in tables.splitlines() for line in verdicts)
    figures = set(re.findall(r"(?<![\d.])0?(\.\d{3})(?!\d)", tables))
    told = re.findall(r"(?<![\d.])0?(\.\d{3})(?!\d)", section)
    assert len(told) > 20 and set(told) <= figures, set(told) - figures
