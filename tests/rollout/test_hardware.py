"""What is read on hardware that the tests do not have: pretended devices, and other libraries' ways there."""

import copy

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from pretended import Pretended
from test_trl import VECTOR, options, spied

import mechreward as mr
from conftest import WIDTH, build
from mechreward.aggregation import NAMES, aggregation
from mechreward.errors import CaptureError, ModelMismatchError
from mechreward.integrations.trl_grpo import MechRewardGRPOConfig, MechRewardGRPOTrainer
from mechreward.probes import training as probes
from mechreward.readout import HookPoint, Readings, ReadoutBank, direction
from mechreward.reward.normalization import dense_zscore, zscore_in_batch, zscore_in_group
from mechreward.rollout import sampling, source
from mechreward.rollout.batch import Call, RolloutBatch
from mechreward.rollout.capture import GenerationReader, ResidualTap
from mechreward.rollout.hf import load_model, read_forward
from mechreward.rollout.labelled import Labelled
from mechreward.rollout.plain import describe

POINT = HookPoint(1)
READOUT = direction("d", torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)), POINT)


def rollouts(*lengths: int) -> RolloutBatch:
    ids = [[3 + (7 * n + t) % 90 for t in range(n)] for n in lengths]
    return RolloutBatch(["p"] * len(ids), ["c"] * len(ids), [[5, 6]] * len(ids), ids, num_generations=2)


class TestSoftCapping:
    """Gemma-2's attention logits are capped, or nothing is read."""

    def test_an_uncapped_model_is_refused_by_all_that_reads(self):
        model = copy.deepcopy(build("gemma2"))
        model.config._attn_implementation = "sdpa"
        readers = [
            lambda: ResidualTap(model, [POINT]),
            lambda: read_forward(model, rollouts(5), ReadoutBank([READOUT])),
            lambda: mr.HFSource(model, None).read(rollouts(5), mr.FeatureReward(READOUT).requests),
            lambda: list(source.pooled(model, rollouts(5), [READOUT])),
        ]
        for read in readers:
            with pytest.raises(ModelMismatchError, match='attn_implementation="eager", "flash_attention_2"') as caught:
                read()
            assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("implementation", ["eager", "flash_attention_2", "flex_attention"])
    def test_the_others_cap(self, implementation):
        model = copy.deepcopy(build("gemma2"))
        model.config._attn_implementation = implementation
        ResidualTap(model, [POINT]).close()

    def test_sdpa_is_fine_where_nothing_is_to_be_capped(self):
        model = build("llama")
        assert model.config._attn_implementation == "sdpa"
        ResidualTap(model, [POINT]).close()

    def test_the_trainer_refuses_a_policy_that_came_so(self, tmp_path):
        model = transformers.AutoModelForCausalLM.from_pretrained(mr.pocket.path())
        model.config._attn_implementation = "sdpa"
        args = MechRewardGRPOConfig(**options(tmp_path, beta=0.0))
        reward = mr.FeatureReward(direction("d", VECTOR, POINT))
        with pytest.raises(ModelMismatchError, match="caps its attention logits"):
            MechRewardGRPOTrainer(model, reward, args, mr.pocket.dataset("train", 8))

    def test_loaders_choose_one_that_caps_whatever_the_library_s_default(self, tmp_path, monkeypatch):
        # As transformers 5.17: SDPA is the default for Gemma-2 too.
        monkeypatch.setattr(transformers.models.gemma2.modeling_gemma2.Gemma2PreTrainedModel, "_supports_sdpa", True)
        build("gemma2").save_pretrained(tmp_path)
        transformers.AutoTokenizer.from_pretrained(mr.pocket.path()).save_pretrained(tmp_path)
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert plain.config._attn_implementation == "sdpa"
        assert load_model(str(tmp_path))[0].config._attn_implementation == "eager"
        asked = sampling.keeping_softcap(str(tmp_path))
        assert (
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **asked).config._attn_implementation == "eager"
        )
        # pocket says so itself, for trainers and scripts that load it by its folder.
        shipped = transformers.AutoModelForCausalLM.from_pretrained(mr.pocket.path())
        assert shipped.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("tap", "changes"),
    [
        ("generation", {}),
        ("old_logprobs", {"num_iterations": 2}),
        ("forward", {"generation_kwargs": {"use_cache": False}}),
    ],
)
def test_a_layer_on_another_card(tmp_path, monkeypatch, tap, changes):
    """``device_map="auto"`` puts layers on several cards: what is read of one is brought to the trainer's."""
    trainer, spy = spied(MechRewardGRPOTrainer, tmp_path, ("policy", "reference"), max_steps=1, **changes)
    read, cards = ResidualTap._read, Pretended("cuda:1")

    def on_its_card(self, point, hidden):
        with cards:
            read(self, point, cards.put(hidden.detach().clone()))

    monkeypatch.setattr(ResidualTap, "_read", on_its_card)
    # The hooks are there already, bound to the method that they were made with.
    trainer.passes.install()
    with cards:
        trainer.train()
    assert trainer.taps == {"policy": tap, "reference": "reference"}
    assert len(spy.errors["policy"]) == 8 and max(spy.errors["policy"] + spy.errors["reference"]) < 1e-5


def test_layers_on_two_cards_are_read_into_one(monkeypatch):
    model, second = build("llama"), HookPoint(2)
    readouts = [READOUT, direction("e", READOUT.weight[:, 0], second)]
    want = read_forward(model, rollouts(9, 4), ReadoutBank(readouts))
    read, cards = ResidualTap._read, Pretended("cuda:1")
    monkeypatch.setattr(
        ResidualTap,
        "_read",
        lambda self, point, hidden: read(self, point, cards.put(hidden.clone()) if point == second else hidden),
    )
    with cards:
        got = read_forward(model, rollouts(9, 4), ReadoutBank(readouts))
    assert all(torch.equal(got[r].values, want[r].values) for r in readouts)


def test_weights_that_are_kept_elsewhere_until_they_run():
    """accelerate's offloading: most parameters are ``meta``, the first too."""
    from accelerate import cpu_offload

    model = build("llama")
    want = read_forward(model, rollouts(9, 4), ReadoutBank([READOUT]))[READOUT]
    offloaded = cpu_offload(copy.deepcopy(model), torch.device("cpu"))
    assert next(offloaded.parameters()).device.type == "meta"
    got = read_forward(offloaded, rollouts(9, 4), ReadoutBank([READOUT]))[READOUT]
    assert torch.equal(got.values, want.values) and torch.equal(got.mask, want.mask)


class TestDecodingSteps:
    """`generate` may run one step more than it returns: where it looks late whether all rows have ended."""

    @staticmethod
    def read(steps: int, width: int) -> torch.Tensor:
        reader = GenerationReader(ReadoutBank([READOUT]))
        generator = torch.Generator().manual_seed(1)
        reader(POINT, torch.randn(2, 3, WIDTH, generator=generator))
        for _ in range(steps):
            reader(POINT, torch.randn(2, 1, WIDTH, generator=generator))
        return reader.values(2, width)

    @pytest.mark.parametrize("width", [1, 2, 7])
    def test_one_more_is_dropped(self, width):
        assert torch.equal(self.read(width - 1, width), self.read(width, width))
        assert self.read(width, width)[:, -1].eq(0).all()

    @pytest.mark.parametrize("steps", [0, 5, 8])
    def test_any_other_number_is_refused(self, steps):
        with pytest.raises(CaptureError, match=f"{steps} decoding steps"):
            self.read(steps, 7)

    def test_in_training(self, tmp_path, monkeypatch):
        import transformers.generation.utils as generation

        class Event:
            def __init__(self, *_, **__): ...

            def record(self): ...

            def synchronize(self): ...

        monkeypatch.setattr(generation.torch, "Event", Event)
        monkeypatch.setattr(generation.DeferredStopCheck, "is_supported", staticmethod(lambda *_, **__: True))
        trainer, spy = spied(MechRewardGRPOTrainer, tmp_path, max_completion_length=120, seed=5)
        steps = []
        trainer.model.model.layers[1].register_forward_hook(lambda _m, _a, out: steps.append(out.shape[1]))
        trainer.train()
        assert trainer.taps == {"policy": "generation"} and max(spy.errors["policy"]) < 1e-5
        longest = [mask.shape[1] for mask in spy.masks]
        assert any(width < 120 for width in longest), "all rollouts must end early once, or nothing is tested"


class TestAppleGPU:
    """``mps`` has no float64."""

    @pytest.mark.parametrize("normalise", [zscore_in_group, zscore_in_batch])
    def test_normalisation(self, normalise):
        values = torch.tensor([1.0, 2.0, torch.nan, 12345.678])
        want, mps = normalise(values, rollouts(3, 4, 5, 6)), Pretended("mps")
        with mps:
            got = normalise(mps.put(values.clone()), rollouts(3, 4, 5, 6))
            assert got.device.type == "mps"
            assert torch.equal(got.cpu().nan_to_num(9), want.nan_to_num(9))

    def test_dense_advantages(self):
        batch, mps = rollouts(3, 4, 5, 6), Pretended("mps")
        values = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
        want = dense_zscore(values, batch.mask(), batch)
        with mps:
            got = dense_zscore(mps.put(values.clone()), mps.put(batch.mask()), batch)
            assert got.device.type == "mps" and torch.equal(got.cpu(), want)

    def test_gathering_in_one_process_moves_nothing(self, tmp_path):
        trainer, _ = spied(MechRewardGRPOTrainer, tmp_path)
        rows = torch.ones(4, dtype=torch.float64)
        assert describe(trainer, Call([""], [""], [[5]]), [[1]]).gather(rows) is rows

    def test_probes_are_fitted_where_float64_is(self, monkeypatch):
        mps, read = Pretended("mps"), source.read_in_pieces
        labels = np.array([True, False, True, False])
        model, data = build("llama"), Labelled(rollouts(3, 4, 5, 6), labels, np.arange(4), "here")
        want = probes._read_tokens(model, data, POINT)

        def there(*args):
            for piece, each in read(*args):
                yield piece, [Readings(mps.put(r.values.clone()), mps.put(r.mask.clone())) for r in each]

        monkeypatch.setattr(probes, "read_in_pieces", there)
        with mps:
            got = probes._read_tokens(model, data, POINT)
            assert got.x.device.type == "cpu" and torch.equal(got.x, want.x) and torch.equal(got.mask, want.mask)


@given(
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=8, max_size=8),
    junk=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    mask=st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_what_stands_in_padding_changes_nothing(values, junk, mask):
    """Padding computes on whatever was left there: NaN and infinity too."""
    clean, mask = torch.tensor(values).view(2, 4), torch.tensor(mask).view(2, 4)
    clean = clean.masked_fill(~mask, 0.0)
    dirty = clean.masked_fill(~mask, junk)
    for name in [*NAMES, "top_2_mean", "mean_last_2_tokens"]:
        a, b = (aggregation(name)(each, mask) for each in (clean, dirty))
        assert torch.equal(a.nan_to_num(7e9), b.nan_to_num(7e9)), name
    batch = RolloutBatch(["", ""], ["", ""], [[], []], [[5] * 4] * 2, num_generations=2)
    assert torch.equal(dense_zscore(clean, mask, batch), dense_zscore(dirty, mask, batch))


def test_readings_of_padding_are_0_whatever_was_read_there(tmp_path):
    trainer, spy = spied(MechRewardGRPOTrainer, tmp_path)
    bank, mask = trainer.passes.banks["policy", False], torch.tensor([[True, False], [True, True]])
    values = torch.tensor([[[1.0], [torch.nan]], [[2.0], [3.0]]])
    trainer.passes.keep("policy", bank, values, mask)
    assert trainer.passes.read[spy.asks[0]].values[..., 0].tolist() == [[1.0, 0.0], [2.0, 3.0]]


class TestLoading:
    @pytest.fixture
    def folder(self, tmp_path):
        build("llama").to(torch.bfloat16).save_pretrained(tmp_path)
        transformers.AutoTokenizer.from_pretrained(mr.pocket.path()).save_pretrained(tmp_path)
        return str(tmp_path)

    def test_weights_stay_in_the_type_that_they_are_stored_in(self, folder):
        assert load_model(folder)[0].dtype == torch.bfloat16
        assert load_model(folder, torch.float32)[0].dtype == torch.float32
        assert load_model("mechreward/pocket")[0].dtype == torch.float32

    @pytest.mark.parametrize(
        ("rank", "cards", "wanted"),
        [(None, 2, "cuda:0"), ("0", 2, "cuda:0"), ("1", 2, "cuda:1"), ("3", 1, "cuda:0"), ("1", 0, "cpu")],
    )
    def test_each_process_has_a_card_of_its_own(self, folder, monkeypatch, rank, cards, wanted):
        went = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
        monkeypatch.setattr(transformers.PreTrainedModel, "to", lambda self, device: went.append(device) or self)
        monkeypatch.setenv("LOCAL_RANK", rank) if rank else monkeypatch.delenv("LOCAL_RANK", raising=False)
        load_model(folder)
        assert [str(torch.device(device)) for device in went] == [wanted]
