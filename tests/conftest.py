"""Tiny models with random weights, one for each layout that is supported."""

import os
import sys
import warnings

if "hub" not in sys.argv:  # pytest -m hub
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in the test's own process
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import pytest
import torch
import transformers
from hypothesis import settings

settings.register_profile("anywhere", deadline=None)  # a busy machine is no bug
settings.load_profile("anywhere")
torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that need a sandbox where there is none, and say so in the summary."""
    isolated = [item for item in items if item.get_closest_marker("bwrap")]
    if not isolated:
        return
    from mechreward.errors import SandboxError
    from mechreward.verifiers import sandbox

    try:
        sandbox.engine()
    except SandboxError as error:
        items[:] = [item for item in items if item not in isolated]
        config.hook.pytest_deselected(items=isolated)
        warnings.warn(pytest.PytestWarning(f"{len(isolated)} tests are left out. {error}"), stacklevel=1)


LAYERS, WIDTH, VOCAB = 4, 32, 97
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = COMMON | {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64}


def build(layout: str) -> transformers.PreTrainedModel:
    """A random tiny model in eval mode, with weights large enough that every layer moves the residual stream."""
    t = transformers
    torch.manual_seed(0)
    if layout == "gemma2":
        model = t.Gemma2ForCausalLM(t.Gemma2Config(**GROUPED, sliding_window=16, query_pre_attn_scalar=16))
    elif layout == "gemma3":
        model = t.Gemma3ForCausalLM(t.Gemma3TextConfig(**GROUPED, sliding_window=16, query_pre_attn_scalar=16))
    elif layout == "gemma3_multimodal":
        text = t.Gemma3TextConfig(**GROUPED, sliding_window=16, query_pre_attn_scalar=16)
        # As many vision layers as text layers: the wrong list is there to be found.
        vision = t.SiglipVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=LAYERS, num_attention_heads=2, image_size=28,
            patch_size=14,
        )  # fmt: skip
        model = t.Gemma3ForConditionalGeneration(
            t.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=96)
        )
    elif layout == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**GROUPED))
    elif layout == "qwen2":
        model = t.Qwen2ForCausalLM(t.Qwen2Config(**{k: v for k, v in GROUPED.items() if k != "head_dim"}))
    elif layout == "qwen3":
        model = t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED))
    elif layout == "gpt_neox":
        model = t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**COMMON, intermediate_size=64))
    elif layout == "gpt2":
        model = t.GPT2LMHeadModel(t.GPT2Config(**COMMON))
    else:
        raise ValueError(layout)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)
            elif "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


LAYOUTS = ["gemma2", "gemma3", "gemma3_multimodal", "llama", "qwen2", "qwen3", "gpt_neox", "gpt2"]


@pytest.fixture(scope="session", params=LAYOUTS)
def any_model(request):
    return build(request.param)


@pytest.fixture(scope="session")
def gemma():
    return build("gemma2")


# What readings are compared with: Hugging Face's own hidden states of one unpadded sequence, and SAELens' own encode.

LAYER_LISTS = {
    "Gemma3ForConditionalGeneration": "model.language_model.layers",
    "GPTNeoXForCausalLM": "gpt_neox.layers",
    "GPT2LMHeadModel": "transformer.h",
}
SAE_KINDS = ["standard", "jumprelu", "topk", "topk_rescaled", "gated", "batchtopk", "matryoshka"]
NORMS = ["none", "constant_norm_rescale", "layer_norm"]
LATENTS = 64


def layer_list(model) -> torch.nn.ModuleList:
    """The decoder layers, written down by hand for each layout."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_submodule(LAYER_LISTS.get(type(base).__name__, "model.layers"))


@torch.no_grad()
def residuals(model, ids) -> dict:
    """The residual stream ``[tokens, d_model]`` of one unpadded sequence at each (layer, site)."""
    last = []  # HF's last hidden state is normed
    hook = layer_list(model)[-1].register_forward_hook(lambda _module, _args, out: last.append(out))
    try:
        hidden = model(input_ids=torch.tensor([list(ids)]), output_hidden_states=True).hidden_states
    finally:
        hook.remove()
    stream = [h[0] for h in hidden[:LAYERS]] + [last[0][0][0] if isinstance(last[0], tuple) else last[0][0]]
    return {
        (n, site): stream[n + (site == "resid_post")] for n in range(LAYERS) for site in ("resid_pre", "resid_post")
    }


def residual(model, ids, point) -> torch.Tensor:
    return residuals(model, ids)[point.layer, point.site]


def random_sae(
    kind: str, norm: str = "none", b_dec: bool = True, d_in: int = WIDTH, d_sae: int = LATENTS, seed: int = 0
):
    """A SAELens object with random weights; "batchtopk" and "matryoshka" are what is trained, and saved as JumpReLU."""
    import sae_lens
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )

    options = {
        "d_in": d_in,
        "d_sae": d_sae,
        "apply_b_dec_to_input": b_dec,
        "normalize_activations": norm,
        "metadata": sae_lens.saes.sae.SAEMetadata(hook_name="blocks.1.hook_resid_post", model_name="a-model"),
    }
    if kind == "standard":
        sae = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(**options))
    elif kind == "jumprelu":
        sae = sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(**options))
    elif kind in ("topk", "topk_rescaled"):
        rescale = kind == "topk_rescaled"
        sae = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(**options, k=8, rescale_acts_by_decoder_norm=rescale))
    elif kind == "gated":
        sae = sae_lens.GatedSAE(sae_lens.GatedSAEConfig(**options))
    else:
        options |= {"k": 8.0, "rescale_acts_by_decoder_norm": True}
        if kind == "batchtopk":
            sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**options))
        else:
            widths = [d_sae // 4, d_sae // 2, d_sae]
            sae = MatryoshkaBatchTopKTrainingSAE(
                MatryoshkaBatchTopKTrainingSAEConfig(**options, matryoshka_widths=widths)
            )
        sae.topk_threshold.fill_(1.5)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(sae.named_parameters()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            if name == "threshold":
                parameter.mul_(8).abs_()
            if name == "W_dec":  # rows of quite different norms
                parameter.mul_(torch.rand(d_sae, 1, generator=generator) + 0.5)
    return sae


def save_sae(sae, folder):
    """Save with SAELens, and return what SAELens itself makes of the folder."""
    import sae_lens

    getattr(sae, "save_inference_model", sae.save_model)(folder)
    return sae_lens.SAE.load_from_disk(folder)


@pytest.fixture(scope="session")
def saved_sae(tmp_path_factory):
    """``saved_sae(kind, norm, b_dec)``: a SAELens object, and our handle on the same files."""
    import functools

    import mechreward as mr

    @functools.cache
    def make(kind: str, norm: str = "none", b_dec: bool = True):
        folder = tmp_path_factory.mktemp("sae")
        return save_sae(random_sae(kind, norm, b_dec), folder), mr.load_sae(path=folder)

    return make


@torch.no_grad()
def assert_readings(got: torch.Tensor, sae, x: torch.Tensor, ids) -> tuple[int, int]:
    """``got [N, K]`` is SAELens' encoding of ``x [N, d]``, as DESIGN section 5 says what "equal" means.

    Returns:
        How many values were left out because their pre-activation is too close to a threshold or the k-th value, and
        how many were compared.
    """
    ids = list(ids)
    assert got.dtype == torch.float32 and got.shape == (len(x), len(ids))
    expected = sae.encode(x.float())[:, ids].double()
    v = x.double()
    if sae.cfg.normalize_activations == "constant_norm_rescale":
        v = v * v.shape[-1] ** 0.5 / v.norm(dim=-1, keepdim=True)
    elif sae.cfg.normalize_activations == "layer_norm":
        v = v - v.mean(-1, keepdim=True)
        v = v / (v.std(-1, keepdim=True) + 1e-5)
    v = v - sae.b_dec.double() * sae.cfg.apply_b_dec_to_input
    kind = sae.cfg.architecture()
    z = v @ sae.W_enc.double() + (sae.b_gate if kind == "gated" else sae.b_enc).double()
    largest = z.abs()
    if kind == "gated":
        largest = torch.maximum(largest, (v @ (sae.W_enc * sae.r_mag.exp()).double() + sae.b_mag).abs())
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        z = z * sae.W_dec.double().norm(dim=-1)
        largest = z.abs()
    tolerance = 1e-5 * torch.maximum(expected.abs(), largest.max(-1, keepdim=True).values)
    margin = torch.full_like(z, torch.inf)  # distance of a pre-activation from where it would flip
    if kind == "jumprelu":
        margin = (z - sae.threshold).abs()
    elif kind == "gated":
        margin = z.abs()
    elif kind == "topk":
        ordered = z.sort(dim=-1, descending=True).values
        kth, next_one = ordered[:, sae.cfg.k - 1, None], ordered[:, sae.cfg.k, None]
        margin = torch.where(z >= kth, z - next_one, kth - z)
    clear = margin[:, ids] > tolerance
    difference = (got.double() - expected).abs()
    worst = (difference / tolerance)[clear]
    assert (difference <= tolerance)[clear].all(), f"off by {worst.max().item():.3g} x the tolerance"
    return int((~clear).sum()), clear.numel()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`mechreward serve` with pocket and its pack, as a process."""
    from serving import Process

    arguments = ["--model", "mechreward/pocket", "--pack", "pocket/reasoning_pack"]
    started = Process(tmp_path_factory.mktemp("server"), *arguments)
    yield started
    started.end()
