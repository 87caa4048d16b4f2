"""Readings against Hugging Face's own hidden states of one unpadded sequence, encoded by SAELens."""

import copy
import os
import socket
import types
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import LAYERS, LAYOUTS, VOCAB, WIDTH, assert_readings, build, layer_list, residual, residuals
from mechreward import readout as readout_module
from mechreward.errors import CaptureError, MechRewardError, ModelMismatchError
from mechreward.readout import HookPoint, Nonlinearity, Readout, ReadoutBank, Request, direction
from mechreward.rollout.batch import Call, RolloutBatch
from mechreward.rollout.capture import (
    GenerationReader,
    ResidualTap,
    SequenceReader,
    check_fits,
    decoder_layers,
    has_active_dropout,
    text_config,
    truncated_forward,
    unwrap,
)
from mechreward.rollout.hf import HFSource, read_forward, sample

EOS, PAD = 2, 0
POST, LAST, PRE = HookPoint(1), HookPoint(LAYERS - 1), HookPoint(2, "resid_pre")
POINTS = [HookPoint(layer, site) for layer in range(LAYERS) for site in ("resid_pre", "resid_post")]
IDS = (5, 60, 0, 33)
SAES = [
    ("jumprelu", "none", True),
    ("topk", "none", True),
    ("topk_rescaled", "layer_norm", True),
    ("gated", "constant_norm_rescale", False),
    ("standard", "layer_norm", False),
    ("batchtopk", "constant_norm_rescale", True),
]


def at(readout: Readout, point: HookPoint) -> Readout:
    return Readout(
        readout.name, readout.labels, point, readout.weight, readout.bias, readout.nonlinearity, readout.transform,
        readout.keep,
    )  # fmt: skip


def batch_of(prompts, completions, **more) -> RolloutBatch:
    n = len(prompts)
    return RolloutBatch(["p"] * n, ["c"] * n, prompts, completions, eos_token_ids=frozenset({EOS}), **more)


def real_tokens(completion, read_last=False) -> int:
    """Tokens up to and including the first EOS, less the last unless it is read."""
    end = completion.index(EOS) + 1 if EOS in completion else len(completion)
    return max(end - (not read_last), 0)


def token_lists(count, longest, seed):
    """Random token ids without EOS; lengths from 1."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=g).tolist()
    return [torch.randint(3, VOCAB - 1, (length,), generator=g).tolist() for length in lengths]


def check_batch(found, model, batch, sae, ids=IDS, read_last=False):
    """Every completion token that is to be read equals the reference, and no other token is read."""
    left_out = compared = 0
    longest = max((len(c) for c in batch.completion_ids), default=0)
    for readings in found.values():
        assert readings.values.shape == (len(batch), longest, len(ids)) and not readings.values.requires_grad
    for row, (prompt, completion) in enumerate(zip(batch.prompt_ids, batch.completion_ids, strict=True)):
        count = real_tokens(list(completion), read_last)
        stream = residuals(model, [*prompt, *completion]) if count else {}
        for readout, readings in found.items():
            point = readout.hook_point
            assert readings.mask[row].tolist() == [True] * count + [False] * (longest - count)
            assert (readings.values[row, count:] == 0).all()
            if count:
                x = stream[point.layer, point.site][len(prompt) : len(prompt) + count]
                more = assert_readings(readings.values[row, :count], sae, x, ids)
                left_out, compared = left_out + more[0], compared + more[1]
    assert left_out <= 1 + 0.002 * compared
    return compared


def hooks_on(model) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


# Our own forward


tokens = st.integers(3, VOCAB - 2)
prompts_and_completions = st.lists(
    st.tuples(
        st.lists(tokens, min_size=1, max_size=9),
        st.lists(st.one_of(tokens, tokens, tokens, st.just(EOS)), max_size=25)  # EOS anywhere, also several
        | st.just([EOS]),
    ),
    min_size=1,
    max_size=6,
)


@given(
    rows=prompts_and_completions,
    points=st.lists(st.sampled_from(POINTS), min_size=1, max_size=3, unique=True),
    kind=st.sampled_from(SAES),
    chunk=st.sampled_from([1, 3, 10, 1024]),
    max_tokens=st.sampled_from([1, 30, 80, 10_000]),
    read_last=st.booleans(),
    layout=st.sampled_from(["gemma2", "gpt2"]),
)
@settings(max_examples=40, deadline=None)
def test_own_forward_on_any_batch(models, saved_sae, rows, points, kind, chunk, max_tokens, read_last, layout):
    model, (sae, handle) = models(layout), saved_sae(*kind)
    batch = batch_of(*map(list, zip(*rows, strict=True)))
    readouts = [at(handle.features(IDS), point) for point in points]
    with patch.object(readout_module, "CHUNK_TOKENS", chunk):
        found = read_forward(model, batch, ReadoutBank(readouts), read_last, max_tokens=max_tokens)
    assert list(found) == readouts
    check_batch(found, model, batch, sae, read_last=read_last)


@pytest.fixture(scope="session")
def models():
    made = {}

    def get(layout):
        if layout not in made:
            made[layout] = build(layout)
        return made[layout]

    return get


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_at_every_hook_point(models, saved_sae, layout):
    model, (sae, handle) = models(layout), saved_sae("jumprelu")
    batch = batch_of(token_lists(4, 6, seed=1), [*token_lists(3, 20, seed=2), [7, 8, EOS]])
    found = read_forward(model, batch, ReadoutBank([at(handle.features(IDS), point) for point in POINTS]))
    assert [readout.hook_point for readout in found] == POINTS
    assert check_batch(found, model, batch, sae) > 300
    assert decoder_layers(model) is layer_list(model)
    if layout == "gemma3_multimodal":  # the wrong list is there to be found
        assert len(model.model.vision_tower.encoder.layers) == LAYERS


def test_nothing_to_read(models, saved_sae):
    handle = saved_sae("jumprelu")[1]
    bank = ReadoutBank([readout := handle.features(IDS)])
    for completions in ([[], []], [[EOS], [EOS]], [[5], []]):
        found = read_forward(models("gemma2"), batch_of([[3], [4]], completions), bank)[readout]
        assert not found.mask.any() and (found.values == 0).all()
        assert found.values.shape == (2, max(map(len, completions)), 4)
    found = read_forward(models("gemma2"), batch_of([], []), bank)[readout]
    assert found.values.shape == (0, 0, 4)


def test_tool_output_is_not_read(models, saved_sae):
    model, (sae, handle) = models("gemma2"), saved_sae("jumprelu")
    completion, written = [5, 6, 7, 8, 9, 10], [1, 1, 0, 0, 1, 1]
    batch = batch_of([[3, 4]], [completion], tool_mask=[written])
    bank = ReadoutBank([readout := handle.features(IDS)])
    found = read_forward(model, batch, bank)[readout]
    assert found.mask.tolist() == [[True, True, False, False, True, False]]
    x = residual(model, [3, 4, *completion], HookPoint(1))[2:]
    assert_readings(found.values[0, [0, 1, 4]], sae, x[[0, 1, 4]], IDS)
    assert (found.values[0, [2, 3, 5]] == 0).all()


def test_every_turn_of_a_rollout_is_read():
    """Each of the model's turns ends with an EOS of its own: TRL's tool loop joins them."""
    batch = batch_of([[3, 4]], [[5, 6, EOS, 9, 9, 9, 7, 8, EOS]], tool_mask=[[1, 1, 1, 0, 0, 0, 1, 1, 1]])
    assert batch.lengths == [6] and batch.written == [[5, 6, EOS, 7, 8, EOS]]
    assert batch.mask().tolist() == [[True, True, True, False, False, False, True, True, False]]


# Tapping full passes that somebody else runs: TRL pads on the left, and passes no position_ids


# GPT-2 looks positions up, and is never tapped on left-padded passes (has_absolute_positions).
PASSES = [(layout, side) for layout in LAYOUTS for side in ("left", "right") if (layout, side) != ("gpt2", "left")]


@pytest.mark.parametrize(("layout", "side"), PASSES)
def test_full_passes_of_a_trainer(models, saved_sae, layout, side):
    model = models(layout)
    prompts = token_lists(7, 8, seed=3)
    completions = token_lists(7, 24, seed=4)
    completions[2] = [5, EOS]
    completions[3] = []
    check_full_pass(model, saved_sae, ("jumprelu", "none", True), prompts, completions, side, [POST, LAST, PRE], 3)


@given(
    rows=prompts_and_completions,
    point=st.sampled_from(POINTS),
    kind=st.sampled_from(SAES),
    side=st.sampled_from(["left", "right"]),
    chunk=st.integers(1, 6),
    encode_chunk=st.sampled_from([1, 7, 1024]),
)
@settings(max_examples=30, deadline=None)
def test_full_passes_on_any_batch(models, saved_sae, rows, point, kind, side, chunk, encode_chunk):
    prompts, completions = map(list, zip(*rows, strict=True))
    with patch.object(readout_module, "CHUNK_TOKENS", encode_chunk):
        check_full_pass(models("gemma2"), saved_sae, kind, prompts, completions, side, [point], chunk)


def check_full_pass(model, saved_sae, kind, prompts, completions, side, points, chunk):
    """TRL's layout: prompts padded on one side, completions on the right, passes of ``chunk`` rows at a time."""
    sae, handle = saved_sae(*kind)
    bank = ReadoutBank([at(handle.features(IDS), point) for point in points])
    batch = batch_of(prompts, completions)
    widest_p, widest_c = max(map(len, prompts)), max(map(len, completions))
    ids = torch.full((len(prompts), widest_p + widest_c), PAD)
    attention, positions = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
    for row, (p, c) in enumerate(zip(prompts, completions, strict=True)):
        start = widest_p if side == "left" else len(p)
        ids[row, start - len(p) : start + len(c)] = torch.tensor([*p, *c])
        attention[row, start - len(p) : start + len(c)] = 1
        positions[row, start : start + real_tokens(c)] = True
    tap, reader = ResidualTap(model, points), SequenceReader(bank, positions)
    with torch.no_grad(), tap.window(reader):
        for start in range(0, len(ids), chunk):
            model(input_ids=ids[start : start + chunk], attention_mask=attention[start : start + chunk])
    tap.close()
    flat = reader.values()
    assert flat.shape == (positions.sum(), len(bank))
    values = torch.zeros(len(prompts), widest_c, len(bank))
    values[batch.mask()] = flat
    check_batch(bank.split(values, batch.mask()), model, batch, sae)


def test_prompt_tokens_can_be_read_too(models, saved_sae):
    model, (sae, handle) = models("gemma2"), saved_sae("topk")
    bank, ids = ReadoutBank([at(handle.features(IDS), PRE)]), [3, 4, 5, 6, 7]
    positions = torch.tensor([[True, False, True, True, False]])
    tap, reader = ResidualTap(model, [PRE]), SequenceReader(bank, positions)
    with torch.no_grad(), tap.window(reader):
        model(input_ids=torch.tensor([ids]))
    tap.close()
    assert_readings(reader.values(), sae, residual(model, ids, PRE)[positions[0]], IDS)


# Tapping a generation


class FavourEOS(transformers.LogitsProcessor):
    token = EOS

    def __call__(self, input_ids, scores):
        scores[:, self.token] = scores.max(-1).values + 1.8  # about one token in ten
        return scores


def generate(model, prompts, tap=None, reader=None, new=24, **more):
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    torch.manual_seed(0)
    options = {"do_sample": True, "max_new_tokens": new, "eos_token_id": EOS, "pad_token_id": PAD} | more
    with tap.window(reader) if tap else nullcontext():
        out = model.generate(input_ids=ids, attention_mask=attention, logits_processor=[FavourEOS()], **options)
    return out[:, width:]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_generation(models, saved_sae, layout):
    model, (sae, handle) = models(layout), saved_sae("jumprelu")
    prompts = token_lists(8, 7, seed=5)
    readouts = [at(handle.features(IDS), point) for point in (LAST, PRE)]
    bank = ReadoutBank(readouts)
    tap, reader = ResidualTap(model, bank.hook_points), GenerationReader(bank)
    sampled = generate(model, prompts, tap, reader)
    assert generate(model, prompts).equal(sampled)  # the tap changes nothing
    tap.close()
    completions = []
    for row in sampled.tolist():
        completions.append(row[: row.index(EOS) + 1] if EOS in row else row)
    lengths = set(map(len, completions))
    assert len(lengths) > 3 and min(lengths) < 8  # ragged
    values = reader.values(len(prompts), sampled.shape[1])
    assert values.shape == (len(prompts), sampled.shape[1], len(bank))
    batch = batch_of(prompts, completions)
    mask = batch.mask()
    values = values[:, : mask.shape[1]] * mask[..., None]
    assert check_batch(bank.split(values, mask), model, batch, sae) > 200


def test_generation_of_one_token_reads_nothing(models, saved_sae):
    bank = ReadoutBank([saved_sae("jumprelu")[1].features(IDS)])
    tap, reader = ResidualTap(models("gemma2"), bank.hook_points), GenerationReader(bank)
    sampled = generate(models("gemma2"), [[3, 4], [5]], tap, reader, new=1)
    tap.close()
    assert (reader.values(*sampled.shape) == 0).all() and sampled.shape == (2, 1)


def test_generation_without_a_cache_is_refused(models, saved_sae):
    bank = ReadoutBank([saved_sae("jumprelu")[1].features(IDS)])
    tap, reader = ResidualTap(models("gemma2"), bank.hook_points), GenerationReader(bank)
    with pytest.raises(CaptureError, match="more than one token at a time"):
        generate(models("gemma2"), [[3, 4], [5]], tap, reader, use_cache=False)
    tap.close()


def test_a_second_generation_in_the_window_is_refused(models, saved_sae):
    bank = ReadoutBank([saved_sae("jumprelu")[1].features(IDS)])
    model = models("gemma2")
    tap, reader = ResidualTap(model, bank.hook_points), GenerationReader(bank)
    with pytest.raises(CaptureError, match="decoding step"), tap.window(reader):
        sampled = generate(model, [[3, 4], [5]])
        generate(model, [[3], [5]])  # a prompt of one token looks like a decoding step
        reader.values(*sampled.shape)
    tap.close()


class Tokenizer:
    eos_token_id = EOS

    def __call__(self, texts, **_):
        texts = [texts] if (alone := isinstance(texts, str)) else texts
        rows = [list(map(int, text.split())) for text in texts]
        return transformers.BatchEncoding({"input_ids": rows[0] if alone else rows})

    def batch_decode(self, ids, **_):
        return [" ".join(map(str, row)) for row in ids]


def test_sample_and_read(models, saved_sae):
    """Rollouts by `sample`, read by `HFSource`."""
    model, (sae, handle) = models("gemma2"), saved_sae("jumprelu")

    torch.manual_seed(3)
    batch = sample(
        model, Tokenizer(), ["5 6 7", "8"], 3, batch_size=4, do_sample=True, max_new_tokens=12, pad_token_id=PAD,
        logits_processor=[FavourEOS()],
    )  # fmt: skip
    assert batch.prompt_ids == [[5, 6, 7]] * 3 + [[8]] * 3 and batch.num_generations == 3
    assert all(len(c) == real_tokens(c, True) for c in batch.completion_ids)  # cut after EOS
    request = Request(at(handle.features(IDS), LAST), read_last=True)
    found = HFSource(model, Tokenizer()).read(batch, [request])
    assert check_batch({request.readout: found[request]}, model, batch, sae, read_last=True) > 40


def test_every_token_that_ends_a_generation_ends_a_completion():
    """Chat models stop at several tokens; what `generate` pads after them is nobody's completion."""
    model = build("gemma2")
    model.generation_config.eos_token_id = [EOS, 40]
    favour = type("Favour40", (FavourEOS,), {"token": 40})()
    torch.manual_seed(3)
    batch = sample(
        model, Tokenizer(), ["5 6 7", "8"], 4, do_sample=True, max_new_tokens=12, pad_token_id=PAD,
        logits_processor=[favour],
    )  # fmt: skip
    assert batch.eos_token_ids == {EOS, 40}
    ended = [c for c in batch.completion_ids if len(c) < 12]
    assert len(ended) > 2 and any(c[-1] == 40 for c in ended)
    assert all(c[-1] in (EOS, 40) and PAD not in c[-2:] for c in ended)
    source = HFSource(model, Tokenizer())
    padded = [[*c, *[PAD] * (12 - len(c))] for c in batch.completion_ids]
    given = source.batch(Call(batch.prompts, batch.completions, padded, {}))
    assert given.lengths == [len(c) for c in batch.completion_ids]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_active_dropout_is_seen(layout):
    model = build(layout)
    assert not has_active_dropout(model)
    model.train()
    assert has_active_dropout(model) == (layout == "gpt2")  # the others' default is 0
    if layout != "gpt2":
        text_config(model).attention_dropout = 0.1
        assert has_active_dropout(model)
        text_config(model).attention_dropout = 0.0
        wrapped = lora(model).train()
        assert has_active_dropout(wrapped) and not has_active_dropout(wrapped.eval())


# Wrappers and modes


def lora(model):
    import peft

    targets = {"GPT2LMHeadModel": ["c_attn", "c_proj"], "GPTNeoXForCausalLM": ["query_key_value", "dense"]}
    config = peft.LoraConfig(
        r=4, lora_alpha=32, lora_dropout=0.05, init_lora_weights=False, task_type="CAUSAL_LM",
        target_modules=targets.get(type(model).__name__, ["q_proj", "v_proj", "o_proj"]),
    )  # fmt: skip
    torch.manual_seed(1)
    return peft.get_peft_model(copy.deepcopy(model), config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora_with_dropout_in_train_mode(models, saved_sae, layout):
    model, (sae, handle) = lora(models(layout)), saved_sae("jumprelu")
    batch = batch_of(token_lists(3, 5, seed=6), token_lists(3, 15, seed=7))
    bank = ReadoutBank([readout := at(handle.features(IDS), LAST)])
    model.train()
    layer_list(model)[0].eval()  # modes are restored one by one
    modes = {name: module.training for name, module in model.named_modules()}
    found = read_forward(model, batch, bank)
    with model.disable_adapter():
        disabled = read_forward(model, batch, bank)
    again = read_forward(model, batch, bank)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert again[readout].values.equal(found[readout].values)
    model.eval()
    assert check_batch(found, model, batch, sae) > 20
    assert check_batch(disabled, models(layout), batch, sae) > 20
    assert not torch.allclose(found[readout].values, disabled[readout].values, atol=1e-2)  # the adapter does something


def test_modes_are_restored_after_an_error(models, saved_sae):
    model = lora(models("gemma2")).train()
    layer_list(model)[2].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    bank = ReadoutBank([saved_sae("jumprelu")[1].features(IDS)])
    with pytest.raises(IndexError):
        read_forward(model, batch_of([[VOCAB + 5]], [[3, 4, 5]]), bank)
    assert {name: module.training for name, module in model.named_modules()} == modes


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(saved_sae, reentrant):
    model, (sae, handle) = build("llama"), saved_sae("jumprelu")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    completions = token_lists(3, 12, seed=8)
    batch = batch_of([[5, 6]] * 3, completions)
    bank = ReadoutBank([at(handle.features(IDS), POST), at(handle.features(IDS), PRE)])
    check_batch(read_forward(model, batch, bank), model, batch, sae)

    width = 2 + max(map(len, completions))
    ids, positions = torch.full((3, width), PAD), torch.zeros(3, width, dtype=torch.bool)
    for row, c in enumerate(completions):
        ids[row, : 2 + len(c)] = torch.tensor([5, 6, *c])
        positions[row, 2 : 1 + len(c)] = True
    calls = []
    layer_list(model)[1].self_attn.register_forward_hook(lambda *_: calls.append(1))

    def loss():
        return model(input_ids=ids, attention_mask=(ids != PAD).long()).logits.square().mean()

    def check(values):
        everything = torch.zeros(3, width - 2, len(bank))
        everything[batch.mask()] = values
        check_batch(bank.split(everything, batch.mask()), model, batch, sae)

    tap, reader = ResidualTap(model, bank.hook_points), SequenceReader(bank, positions)
    with tap.window(reader):
        result = loss()
    before = reader.values().clone()
    assert len(calls) == 1
    result.backward()  # runs the layers again, outside the window
    assert len(calls) == 2 and reader.values().equal(before)
    check(before)

    reader = SequenceReader(bank, positions)
    try:
        with tap.window(reader):
            loss().backward()
    except CaptureError as error:  # where the hooks run again,
        assert "another forward pass" in str(error)
    else:  # and where they don't
        check(reader.values())
    tap.close()


def test_bfloat16_model(saved_sae):
    model, (sae, handle) = build("gemma2").bfloat16(), saved_sae("jumprelu", "constant_norm_rescale")
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB - 1, (4, 30), generator=g)
    bank = ReadoutBank([at(handle.features(IDS), POST), at(handle.features(IDS), PRE)])
    tap, reader = ResidualTap(model, bank.hook_points), SequenceReader(bank, torch.ones(4, 30, dtype=torch.bool))
    with torch.no_grad(), tap.window(reader):
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    tap.close()
    assert hidden[2].dtype == torch.bfloat16
    for columns, x in ((slice(0, 4), hidden[POST.layer + 1]), (slice(4, 8), hidden[PRE.layer])):
        left_out, compared = assert_readings(reader.values()[:, columns], sae, x.flatten(0, 1).float(), IDS)
        assert left_out <= 0.01 * compared  # exact: the residual as the model had it, encoded in float32

    # Our own forward of a padded batch: bf16 has no batch invariance, so this is an error to be measured.
    batch = batch_of([[5, 6]] * 3, token_lists(3, 20, seed=9))
    readout = bank.readouts[0]
    found = read_forward(model, batch, ReadoutBank([readout]))[readout]
    errors = []
    for row, completion in enumerate(batch.completion_ids):
        x = residual(model, [5, 6, *completion], POST)[2 : 1 + len(completion)]
        expected = sae.encode(x.float())[:, list(IDS)].detach()
        got = found.values[row, : len(x)]
        errors.append(((got - expected).abs() / sae.encode(x.float()).max()).flatten())
    assert torch.cat(errors).median() < 0.01


def test_autocast_pass(models, saved_sae):
    model, (sae, handle) = models("llama"), saved_sae("jumprelu")
    ids = torch.tensor([token_lists(1, 20, seed=10)[0]])
    bank = ReadoutBank([handle.features(IDS)])
    tap, reader = ResidualTap(model, [POST]), SequenceReader(bank, torch.ones_like(ids, dtype=torch.bool))
    with torch.no_grad(), tap.window(reader), torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[2]
    tap.close()
    assert_readings(reader.values(), sae, hidden[0].float(), IDS)


# torch.compile


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check_compiled(backend, saved_sae, lengths, layout="llama"):
    model, (sae, handle) = build(layout), saved_sae("jumprelu")
    bank = ReadoutBank([at(handle.features(IDS), point) for point in (POST, PRE)])
    tap = ResidualTap(model, bank.hook_points)
    compiled = torch.compile(model, backend=backend)
    for seed, length in enumerate(lengths):
        ids = torch.randint(3, VOCAB - 1, (2, length), generator=torch.Generator().manual_seed(seed))
        reader = SequenceReader(bank, torch.ones(ids.shape, dtype=torch.bool))
        with torch.no_grad():
            compiled(input_ids=ids)  # outside a window: reads nothing
            with tap.window(reader):
                compiled(input_ids=ids)
        for readout in bank.readouts:
            expected = torch.cat([residual(model, row, readout.hook_point) for row in ids.tolist()])
            assert_readings(reader.values()[:, bank.columns[readout]], sae, expected, IDS)
    tap.close()
    batch = batch_of([[5, 6]] * 3, token_lists(3, 12, seed=11))
    check_batch(read_forward(compiled, batch, bank), model, batch, sae)


def test_hooks_installed_before_compile(saved_sae, dynamo):
    check_compiled("eager", saved_sae, [5, 5])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["llama", "gemma2"])
def test_hooks_installed_before_the_default_compiler(saved_sae, dynamo, layout):
    check_compiled("inductor", saved_sae, [5, 5, 6, 9], layout)


def test_hooks_installed_after_compile_are_never_silent(saved_sae, dynamo):
    model, (sae, handle) = build("llama"), saved_sae("jumprelu")
    compiled = torch.compile(model, backend="eager")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        compiled(input_ids=ids)
    bank = ReadoutBank([handle.features(IDS)])
    tap, reader = ResidualTap(compiled, [POST]), SequenceReader(bank, torch.ones(1, 4, dtype=torch.bool))
    try:
        with torch.no_grad(), tap.window(reader):
            compiled(input_ids=ids)
    except CaptureError as error:
        assert "compiled before the hooks were installed" in str(error)
    else:  # a torch that notices the new hook must read it right
        assert_readings(reader.values(), sae, residual(model, ids[0].tolist(), POST), IDS)
    tap.close()
    batch = batch_of([[5]], [[6, 7, 8]])  # our own forward does not depend on it
    check_batch(read_forward(compiled, batch, bank), model, batch, sae)


def test_own_forward_of_a_model_compiled_in_place(saved_sae, dynamo):
    """`model.compile()` leaves no wrapper to take off."""
    model, (sae, handle) = build("llama"), saved_sae("jumprelu")
    plain = copy.deepcopy(model)
    model.compile(backend="eager")
    batch = batch_of([[5, 6]] * 2, [[7, 8, 9, 10]] * 2)
    with torch.no_grad():
        model(input_ids=rows([5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 9, 10]))
    bank = ReadoutBank([at(handle.features(IDS), POST)])
    check_batch(read_forward(model, batch, bank), plain, batch, sae)


# Nothing leaks


def rows(*lists):
    return torch.tensor([list(row) for row in lists])


def test_windows_are_independent(models, saved_sae):
    model, (sae, handle) = models("gemma2"), saved_sae("jumprelu")
    bank = ReadoutBank([handle.features(IDS)])
    tap = ResidualTap(model, [POST])
    first, between, second = rows([5, 6, 7, 8]), rows([20, 21, 22, 23]), rows([9, 10, 11, 12])
    readers = [SequenceReader(bank, torch.ones(1, 4, dtype=torch.bool)) for _ in range(2)]
    with torch.no_grad():
        model(input_ids=between)
        with tap.window(readers[0]):
            model(input_ids=first)
        model(input_ids=between)
        with tap.window(readers[1]):
            model(input_ids=second)
        model(input_ids=between)
    for reader, ids in zip(readers, (first, second), strict=True):
        assert_readings(reader.values(), sae, residual(model, ids[0].tolist(), POST), IDS)
    before = hooks_on(model)
    tap.close()
    assert hooks_on(model) == before - 1


def test_a_second_pass_in_a_window_is_refused(models, saved_sae):
    bank = ReadoutBank([saved_sae("jumprelu")[1].features(IDS)])
    tap, ids = ResidualTap(models("gemma2"), [POST]), rows([5, 6, 7])
    with torch.no_grad():
        for extra in (ids, rows([5, 6, 7, 8])):
            reader = SequenceReader(bank, torch.ones(1, 3, dtype=torch.bool))
            with pytest.raises(CaptureError, match="another forward pass"), tap.window(reader):
                models("gemma2")(input_ids=ids)
                models("gemma2")(input_ids=extra)
        with tap.window(SequenceReader(bank, torch.ones(1, 3, dtype=torch.bool))):
            models("gemma2")(input_ids=ids)  # the window before left nothing behind
    tap.close()


def test_a_pass_that_broke_off_has_no_values(models, saved_sae):
    bank = ReadoutBank([saved_sae("jumprelu")[1].features(IDS)])
    tap, reader = ResidualTap(models("gemma2"), [POST]), SequenceReader(bank, torch.ones(3, 3, dtype=torch.bool))
    with torch.no_grad(), tap.window(reader):
        models("gemma2")(input_ids=rows([5, 6, 7], [8, 9, 10]))
    tap.close()
    with pytest.raises(CaptureError, match="2 of 3 rows"):
        reader.values()


def test_windows_do_not_nest(models):
    tap = ResidualTap(models("gemma2"), [POST])
    seen = []
    with tap.window(lambda point, hidden: seen.append((point, hidden.requires_grad))):
        with pytest.raises(CaptureError, match="do not nest"), tap.window(lambda point, hidden: None):
            pass
        models("gemma2")(input_ids=rows([5, 6]))
    assert seen == [(POST, False)]  # the outer one is still open after the refusal; and readers get no graph
    tap.close()


def test_a_window_in_which_nothing_fired_is_an_error(models):
    model = models("gemma2")
    tap = ResidualTap(model, [POST, PRE])
    both = r"blocks\.1\.hook_resid_post, blocks\.2\.hook_resid_pre"
    with pytest.raises(CaptureError, match=both), tap.window(lambda point, hidden: None):
        pass
    one = r"Nothing was read at blocks\.2\.hook_resid_pre:"
    with pytest.raises(CaptureError, match=one), tap.window(lambda point, hidden: None), torch.no_grad():
        hidden, positions = torch.zeros(1, 2, WIDTH), torch.arange(2)[None]
        layer_list(model)[1](hidden, position_embeddings=model.model.rotary_emb(hidden, positions))
    tap.close()
    with pytest.raises(CaptureError, match="Nothing was read"), tap.window(lambda point, hidden: None):
        model(input_ids=rows([5, 6]))


def test_errors_leave_no_hook_and_no_window(models, saved_sae):
    model = models("gemma2")
    model(input_ids=rows([5, 6]), output_hidden_states=True)  # HF installs hooks of its own once
    bank = ReadoutBank([saved_sae("jumprelu")[1].features(IDS)])
    batch, before = batch_of([[5, 6]], [[7, 8, 9]]), hooks_on(model)

    def broken(*_, **__):
        raise ZeroDivisionError

    with patch.object(ReadoutBank, "encode", broken), pytest.raises(ZeroDivisionError):
        read_forward(model, batch, bank)
    assert hooks_on(model) == before
    layer = layer_list(model)[0]
    with patch.object(type(layer), "forward", broken), pytest.raises(ZeroDivisionError):
        read_forward(model, batch, bank)
    assert hooks_on(model) == before
    with pytest.raises(ModelMismatchError):
        HFSource(model, None).read(batch, [Request(direction("d", torch.ones(WIDTH + 1), POST))])
    read_forward(model, batch, bank)
    assert hooks_on(model) == before

    tap = ResidualTap(model, [POST])
    with pytest.raises(ZeroDivisionError), tap.window(broken), torch.no_grad():
        model(input_ids=rows([5, 6]))
    with torch.no_grad():
        model(input_ids=rows([5, 6]))  # no window is open: the broken reader is not called
    with pytest.raises(ZeroDivisionError):
        truncated_forward(model, tap, broken, {"input_ids": rows([5, 6])})
    reader = SequenceReader(bank, torch.ones(1, 2, dtype=torch.bool))
    truncated_forward(model, tap, reader, {"input_ids": rows([5, 6])})
    assert reader.values().shape == (2, 4)
    tap.close()
    assert hooks_on(model) == before


# Truncation


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("point", [PRE, HookPoint(2)], ids=str)
def test_layers_after_the_deepest_hook_never_run(models, saved_sae, layout, point):
    model = models(layout)
    calls = []
    watched = {f"layer {i}": layer for i, layer in enumerate(layer_list(model))}
    watched["head"] = model.get_output_embeddings()
    hooks = [
        module.register_forward_pre_hook(lambda _module, _args, name=name: calls.append(name))
        for name, module in watched.items()
    ]
    handle = saved_sae("jumprelu")[1]
    bank = ReadoutBank([at(handle.features(IDS), HookPoint(0)), at(handle.features(IDS), point)])
    try:
        read_forward(model, batch_of([[5, 6]] * 2, [[7, 8, 9]] * 2), bank)
        deepest = ["layer 2"] if "layer 2" in calls else []
        assert calls == ["layer 0", "layer 1", *deepest]
        if point.site == "resid_post":
            assert deepest
        else:  # the hook before a layer ends the pass before its attention runs
            ran = []
            hooks.append(next(layer_list(model)[2].children()).register_forward_hook(lambda *_: ran.append(1)))
            read_forward(model, batch_of([[5, 6]], [[7, 8, 9]]), bank)
            assert not ran
        calls.clear()
        with torch.no_grad():
            model(input_ids=rows([5, 6]))
        assert calls == ["layer 0", "layer 1", "layer 2", "layer 3", "head"]  # and now they all do
    finally:
        for hook in hooks:
            hook.remove()


# Readouts of another model


def test_check_fits(models):
    model = models("gemma2")
    check_fits([direction("d", torch.ones(WIDTH), LAST)], model)
    for readout, part in [
        (direction("wide", torch.ones(WIDTH * 2), POST), "width 64"),
        (direction("deep", torch.ones(WIDTH), HookPoint(LAYERS)), "layers 0 to 3"),
    ]:
        with pytest.raises(ModelMismatchError, match=part) as caught:
            check_fits([readout], model)
        assert "\n" not in str(caught.value) and readout.name in str(caught.value)


def named(name):
    return Readout("r", ("a",), POST, torch.ones(WIDTH, 1), torch.zeros(1), model_name=name)


RIGHT_NAMES = {
    "gemma2": ["gemma-2-2b", "google/gemma-2-9b-it", "mechreward/pocket", "somebody/gemma-2-2b-grpo"],
    "gemma3": ["gemma-3-1b-it", "gemma-3-270m"],
    "gemma3_multimodal": ["google/gemma-3-4b-it"],
    "llama": ["meta-llama/Llama-3.1-8B", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "TinyLlama-1.1B"],
    "qwen2": ["Qwen/Qwen2.5-7B-Instruct", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"],
    "qwen3": ["Qwen/Qwen3-8B"],
    "gpt_neox": ["pythia-70m-deduped"],
    "gpt2": ["gpt2-small"],
}
OTHER_NAMES = [
    "gemma-2b", "mistral-7b", "openai/gpt-oss-20b", "microsoft/phi-2", "facebook/opt-125m", "Qwen/Qwen3-30B-A3B-Base",
    "Qwen/Qwen3.5-2B-Base", "mistralai/Ministral-8B-Instruct-2410", "mistralai/Mixtral-8x7B-v0.1", "allenai/OLMo-7B-hf",
    "bigscience/bloom-560m", "gpt-neo-125M", "stabilityai/stablelm-3b-4e1t", "meta-llama/Llama-4-Scout-17B-16E",
]  # fmt: skip
NOBODYS = ["something-unheard-of", "dolphin-7b", "option-1", "", None]
GEMMA3 = ("gemma3", "gemma3_multimodal")  # one family


@pytest.mark.parametrize("layout", RIGHT_NAMES)
def test_a_readout_made_for_another_architecture_is_refused(models, layout):
    model = models(layout)
    for name in [*RIGHT_NAMES[layout], *NOBODYS]:
        check_fits([named(name)], model)
    others = [names for other, names in RIGHT_NAMES.items() if other != layout and not {other, layout} <= {*GEMMA3}]
    for name in [*OTHER_NAMES, *(name for names in others for name in names)]:
        with pytest.raises(ModelMismatchError, match="made for") as caught:
            check_fits([named(name)], model)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_of_a_name_that_nobody_knows_is_said_once_that_nothing_was_compared(models, caplog):
    with caplog.at_level("WARNING", logger="mechreward"):
        for _ in range(3):
            for name in ("unheard-of-7b", "unheard-of-9b", "gemma-2-2b", "unknown", None):
                check_fits([named(name)], models("gemma2"))
    assert [record.getMessage().split("'")[1] for record in caplog.records] == ["unheard-of-7b", "unheard-of-9b"]


def test_the_model_of_the_same_name_is_the_right_one(models, caplog):
    """What a probe was trained on by its user may be called anything."""
    for name in ("runs/mine", "llama-into-gemma/gpt2"):
        model = copy.deepcopy(models("gemma2"))
        model.config._name_or_path = name
        check_fits([named(name)], model)
    assert not caplog.records


def test_gemma_1_saes_fit_gemma_1():
    config = transformers.GemmaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, intermediate_size=64,
    )  # fmt: skip
    model = transformers.GemmaForCausalLM(config)
    for name in ("gemma-2b", "google/gemma-2b-it", "gemma-7b"):
        check_fits([named(name)], model)
    with pytest.raises(ModelMismatchError):
        check_fits([named("gemma-2-2b")], model)


VIRTUAL = {
    "PROMPT_TUNING": ("PromptTuningConfig", {"num_virtual_tokens": 4}),
    "P_TUNING": ("PromptEncoderConfig", {"num_virtual_tokens": 4, "encoder_hidden_size": 8}),
    "MULTITASK_PROMPT_TUNING": ("MultitaskPromptTuningConfig", {"num_virtual_tokens": 4, "num_tasks": 1}),
    "CPT": (
        "CPTConfig", {"cpt_token_ids": [3, 4, 5, 6], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens_are_named_and_refused(models, kind):
    import peft

    config, settings = VIRTUAL[kind]
    adapted = peft.get_peft_model(
        copy.deepcopy(models("llama")), getattr(peft, config)(task_type="CAUSAL_LM", **settings)
    )
    readout = direction("d", torch.ones(WIDTH), POST)
    for model in (
        adapted,
        torch.nn.parallel.DistributedDataParallel.__new__(torch.nn.parallel.DistributedDataParallel),
    ):
        if model is not adapted:  # as DDP wraps it, without processes
            torch.nn.Module.__init__(model)
            model.module = adapted
        with pytest.raises(CaptureError, match="prompt tuning") as caught:
            check_fits([readout], model)
        assert kind in str(caught.value) and "4 virtual tokens" in str(caught.value) and "\n" not in str(caught.value)
    with adapted.disable_adapter():
        check_fits([readout], adapted)


def test_prefix_tuning_is_read_as_it_runs(models):
    """It adds keys and values, not positions: against hidden states that Hugging Face gives for the adapted model."""
    import peft

    adapted = peft.get_peft_model(
        copy.deepcopy(models("llama")), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    ).eval()
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 3)
    readout = direction("d", torch.randn(WIDTH), POST)
    check_fits([readout], adapted)
    prompts, completions = [[5, 6, 7], [8, 9]], [[10, 11, 12, 13, EOS], [14, 15, EOS]]
    got = read_forward(adapted, batch_of(prompts, completions), ReadoutBank([readout]))[readout]
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids = torch.tensor([prompt + completion])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "output_hidden_states": True}
        with torch.no_grad():
            hidden = adapted(**inputs).hidden_states[POST.layer + 1][0]
            with adapted.disable_adapter():
                plain = adapted(**inputs).hidden_states[POST.layer + 1][0]
        want = (hidden @ readout.weight)[len(prompt) : -1, 0]
        torch.testing.assert_close(got.values[row, : len(want), 0], want, atol=1e-4, rtol=1e-4)
        assert (hidden - plain).abs().max() > 0.1


@pytest.mark.parametrize(
    "own, stops, ends",
    [(7, [8, 9], [7]), (None, [9, 8], [9]), (None, 5, [5]), (None, None, []), (0, None, [0])],
)
def test_completions_without_ids_end_as_the_model_can(models, own, stops, ends):
    """With the tokenizer's end token, else the first of the model's, else as one that was cut off."""
    model = copy.deepcopy(models("llama"))
    model.generation_config.eos_token_id = stops

    class Tokenizer:
        eos_token_id = own

        def __call__(self, text, **options):
            return types.SimpleNamespace(input_ids=[10, 11, 12])

    batch = HFSource(model, Tokenizer()).batch(Call(["p"], ["c"]))
    assert [list(ids) for ids in batch.completion_ids] == [[10, 11, 12, *ends]]
    assert batch.eos_token_ids == {*ends, *([] if stops is None else [stops] if isinstance(stops, int) else stops)}
    assert batch.mask().tolist() == [[True, True, bool(ends), False][: 3 + len(ends)]]


def test_models_without_a_known_layout_are_refused():
    with pytest.raises(CaptureError, match="no Hugging Face config"):
        ResidualTap(torch.nn.Linear(2, 2), [POST])
    model = build("llama")
    model.model.more = torch.nn.ModuleList(torch.nn.Identity() for _ in range(LAYERS))
    with pytest.raises(CaptureError, match="holds 2 lists of 4 layers"):
        ResidualTap(model, [POST])
    assert issubclass(CaptureError, MechRewardError)


# Several processes


def _relu_readout(point):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDTH, 3, generator=g)
    return Readout("relu", ("a", "b", "c"), point, weight, torch.zeros(3), Nonlinearity("relu", {}))


def _check_relu(found, model, batch, readout):
    for row, (prompt, completion) in enumerate(zip(batch.prompt_ids, batch.completion_ids, strict=True)):
        count = len(completion) - 1
        x = residual(model, [*prompt, *completion], readout.hook_point)[len(prompt) : len(prompt) + count].double()
        expected = (x @ readout.weight.double()).clamp(min=0)
        tolerance = 1e-5 * expected.max(-1, keepdim=True).values
        assert ((found.values[row, :count].double() - expected).abs() <= tolerance.clamp(min=1e-4)).all()


def _in_process(rank: int, port: int, kind: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    plain = build("llama")
    model = copy.deepcopy(plain)
    if kind == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(lora(model).train())
        plain = copy.deepcopy(model.module).eval()
        assert unwrap(model) is model.module
    else:
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    batch = batch_of([[5, 6], [7]], token_lists(2, 9, seed=20 + rank))  # each process has rows of its own
    readout = _relu_readout(POST)
    bank = ReadoutBank([readout])
    found = read_forward(model, batch, bank)[readout]
    _check_relu(found, plain, batch, readout)
    # A pass through the wrapper, tapped; and training goes on afterwards.
    ids = torch.randint(3, VOCAB - 1, (2, 6), generator=torch.Generator().manual_seed(rank))
    model.eval()
    tap, reader = ResidualTap(model, [POST]), SequenceReader(bank, torch.ones(2, 6, dtype=torch.bool))
    with torch.no_grad(), tap.window(reader):
        model(input_ids=ids)
    x = torch.cat([residual(plain, row, POST) for row in ids.tolist()]).double()
    expected = (x @ readout.weight.double()).clamp(min=0)
    assert (reader.values().double() - expected).abs().max() <= 1e-4 * expected.max()
    tap.close()
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        read_forward(model, batch, bank)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes(kind):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_in_process, (port, kind), nprocs=2)
