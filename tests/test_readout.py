"""The readout bank: what it computes, what it fuses, what it keeps in memory, and at which precision."""

from unittest.mock import patch

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from mechreward import readout as readout_module
from mechreward.errors import ModelMismatchError, RewardError
from mechreward.readout import (
    CHUNK_TOKENS,
    RAW_INPUT,
    HookPoint,
    InputTransform,
    Nonlinearity,
    Readout,
    ReadoutBank,
    direction,
    projection,
)
from mechreward.rollout.capture import SequenceReader

POST, PRE = HookPoint(1), HookPoint(1, "resid_pre")


def features(kind="relu", d=32, latents=24, chosen=(3, 0, 17), k=16, seed=0, transform=RAW_INPUT, point=POST):
    """A made readout of some latents; "topk" carries the whole dictionary, and keeps negative values among its k."""
    g = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(d, latents, generator=g), torch.randn(latents, generator=g)
    parameters = {}
    if kind == "jumprelu":
        parameters = {"threshold": 3 * torch.rand(latents, generator=g)}
    elif kind == "gated":
        parameters = {name: 0.3 * torch.randn(latents, generator=g) for name in ("b_gate", "r_mag", "b_mag")}
        bias = torch.zeros(latents)
    ids = torch.tensor(chosen)
    function, keep = Nonlinearity(kind, parameters, k), None
    if kind == "topk":
        keep = ids
    else:
        weight, bias, function = weight[:, ids], bias[ids], function.columns(ids)
    labels = tuple(f"feature_{i}" for i in chosen)
    return Readout(f"{kind}-{seed}", labels, point, weight, bias, function, transform, keep)


def by_hand(r: Readout, x):
    """The same in float64, written out; and each value's distance from where its nonlinearity flips."""
    v = x.double() * r.transform.scale
    if r.transform.norm == "constant_norm_rescale":
        v = v / v.square().sum(-1, keepdim=True).sqrt() * v.shape[-1] ** 0.5
    elif r.transform.norm == "layer_norm":
        v = v - v.mean(-1, keepdim=True)
        v = v / ((v.square().sum(-1, keepdim=True) / (v.shape[-1] - 1)).sqrt() + 1e-5)
    if r.transform.shift is not None:
        v = v - r.transform.shift.double()
    z = torch.einsum("nd,dp->np", v, r.weight.double()) + r.bias.double()
    p = {name: t.double() for name, t in r.nonlinearity.parameters.items()}
    margin, kind = torch.full_like(z, torch.inf), r.nonlinearity.kind
    positive = z.clamp(min=0)
    if kind == "identity":
        y = z
    elif kind == "relu":
        y = positive
    elif kind == "jumprelu":
        y, margin = torch.where(z > p["threshold"], positive, 0.0), (z - p["threshold"]).abs()
    elif kind == "gated":
        gate = z + p["b_gate"]
        y, margin = torch.where(gate > 0, (z * p["r_mag"].exp() + p["b_mag"]).clamp(min=0), 0.0), gate.abs()
    else:
        rank = (z[:, :, None] < z[:, None, :]).sum(-1)  # how many are larger
        ordered = z.sort(-1, descending=True).values
        k = r.nonlinearity.k
        y = torch.where(rank < k, positive, 0.0)
        margin = torch.where(rank < k, z - ordered[:, k, None], ordered[:, k - 1, None] - z)
    # The size of a pre-activation of this token: a single column may happen to cancel.
    typical = v.norm(dim=-1, keepdim=True) * r.weight.double().norm(dim=0).max() / v.shape[-1] ** 0.5
    largest = torch.maximum(z.abs().max(-1, keepdim=True).values, typical)
    keep = slice(None) if r.keep is None else r.keep
    return y[:, keep], margin[:, keep], largest


def assert_by_hand(got, r, x):
    expected, margin, largest = by_hand(r, x)
    tolerance = 1e-5 * torch.maximum(expected.abs(), largest)
    clear = margin > tolerance
    assert (~clear).sum() <= 1 + 0.001 * clear.numel()
    assert ((got.double() - expected).abs() <= tolerance)[clear].all()


def encode(bank, point, x, rows=None):
    out = torch.full((len(x) if rows is None else len(rows), len(bank)), torch.nan)
    bank.encode(point, x, out, rows)
    return out


KINDS = ["identity", "relu", "jumprelu", "gated", "topk"]
TRANSFORMS = [
    RAW_INPUT,
    InputTransform("constant_norm_rescale"),
    InputTransform("layer_norm", torch.linspace(-1, 1, 32)),
    InputTransform("none", torch.linspace(-1, 1, 32), scale=0.25),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=["raw", "rescale", "layer_norm", "scale"])
def test_every_nonlinearity_and_transform_is_its_formula(kind, transform):
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    r = features(kind, transform=transform)
    got = encode(ReadoutBank([r]), POST, x)
    assert_by_hand(got, r, x)
    if kind != "identity":
        assert 0.02 < (got > 0).float().mean() < 0.98  # both sides of the nonlinearity were seen


bank_strategy = st.lists(
    st.tuples(
        st.sampled_from(KINDS), st.integers(0, 5), st.integers(0, 3), st.sampled_from([POST, PRE]), st.integers(1, 6)
    ),
    min_size=1,
    max_size=6,
    unique=True,
)


@given(bank_strategy, st.integers(0, 40), st.integers(1, 50), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_readout_does_not_depend_on_its_company_or_on_chunks(members, count, chunk, some_rows):
    g = torch.Generator().manual_seed(count)
    readouts = [
        features(kind, seed=seed, transform=TRANSFORMS[t], point=point, chosen=tuple(range(width)))
        for kind, seed, t, point, width in members
    ]
    bank = ReadoutBank(readouts)
    assert len(bank) == sum(m[4] for m in members)
    x = torch.randn(count, 32, generator=g)
    rows = torch.randperm(count, generator=g)[: count // 2] if some_rows else None
    with patch.object(readout_module, "CHUNK_TOKENS", chunk):
        for point in bank.hook_points:
            out = encode(bank, point, x, rows)
            for r in readouts:
                mine = out[:, bank.columns[r]]
                if r.hook_point == point:
                    assert_by_hand(mine, r, x if rows is None else x[rows]) if len(mine) else None
                else:
                    assert mine.isnan().all()  # another hook point's columns are left alone


def test_split_gives_each_readout_its_own_columns():
    first, second = features(seed=1), features(chosen=(5,), seed=2)
    bank = ReadoutBank([first, second, first])
    values, mask = torch.arange(24.0).view(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    found = bank.split(values, mask)
    assert list(found) == [first, second]
    assert found[first].values.equal(values[..., :3]) and found[second].values.equal(values[..., 3:])
    assert found[first].mask is mask


class Products(TorchDispatchMode):
    """Counts matrix products, whatever function asks for them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv"}
        return func(*args, **kwargs or {})


def products(bank, point):
    with Products() as seen:
        encode(bank, point, torch.randn(8, 32))
    return seen.count


def test_one_product_for_each_hook_point_and_transform():
    shared = InputTransform("none", torch.ones(32))
    bank = ReadoutBank(
        [
            features("relu", seed=1),
            features("jumprelu", seed=2),
            features("gated", seed=3),
            direction("d", torch.randn(32), POST),
            features("relu", seed=4, transform=shared),
            features("jumprelu", seed=5, transform=shared),
            features("relu", seed=6, point=PRE),
        ]
    )
    assert products(bank, POST) == 2
    assert products(bank, PRE) == 1


def test_choices_from_one_topk_dictionary_share_its_product(saved_sae):
    _, handle = saved_sae("topk")
    bank = ReadoutBank([handle.features([1, 2]), handle.features([9]), handle.features([2, 63])])
    assert products(bank, HookPoint(1)) == 1


# Memory


def peak_extra_bytes(call) -> int:
    """The most that was allocated at one time during a call, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def test_the_memory_meter_sees_what_is_allocated_and_freed():
    peak = peak_extra_bytes(lambda: [torch.zeros(1000, 1000).sum() for _ in range(3)])
    assert 4e6 <= peak < 5e6


D, D_SAE, K, TOKENS = 128, 16_384, 16, 20_000


def read_pass(bank, hidden):
    positions = torch.ones(hidden.shape[:2], dtype=torch.bool)
    reader = SequenceReader(bank, positions)
    reader(POST, hidden)
    return reader.values()


def test_a_slice_costs_tokens_times_k(saved_sae):
    wide = torch.randn(D, D_SAE)
    chosen = torch.arange(K) * 1000
    r = Readout(
        "slice", tuple(map(str, chosen)), POST, wide[:, chosen].clone(), torch.zeros(K), Nonlinearity("relu", {})
    )
    bank = ReadoutBank([r])
    peaks = []
    for tokens in (TOKENS, 2 * TOKENS):
        hidden = torch.randn(20, tokens // 20, D)
        read_pass(bank, hidden[:1])
        peaks.append(peak_extra_bytes(lambda hidden=hidden: read_pass(bank, hidden)))
    kept = TOKENS * K * 4
    chunk = CHUNK_TOKENS * (D + 2 * K) * 4
    positions = TOKENS * 20  # bool mask, its indices (int64, once as a pair), the chosen ones
    assert kept <= peaks[0] < kept + 3 * chunk + positions
    assert peaks[0] < TOKENS * D * 4  # no copy of the residual
    assert peaks[0] < TOKENS * D_SAE * 4 / 300  # and nothing of the dictionary's width
    assert kept <= peaks[1] - peaks[0] < kept + positions

    x, out = torch.randn(TOKENS, D), torch.zeros(TOKENS, K)
    assert peak_extra_bytes(lambda: bank.encode(POST, x, out)) < 3 * chunk


def test_a_whole_topk_dictionary_costs_one_chunk():
    latents, tokens, chunk = 2048, 4000, 100
    g = torch.Generator().manual_seed(0)
    r = features("topk", d=32, latents=latents, k=16)
    bank, x, out = ReadoutBank([r]), torch.randn(tokens, 32, generator=g), torch.zeros(tokens, 3)
    with patch.object(readout_module, "CHUNK_TOKENS", chunk):
        peak = peak_extra_bytes(lambda: bank.encode(POST, x, out))
    assert chunk * latents * 4 < peak < 6 * chunk * latents * 4
    assert peak < tokens * latents * 4 / 5


# Precision


def precisions():
    found = [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
    for read in (lambda: torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision):
        try:
            found.append(read())
        except RuntimeError:  # torch, when old and new switches were mixed
            found.append("mixed")
    return found


class Precision(TorchDispatchMode):
    """The precision at which each matrix product is made."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in {"mm", "addmm"}:
            self.seen.append(precisions()[:2])
        return func(*args, **kwargs or {})


@pytest.fixture
def restored_precision():
    before = precisions()
    yield
    torch.set_float32_matmul_precision("highest")
    for backend in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        backend.fp32_precision = "none"
    assert precisions() == before


@pytest.mark.parametrize(
    "choose",
    [
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        lambda: transformers.utils.enable_tf32(True),  # what TrainingArguments(tf32=True) calls
        lambda: torch.set_float32_matmul_precision("medium"),
    ],
    ids=["old", "new", "trainer", "medium"],
)
def test_products_are_in_full_float32_and_the_users_choice_survives(choose, restored_precision):
    choose()
    before = precisions()
    assert "tf32" in before
    with Precision() as mode:
        encode(ReadoutBank([features()]), POST, torch.randn(8, 32))
    assert mode.seen == [["ieee", "ieee"]]
    assert precisions() == before


def test_autocast_does_not_reach_the_product():
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    r = features("jumprelu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = encode(ReadoutBank([r]), POST, x)
    assert_by_hand(got, r, x)


def test_half_precision_input_is_encoded_in_float32():
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    r = features("relu", transform=TRANSFORMS[2])
    assert_by_hand(encode(ReadoutBank([r]), POST, x), r, x.float())


def test_no_gradient_flows():
    x = torch.randn(4, 32, requires_grad=True)
    out = torch.zeros(4, 3)
    ReadoutBank([features()]).encode(POST, x, out)
    assert not out.requires_grad


# Refusals


@pytest.mark.parametrize("width", [32, 64])
def test_a_projection_is_the_same_each_time_and_keeps_lengths(width):
    a, b = projection(HookPoint(0), 512, width), projection(HookPoint(0), 512, width)
    assert torch.equal(a.weight, b.weight) and a.weight.shape == (512, width)
    vectors = torch.randn(2000, 512, generator=torch.Generator().manual_seed(1))
    ratio = (vectors @ a.weight).norm(dim=1) / vectors.norm(dim=1) * (512 / width) ** 0.5
    assert ratio.mean().item() == pytest.approx(1.0, abs=0.02) and ratio.std() <= (1 / (2 * width)) ** 0.5
    narrow = projection(HookPoint(0), 8, width).weight
    assert torch.allclose(narrow @ narrow.T, torch.eye(8), atol=1e-6), "a narrow stream is only rotated"


def test_hook_points_are_written_as_saelens_does():
    assert str(HookPoint(22)) == "blocks.22.hook_resid_post"
    assert HookPoint.parse("blocks.3.hook_resid_pre") == HookPoint(3, "resid_pre")
    for wrong in ("blocks.3.hook_mlp_out", "blocks.3.hook_resid_mid", "hook_embed", "blocks.x.hook_resid_post", ""):
        with pytest.raises(ModelMismatchError, match="is not a residual-stream hook point"):
            HookPoint.parse(wrong)


@pytest.mark.parametrize("part", ["weight", "bias", "threshold", "shift"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_refused(part, value):
    weight, bias = torch.ones(4, 2), torch.ones(2)
    threshold, shift = torch.ones(2), torch.ones(4)
    {"weight": weight[1], "bias": bias, "threshold": threshold, "shift": shift}[part][1] = value
    make = lambda: Readout(  # noqa: E731
        "r", ("a", "b"), POST, weight, bias, Nonlinearity("jumprelu", {"threshold": threshold}),
        InputTransform(shift=shift),
    )  # fmt: skip
    if part == "threshold" and value == float("inf"):
        out = encode(ReadoutBank([make()]), POST, torch.ones(1, 4))
        assert out.tolist() == [[4.0 - 4.0 + 1.0 - 1.0, 0.0]]  # z = 1, not above its threshold of 1; never above inf
        return
    with pytest.raises(RewardError, match=rf"{part} of readout 'r' holds NaN or infinity") as caught:
        make()
    assert "\n" not in str(caught.value)


def test_labels_weight_and_bias_must_agree():
    for labels, bias in ((("a",), torch.zeros(2)), (("a", "b"), torch.zeros(3)), (("a", "b"), torch.zeros(1))):
        with pytest.raises(RewardError, match="must agree"):
            Readout("r", labels, POST, torch.ones(4, 2), bias)
    for short in (torch.ones(1), torch.ones(3), torch.tensor(1.0)):  # one threshold would be broadcast, silently
        with pytest.raises(RewardError, match=r"threshold .* must agree"):
            nonlinearity = Nonlinearity("jumprelu", {"threshold": short})
            Readout("r", ("a", "b"), POST, torch.ones(4, 2), torch.zeros(2), nonlinearity)
