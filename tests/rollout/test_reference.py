"""``reads="reference"`` reads the model that training started from, or refuses in one sentence."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_trl import Spy, independent, options
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

import mechreward as mr
from mechreward.errors import RewardError
from mechreward.integrations.trl_grpo import STATE_FILE, MechRewardGRPOConfig, MechRewardGRPOTrainer
from mechreward.rollout.batch import Scores

LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.0}
FAST = {"learning_rate": 1e-2, "max_steps": 2, "max_completion_length": 8}


def pocket():
    return AutoModelForCausalLM.from_pretrained(mr.pocket.path())


def moved(model, size=0.02, seed=7):
    """Other weights under the same name, as after a training before."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def with_adapter(size=0.1):
    torch.manual_seed(1)
    model = get_peft_model(pocket(), LoraConfig(**LORA))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return model


def merged():
    return with_adapter().merge_and_unload().requires_grad_(True)  # PEFT has frozen it


def without_a_path():
    model = Gemma2ForCausalLM(pocket().config)
    model.config._name_or_path = ""
    return moved(model)


def with_more_tokens():
    model = pocket()
    model.resize_token_embeddings(520, mean_resizing=False)
    return moved(model)


STARTS = {
    "as loaded": pocket,
    "trained before": lambda: moved(pocket()),
    "merged": merged,
    "no path": without_a_path,
    "tokens added": with_more_tokens,
    "adapter": with_adapter,
}


def trained(trainer_class, folder, model, start=None, peft=None, resume=None, spy=None, **changes):
    """Train and compare each reading of the reference with the start's, by hand."""
    spy = spy or Spy(("reference",))
    config = MechRewardGRPOConfig if trainer_class is MechRewardGRPOTrainer else GRPOConfig
    start = copy.deepcopy(model).eval() if start is None else start
    trainer = trainer_class(
        model=model,
        reward_funcs=spy,
        args=config(**options(folder, **(FAST | changes))),
        train_dataset=mr.pocket.dataset("train", 32),
        processing_class=AutoTokenizer.from_pretrained(mr.pocket.path(), padding_side="left"),
        peft_config=peft,
    )
    spy.models = {"reference": lambda: start}
    trainer.train(resume_from_checkpoint=resume)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    here, there = (independent(m, [5, 6, 7], [8, 9, 10, 11]) for m in (policy, start))
    assert (here - there).abs().max() > 1e-3 * there.abs().max(), "nothing was trained: the test shows nothing"
    assert spy.errors["reference"] and max(spy.errors["reference"]) < 1e-5
    return trainer


def refused(train, *parts) -> str:
    with pytest.raises(RewardError) as caught:
        train()
    said = str(caught.value)
    assert "\n" not in said and said.count(". ") == 0, said
    assert all(part in said for part in parts), said
    return said


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(s, marks=() if s in ("trained before", "tokens added", "adapter") else pytest.mark.slow)
        for s in STARTS
    ],
)
def test_without_kl_our_trainer_reads_the_start_whatever_it_was(tmp_path, start):
    trainer = trained(MechRewardGRPOTrainer, tmp_path, STARTS[start](), beta=0.0)
    assert trainer.mechreward_gap == 0


@pytest.mark.slow
@pytest.mark.parametrize("start", [name for name in STARTS if name != "adapter"])
def test_without_kl_the_plain_trainer_does_too(tmp_path, start):
    trained(GRPOTrainer, tmp_path, STARTS[start](), beta=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("trainer_class", [GRPOTrainer, MechRewardGRPOTrainer])
def test_trl_s_copy_of_an_adapter_is_the_start(tmp_path, trainer_class):
    trained(trainer_class, tmp_path, with_adapter(), beta=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("trainer_class", [GRPOTrainer, MechRewardGRPOTrainer])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_a_new_adapter_is_switched_off(tmp_path, trainer_class, beta):
    trainer = trained(trainer_class, tmp_path, pocket(), peft=LoraConfig(**LORA), beta=beta)
    assert getattr(trainer, "mechreward_reference", None) is None and trainer.mechreward_gap < 1e-6


@pytest.mark.slow
def test_under_autocast_the_copy_does_not_call_the_policy(tmp_path):
    """accelerate and TRL wrap the policy's forward, and a copied wrapper would call the policy."""
    for trainer_class in (GRPOTrainer, MechRewardGRPOTrainer):
        seen, start = [], pocket().eval()

        class Look(Spy):
            def score(self, batch, readings, start=start, seen=seen):
                read = readings[self.asks[0]]
                for i, (p, c) in enumerate(zip(batch.prompt_ids, batch.completion_ids, strict=True)):
                    want = independent(start, p, c)[:-1]
                    seen.append(float((read.values[i, : len(want), 0] - want).abs().max() / want.abs().max()))
                return Scores(torch.arange(len(batch)).float())

        config = MechRewardGRPOConfig if trainer_class is MechRewardGRPOTrainer else GRPOConfig
        args = config(
            **options(tmp_path, **(FAST | {"bf16": True, "beta": 0.0, "max_steps": 3, "learning_rate": 1e-1}))
        )
        trainer = trainer_class(pocket(), Look(("reference",)), args, mr.pocket.dataset("train", 32))
        trainer.train()
        here, there = (independent(m, [5, 6, 7], [8, 9, 10, 11]) for m in (trainer.model, start))
        assert (here - there).abs().max() > 0.3 * there.abs().max()
        assert max(seen) < 0.1 and trainer.mechreward_gap <= 2**-8


class TestAnotherModelIsRefused:
    @pytest.mark.parametrize(
        ("trainer_class", "start"), [(GRPOTrainer, "merged"), (MechRewardGRPOTrainer, "trained before")]
    )
    def test_trl_s_reference_loaded_anew(self, tmp_path, trainer_class, start):
        train = lambda: trained(trainer_class, tmp_path, STARTS[start](), beta=0.04)  # noqa: E731
        refused(train, "another model", "save_pretrained", "beta=0")

    @pytest.mark.parametrize("first", [0, 3])
    def test_at_every_layer_that_any_reward_of_a_plain_trainer_reads(self, tmp_path, first):
        model = pocket()
        with torch.no_grad():  # the streams differ after the last layer alone
            model.model.layers[3].post_feedforward_layernorm.weight.add_(1.0)
        layers = [first, 3 - first]
        rewards = [
            mr.FeatureReward(mr.direction(f"at{n}", torch.ones(128), mr.HookPoint(n)), name=f"at{n}", reads="reference")
            for n in layers
        ]
        args = GRPOConfig(**options(tmp_path, **(FAST | {"beta": 0.04})))
        trainer = GRPOTrainer(model, rewards, args, mr.pocket.dataset("train", 32))
        refused(trainer.train, "another model")

    def test_other_weights_in_a_subfolder(self, tmp_path):
        pocket().save_pretrained(tmp_path)
        moved(pocket()).save_pretrained(tmp_path / "start")
        model = lambda: AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="start")  # noqa: E731
        refused(lambda: trained(MechRewardGRPOTrainer, tmp_path / "out", model(), beta=0.04), "another model")

    def test_options_of_loading_that_the_policy_did_not_have(self, tmp_path):
        moved(pocket()).save_pretrained(tmp_path / "other")
        model = AutoModelForCausalLM.from_pretrained(mr.pocket.path())
        model.config._name_or_path = str(tmp_path)
        pocket().save_pretrained(tmp_path)
        changes = {"beta": 0.04, "model_init_kwargs": {"subfolder": "other"}}
        refused(lambda: trained(MechRewardGRPOTrainer, tmp_path / "out", model, **changes), "model_init_kwargs")

    def test_an_adapter_that_came_with_the_plain_trainer_s_model(self, tmp_path):
        with_adapter().save_pretrained(tmp_path / "adapter")
        model = PeftModel.from_pretrained(pocket(), tmp_path / "adapter", is_trainable=True)
        refused(lambda: trained(GRPOTrainer, tmp_path, model, beta=0.0), "adapter", "MechRewardGRPOTrainer")

    @pytest.mark.parametrize("beta", [0.0, 0.04])
    def test_an_adapter_that_does_not_start_at_zero(self, tmp_path, beta):
        lora = LoraConfig(**LORA, init_lora_weights=False)
        train = lambda: trained(MechRewardGRPOTrainer, tmp_path, pocket(), peft=lora, beta=beta)  # noqa: E731
        refused(train, "adapter", "get_peft_model")

    def test_a_monitor_s_reference_counts_too(self, tmp_path):
        watched = mr.FeatureReward(mr.direction("d", torch.randn(128), mr.HookPoint(1)), reads="reference")
        args = MechRewardGRPOConfig(**options(tmp_path))
        data = mr.pocket.dataset("train", 32)
        right = mr.OutcomeReward(mr.verifiers.math_boxed)
        trainer = MechRewardGRPOTrainer(moved(pocket()), right, args, data, monitors=[watched])
        refused(trainer.train, "another model")

    def test_a_reference_without_a_path(self, tmp_path):
        train = lambda: trained(MechRewardGRPOTrainer, tmp_path, without_a_path(), beta=0.04)  # noqa: E731
        refused(train, "no path", "beta=0")

    def test_a_path_that_is_gone(self, tmp_path):
        model = pocket()
        model.config._name_or_path = str(tmp_path / "gone")
        refused(lambda: trained(MechRewardGRPOTrainer, tmp_path, model, beta=0.04), "gone", "beta=0")

    def test_tokens_that_the_reference_lacks(self, tmp_path):
        train = lambda: trained(MechRewardGRPOTrainer, tmp_path, with_more_tokens(), beta=0.04)  # noqa: E731
        refused(train, "520 tokens", "512", "save_pretrained")

    @pytest.mark.slow
    def test_a_plain_trainer_that_begins_to_read_too_late(self, tmp_path):
        trained(GRPOTrainer, tmp_path, pocket(), beta=0.0, save_strategy="steps", save_steps=2)
        again = lambda: trained(  # noqa: E731
            GRPOTrainer, tmp_path, pocket(), beta=0.0, resume=str(tmp_path / "checkpoint-2"), max_steps=4
        )
        refused(again, "MechRewardGRPOTrainer", "under way")


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_a_resumed_training_does_not_compare_again(tmp_path, beta, monkeypatch, caplog):
    saves = {"save_strategy": "steps", "save_steps": 2, "beta": beta}
    trained(MechRewardGRPOTrainer, tmp_path, pocket(), **saves)
    assert json.loads((tmp_path / "checkpoint-2" / STATE_FILE).read_text())["reference_gap"] < 1e-6
    monkeypatch.setattr("mechreward.rollout.reference._apart", lambda *_: pytest.fail("compared again"))
    checkpoint = str(tmp_path / "checkpoint-2")
    trained(MechRewardGRPOTrainer, tmp_path, pocket(), resume=checkpoint, max_steps=4, **saves)
    assert "could not be compared" not in caplog.text
    # A plain trainer keeps no such file: it says once that it has not compared.
    if beta:
        trained(GRPOTrainer, tmp_path, pocket(), resume=checkpoint, max_steps=4, **saves)
        assert caplog.text.count("could not be compared") == 1
