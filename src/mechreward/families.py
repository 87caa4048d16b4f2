"""Families of models: what a model's name says of its architecture.

Of a sparse autoencoder or a probe, nothing but a name tells which model it was made for, and models of different
architectures are often equally wide. So the name decides whether the policy can be that model, or a fine-tune of it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

UNNAMED = "unknown"
"""What stands for the model's name in packs of which it is not known."""


class Family(NamedTuple):
    """One architecture.

    Attributes:
        pattern: Of whole parts of names in lower case, with ``-`` for ``_`` and spaces: what follows a last letter must
            not be a letter, what follows a last digit neither letter nor digit.
        types: The ``model_type`` of its Hugging Face configurations, of the text model or of the whole.
        centers: Whether TransformerLens' ``center_writing_weights`` takes the mean out of its residual stream: where it
            is normalised by LayerNorm (``weight_processing.py`` of TransformerLens: ``normalization_type`` LN, LNPre),
            not where by RMSNorm. None: TransformerLens' ``HookedTransformer`` does not load it, or does so in part.
    """

    pattern: str
    types: frozenset[str]
    centers: bool | None = False


def _family(pattern: str, types: str, centers: bool | None = False) -> Family:
    return Family(pattern, frozenset(types.split()), centers)


_ANY_GEMMA = (
    "gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text"
)
_EXPERTS = r"(-(?!distill)[a-z]+)*(-\d+(\.\d+)?b)?-a\d+(\.\d+)?b"  # A3B: how many parameters are active
_ANY_QWEN = "qwen qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text"

# A name belongs to each family that a part of it names. The special stand before the general, since what a pattern
# matched is cut out. Only families that Hugging Face's causal language models have: the others can't be a policy.
FAMILIES: tuple[Family, ...] = (
    _family(r"^pocket", "gemma2"),
    # distilled models: the student's name stands last
    _family(r"deepseek-r1-(distill|0528)-qwen-?3", "qwen3"),
    _family(r"deepseek-r1-distill-qwen", "qwen2"),
    _family(r"deepseek-r1-distill-llama", "llama"),
    # Gemma
    _family(r"gemma-?3n", "gemma3n gemma3n_text"),
    _family(r"gemma-?4", "gemma4 gemma4_text gemma4_unified gemma4_unified_text"),
    _family(r"shieldgemma-2(?!\d*b)", "shieldgemma2 gemma3_text"),
    _family(r"gemma-?3|(med|function|translate|embedding)gemma", "gemma3 gemma3_text"),
    _family(r"paligemma-?2", "paligemma gemma2"),
    _family(r"paligemma", "paligemma gemma"),
    _family(r"gemma-?2|(shield|data|tx)gemma", "gemma2"),
    _family(r"recurrentgemma", "recurrent_gemma", None),
    _family(r"vaultgemma", "vaultgemma", None),
    _family(r"gemma-?(1\.1-)?[27]b|codegemma|gemma-?1(\.1)?", "gemma"),
    _family(r"gemma", _ANY_GEMMA),
    # Qwen
    _family(rf"qwen-?3[.-][56]{_EXPERTS}", "qwen3_5_moe qwen3_5_moe_text", None),
    _family(r"qwen-?3[.-][56]", "qwen3_5 qwen3_5_text", None),
    _family(r"qwen-?3-(coder-)?next", "qwen3_next", None),
    _family(r"qwen-?3-omni", "qwen3_omni_moe qwen3_omni_moe_thinker qwen3_omni_moe_text", None),
    _family(rf"qwen-?3-vl{_EXPERTS}", "qwen3_vl_moe qwen3_vl_moe_text", None),
    _family(r"qwen-?3-vl", "qwen3_vl qwen3_vl_text", None),
    _family(rf"qwen-?3({_EXPERTS}|-moe)", "qwen3_moe", None),
    _family(r"qwen-?3", "qwen3"),
    _family(r"qwen-?2\.5-omni", "qwen2_5_omni qwen2_5_omni_thinker qwen2_5_omni_text", None),
    _family(r"qwen-?2\.5-vl", "qwen2_5_vl qwen2_5_vl_text", None),
    _family(r"qwen-?2-vl|qvq", "qwen2_vl qwen2_vl_text", None),
    _family(r"qwen-?2-audio", "qwen2_audio qwen2", None),
    _family(rf"qwen-?(2|1\.5)({_EXPERTS}|-moe)", "qwen2_moe", None),
    _family(r"(code)?qwen-?(1\.5|2(\.5)?)|qwq", "qwen2"),
    _family(r"qwen", _ANY_QWEN),
    # Llama, and what has its architecture
    _family(r"falcon-?h-?1r?", "falcon_h1", None),
    _family(r"falcon-?3?-?mamba", "falcon_mamba", None),
    _family(r"[a-z]*llava(-next|-onevision)?", "llava llava_next llava_next_video llava_onevision vipllava", None),
    _family(r"llama-?4", "llama4 llama4_text", None),
    _family(r"llama-?3\.2-\d+b-vision", "mllama mllama_text_model", None),
    _family(r"diffllama", "diffllama", None),
    _family(r"[a-z]*llama-?[123](\.\d)?|[a-z]*llama(fied|fy)?", "llama"),
    _family(r"vicuna|smollm-?2|smollm(?!-?3)|yi-(1\.5-)?\d+b|yi-coder", "llama"),
    _family(r"deepseek-(llm|math)|deepseek-coder(?!-v)|falcon-?3", "llama"),
    _family(r"smollm-?3", "smollm3", None),
    # Mistral
    _family(r"ministral-?3(?!b)", "ministral3 mistral3", None),
    _family(r"ministral", "ministral mistral"),
    _family(r"[a-z]*mistral|codestral|devstral|magistral|mathstral|zephyr-7b", "mistral mistral3"),
    _family(r"mixtral|\d+x\d+(\.\d+)?b", "mixtral"),
    # OpenAI, EleutherAI, and what has their architectures
    _family(r"gpt-?oss", "gpt_oss"),
    _family(r"(distill?)?gpt-?2(-mistral)?|dialogpt|mgpt|cerebras-gpt", "gpt2", True),
    _family(r"gpt-?neox|pythia|polyglot-ko|stablelm-(base|tuned)-(alpha|\db)|dolly-v2|^neox", "gpt_neox", True),
    _family(
        r"gpt-?neo|^neo-(small|medium|large)|tiny-?stories(-instruct|-instuct|-\d(l|layers?))*-\d+m", "gpt_neo", True
    ),
    _family(r"gpt-?j", "gptj", True),
    # Microsoft
    _family(r"phi-?4-multimodal", "phi4_multimodal", None),
    _family(r"phi-(\d\.\d|mini|tiny)-moe", "phimoe", None),
    _family(r"phi-?[34](\.\d)?", "phi3"),
    _family(r"phi-?(1([.-]5)?|2)", "phi", True),
    _family(r"phi", "phi phi3 phimoe phi4_multimodal", None),
    # others
    _family(r"^opt(?=-)|opt-?(iml-)?(max-)?\d+(\.\d+)?[bm]|galactica", "opt", True),
    _family(r"bloomz?", "bloom", None),  # its embeddings pass a LayerNorm of their own, which is not centred
    _family(r"starcoder-?2", "starcoder2", None),
    _family(r"santacoder", "gpt_bigcode gpt2", True),
    _family(r"star(coder|chat)", "gpt_bigcode", None),
    _family(r"codegen", "codegen", None),
    _family(r"olmo-hybrid", "olmo_hybrid", None),
    _family(r"olmo-?3(\.\d)?", "olmo3"),
    _family(r"olmo-?2", "olmo2"),
    _family(r"olmoe", "olmoe"),
    _family(r"olmo-[17]b(?!-1024)", "olmo", True),
    _family(r"olmo", "olmo olmo2 olmo3", None),
    _family(r"apertus", "apertus"),
    _family(r"falcon", "falcon", None),
    _family(r"mpt-\d+b", "mpt", None),
    _family(r"stable-?lm|stable-code", "stablelm", None),
    _family(r"deepseek-(coder-)?v2(\.\d)?", "deepseek_v2", None),
    _family(r"deepseek-v3\.2", "deepseek_v32", None),
    _family(r"deepseek-(v3(\.\d)?|r1)", "deepseek_v3", None),
    _family(r"granite-\d+b-code|granite-vision", "llama gpt_bigcode granite llava_next", None),
    _family(r"granite", "granite granitemoe granitemoehybrid granitemoeshared", None),
    _family(r"command-r\d*b?|aya-(23|expanse|vision)|tiny-aya", "cohere cohere2", None),
)

_WHOLE = [
    re.compile(rf"(?<![a-z0-9])(?:{family.pattern})(?:(?<=[a-z])(?![a-z])|(?<=[0-9])(?![a-z0-9]))")
    for family in FAMILIES
]


_STAGE = re.compile(r"(checkpoint|ckpt|step|epoch|final|last|latest|best|merged|model|hf|policy)?[-\d]*")
"""What folders inside a model's own folder are called."""


def families(name: str) -> list[Family]:
    """The families that a model's name names.

    Args:
        name: A short name; a hub id, whose owner does not count; or a path, of which the last part counts that is not
            ``checkpoint-500`` and the like, or the name in the hub's cache (``models--owner--name/snapshots/...``).
    """
    parts = re.sub(r"[_\s]+", "-", name.lower()).replace("\\", "/").strip("/").split("/")
    cached = [part.split("--")[-1] for part in parts if part.startswith("models--")]
    while len(parts) > 1 and _STAGE.fullmatch(parts[-1]):
        parts.pop()
    part = cached[-1] if cached else parts[-1]
    found = []
    for family, whole in zip(FAMILIES, _WHOLE, strict=True):
        part, times = whole.subn("/", part)
        if times:
            found.append(family)
    return found


def model_types(name: str) -> frozenset[str]:
    """The ``model_type`` that the configuration of a model of this name can have; none where no family is named."""
    return frozenset().union(*(family.types for family in families(name)))


def centers(name: str) -> bool | None:
    """What :attr:`Family.centers` says of a model of this name; None where nothing, or both."""
    said = {family.centers for family in families(name)}
    return said.pop() if len(said) == 1 else None
