"""Tiny models with random weights, one for each layout that is supported."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

torch.set_num_threads(2)

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
