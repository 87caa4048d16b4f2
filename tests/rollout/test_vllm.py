"""Rollouts of a real vLLM (0.32, CPU build), read while it generates, against Hugging Face's own hidden states.

The engine runs in this process. Gemma-2 is `pocket`, through our plug-in, with eager attention on Hugging Face's side:
its SDPA leaves out Gemma-2's soft-capping, which vLLM does not.
"""

import logging
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from vllm_here import shut

from mechreward import pocket
from mechreward.errors import CaptureError, ConfigError, ModelMismatchError
from mechreward.readout import HookPoint, Nonlinearity, Readout, Request, residual
from mechreward.rollout.vllm import VLLMRollout

pytestmark = pytest.mark.engine

LAYERS, WIDTH = 4, 128
SMALL = {"max_model_len": 128, "max_num_seqs": 8, "max_num_batched_tokens": 256}
ENGINE = {
    "dtype": "float32",
    "distributed_executor_backend": "uni",
    "seed": 0,
    "enforce_eager": True,
    "disable_log_stats": False,
    **SMALL,
}
PROMPTS = [item["prompt"] for item in pocket.dataset("discovery", 6, seed=0, kind="reasoning")]
SAMPLING = {"temperature": 1.0, "max_tokens": 40}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random Llama with pocket's tokenizer, every layer of which moves the residual stream."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(pocket.resolve("mechreward/pocket"))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def hugging_face(model):
    return AutoModelForCausalLM.from_pretrained(
        pocket.resolve(model), dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def behind(hf, ids, layer):
    return hf(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]


@contextmanager
def engine(model, readouts, backend=None, **options):
    rollout = VLLMRollout(model, readouts, backend=backend, **{**ENGINE, **options})
    try:
        yield rollout
    finally:
        shut(rollout)


def dictionary(kind, layer, latents=512, k=64):
    """A random sparse autoencoder's five latents, and their activations by hand in float64."""
    generator = torch.Generator().manual_seed(layer)
    weight, bias = torch.randn(WIDTH, latents, generator=generator), torch.randn(latents, generator=generator)
    keep = [0, 7, 100, 101, 511]
    if kind == "topk":
        readout = Readout(
            "topk", tuple(map(str, keep)), HookPoint(layer), weight, bias, Nonlinearity("topk", {}, k),
            keep=torch.tensor(keep),
        )  # fmt: skip

        def by_hand(x):
            z = x.double() @ weight.double() + bias.double()
            least = z.topk(k, dim=-1).values[:, -1:]
            return torch.where(z >= least, z.relu(), 0)[:, keep], (z[:, keep] - least).abs()
    else:
        threshold = torch.full((5,), 1.0)
        readout = Readout(
            "jumprelu", tuple(map(str, keep)), HookPoint(layer), weight[:, keep].contiguous(), bias[keep],
            Nonlinearity("jumprelu", {"threshold": threshold}),
        )  # fmt: skip

        def by_hand(x):
            z = (x.double() @ weight.double() + bias.double())[:, keep]
            return z.relu() * (z > 1), (z - 1).abs()

    return readout, by_hand


def check(hf, batch, read, layers, read_last=False, tolerance=5e-5):
    """Every residual vector that was read equals Hugging Face's; returns how many were."""
    tokens = 0
    for row, (prompt, completion) in enumerate(zip(batch.prompt_ids, batch.completion_ids, strict=True)):
        ends = [t for t, token in enumerate(completion) if token in batch.eos_token_ids]
        real = ends[0] + 1 if ends else len(completion)
        until = real if read_last else real - 1
        for layer in layers:
            readings = next(r for readout, r in read.items() if readout.hook_point == HookPoint(layer))
            expected = behind(hf, list(prompt) + list(completion), layer)[len(prompt) : len(prompt) + until]
            assert readings.mask[row].tolist() == [t < until for t in range(readings.mask.shape[1])]
            torch.testing.assert_close(readings.values[row, :until], expected, rtol=0, atol=tolerance)
            assert not readings.values[row, until:].any()
        tokens += until
    return tokens


def residuals(*layers):
    return [replace(residual(HookPoint(layer), WIDTH), name=f"residual {layer}") for layer in layers]


@pytest.mark.parametrize("backend", ["aux", "hook", "second_pass", "forward"])
@pytest.mark.parametrize("which", ["gemma2", "llama"])
def test_every_way_reads_what_hugging_face_reads(which, backend, llama):
    model = "mechreward/pocket" if which == "gemma2" else llama
    hf = hugging_face(model)
    with engine(model, residuals(0, 2), backend) as rollout:
        assert rollout.backend == backend
        batch, read = rollout.generate(PROMPTS, num_generations=3, **SAMPLING)
        assert len(batch) == 18 and batch.num_generations == 3
        assert batch.prompt_ids[0] == batch.prompt_ids[2] != batch.prompt_ids[3]
        assert check(hf, batch, read, [0, 2]) > 100


@pytest.mark.parametrize("backend", ["aux", "hook", "second_pass"])
@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_features_are_those_computed_by_hand(kind, backend, llama):
    readout, by_hand = dictionary(kind, 1)
    hf, near = hugging_face(llama), 0
    with engine(llama, [readout], backend) as rollout:
        batch, read = rollout.generate(PROMPTS, num_generations=2, **SAMPLING)
    values = read[readout].values
    for row, (prompt, completion) in enumerate(zip(batch.prompt_ids, batch.completion_ids, strict=True)):
        x = behind(hf, list(prompt) + list(completion), 1)[len(prompt) : -1]
        expected, distance = by_hand(x)
        clear = distance > 1e-4  # nearer to a threshold, the last bits decide
        near += int((~clear).sum())
        got = values[row, : len(x)].double()
        torch.testing.assert_close(got[clear], expected[clear], rtol=1e-5, atol=1e-4)
    assert (values > 0).any() and near < 10


@pytest.mark.parametrize("backend", ["aux", "hook", "second_pass"])
def test_chunked_prefill_and_prefix_caching(backend, llama):
    hf = hugging_face(llama)
    long = [" ".join(PROMPTS[:2]), " ".join(PROMPTS[:2]) + " And?", " ".join(PROMPTS[2:4])]
    options = {"max_num_batched_tokens": 32, "max_model_len": 256, "enable_prefix_caching": True, "block_size": 32}
    with engine(llama, residuals(1), backend, **options) as rollout:
        for _ in range(2):  # the second time, from the cache
            batch, read = rollout.generate(long, num_generations=2, **SAMPLING)
            assert min(map(len, batch.prompt_ids)) > 32
            check(hf, batch, read, [1])
        hits = {m.name: getattr(m, "value", 0) for m in rollout.llm.get_metrics()}
        assert hits["vllm:prefix_cache_hits"] > 0


@pytest.mark.parametrize("backend", ["aux", "hook"])
def test_preempted_requests_are_read_whole(backend, llama):
    hf = hugging_face(llama)
    options = {"num_gpu_blocks_override": 12, "block_size": 32, "max_model_len": 128, "enable_prefix_caching": False}
    with engine(llama, residuals(1), backend, **options) as rollout:
        batch, read = rollout.generate(PROMPTS, num_generations=3, temperature=1.0, max_tokens=60, ignore_eos=True)
        check(hf, batch, read, [1])
        preemptions = next(m.value for m in rollout.llm.get_metrics() if m.name == "vllm:num_preemptions")
    assert preemptions > 0


@pytest.mark.parametrize("backend", ["aux", "hook", "second_pass"])
def test_stop_strings_ends_and_the_longest_length(backend):
    """Pocket writes numbers, ends by itself, and here has no room for long answers."""
    hf = hugging_face("mechreward/pocket")
    with engine("mechreward/pocket", residuals(2), backend, max_model_len=96) as rollout:
        batch, read = rollout.generate(PROMPTS, num_generations=4, temperature=1.0, max_tokens=90, stop=["="])
        check(hf, batch, read, [2])
        assert any(len(c) > 1 and c[-1] not in batch.eos_token_ids for c in batch.completion_ids)  # stopped by "="
        batch, read = rollout.generate(PROMPTS, num_generations=4, temperature=1.0, max_tokens=90)
        ends = [c[-1] in batch.eos_token_ids for c in batch.completion_ids]
        full = [len(p) + len(c) == 96 for p, c in zip(batch.prompt_ids, batch.completion_ids, strict=True)]
        assert any(ends) and any(full)
        check(hf, batch, read, [2])
        with pytest.raises(CaptureError, match="fills all of max_model_len=96"):
            rollout.read(batch, [Request(next(iter(read)), read_last=True)])


def test_a_completion_of_one_token_has_nothing_to_read(llama):
    with engine(llama, residuals(1)) as rollout:
        _, read = rollout.generate(PROMPTS, temperature=0.0, max_tokens=1)
        (readings,) = read.values()
        assert readings.values.shape == (6, 1, WIDTH)
        assert not readings.mask.any()


@pytest.mark.parametrize("backend", ["aux", "forward"])
def test_finished_rollouts_are_read_with_their_last_token(backend, llama):
    hf = hugging_face(llama)
    readouts = residuals(1)
    with engine(llama, readouts, backend) as rollout:
        batch, read = rollout.generate(PROMPTS, num_generations=2, **SAMPLING)
        for last in (False, True):
            request = Request(readouts[0], read_last=last)
            again = rollout.read(batch, [request])[request]
            check(hf, batch, {readouts[0]: again}, [1], read_last=last)
            if not last:
                torch.testing.assert_close(again.values, read[readouts[0]].values, rtol=0, atol=5e-5)


def test_lora_s_own_activations_are_read(llama, tmp_path):
    from peft import LoraConfig, get_peft_model
    from vllm.lora.request import LoRARequest

    torch.manual_seed(1)
    adapted = get_peft_model(hugging_face(llama), LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.eval().save_pretrained(tmp_path)
    lora = LoRARequest("adapter", 1, str(tmp_path))
    with engine(llama, residuals(2), enable_lora=True, max_lora_rank=8) as rollout:
        batch, read = rollout.generate(PROMPTS, num_generations=2, lora_request=lora, **SAMPLING)
        check(adapted, batch, read, [2])
        plain, own = rollout.generate(PROMPTS, num_generations=2, **SAMPLING)
        check(hugging_face(llama), plain, own, [2])


@pytest.mark.parametrize("backend", ["aux", "forward"])
def test_new_weights_are_what_is_read(backend, llama, tmp_path):
    moved = hugging_face(llama)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    moved.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path)
    with engine(llama, residuals(2), backend) as rollout:
        batch, read = rollout.generate(PROMPTS, **SAMPLING)
        check(hugging_face(llama), batch, read, [2])
        with pytest.raises(AssertionError):  # the control: without new weights, readings are the old policy's
            check(moved, batch, read, [2])
        rollout.load_weights(tmp_path)
        batch, read = rollout.generate(PROMPTS, **SAMPLING)
        check(moved, batch, read, [2])


@pytest.mark.slow
@pytest.mark.parametrize("which", ["gemma2", "llama"])
def test_a_compiled_engine_s_states_are_read(which, llama):
    model = "mechreward/pocket" if which == "gemma2" else llama
    with engine(model, residuals(0, 2), enforce_eager=False) as rollout:
        assert rollout.backend == "aux"
        batch, read = rollout.generate(PROMPTS, num_generations=2, **SAMPLING)
        check(hugging_face(model), batch, read, [0, 2])


@pytest.mark.slow
def test_hooks_in_a_compiled_engine_fail_loudly(llama, monkeypatch):
    with pytest.raises(ConfigError, match="enforce_eager=True"):
        VLLMRollout(llama, residuals(1), backend="hook", **{**ENGINE, "enforce_eager": False})
    # And where the check before is fooled, the worker sees that nothing was read.
    monkeypatch.setattr("mechreward.rollout.vllm.choose_backend", lambda *_: "hook")
    with (
        engine(llama, residuals(1), enforce_eager=False) as rollout,
        pytest.raises(CaptureError, match="The hooks never ran: the model is compiled"),
    ):
        rollout.generate(PROMPTS, **SAMPLING)


def test_what_does_not_fit_is_refused(llama):
    with pytest.raises(ModelMismatchError, match="4 layers of width 128"):
        VLLMRollout(llama, [residual(HookPoint(7), WIDTH)], **ENGINE)
    with pytest.raises(ConfigError, match="Did you mean 'aux'"):
        VLLMRollout(llama, residuals(1), backend="auxx", **ENGINE)
    with (
        engine(llama, residuals(1)) as rollout,
        pytest.raises(ConfigError, match="'residual 2'"),
    ):
        rollout.read(rollout.generate(PROMPTS, **SAMPLING)[0], [Request(residuals(2)[0])])


def test_what_would_read_another_model_is_refused(llama):
    readouts = residuals(1)
    with engine(llama, readouts, "forward", enable_lora=True) as rollout:
        with pytest.raises(ConfigError, match="without the LoRA"):
            rollout.generate(PROMPTS, lora_request=object(), **SAMPLING)
        batch, _ = rollout.generate(PROMPTS, **SAMPLING)
        with pytest.raises(ConfigError, match="has one model, the policy"):
            rollout.read(batch, [Request(readouts[0], reads="reference")])


def test_the_choice_is_logged(llama, caplog):
    with caplog.at_level(logging.INFO, "mechreward"), engine(llama, residuals(1)):
        pass
    assert "come from: vLLM, aux" in caplog.text


def test_drafts_that_are_rejected_are_not_read(llama):
    """Speculative decoding feeds tokens that it takes back: the finished rollouts are read instead.

    The last test: what vLLM imports for drafts keeps it from building another engine in this process.
    """
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    with engine(llama, residuals(1), speculative_config=drafts) as rollout:
        assert rollout.backend == "second_pass"
        batch, read = rollout.generate(PROMPTS, **SAMPLING)
        check(hugging_face(llama), batch, read, [1])
