"""What a model's name says of its architecture, against lists that others keep of names and architectures."""

import json
import re
import string
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechreward.families import FAMILIES, centers, families, model_types
from mechreward.sae.registry import CORRECTED_MODELS, saelens_directory

ROOT = Path(__file__).parents[2]
REMOTE = {"qwen"}  # the first Qwen's architecture is in its repository, not in transformers
EVERY_TYPE = sorted(set().union(*(family.types for family in FAMILIES)))


def test_every_model_with_published_saes_has_a_family():
    named = {str(entry["model"]) for entry in saelens_directory().values()} | set(CORRECTED_MODELS.values())
    assert len(named) > 30
    assert [name for name in named if not families(name)] == [], "add its family to mechreward/families.py"


def test_every_model_of_the_readme_and_of_the_packs_has_a_family():
    table = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ") and "`" in line]
    rows = [line.split("|")[1] for line in table if "formula, at" in line]
    named = {name.split(":")[0].strip() for row in rows for name in row.split(",")} - {"any", "e.g. `EleutherAI/sae"}
    packs = [json.loads(file.read_text()) for file in (ROOT / "src/mechreward/catalogs").glob("*/*.json")]
    named = {name for name in named if not name.startswith(("e.g.", "`"))} | {pack["model"] for pack in packs}
    assert {"mistral-7b", "Qwen3.5-4B", "mechreward/pocket"} <= named
    assert [name for name in named if not families(name)] == []


def test_every_type_is_one_of_hugging_faces():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert [name for name in EVERY_TYPE if name not in CONFIG_MAPPING_NAMES and name not in REMOTE] == []


GEMMA3, QWEN35 = {"gemma3", "gemma3_text"}, {"qwen3_5", "qwen3_5_text"}
NAMES = {
    "gemma-2b": {"gemma"},
    "google/gemma-7b-it": {"gemma"},
    "gemma-1.1-2b-it": {"gemma"},
    "google/codegemma-2b": {"gemma"},
    "gemma-2-2b": {"gemma2"},
    "google/gemma-2-27b": {"gemma2"},
    "gemma2-9b": {"gemma2"},
    "google/gemma-3-270m": GEMMA3,
    "google/medgemma-4b-it": GEMMA3,
    "google/gemma-3n-E2B-it": {"gemma3n", "gemma3n_text"},
    "meta-llama/Meta-Llama-3-8B-Instruct": {"llama"},
    "Llama-3.1-8B": {"llama"},
    "llama3-8b": {"llama"},
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": {"llama"},
    "codellama/CodeLlama-7b-hf": {"llama"},
    "dolphin-2.9-llama3-8b": {"llama"},
    "meta-llama/Llama-4-Scout-17B-16E": {"llama4", "llama4_text"},
    "HuggingFaceTB/SmolLM2-1.7B": {"llama"},
    "HuggingFaceTB/SmolLM3-3B": {"smollm3"},
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": {"llama"},
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": {"qwen2"},
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": {"qwen3"},
    "deepseek-ai/DeepSeek-R1": {"deepseek_v3"},
    "deepseek-ai/DeepSeek-V3.1": {"deepseek_v3"},
    "Qwen/Qwen2.5-7B-Instruct": {"qwen2"},
    "Qwen2-7B": {"qwen2"},
    "Qwen/Qwen1.5-MoE-A2.7B": {"qwen2_moe"},
    "Qwen/QwQ-32B": {"qwen2"},
    "Qwen/Qwen3-8B-Base": {"qwen3"},
    "qwen3-0.6b": {"qwen3"},
    "Qwen/Qwen3-30B-A3B-Base": {"qwen3_moe"},
    "Qwen/Qwen3-Next-80B-A3B-Instruct": {"qwen3_next"},
    "Qwen/Qwen3.5-27B": QWEN35,
    "Qwen3.5-4B": QWEN35,
    "Qwen/Qwen3.5-35B-A3B-Base": {"qwen3_5_moe", "qwen3_5_moe_text"},
    "mistral-7b": {"mistral", "mistral3"},
    "mistralai/Mistral-7B-Instruct-v0.1": {"mistral", "mistral3"},
    "teknium/OpenHermes-2.5-Mistral-7B": {"mistral", "mistral3"},
    "mistralai/Ministral-8B-Instruct-2410": {"ministral", "mistral"},
    "mistralai/Ministral-3-3B-Base-2512": {"ministral3", "mistral3"},
    "mistralai/Mixtral-8x7B-v0.1": {"mixtral"},
    "openai/gpt-oss-20b": {"gpt_oss"},
    "gpt2-small": {"gpt2"},
    "gpt2": {"gpt2"},
    "distilgpt2": {"gpt2"},
    "gpt-neo-125M": {"gpt_neo"},
    "EleutherAI/gpt-neox-20b": {"gpt_neox"},
    "EleutherAI/gpt-j-6B": {"gptj"},
    "pythia-70m-deduped": {"gpt_neox"},
    "EleutherAI/pythia-160m-seed1": {"gpt_neox"},
    "roneneldan/TinyStories-33M": {"gpt_neo"},
    "microsoft/phi-1_5": {"phi"},
    "microsoft/phi-2": {"phi"},
    "dolphin-2_6-phi-2": {"phi"},
    "microsoft/Phi-3-mini-4k-instruct": {"phi3"},
    "microsoft/phi-4": {"phi3"},
    "microsoft/Phi-3.5-MoE-instruct": {"phimoe"},
    "facebook/opt-125m": {"opt"},
    "facebook/opt-1.3b": {"opt"},
    "allenai/OLMo-7B-hf": {"olmo"},
    "allenai/OLMo-2-1124-7B": {"olmo2"},
    "allenai/Olmo-3.1-32B-Think": {"olmo3"},
    "allenai/OLMoE-1B-7B-0924": {"olmoe"},
    "bigscience/bloom-560m": {"bloom"},
    "tiiuae/falcon-7b": {"falcon"},
    "tiiuae/Falcon3-7B-Base": {"llama"},
    "stabilityai/stablelm-3b-4e1t": {"stablelm"},
    "stable-lm-2-1_6b": {"stablelm"},
    "stabilityai/stablelm-base-alpha-3b": {"gpt_neox"},
    "mechreward/pocket": {"gemma2"},
    # an owner is no name; of a path, the last part that names a family counts
    "llama-farm/mistral-7b": {"mistral", "mistral3"},
    "runs/gemma-2-2b/checkpoint-500": {"gemma2"},
    "/data/models--google--gemma-2-2b/snapshots/0123abcd": {"gemma2"},
    "C:\\models\\gpt2-small\\final": {"gpt2"},
    # a name that names two may be either
    "gpt2-into-llama": {"gpt2", "llama"},
}  # fmt: skip
NO_FAMILY = [
    "a-model", "dolphin", "dolphin-7b", "option-7b", "adopt-125m", "delphi-2", "sapphire", "llamao", "pythias", "agpt2",
    "mistrals-7b", "gpt-osseous", "checkpoint-500", "", "/", "google/", "llama-farm/theirs", "llama-farm/mine-7b",
    "/opt/models/mine", "gemmatron-2b", "qwenta-7b", "SciPhi-7B", "polyphia-2", "bloomberg-7b", "falcony",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_types_of_a_name(name):
    assert model_types(name) == NAMES[name]
    assert model_types(name.upper()) == NAMES[name]


@pytest.mark.parametrize("name", NO_FAMILY)
def test_a_part_of_a_word_is_no_name(name):
    assert not families(name)


@settings(deadline=None)
@given(
    st.sampled_from([name for name in NAMES if name.count("/") < 2 and "\\" not in name]),
    st.sampled_from(["-ft", "-v0.2", "_sft", ".gguf", "-GRPO", "-checkpoint-7"]),
)
def test_a_fine_tune_keeps_its_family(name, more):
    assert model_types(f"somebody/{name.split('/')[-1]}{more}") == NAMES[name]


@settings(max_examples=50, deadline=None)
@given(st.text(string.printable + "ÄßÉ中\ud800", max_size=40))
def test_any_name_can_be_asked_about(name):
    assert families(name) is not None and centers(name) in (True, False, None)


def test_names_agree_with_the_architectures_that_transformerlens_recorded():
    """Of 15,000 models of the hub: those whose name names a family have its architecture, but for misnamed ones."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    types: dict[str, set[str]] = {}
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for model_type, architecture in mapping.items():
            types.setdefault(str(architecture), set()).add(model_type)
    listed = Path(find_spec("transformer_lens").origin).parent / "tools/model_registry/data/supported_models.json"
    if not listed.exists():
        pytest.skip("this TransformerLens keeps no list of models")
    named, wrong, publishers = 0, [], []
    for model in json.loads(listed.read_text())["models"]:
        real, name = types.get(model["architecture_id"]), model["model_id"]
        if real is None or not (said := model_types(name)):
            continue
        named += 1
        if real.isdisjoint(said):
            wrong.append(name)
            # Their own names are right; what others call a model need not be.
            if re.match("(google|meta-llama|Qwen|mistralai|openai|EleutherAI|microsoft|deepseek-ai|facebook)/", name):
                publishers.append(name)
    assert named > 6000 and len(wrong) < 0.02 * named, wrong
    assert publishers in ([], ["meta-llama/Llama-Guard-4-12B"])


CENTERING = sorted(
    {(name, family.centers) for family in FAMILIES for name in family.types if family.centers is not None}
)


@pytest.mark.parametrize("model_type, centered", CENTERING)
def test_layernorm_is_centered_and_rmsnorm_is_not(model_type, centered):
    """By the source of Hugging Face's classes."""
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    if model_type in REMOTE:
        return
    folder = Path(find_spec("transformers").origin).parent / "models" / model_type_to_module_name(model_type)
    source = re.sub("#.*", "", (folder / f"modeling_{folder.name}.py").read_text())
    norms = set(re.findall(r"RMSNorm|LayerNorm(?=\()", source))
    if centered:
        assert norms == {"LayerNorm"}
    else:  # pictures may pass LayerNorms of their own; a wrapper of other models has no norm itself
        assert "RMSNorm" in norms or not norms


OTHERS = ("fold_ln", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices")


@pytest.mark.parametrize("norm", ["LN", "RMS"])
def test_of_transformerlens_options_centering_alone_changes_the_stream_and_with_layernorm_alone(norm):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    def stream(**options):
        torch.manual_seed(0)
        config = HookedTransformerConfig(
            n_layers=2, d_model=16, n_ctx=8, d_head=8, n_heads=2, d_vocab=30, d_mlp=32, act_fn="gelu",
            normalization_type=norm, seed=1, device="cpu",
        )  # fmt: skip
        model = HookedTransformer(config)
        for parameter in model.parameters():
            parameter.data.normal_(0.1, 0.5)
        off = dict.fromkeys(["center_writing_weights", *OTHERS], False)
        model.load_and_process_state_dict(model.state_dict(), **off | options)
        _, cache = model.run_with_cache(torch.tensor([[3, 7, 1, 20]]))
        return torch.stack([cache[f"blocks.{layer}.hook_resid_{site}"] for layer in (0, 1) for site in ("pre", "post")])

    plain = stream()
    assert plain.mean(-1).abs().mean() > 0.1
    for option in OTHERS:
        torch.testing.assert_close(stream(**{option: True}), plain, atol=1e-3, rtol=1e-3)
    centered = stream(center_writing_weights=True)
    expected = plain - plain.mean(-1, keepdim=True) if norm == "LN" else plain
    torch.testing.assert_close(centered, expected, atol=1e-3, rtol=1e-3)
