"""Published SAE formats: parity with each publisher's formula and with SAELens, what is fetched, and damaged files."""

import functools
import json
import math
import random
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from test_sae import Bomb, encode, one_sentence, vectors
from torch import Tensor

import mechreward as mr
from conftest import LATENTS, WIDTH, assert_readings
from mechreward.errors import MechRewardError, SAEError
from mechreward.readout import HookPoint, Nonlinearity
from mechreward.sae import readers, registry
from supported_models import SUPPORTED

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
CHOSEN = [63, 0, 17, 5]


# The publishers' formulas, in float64: activations, the largest pre-activation of each token, and how far each
# pre-activation is from where its activation would jump


def relu(z):
    return z.clamp(min=0), z.abs().amax(-1, keepdim=True), torch.full_like(z, torch.inf)


def jump(z, threshold):
    fired = torch.where(z > threshold, z.clamp(min=0), 0.0)
    # Below 0 there is nothing to jump from.
    margin = torch.where(threshold > 0, (z - threshold).abs(), torch.inf)
    return fired, z.abs().amax(-1, keepdim=True), margin


def best(z, k):
    ordered = z.sort(dim=-1, descending=True).values
    kth, next_one = ordered[..., k - 1, None], ordered[..., k, None]
    return torch.where(z >= kth, z.clamp(min=0), 0.0), torch.where(z >= kth, z - next_one, kth - z)


def topk(z, k):
    activations, margin = best(z, k)
    return activations, z.abs().amax(-1, keepdim=True), margin


def groupmax(z, k):
    activations, margin = best(z.reshape(len(z), k, -1), 1)
    return activations.reshape(z.shape), z.abs().amax(-1, keepdim=True), margin.reshape(z.shape)


def gated(z, gate_bias, r_mag, mag_bias):
    gate, magnitude = z + gate_bias, z * r_mag.exp() + mag_bias
    largest = torch.maximum(gate.abs(), magnitude.abs()).amax(-1, keepdim=True)
    return torch.where(gate > 0, magnitude.clamp(min=0), 0.0), largest, gate.abs()


# The publishers' files, with random numbers


@dataclass
class Published:
    path: Path
    weights: Path
    config: Path | None
    tensors: dict[str, Tensor]
    formula: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    decode: Callable[[Tensor], Tensor]
    layer: int
    kind: str
    unused: tuple[str, ...] = ()
    beside: dict = field(default_factory=dict)  # what the file holds beside its tensors

    def rewrite(self, tensors):
        save(self.weights, self.beside | tensors)

    def reconfigure(self, change):
        config = json.loads(self.config.read_text())
        change(config)
        self.config.write_text(json.dumps(config))


def save(file, tensors):
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".npz":
        np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif file.suffix == ".safetensors":
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file)
    else:
        torch.save(tensors, file)


def save_json(file, config):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(config))
    return file


def draw(dtype, **shapes):
    """Random tensors; the names of thresholds tell that they are positive."""
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for name, shape in shapes.items():
        if name == "threshold":
            value = torch.rand(shape, generator=generator) * 2.5 + 0.25
        else:
            value = 0.3 * torch.randn(shape, generator=generator)
        if name.lower() in ("w_dec", "decoder.weight"):  # columns of quite different norms
            latents = (0, 1) if value.shape[0] > value.shape[1] else (1, 0)
            value *= (torch.rand(max(value.shape), 1, generator=generator) + 0.5).permute(latents)
        drawn[name] = value.to(dtype)
    return drawn, {name: value.double() for name, value in drawn.items()}


def gemma_scope(root, dtype=torch.float32, d=WIDTH, n=LATENTS, layer=22, at=None):
    file = root / (at or f"layer_{layer}/width_16k/average_l0_123") / "params.npz"
    tensors, w = draw(dtype, W_enc=(d, n), W_dec=(n, d), b_enc=(n,), b_dec=(d,), threshold=(n,))
    save(file, tensors)
    return Published(
        file.parent,
        file,
        None,
        tensors,
        lambda x: jump(x @ w["W_enc"] + w["b_enc"], w["threshold"]),
        lambda f: f @ w["W_dec"] + w["b_dec"],
        layer,
        "jumprelu",
    )


def gemma_scope_2(root, dtype=torch.float32, d=WIDTH, n=LATENTS, layer=24, at=None):
    file = root / (at or f"resid_post/layer_{layer}_width_16k_l0_medium") / "params.safetensors"
    tensors, w = draw(dtype, w_enc=(d, n), w_dec=(n, d), b_enc=(n,), b_dec=(d,), threshold=(n,))
    save(file, tensors)
    config = save_json(
        file.parent / "config.json",
        {
            "hf_hook_point_in": f"model.layers.{layer}.output",
            "hf_hook_point_out": f"model.layers.{layer}.output",
            "width": n,
            "model_name": "gemma-v3-12b-it",
            "architecture": "jump_relu",
            "l0": 60,
            "affine_connection": False,
            "type": "sae",
        },
    )
    return Published(
        file.parent,
        file,
        config,
        tensors,
        lambda x: jump(x @ w["w_enc"] + w["b_enc"], w["threshold"]),
        lambda f: f @ w["w_dec"] + w["b_dec"],
        layer,
        "jumprelu",
    )


def linear(d, n, bias=True, suffix=""):
    """The parameters of two torch.nn.Linear."""
    shapes = {f"encoder{suffix}.weight": (n, d), f"encoder{suffix}.bias": (n,)}
    shapes |= {f"decoder{suffix}.weight": (d, n), f"decoder{suffix}.bias": (d,)}
    return shapes if bias else {name: shape for name, shape in shapes.items() if name.endswith("weight")}


def llama_scope(
    root, dtype=torch.bfloat16, d=WIDTH, n=LATENTS, layer=15, at=None, scale=5.91907514450867, with_norm=False
):
    folder = root / (at or f"Llama3_1-8B-Base-L{layer}R-8x")
    raw_threshold = 0.52734375
    config = save_json(
        folder / "hyperparams.json",
        {
            "hook_point_in": f"blocks.{layer}.hook_resid_post",
            "hook_point_out": f"blocks.{layer}.hook_resid_post",
            "d_model": d,
            "d_sae": n,
            "expansion_factor": n // d,
            "act_fn": "jumprelu",
            "jump_relu_threshold": raw_threshold,
            "norm_activation": "dataset-wise",
            "dataset_average_activation_norm": {"in": math.sqrt(d) / scale, "out": 1.0},
            "use_decoder_bias": True,
            "apply_decoder_bias_to_pre_encoder": False,
            "sparsity_include_decoder_norm": with_norm,
            "top_k": 50,
        },
    )
    file = folder / "checkpoints" / "final.safetensors"
    tensors, w = draw(dtype, **linear(d, n))
    save(file, tensors)
    norms = w["decoder.weight"].norm(dim=0) if with_norm else torch.ones(n, dtype=torch.float64)

    def formula(x):  # in the raw scale: W x + b / s, kept above T; the published unit is s times that
        raw = (x @ w["encoder.weight"].T + w["encoder.bias"] / scale) * norms
        activations, largest, margin = jump(raw, torch.tensor(raw_threshold))
        return scale * activations, scale * largest, scale * margin

    return Published(
        folder,
        file,
        config,
        tensors,
        formula,
        lambda f: (f @ (w["decoder.weight"] / norms).T + w["decoder.bias"]) / scale,
        layer,
        "jumprelu",
    )


def llama_scope_r1(
    root, dtype=torch.float32, d=WIDTH, n=LATENTS, layer=15, at=None, scale=5.529329506982431, in_config=True,
    with_norm=False,
):  # fmt: skip
    folder = root / (at or f"800M-Slimpajama-0-OpenR1-Math-220k/L{layer}R")
    config = {"sae_type": "sae", "hook_point_in": f"blocks.{layer}.hook_resid_post", "d_model": d}
    config |= {"expansion_factor": n // d, "act_fn": "jumprelu", "norm_activation": "dataset-wise"}
    if with_norm:
        config["sparsity_include_decoder_norm"] = True
    if in_config:
        config["dataset_average_activation_norm"] = {"in": math.sqrt(d) / scale}
    config = save_json(folder / "config.json", config)
    file = folder / "sae_weights.safetensors"
    tensors, w = draw(dtype, **linear(d, n), log_jumprelu_threshold=(n,))
    save(file, tensors)
    norms = w["decoder.weight"].norm(dim=0) if with_norm else 1.0
    return Published(
        folder,
        file,
        config,
        tensors,
        lambda x: jump(
            ((scale * x) @ w["encoder.weight"].T + w["encoder.bias"]) * norms,
            w["log_jumprelu_threshold"].exp().float().double(),
        ),
        lambda f: (f / norms @ w["decoder.weight"].T + w["decoder.bias"]) / scale,
        layer,
        "jumprelu",
    )


def goodfire(root, dtype=torch.float32, d=WIDTH, n=LATENTS, layer=19, at=None, suffix="_linear"):
    file = root / (at or f"Llama-3.1-8B-Instruct-SAE-l{layer}.pth")
    tensors, w = draw(dtype, **linear(d, n, suffix=suffix))
    save(file, tensors)
    return Published(
        file,
        file,
        None,
        tensors,
        lambda x: relu(x @ w[f"encoder{suffix}.weight"].T + w[f"encoder{suffix}.bias"]),
        lambda f: f @ w[f"decoder{suffix}.weight"].T + w[f"decoder{suffix}.bias"],
        layer,
        "relu",
    )


qresearch = functools.partial(goodfire, suffix="")


def qwen_scope(root, dtype=torch.float32, d=WIDTH, n=LATENTS, layer=7, at=None, k=50):
    file = root / (at or f"SAE-Res-Qwen3-8B-Base-W64K-L0_{k}/layer{layer}.sae.pt")
    tensors, w = draw(dtype, W_enc=(n, d), W_dec=(d, n), b_enc=(n,), b_dec=(d,))
    save(file, tensors)
    return Published(
        file,
        file,
        None,
        tensors,
        lambda x: topk(x @ w["W_enc"].T + w["b_enc"], k),
        lambda f: f @ w["W_dec"].T + w["b_dec"],
        layer,
        "topk",
    )


def dictionary_learning(
    root, dtype=torch.float32, d=WIDTH, n=LATENTS, layer=15, at=None, name="BatchTopKSAE", threshold=1.25, unit=False
):
    folder = root / (at or f"resid_post_layer_{layer}/trainer_1")
    k, norms = 8, 1.0
    trainer = {"dict_class": name, "activation_dim": d, "dict_size": n, "k": k, "layer": layer, "seed": 0}
    trainer |= {"lm_name": "Qwen/Qwen2.5-7B-Instruct", "submodule_name": f"resid_post_layer_{layer}"}
    config = save_json(folder / "config.json", {"trainer": trainer, "buffer": {"ctx_len": 1024, "d_submodule": d}})
    buffers = {"k": torch.tensor(k, dtype=torch.int32), "threshold": torch.tensor(threshold)}
    two_layers = linear(d, n, bias=False) | {"encoder.bias": (n,)}
    matrices = {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,)}
    unused = ("k",)
    if name == "AutoEncoder":
        tensors, w = draw(dtype, **two_layers, bias=(d,))
        if unit:
            tensors["decoder.weight"] = tensors["decoder.weight"] / tensors["decoder.weight"].norm(dim=0)
            w["decoder.weight"] = tensors["decoder.weight"].double()
        b_dec, kind, unused, encode = w["bias"], "relu", (), relu
        norms = w["decoder.weight"].norm(dim=0)  # from_pretrained moves them from the decoder into the encoder
    elif name == "AutoEncoderTopK":
        tensors, w = draw(dtype, **two_layers, b_dec=(d,))
        tensors, b_dec, kind, unused = buffers | tensors, w["b_dec"], "topk", ("k", "threshold")
        encode = functools.partial(topk, k=k)
    elif name == "BatchTopKSAE":
        tensors, w = draw(dtype, **two_layers, b_dec=(d,))
        tensors, b_dec, kind = buffers | tensors, w["b_dec"], "jumprelu"
        encode = functools.partial(jump, threshold=buffers["threshold"])
    elif name == "MatryoshkaBatchTopKSAE":
        tensors, w = draw(dtype, **matrices)
        tensors |= buffers | {"group_sizes": torch.tensor([n // 4, n - n // 4])}
        b_dec, kind, unused = w["b_dec"], "jumprelu", ("k", "group_sizes")
        encode = functools.partial(jump, threshold=buffers["threshold"])
    elif name == "JumpReluAutoEncoder":
        tensors, w = draw(dtype, **matrices, threshold=(n,))
        b_dec, kind, unused = torch.zeros(d), "jumprelu", ()  # the one class that does not subtract it
        encode = functools.partial(jump, threshold=w["threshold"])
    else:
        tensors, w = draw(
            dtype, **linear(d, n, bias=False), decoder_bias=(d,), r_mag=(n,), gate_bias=(n,), mag_bias=(n,)
        )
        b_dec, kind, unused = w["decoder_bias"], "gated", ()
        encode = functools.partial(gated, gate_bias=w["gate_bias"], r_mag=w["r_mag"], mag_bias=w["mag_bias"])
    save(folder / "ae.pt", tensors)
    w_enc = w["W_enc"] if "W_enc" in w else w["encoder.weight"].T
    w_dec = w["W_dec"] if "W_dec" in w else w["decoder.weight"].T
    b_enc = w.get("b_enc", w.get("encoder.bias", 0.0))
    added = w.get("b_dec", b_dec)
    return Published(
        folder,
        folder / "ae.pt",
        config,
        tensors,
        lambda x: encode(((x - b_dec) @ w_enc + b_enc) * norms),
        lambda f: (f / norms) @ w_dec + added,
        layer,
        kind,
        unused,
    )


def sparsify(root, dtype=torch.float32, d=WIDTH, n=LATENTS, layer=24, at=None, activation="topk", k=8, **config):
    folder = root / (at or f"layers.{layer}")
    defaults = {"expansion_factor": n // d, "normalize_decoder": True, "num_latents": 0, "k": k, "d_in": d}
    defaults |= {"activation": activation, "signed": False, "transcode": False, "skip_connection": False}
    config = {name: value for name, value in (defaults | config).items() if value != "absent"}
    config = save_json(folder / "cfg.json", config)
    tensors, w = draw(dtype, **{"encoder.weight": (n, d), "encoder.bias": (n,), "W_dec": (n, d), "b_dec": (d,)})
    save(folder / "sae.safetensors", tensors)
    select = topk if activation == "topk" else groupmax
    return Published(
        folder,
        folder / "sae.safetensors",
        config,
        tensors,
        lambda x: select((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], k),
        lambda f: f @ w["W_dec"] + w["b_dec"],
        layer,
        activation,
    )


def topk_checkpoint(root, dtype=torch.float32, d=WIDTH, n=LATENTS, layer=18, at=None, k=8):
    file = root / (at or f"Qwen3.5-4B-SAE-L{layer}-topk/sae_final.pt")
    tensors, w = draw(dtype, W_enc=(d, n), W_dec=(n, d), b_enc=(n,), b_dec=(d,))
    beside = {"d_model": d, "d_sae": n, "k": k, "step": 48828}
    save(file, beside | tensors)
    return Published(
        file,
        file,
        None,
        tensors,
        lambda x: topk((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], k),
        lambda f: f @ w["W_dec"] + w["b_dec"],
        layer,
        "topk",
        beside=beside,
    )


def saelens(root, dtype=torch.float32, d=WIDTH, n=LATENTS, layer=12, at=None):
    """SAELens' own format; its other kinds and normalisations are in test_sae.py."""
    folder = root / (at or f"blocks.{layer}.hook_resid_post")
    metadata = {
        "hook_name": f"blocks.{layer}.hook_resid_post",
        "model_name": "gemma-2-2b",
        "sae_lens_version": "6.54.12",
    }
    config = {"architecture": "jumprelu", "d_in": d, "d_sae": n, "dtype": "float32", "apply_b_dec_to_input": True}
    config |= {"normalize_activations": "none", "reshape_activations": "none", "metadata": metadata}
    config = save_json(folder / "cfg.json", config)
    file = folder / "sae_weights.safetensors"
    tensors, w = draw(dtype, W_enc=(d, n), W_dec=(n, d), b_enc=(n,), b_dec=(d,), threshold=(n,))
    save(file, tensors)
    return Published(
        folder,
        file,
        config,
        tensors,
        lambda x: jump((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], w["threshold"]),
        lambda f: f @ w["W_dec"] + w["b_dec"],
        layer,
        "jumprelu",
    )


CLASSES = [
    "AutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
    "GatedAutoEncoder",
]
FORMATS = {
    "gemma_scope": gemma_scope,
    "gemma_scope_2": gemma_scope_2,
    "llama_scope": llama_scope,
    "llama_scope_with_norm": functools.partial(llama_scope, with_norm=True),
    "llama_scope_r1": llama_scope_r1,
    "llama_scope_r1_with_norm": functools.partial(llama_scope_r1, with_norm=True),
    "goodfire_pth": goodfire,
    "goodfire_pt": functools.partial(goodfire, at="Llama-3.3-70B-Instruct-SAE-l50.pt", layer=50),
    "qresearch": functools.partial(qresearch, at="DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"),
    "qwen_scope": qwen_scope,
    **{f"dictionary_learning_{name}": functools.partial(dictionary_learning, name=name) for name in CLASSES},
    "sparsify_topk": sparsify,
    "sparsify_groupmax": functools.partial(sparsify, activation="groupmax"),
    "topk_checkpoint": topk_checkpoint,
    "saelens": saelens,
}
every_format = pytest.mark.parametrize("write", FORMATS.values(), ids=list(FORMATS))


def assert_formula(got, published, x, ids=range(LATENTS), fires=(0.02, 0.98)):
    """Equal, to 1e-5 of a token's largest pre-activation: only what is that close to a jump may flip.

    Returns:
        How many values flipped, how many were so close that they might, and how many were compared.
    """
    expected, largest, margin = published.formula(x.double())
    tolerance = 1e-5 * torch.maximum(expected.abs(), largest)
    assert fires[0] < (expected > 0).double().mean() < fires[1]
    ids = list(ids)
    assert got.dtype == torch.float32 and got.shape == (len(x), len(ids))
    off = (got.double() - expected[:, ids]).abs() / tolerance[:, ids]
    close = (margin <= tolerance)[:, ids]
    assert close.sum() <= 0.001 * close.numel()
    worst = off[~close].max()
    assert worst <= 1, f"off by {worst:.3g} x the tolerance"
    return int((off > 1).sum()), int(close.sum()), close.numel()


# Parity


IN_NUMPY = (torch.float32, torch.float16)


@pytest.mark.parametrize(
    ("write", "dtype"),
    [
        pytest.param(write, dtype, id=f"{name}-{dtype}")
        for name, write in FORMATS.items()
        for dtype in (IN_NUMPY if write is gemma_scope else DTYPES)
    ],
)
def test_all_and_chosen_latents_equal_the_publishers_formula(tmp_path, write, dtype):
    published, x = write(tmp_path, dtype), vectors()
    handle = mr.load_sae(path=published.path)
    assert (handle.d_model, handle.d_sae, handle.kind) == (WIDTH, LATENTS, published.kind)
    assert handle.hook_point == HookPoint(published.layer, "resid_post")
    flipped, close, _ = assert_formula(encode(handle, range(LATENTS), x), published, x)
    assert flipped <= close
    assert_formula(encode(handle, CHOSEN, x), published, x, CHOSEN)
    activations = published.formula(x.double())[0]
    expected = published.decode(activations)
    difference = (handle.decode(activations.float(), x).double() - expected).abs()
    assert (difference <= 1e-5 * expected.abs().amax(-1, keepdim=True)).all()


@every_format
def test_flips_are_counted_and_bfloat16_would_flip_many(tmp_path, write):
    """Why readings are computed in float32 whatever the model's type."""
    published, x = write(tmp_path, torch.float32), vectors(2000)
    handle = mr.load_sae(path=published.path)
    flipped, close, compared = assert_formula(encode(handle, range(LATENTS), x), published, x)
    assert flipped <= close < 1e-3 * compared
    exact, _, margin = published.formula(x.double())
    if published.kind == "relu":
        return  # continuous: nothing flips
    encoder = handle.read_encoder(None)
    weight, transformed = encoder.weight.bfloat16(), handle.transform(x).bfloat16()
    rough = encoder.nonlinearity((transformed @ weight).float() + encoder.bias)
    jumped = ((rough > 0) != (exact > 0)) & margin.isfinite()
    assert jumped.sum() > 10 * max(1, close)


JUMPING = [
    gemma_scope,
    gemma_scope_2,
    functools.partial(llama_scope, dtype=torch.float32, scale=1.0),
    functools.partial(dictionary_learning, name="BatchTopKSAE"),
    functools.partial(dictionary_learning, name="MatryoshkaBatchTopKSAE"),
    functools.partial(dictionary_learning, name="JumpReluAutoEncoder"),
    saelens,
]


@pytest.mark.parametrize("write", JUMPING)
def test_a_value_at_its_threshold_does_not_fire(tmp_path, write):
    """Strictly above, in every format: with one weight of 1 and no bias, z is x to the last bit."""
    published = write(tmp_path)
    at = torch.tensor(0.52734375 if published.config and "hyperparams" in published.config.name else 1.25)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in published.tensors.items()}
    for name, tensor in tensors.items():
        if name.lower() in ("w_enc", "encoder.weight"):
            tensor.view(-1)[0] = 1.0
        elif name == "threshold":
            tensor.fill_(at)
    published.rewrite(published.tensors | tensors)
    x = torch.zeros(3, WIDTH)
    x[:, 0] = torch.stack([at, torch.nextafter(at, torch.tensor(9.0)), torch.nextafter(at, torch.tensor(0.0))])
    assert encode(mr.load_sae(path=published.path), [0], x).flatten().tolist() == [0, x[1, 0].item(), 0]


def test_the_standard_class_of_dictionary_learning_has_its_decoders_norms_in_the_encoder(tmp_path):
    """As its from_pretrained does; SAELens leaves them where they are."""
    published, x = dictionary_learning(tmp_path, name="AutoEncoder"), vectors()
    t = published.tensors
    norms = t["decoder.weight"].norm(dim=0)
    assert norms.max() / norms.min() > 1.5
    plain = ((x - t["bias"]) @ t["encoder.weight"].T + t["encoder.bias"]).relu()
    got = encode(mr.load_sae(path=published.path), range(LATENTS), x)
    torch.testing.assert_close(got, plain * norms, atol=1e-5, rtol=1e-5)


@every_format
def test_chosen_columns_are_those_of_the_whole_encoder(tmp_path, write):
    handle = mr.load_sae(path=write(tmp_path).path)
    whole, few = handle.read_encoder(None), handle.read_encoder(CHOSEN)
    assert whole.weight.shape == (WIDTH, LATENTS) and few.weight.shape == (WIDTH, 4)
    assert few.weight.equal(whole.weight[:, CHOSEN]) and few.bias.equal(whole.bias[CHOSEN])
    assert few.nonlinearity.parameters.keys() == whole.nonlinearity.parameters.keys()
    for name, parameter in whole.nonlinearity.parameters.items():
        assert parameter.shape == (LATENTS,) and few.nonlinearity.parameters[name].equal(parameter[CHOSEN])


@every_format
def test_only_chosen_columns_are_kept_unless_all_compete(tmp_path, write):
    handle = mr.load_sae(path=write(tmp_path).path)
    readout = handle.features([4, 2])
    assert readout.weight.shape == (WIDTH, LATENTS if handle.kind in ("topk", "groupmax") else 2)
    assert readout.width == 2


@pytest.mark.parametrize("name", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"])
def test_one_threshold_and_one_for_each_latent(tmp_path, name):
    published, x = dictionary_learning(tmp_path, name=name), vectors()

    def with_threshold(threshold):
        published.rewrite(published.tensors | {"threshold": threshold})
        handle = mr.load_sae(path=published.path)
        few = handle.read_encoder(CHOSEN).nonlinearity.parameters["threshold"]
        assert few.equal(threshold.expand(LATENTS)[CHOSEN])
        return encode(handle, range(LATENTS), x)

    positive = with_threshold(torch.tensor(0.0))
    for threshold in (torch.tensor(0.75), torch.linspace(0.1, 3, LATENTS)):
        assert with_threshold(threshold).equal(torch.where(positive > threshold, positive, 0.0))


def test_a_threshold_that_was_never_trained_keeps_every_positive_value(tmp_path):
    """dictionary_learning starts it at -1."""
    published, x = dictionary_learning(tmp_path, threshold=-1.0), vectors()
    assert_formula(encode(mr.load_sae(path=published.path), range(LATENTS), x), published, x)


@pytest.mark.parametrize("num_latents", [0, LATENTS, "absent"])
@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_sparsify_with_and_without_its_number_of_latents(tmp_path, num_latents, activation):
    published, x = sparsify(tmp_path, activation=activation, num_latents=num_latents), vectors()
    assert_formula(encode(mr.load_sae(path=published.path), range(LATENTS), x), published, x)


def test_sparsify_of_before_there_was_groupmax(tmp_path):
    old = dict.fromkeys(("signed", "transcode", "skip_connection", "num_latents"), "absent")
    published, x = sparsify(tmp_path, **old), vectors()
    published.reconfigure(lambda config: config.pop("activation"))
    assert_formula(encode(mr.load_sae(path=published.path), range(LATENTS), x), published, x)


def test_groupmax_keeps_one_of_each_group_of_neighbours():
    z = torch.tensor([[1.0, 3.0, 2.0, -1.0, -5.0, -2.0], [0.0, 0.0, 0.0, 7.0, 8.0, 9.0]])
    kept = Nonlinearity("groupmax", {}, 2)(z)
    assert kept.tolist() == [[0, 3, 0, 0, 0, 0], [0, 0, 0, 0, 0, 9]]  # -1 is the largest of its group: max(z, 0)
    assert Nonlinearity("groupmax", {}, 6)(z).equal(z.relu())
    assert Nonlinearity("groupmax", {}, 1)(z).tolist() == [[0, 3, 0, 0, 0, 0], [0, 0, 0, 0, 0, 9]]
    assert not Nonlinearity("groupmax", {}, 2).sliceable


# The registry, and SAELens


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub, served from a folder; what was asked for."""
    asked = []

    def fetch(repo_id, filename, *, subfolder=None, revision=None, **_):
        name = f"{subfolder}/{filename}" if subfolder else filename
        asked.append((repo_id, name, revision))
        if not (tmp_path / repo_id / name).exists():
            raise FileNotFoundError(name)
        return str(tmp_path / repo_id / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    return tmp_path, asked, fetch


LLAMA_SCOPE_FILES = ("hyperparams.json", "checkpoints/final.safetensors")
RELEASES = {
    # release, id: repository, writer, layer, place in it, files there, model
    ("gemma-scope-9b-pt-res-canonical", "layer_22/width_16k/canonical"): (
        "google/gemma-scope-9b-pt-res",
        gemma_scope,
        22,
        "layer_22/width_16k/average_l0_123",
        ("params.npz",),
        "gemma-2-9b",
    ),
    ("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical"): (
        "google/gemma-scope-2b-pt-res",
        gemma_scope,
        20,
        "layer_20/width_16k/average_l0_71",
        ("params.npz",),
        "gemma-2-2b",
    ),
    ("gemma-scope-27b-pt-res-canonical", "layer_22/width_131k/canonical"): (
        "google/gemma-scope-27b-pt-res",
        gemma_scope,
        22,
        "layer_22/width_131k/average_l0_82",
        ("params.npz",),
        "gemma-2-27b",
    ),
    ("gemma-scope-2-12b-it-res", "layer_24_width_16k_l0_medium"): (
        "google/gemma-scope-2-12b-it",
        gemma_scope_2,
        24,
        "resid_post/layer_24_width_16k_l0_medium",
        ("params.safetensors",),
        "google/gemma-3-12b-it",
    ),
    ("gemma-scope-2-12b-it-res-all", "layer_5_width_16k_l0_big"): (
        "google/gemma-scope-2-12b-it",
        gemma_scope_2,
        5,
        "resid_post_all/layer_5_width_16k_l0_big",
        ("params.safetensors",),
        "google/gemma-3-12b-it",
    ),
    ("llama_scope_lxr_8x", "l15r_8x"): (
        "fnlp/Llama3_1-8B-Base-LXR-8x",
        llama_scope,
        15,
        "Llama3_1-8B-Base-L15R-8x",
        LLAMA_SCOPE_FILES,
        "meta-llama/Llama-3.1-8B",
    ),
    ("llama_scope_lxr_32x", "l20r_32x"): (
        "fnlp/Llama3_1-8B-Base-LXR-32x",
        functools.partial(llama_scope, scale=3.4133333333333336),
        20,
        "Llama3_1-8B-Base-L20R-32x",
        LLAMA_SCOPE_FILES,
        "meta-llama/Llama-3.1-8B",
    ),
    # The scale is SAELens' registry's.
    ("llama_scope_r1_distill", "l15r_800m_slimpajama"): (
        "fnlp/Llama-Scope-R1-Distill",
        functools.partial(llama_scope_r1, in_config=False),
        15,
        "800M-Slimpajama-0-OpenR1-Math-220k/L15R",
        ("config.json", "sae_weights.safetensors"),
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    ),
    ("goodfire-llama-3.1-8b-instruct", "layer_19"): (
        "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
        goodfire,
        19,
        "Llama-3.1-8B-Instruct-SAE-l19.pth",
        (),
        "meta-llama/Llama-3.1-8B-Instruct",
    ),
    ("goodfire-llama-3.3-70b-instruct", "layer_50"): (
        "Goodfire/Llama-3.3-70B-Instruct-SAE-l50",
        goodfire,
        50,
        "Llama-3.3-70B-Instruct-SAE-l50.pt",
        (),
        "meta-llama/Llama-3.3-70B-Instruct",
    ),
    ("deepseek-r1-distill-llama-8b-qresearch", "blocks.19.hook_resid_post"): (
        "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19",
        qresearch,
        19,
        "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt",
        (),
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    ),
    ("qwen-scope-3-8b-base-w64k-l50", "layer0"): (
        "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50",
        qwen_scope,
        0,
        "layer0.sae.pt",
        (),
        "Qwen/Qwen3-8B-Base",
    ),
    ("llama-3.1-8b-instruct-andyrdt", "resid_post_layer_15_trainer_1"): (
        "andyrdt/saes-llama-3.1-8b-instruct",
        dictionary_learning,
        15,
        "resid_post_layer_15/trainer_1",
        ("config.json", "ae.pt"),
        "meta-llama/Llama-3.1-8B-Instruct",
    ),
    **{
        ("qwen2.5-7b-instruct-andyrdt", f"resid_post_layer_{layer}_trainer_1"): (
            "andyrdt/saes-qwen2.5-7b-instruct",
            functools.partial(dictionary_learning, name=name, unit=True),  # SAELens leaves the norms out
            layer,
            f"resid_post_layer_{layer}/trainer_1",
            ("config.json", "ae.pt"),
            "Qwen/Qwen2.5-7B-Instruct",
        )
        for name, layer in zip(CLASSES, (3, 7, 11, 15, 19, 23), strict=True)  # one class for each id
    },
}


def saelens_reads(monkeypatch, fetch, release, sae_id):
    """SAELens' own reading, except that it does not insist on the sizes of the real models."""
    import sae_lens
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def shapes(repo_id, filename):
        with readers.safe_open(fetch(repo_id, filename), framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118

    monkeypatch.setattr(loaders, "hf_hub_download", fetch)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    load = loaders.NAMED_PRETRAINED_SAE_LOADERS[loaders.get_conversion_loader_name(release)]

    def smaller(cfg_overrides, **where):
        return load(cfg_overrides=cfg_overrides | {"d_in": WIDTH, "d_sae": LATENTS}, **where)

    return sae_lens.SAE.from_pretrained(release, sae_id, converter=smaller)


@pytest.mark.parametrize(
    "release, sae_id, repo, write, layer, at, files, model",
    [(*named, *rest) for named, rest in RELEASES.items()],
    ids=["-".join(named).replace("/", "-") for named in RELEASES],
)
def test_releases_are_fetched_and_read_as_saelens_does(
    hub, monkeypatch, release, sae_id, repo, write, layer, at, files, model
):
    root, asked, fetch = hub
    published, x = write(root / repo, torch.float32, layer=layer, at=at), vectors()
    handle = mr.load_sae(release=release, sae_id=sae_id, revision="a-commit")
    wanted = [f"{at}/{file}" for file in files] or [at]
    assert sorted(asked) == sorted((repo, file, "a-commit") for file in wanted)
    assert (handle.hook_point, handle.model_name) == (HookPoint(layer), model)
    assert handle.name == f"{release}/{sae_id}"
    whole = encode(handle, range(LATENTS), x)
    assert_formula(whole, published, x)
    assert_formula(encode(handle, CHOSEN, x), published, x, CHOSEN)
    sae = saelens_reads(monkeypatch, fetch, release, sae_id)
    assert sae.cfg.metadata.hook_name == str(handle.hook_point)
    left_out, compared = assert_readings(whole, sae, x, range(LATENTS))
    assert left_out <= 0.001 * compared
    activations = sae.encode(x).detach()
    torch.testing.assert_close(handle.decode(activations, x), sae.decode(activations).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "release, sae_id, write, at",
    [
        ("llama_scope_lxr_8x", "l15r_8x", llama_scope, "fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L15R-8x"),
        (
            "llama_scope_r1_distill",
            "l15r_800m_slimpajama",
            llama_scope_r1,
            "fnlp/Llama-Scope-R1-Distill/800M-Slimpajama-0-OpenR1-Math-220k/L15R",
        ),
    ],
)
def test_saelens_leaves_the_decoders_norms_out_of_llama_scope(hub, monkeypatch, release, sae_id, write, at):
    """If this fails, SAELens has changed: the README's table says how its reading differs."""
    root, _, fetch = hub
    published, x = write(root, torch.float32, layer=15, at=at, with_norm=True), vectors()
    ours = encode(mr.load_sae(release=release, sae_id=sae_id), range(LATENTS), x)
    assert_formula(ours, published, x)
    theirs = saelens_reads(monkeypatch, fetch, release, sae_id).encode(x)
    assert ((ours > 0) != (theirs > 0)).float().mean() > 0.01


@pytest.mark.parametrize(
    "release, sae_id, part",
    [
        ("gemma-scope-2b-pt-mlp-canonical", "layer_0/width_16k/canonical", "residual stream"),
        ("gemma-scope-9b-pt-att-canonical", "layer_0/width_16k/canonical", "residual stream"),
        ("gemma-scope-9b-pt-res", "embedding/width_4k/average_l0_14", "residual stream"),
        ("gemma-scope-2-12b-it-mlp-all", "layer_0_width_16k_l0_big", "residual stream"),
        ("gemma-scope-2-12b-it-att-all", "layer_0_width_16k_l0_big", "residual stream"),
        ("gemma-scope-2-12b-it-transcoders-all", "layer_0_width_16k_l0_big", "residual stream"),
        ("gemma-scope-2b-pt-transcoders", "layer_0/width_16k/average_l0_76", "gemma_2_transcoder"),
        ("mwhanna-qwen3-8b-transcoders", "layer_0", "mwhanna_transcoder"),
        ("mntss-gemma-2-2b-2.5m-clt-as-per-layer", "layer_0", "mntss_clt_layer_transcoder"),
        ("temporal-sae-gemma-2-2b", "blocks.12.hook_resid_post", "temporal"),
        ("gpt2-small-hook-z-kk", "blocks.0.hook_z", "connor_rob_hook_z"),
    ],
)
def test_other_places_than_the_residual_stream_are_refused_before_anything_is_fetched(hub, release, sae_id, part):
    one_sentence(lambda: mr.load_sae(release=release, sae_id=sae_id), f"{release}/{sae_id}", part)
    assert hub[1] == []


@pytest.mark.parametrize(
    "release, sae_id, site", [("llama_scope_lxa_8x", "l15a_8x", "attn"), ("llama_scope_lxm_8x", "l15m_8x", "mlp")]
)
def test_llama_scope_of_attention_and_mlp_is_refused_before_its_weights_are_fetched(hub, release, sae_id, site):
    root, asked, _ = hub
    letter = sae_id[3].upper()
    config = {"hook_point_in": f"blocks.15.hook_{site}_out", "d_model": 32, "d_sae": 64, "jump_relu_threshold": 0.5}
    config["dataset_average_activation_norm"] = {"in": 1.0}
    where = f"fnlp/Llama3_1-8B-Base-LX{letter}-8x/Llama3_1-8B-Base-L15{letter}-8x"
    save_json(root / where / "hyperparams.json", config)
    one_sentence(lambda: mr.load_sae(release=release, sae_id=sae_id), "residual")
    assert not any(file.endswith(".safetensors") for _, file, _ in asked)


@pytest.mark.parametrize(
    "release, sae_id, meant",
    [
        ("llama_scope_lxr_8", "l15r_8x", "llama_scope_lxr_8x"),
        ("llama_scope_lxr_8x", "l15_8x", "l15r_8x"),
        ("qwen-scope-3-8b-base-w64k-l5", "layer0", "qwen-scope-3-8b-base-w64k-l50"),
        ("qwen-scope-3-8b-base-w64k-l50", "layer_0", "layer0"),
        ("goodfire-llama-3.1-8b-instruct", "layer_9", "layer_19"),
        ("goodfire-llama-3-70b-instruct", "layer_50", "goodfire-llama-3.3-70b-instruct"),
        ("gemma-scope-2-12b-it-res", "layer_24_width_16k_l0_med", "layer_24_width_16k_l0_medium"),
        ("llama-3.1-8b-instruct-andyrdt", "resid_post_layer_15", "resid_post_layer_15_trainer_1"),
    ],
)
def test_unknown_names_suggest_the_nearest(hub, release, sae_id, meant):
    one_sentence(lambda: mr.load_sae(release=release, sae_id=sae_id), f"Did you mean '{meant}'?")
    assert hub[1] == []


@pytest.fixture
def snapshot(monkeypatch, tmp_path):
    """``snapshot(repo)``: a repository's folder, of which only what is asked for arrives."""
    stored, arrived, asked = tmp_path / "stored", tmp_path / "arrived", []

    def fetch(repo_id, *, revision=None, allow_patterns=None, **_):
        asked.append((repo_id, revision))
        files = [str(file.relative_to(stored / repo_id)) for file in (stored / repo_id).rglob("*") if file.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            (arrived / repo_id / name).parent.mkdir(parents=True, exist_ok=True)
            (arrived / repo_id / name).write_bytes((stored / repo_id / name).read_bytes())
        return str(arrived / repo_id)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    return lambda repo: stored / repo, arrived, asked


def test_a_repository_that_saelens_does_not_list(snapshot):
    stored, arrived, asked = snapshot
    repo = "EleutherAI/sae-llama-3-8b-32x"
    for layer in (2, 23, 25):
        sparsify(stored(repo), layer=layer)
    published, x = sparsify(stored(repo), layer=24), vectors()
    handle = mr.load_sae(release=repo, sae_id="layers.24", revision="main")
    assert asked == [(repo, "main")] and handle.hook_point == HookPoint(24)
    assert [folder.name for folder in (arrived / repo).iterdir()] == ["layers.24"]
    assert_formula(encode(handle, range(LATENTS), x), published, x)
    one_sentence(lambda: mr.load_sae(release=repo, sae_id="layers.99"), "layers.99")


def test_a_file_of_a_repository_that_saelens_does_not_list(snapshot):
    stored, _, _ = snapshot
    repo = "somebody/SAE-Res-Qwen3-8B-Base-W64K-L0_50"
    published, x = qwen_scope(stored(repo), layer=3, at="layer3.sae.pt"), vectors()
    handle = mr.load_sae(release=repo, sae_id="layer3.sae.pt")
    assert_formula(encode(handle, range(LATENTS), x), published, x)


def test_a_repository_needs_no_saelens_and_gives_the_sae_its_name(snapshot, monkeypatch):
    stored, _, _ = snapshot
    monkeypatch.setattr(registry, "saelens_directory", lambda: pytest.fail("SAELens' list was read"))
    repo = "caiovicentino1/Qwen3.5-4B-SAE-L18-topk"
    published, x = topk_checkpoint(stored(repo), at="sae_final.pt"), vectors()
    handle = mr.load_sae(release=repo, sae_id="sae_final.pt")
    assert (handle.name, handle.hook_point) == (f"{repo}/sae_final.pt", HookPoint(18))
    assert_formula(encode(handle, CHOSEN, x), published, x, CHOSEN)


def test_a_topk_checkpoints_json_says_its_layer_and_its_model(tmp_path):
    published = topk_checkpoint(tmp_path, at="somewhere/sae_final.pt")
    one_sentence(lambda: mr.load_sae(path=published.path), "layer")
    save_json(published.path.with_suffix(".json"), {"layer": 18, "model": "Qwen/Qwen3.5-4B", "k": 128})
    handle = mr.load_sae(path=published.path)
    assert (handle.hook_point, handle.model_name) == (HookPoint(18), "Qwen/Qwen3.5-4B")


@pytest.mark.parametrize("k", [None, "8", 8.0, True, torch.tensor([8, 8]), 0, -1, LATENTS + 1])
def test_a_topk_checkpoint_with_an_impossible_k(tmp_path, k):
    published = topk_checkpoint(tmp_path)
    save(published.path, published.tensors | ({} if k is None else {"k": k}))
    assert isinstance(one_sentence(lambda: mr.load_sae(path=published.path), published.path, "k"), SAEError)


@pytest.mark.parametrize("kind", ["mlp", "att", "transcoders"])
def test_gemma_scope_by_its_repository_is_refused_where_its_release_is(snapshot, kind):
    """The files of all its repositories look alike: only the repository's name tells what they read."""
    stored, _, _ = snapshot
    repo = f"google/gemma-scope-2b-pt-{kind}"
    gemma_scope(stored(repo), layer=0, at="layer_0/width_16k/average_l0_119")
    one_sentence(lambda: mr.load_sae(release=repo, sae_id="layer_0/width_16k/average_l0_119"), "residual")


# Where it reads


@pytest.mark.parametrize(
    "write, cache",
    [
        (gemma_scope, "layer_3_study"),
        (gemma_scope_2, "layer_3_study"),
        (goodfire, "l2/cache"),
        (functools.partial(qwen_scope, k=8), "SAE-Res-Qwen3-8B-Base-W64K-L0_50"),
        (sparsify, "layers.3"),
    ],
)
def test_the_layer_is_the_one_nearest_to_the_file(tmp_path, write, cache):
    """Wherever the files are kept: a path may name other layers, or another k, further up."""
    published, x = write(tmp_path / cache), vectors()
    if write is gemma_scope_2:
        published.config.unlink()
    handle = mr.load_sae(path=published.path)
    assert handle.hook_point == HookPoint(published.layer)
    assert_formula(encode(handle, range(LATENTS), x), published, x)


def test_places_that_are_not_the_residual_stream(tmp_path):
    def refused(published, *parts):
        error = one_sentence(lambda: mr.load_sae(path=published.path), *parts)
        assert "residual" in str(error)

    for site in ("mlp_out", "attn_out"):
        for write in (llama_scope, llama_scope_r1):
            published = write(tmp_path)
            published.reconfigure(lambda c, site=site: c.update(hook_point_in=f"blocks.15.hook_{site}"))
            refused(published, f"hook_{site}")
    for site in ("mlp_layer_15", "attention_layer_15"):
        published = dictionary_learning(tmp_path)
        published.reconfigure(lambda c, site=site: c["trainer"].update(submodule_name=site))
        refused(published, site)
    for site in ("layers.24.mlp", "layers.24.self_attn", "embed_tokens"):
        refused(sparsify(tmp_path, at=site), site)
    for site in ("model.layers.24.post_feedforward_layernorm.output", "model.layers.24.self_attn.o_proj.input"):
        published = gemma_scope_2(tmp_path)
        published.reconfigure(lambda c, site=site: c.update(hf_hook_point_in=site))
        refused(published, site)


@pytest.mark.parametrize("site", ["mlp_out", "attn_out", "transcoder", "mlp_out_all", "transcoder_all"])
def test_gemma_scope_2_without_its_configuration_still_tells_by_its_folder(tmp_path, site):
    """SAELens' registry, and ours, fetch no config.json."""
    published = gemma_scope_2(tmp_path, at=f"{site}/layer_24_width_16k_l0_medium")
    published.config.unlink()
    one_sentence(lambda: mr.load_sae(path=published.path), "residual")


@pytest.mark.parametrize(
    "write, at, part",
    [
        (gemma_scope, "somewhere", "layer"),
        (goodfire, "sae.pth", "layer"),
        (qwen_scope, "layer3.sae.pt", "k"),
        (qwen_scope, "SAE-Res-L0_50/three.sae.pt", "layer"),
        (sparsify, "somewhere", "layer"),
    ],
)
def test_a_path_that_does_not_say_its_layer_or_k(tmp_path, write, at, part):
    published = write(tmp_path, at=at)
    assert isinstance(one_sentence(lambda: mr.load_sae(path=published.path), part), SAEError)


# Bad input


def attempts(path):
    """What all uses of an SAE are refused with: nothing but our own errors may come out."""
    refused = []

    def attempt(call, shape=None):
        try:
            got = call()
        except MechRewardError as error:
            text = str(error)
            assert "\n" not in text and len(text) < 500 and text.endswith("."), text
            refused.append(text)
        else:
            assert shape is None or (got.shape == shape and got.dtype == torch.float32)
            return got

    handle = attempt(lambda: mr.load_sae(path=path))
    if handle is not None:
        d, n = handle.d_model, handle.d_sae
        x = vectors(20, d)
        attempt(lambda: encode(handle, range(n), x), (20, n))
        attempt(lambda: encode(handle, [n - 1, 0], x), (20, 2))
        attempt(lambda: handle.decode(torch.ones(20, n), x), (20, d))
    return refused


def damage(raw, chance):
    raw = bytearray(raw)
    how = chance.random()
    if how < 0.2:
        return raw[: chance.randrange(len(raw))]
    # Headers are at the beginning of some files, and at the end of others.
    start, stop = chance.choice([(0, 700), (len(raw) - 1200, len(raw)), (0, len(raw))])
    place = chance.randrange(max(0, start), min(stop, len(raw)))
    if how < 0.8:
        raw[place] ^= 1 << chance.randrange(8)
    else:
        raw[place : place + 16] = bytes(len(raw[place : place + 16]))
    return raw


@every_format
def test_damaged_files_are_refused_or_read_in_the_right_shape(tmp_path, write):
    published = write(tmp_path, torch.float32, d=8)
    assert attempts(published.path) == []
    chance = random.Random(0)
    refused = 0
    for file, rounds in ((published.weights, 40), (published.config, 20)):
        whole = file.read_bytes() if file else b""
        for _ in range(rounds if file else 0):
            file.write_bytes(damage(whole, chance))
            refused += bool(attempts(published.path))
        if file:
            file.write_bytes(whole)
    assert refused >= 8  # every cut at least


@every_format
def test_missing_tensors(tmp_path, write):
    published = write(tmp_path)
    for name in published.tensors:
        published.rewrite({other: tensor for other, tensor in published.tensors.items() if other != name})
        refused = attempts(published.path)
        if name in published.unused:
            assert not refused
        else:
            # The two spellings of Goodfire and Qresearch are told apart by the encoder.
            assert any(name in text or name.split("_")[0] in text for text in refused), (name, refused)


SHAPES = {
    "shorter": lambda t: t[:-1],
    "longer": lambda t: torch.cat([t, t[:1]]),
    "narrower": lambda t: t[..., :-1],
    "transposed": lambda t: t.T if t.ndim == 2 else t[None],
    "flat": lambda t: t.flatten() if t.ndim == 2 else t[:, None],
    "one number": lambda t: t.flatten()[0],
    "empty": lambda t: t[:0],
    "deeper": lambda t: t[None],
}


@pytest.mark.parametrize("change", SHAPES.values(), ids=list(SHAPES))
@every_format
def test_shapes_that_disagree(tmp_path, write, change):
    published = write(tmp_path)
    for name, tensor in published.tensors.items():
        changed = change(tensor) if tensor.ndim else tensor[None].expand(7)
        if name in published.unused or (
            name == "threshold" and changed.ndim == 0 and "ae.pt" in str(published.weights)
        ):
            continue  # one threshold for all is dictionary_learning's custom
        published.rewrite(published.tensors | {name: changed.clone()})
        assert attempts(published.path), f"{name} of shape {tuple(changed.shape)}"


@every_format
def test_whole_numbers_are_not_taken_for_weights(tmp_path, write):
    published = write(tmp_path, torch.float32)
    for name, tensor in published.tensors.items():
        if name not in published.unused:
            published.rewrite(published.tensors | {name: (tensor * 100).to(torch.int8)})
            refused = attempts(published.path)
            assert any("int8" in text for text in refused), name


@every_format
def test_nan_in_the_weights(tmp_path, write):
    published = write(tmp_path, torch.float32)
    for name, tensor in published.tensors.items():
        if name in published.unused or "dec" in name.lower():
            continue
        broken = tensor.clone()
        broken.view(-1)[0] = torch.nan
        published.rewrite(published.tensors | {name: broken})
        assert any("NaN" in text for text in attempts(published.path)), name


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "among_tensors"])
@pytest.mark.parametrize("write", [goodfire, FORMATS["goodfire_pt"], qwen_scope, dictionary_learning])
def test_code_in_a_torch_file_is_not_run(tmp_path, write, alone, zipped):
    published, marker = write(tmp_path), tmp_path / "ran"
    content = Bomb(str(marker)) if alone else published.tensors | {"more": Bomb(str(marker))}
    torch.save(content, published.weights, _use_new_zipfile_serialization=zipped)
    error = one_sentence(lambda: mr.load_sae(path=published.path), published.weights, "run code")
    assert isinstance(error, SAEError)
    assert not marker.exists()


@pytest.mark.parametrize("write", [goodfire, qwen_scope, dictionary_learning])
def test_torch_files_of_before_there_were_zips(tmp_path, write):
    published, x = write(tmp_path), vectors()
    torch.save(published.tensors, published.weights, _use_new_zipfile_serialization=False)
    handle = mr.load_sae(path=published.path)
    assert_formula(encode(handle, range(LATENTS), x), published, x)
    assert_formula(encode(handle, CHOSEN, x), published, x, CHOSEN)


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), {}, {"a": 1}, "text", None], ids=str)
@pytest.mark.parametrize("write", [goodfire, qwen_scope, dictionary_learning])
def test_torch_files_that_hold_something_else(tmp_path, write, content):
    published = write(tmp_path)
    torch.save(content, published.weights)
    one_sentence(lambda: mr.load_sae(path=published.path), published.weights)


NOT_JSON = ["", "{", "[]", "null", "7", '"text"', "[" * 100_000, "{}"]


@pytest.mark.parametrize("text", NOT_JSON, ids=lambda text: text[:5] or "empty")
@pytest.mark.parametrize("write", [llama_scope, llama_scope_r1, dictionary_learning, sparsify])
def test_configurations_that_are_none(tmp_path, write, text):
    published = write(tmp_path)
    published.config.write_text(text)
    assert isinstance(one_sentence(lambda: mr.load_sae(path=published.path), published.path), SAEError)
    published.config.write_bytes(b"\xff\xfe\n" * 5000)
    one_sentence(lambda: mr.load_sae(path=published.path), published.config)
    published.config.unlink()
    one_sentence(lambda: mr.load_sae(path=published.path), published.path)


@pytest.mark.parametrize("write", [llama_scope, llama_scope_r1, dictionary_learning, sparsify, gemma_scope_2])
def test_a_byte_order_mark_before_a_configuration(tmp_path, write):
    published = write(tmp_path)
    want = encode_all(published.path)
    published.config.write_bytes(b"\xef\xbb\xbf" + published.config.read_bytes())
    assert torch.equal(encode_all(published.path), want)


NUMBERS = [None, "x", [], {}, math.nan, math.inf, -1, 0]
WRONG = [
    *[(llama_scope, ("d_model",), value) for value in NUMBERS],
    *[(llama_scope, ("d_sae",), value) for value in NUMBERS],
    *[(llama_scope, ("jump_relu_threshold",), value) for value in (None, "x", [], {}, math.nan)],
    *[(write, ("hook_point_in",), value) for write in (llama_scope, llama_scope_r1) for value in (None, 7, [], {})],
    *[
        (write, ("dataset_average_activation_norm", *inside), value)
        for write in (llama_scope, llama_scope_r1)
        for inside, value in [((), None), ((), 17.1), ((), []), *[(("in",), value) for value in NUMBERS]]
    ],
    *[(llama_scope_r1, ("d_model",), value) for value in (None, "x", [], math.inf, -1)],
    *[(dictionary_learning, ("trainer",), value) for value in (None, 7, [], "x")],
    *[(dictionary_learning, ("trainer", "dict_class"), value) for value in (None, 7, [], "CrossCoder")],
    *[(dictionary_learning, ("trainer", "layer"), value) for value in (None, "x", [], math.inf, -1)],
    *[(FORMATS["dictionary_learning_AutoEncoderTopK"], ("trainer", "k"), value) for value in [*NUMBERS, LATENTS + 1]],
    *[(sparsify, ("k",), value) for value in [*NUMBERS, LATENTS + 1]],
    *[(FORMATS["sparsify_groupmax"], ("k",), value) for value in [*NUMBERS, 7, LATENTS + 1]],
    *[(sparsify, ("activation",), value) for value in (None, 7, [], "relu")],
    (sparsify, ("signed",), True),
    (sparsify, ("transcode",), True),
    *[(gemma_scope_2, ("hf_hook_point_in",), value) for value in (None, 7, [], "x")],
    *[(gemma_scope_2, ("architecture",), value) for value in (None, 7, [], "topk")],
]


@pytest.mark.parametrize("write, keys, value", WRONG, ids=lambda value: getattr(value, "__name__", str(value))[:40])
def test_wrong_entries_of_configurations(tmp_path, write, keys, value):
    published = write(tmp_path)

    def change(config):
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    published.reconfigure(change)
    error = one_sentence(lambda: encode_all(published.path))
    assert str(published.path) in str(error) or "hook point" in str(error)


def encode_all(path):
    handle = mr.load_sae(path=path)
    return encode(handle, range(handle.d_sae), vectors(5, handle.d_model))


@pytest.mark.parametrize("k", [0, LATENTS + 1])
def test_qwen_scope_with_an_impossible_k_in_its_name(tmp_path, k):
    published = qwen_scope(tmp_path, at=f"SAE-Res-L0_{k}/layer3.sae.pt")
    one_sentence(lambda: encode_all(published.path), f"k={k}")


def test_folders_with_nothing_that_is_known(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    one_sentence(lambda: mr.load_sae(path=tmp_path), tmp_path, "expected one of", "params.npz", "ae.pt", "config.json")
    save_json(tmp_path / "config.json", {"architectures": ["LlamaForCausalLM"], "hidden_size": 4096})
    one_sentence(lambda: mr.load_sae(path=tmp_path), tmp_path)  # a model, not an SAE
    for name in ("sae.sae.pt", "sae-l3.pt", "params.npz"):  # folders, though they are named as files
        (tmp_path / "layer_3" / name).mkdir(parents=True)
        one_sentence(lambda name=name: mr.load_sae(path=tmp_path / "layer_3" / name), name)


@every_format
def test_files_that_vanish_after_loading(tmp_path, write):
    published = write(tmp_path)
    handle = mr.load_sae(path=published.path)
    published.weights.unlink()
    assert isinstance(one_sentence(lambda: handle.features([1]), published.weights, "missing"), SAEError)


# Reading numpy archives in blocks


@pytest.mark.parametrize("block", [1, 40, 333, 4096])
@pytest.mark.parametrize("save_npz", [np.savez, np.savez_compressed])
def test_npz_in_blocks_equals_numpy(tmp_path, monkeypatch, save_npz, block):
    monkeypatch.setattr(readers, "BLOCK_BYTES", block)
    g = np.random.default_rng(0)
    arrays = {
        "wide": g.normal(size=(7, 30)).astype(np.float32),
        "tall": g.normal(size=(30, 7)).astype(np.float16),
        "double": g.normal(size=(11, 11)),
        "swapped": g.normal(size=(5, 6)).astype(">f4"),
        "vector": g.normal(size=23).astype(np.float32),
        "column": g.normal(size=(9, 1)).astype(np.float32),
    }
    save_npz(tmp_path / "a.npz", **arrays)
    read = readers.NpzReader(tmp_path / "a.npz")
    chance = random.Random(block)
    for name, array in arrays.items():
        expected = torch.tensor(array.astype(np.float32))
        assert read.shape(name) == array.shape
        assert read(name).equal(expected) and read(name).dtype == torch.float32
        for axis in range(array.ndim):
            for count in {1, array.shape[axis] // 2 or 1, array.shape[axis]}:
                ids = chance.sample(range(array.shape[axis]), count)
                assert read(name, ids, axis).equal(expected.index_select(axis, torch.tensor(ids))), (name, ids, axis)


def test_npz_that_cannot_be_read_in_blocks(tmp_path):
    arrays = {
        "fortran": np.asfortranarray(np.ones((3, 4), np.float32)),
        "whole": np.ones((3, 4), np.int8),
        "brain": np.ones((3, 4), np.dtype("V2")),
        "complex": np.ones((3, 4), np.complex64),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    read = readers.NpzReader(tmp_path / "a.npz")
    for name in arrays:
        assert isinstance(one_sentence(lambda name=name: read(name), name), SAEError)
    np.savez(tmp_path / "a.npz", W=np.ones((3, 4), np.float32))
    one_sentence(lambda: read("W", [4], axis=1), "W", "4")
    one_sentence(lambda: read("V"), "V")


@pytest.mark.parametrize("block", [40, 1 << 24])
def test_a_flipped_byte_in_a_column_that_was_not_asked_for_is_noticed(tmp_path, monkeypatch, block):
    """A damaged file is not used for the part of it that happens to be whole."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", block)
    published = gemma_scope(tmp_path)
    raw = bytearray(published.weights.read_bytes())
    with zipfile.ZipFile(published.weights) as members:
        member = members.getinfo("W_enc.npy")
        assert member.compress_type == zipfile.ZIP_STORED
    data = raw.index(b"\n", raw.index(b"NUMPY", member.header_offset)) + 1
    raw[data + 4 * 5] ^= 1  # the lowest bit of W_enc[0, 5]
    published.weights.write_bytes(raw)
    handle = mr.load_sae(path=published.path)
    assert isinstance(one_sentence(lambda: handle.features([3, 1]), published.weights), SAEError)


# Memory


MEASURE = """
import gc, sys
import torch
import mechreward as mr
torch.set_num_threads(1)

def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

small, large = sys.argv[1:]
mr.load_sae(path=small).features([0, 1])  # whatever is imported late
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # forget the peak
before = memory("VmRSS")
handle = mr.load_sae(path=large)
readout = handle.features([16383, 0, *range(700, 16000, 850)])
gc.collect()
print(memory("VmRSS") - before, memory("VmHWM") - before, readout.width)
"""


def memory_of(small, large):
    """How many bytes stay, and how many were needed at the peak, in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(small), str(large)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    stays, peak, width = map(int, run.stdout.split())
    assert width == 20
    return stays, peak


WIDE = {  # the formats of the README's table
    "Gemma Scope (npz, JumpReLU)": gemma_scope,
    "Gemma Scope 2 (safetensors, JumpReLU)": gemma_scope_2,
    "Llama Scope (safetensors, JumpReLU)": functools.partial(llama_scope, with_norm=True),
    "Llama Scope R1 (safetensors, JumpReLU)": functools.partial(llama_scope_r1, with_norm=True),
    "Goodfire (.pth, ReLU)": goodfire,
    "Goodfire (.pt, ReLU)": FORMATS["goodfire_pt"],
    "Qresearch (.pt, ReLU)": FORMATS["qresearch"],
    "Qwen Scope (.pt, TopK)": qwen_scope,
    "dictionary_learning (ae.pt, BatchTopK)": dictionary_learning,
    "dictionary_learning (ae.pt, standard, gated, TopK, BatchTopK, Matryoshka, JumpReLU)": functools.partial(
        dictionary_learning, name="AutoEncoder"
    ),
    "SAELens (standard, gated, TopK, JumpReLU; BatchTopK and Matryoshka, which it saves as JumpReLU)": saelens,
    "EleutherAI sparsify (safetensors, TopK and GroupMax)": functools.partial(sparsify, k=32),
    "one .pt with its k (TopK)": functools.partial(topk_checkpoint, k=128),
}
TOPK = ("Qwen Scope", "EleutherAI", "one .pt")  # whose whole encoder is needed
TWENTY = [16383, 0, *range(700, 16000, 850)]


def test_every_row_of_the_table_has_a_writer():
    assert list(WIDE) == [row.format for row in SUPPORTED]


class Chosen(dict):
    """Random tensors of a real width; looking one up gives the chosen latents of it alone, in float64."""

    def __init__(self, tensors, latents, ids):
        super().__init__(tensors)
        self.latents, self.ids = latents, ids

    def __getitem__(self, name):
        tensor = super().__getitem__(name)
        if self.ids is not None and self.latents in tensor.shape:
            tensor = tensor.index_select(tensor.shape.index(self.latents), torch.tensor(self.ids))
        return tensor.double()

    def get(self, name, default=None):
        return self[name] if name in set(self) else default


@pytest.mark.slow
@pytest.mark.parametrize("row", SUPPORTED, ids=lambda row: row.format[:24])
def test_published_layouts_at_their_published_widths(tmp_path, monkeypatch, row):
    """Twenty columns, read from files of the real size: their values, and how much memory that takes."""
    d, n = row.widths
    write = WIDE[row.format]
    whole = row.format.startswith(TOPK)
    period = n if whole else 509  # one random latent after the other is slow to draw, but equal ones tie for TopK
    small = write(tmp_path / "small")

    def draw_wide(dtype, **shapes):
        generator, drawn = torch.Generator().manual_seed(0), {}
        for name, shape in shapes.items():
            block = torch.randn([period if size == n else size for size in shape], generator=generator)
            if name == "threshold":
                block = block.abs() * 2 + 0.25
            elif len(shape) == 2:
                block /= math.sqrt(d)  # so that thresholds of about 1 are passed by some
            repeats = [-(-size // period) if size == n else 1 for size in shape]
            drawn[name] = block.to(dtype).repeat(repeats)[tuple(map(slice, shape))]
        return drawn, Chosen(drawn, n, None if whole else TWENTY)

    monkeypatch.setattr(sys.modules[__name__], "draw", draw_wide)
    dtype = torch.float32 if row.format.startswith("Gemma Scope (") else torch.bfloat16
    published = write(tmp_path / "wide", dtype, d=d, n=n)
    size = published.weights.stat().st_size
    assert size > 2 * d * n * dtype.itemsize
    ids = TWENTY if whole else range(20)
    x = vectors(64, d)
    handle = mr.load_sae(path=published.path)
    assert (handle.d_model, handle.d_sae) == (d, n)
    got = encode(handle, TWENTY, x)
    flipped, close, compared = assert_formula(got, published, x, ids, fires=(0.0001, 0.98))
    print(f"{row.format}: {flipped} flipped, {close} close of {compared}")
    if not whole:  # TopK keeps its whole encoder
        del handle, got, published
        stays, peak = memory_of(small.path, tmp_path / "wide" / small.path.relative_to(tmp_path / "small"))
        print(f"{stays / 1e6:.1f} MB stay, {peak / 1e6:.1f} MB at the peak, of {size / 1e6:.0f} MB")
        assert stays < 0.01 * 2 * d * n * 4
        assert peak < 1.2 * size


@pytest.mark.slow
def test_twenty_columns_of_a_gemma_scope_dictionary_of_real_size(tmp_path):
    small = gemma_scope(tmp_path / "small").path
    d, n = 3584, 16384
    folder = tmp_path / "layer_22/width_16k/average_l0_123"
    folder.mkdir(parents=True)
    g = np.random.default_rng(0)
    matrix = g.normal(size=(d, n)).astype(np.float32)
    rows = {name: g.normal(size=n).astype(np.float32) for name in ("b_enc", "threshold")}
    np.savez(folder / "params.npz", W_enc=matrix, W_dec=matrix.reshape(n, d), b_dec=matrix[:, 0], **rows)
    stays, peak = memory_of(small, folder)
    dictionary = 2 * d * n * 4
    assert stays < 0.01 * dictionary, f"{stays / 1e6:.1f} MB stay"
    assert peak < 0.2 * dictionary, f"{peak / 1e6:.1f} MB at the peak"
    ids = [16383, 0, 700]
    readout = mr.load_sae(path=folder).features(ids)
    assert readout.weight.equal(torch.tensor(matrix[:, ids]))
    assert readout.bias.equal(torch.tensor(rows["b_enc"][ids]))


@pytest.mark.slow
def test_twenty_columns_of_a_wide_torch_file_do_not_load_it(tmp_path):
    small = goodfire(tmp_path / "small").path
    d, n = 8192, 16384
    file = tmp_path / "Llama-3.3-70B-Instruct-SAE-l50.pt"
    matrix = torch.randn(n, d, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.save(
        {
            "encoder_linear.weight": matrix,
            "encoder_linear.bias": torch.zeros(n, dtype=torch.bfloat16),
            "decoder_linear.weight": matrix.view(d, n).clone(),  # with bytes of its own
            "decoder_linear.bias": torch.zeros(d, dtype=torch.bfloat16),
        },
        file,
    )
    stays, peak = memory_of(small, file)
    size = file.stat().st_size
    assert size > 2 * 2 * n * d
    # Mapped pages count as resident, and may be of 2 MB each.
    assert stays < 0.01 * size and peak < 0.2 * size, f"{stays / 1e6:.1f} MB stay, {peak / 1e6:.1f} MB at the peak"
    assert mr.load_sae(path=file).features([9, 4]).weight.equal(matrix[[9, 4]].float().T)
