"""SARM: every formula against hand-worked or float64 arithmetic, gradients of every train mode, the cut model."""

import gzip
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mechreward.baselines import sarm
from mechreward.baselines.preferences import Preference, preference, read_preferences, write_preferences
from mechreward.baselines.sarm import Recipe, Sarm, SarmReward, SarmSettings, Tokens, TopKSAE, z_score
from mechreward.errors import ConfigError, DataError, ModelMismatchError, SAEError
from mechreward.rollout.capture import decoder_layers
from mechreward.rollout.hf import load_model

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
