"""The KL coefficient: what moves it, that the loss uses it, and that it survives a checkpoint; the entropy floor."""

import json

import pytest
from peft import LoraConfig
from test_trl import options
from trl import GRPOConfig

import mechreward as mr
from mechreward.errors import ConfigError
from mechreward.hacking.regularization import adapted, scheduled
from mechreward.integrations.trl_grpo import STATE_FILE, MechRewardGRPOConfig, MechRewardGRPOTrainer


def same_for_all(completions, **_):
    return [1.0] * len(completions)


def trained(folder, resume=None, lora=True, config=MechRewardGRPOConfig, **changes):
    """Everybody gets the same reward, so that the loss is the KL penalty alone; an adapter begins away from 0."""
    short = {"max_steps": 3, "max_completion_length": 12, "learning_rate": 3e-3, "lr_scheduler_type": "constant"}
    args = config(**options(folder, **(short | changes)))
    adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.0, init_lora_weights=False)
    data = mr.pocket.dataset("train", 64)
    peft = {"peft_config": adapter} if lora else {}
    trainer = MechRewardGRPOTrainer(mr.pocket.path(), same_for_all, args, data, **peft)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def steps(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log]


def test_the_controller_by_hand():
    assert adapted(0.04, 0.11, 0.1) == pytest.approx(0.04 * 1.01)  # 10 % above the target
    assert adapted(0.04, 0.09, 0.1) == pytest.approx(0.04 * 0.99)
    assert adapted(0.04, 5.0, 0.1) == pytest.approx(0.04 * 1.02)  # at most 2 % a step
    assert adapted(0.04, 0.0, 0.1) == pytest.approx(0.04 * 0.98)
    assert adapted(0.04, 0.1, 0.1) == 0.04


def test_the_schedule_by_hand():
    assert [scheduled(0.1, 0.02, step, 5) for step in range(5)] == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02])
    assert scheduled(0.1, 0.02, 0, 1) == 0.1 and scheduled(0.1, 0.02, 9, 5) == pytest.approx(0.02)


def test_the_loss_uses_the_moving_coefficient(tmp_path):
    trainer = trained(tmp_path, kl_target=1e-6, beta=5.0)
    betas, kls, losses = (steps(trainer, name) for name in ("beta", "kl", "loss"))
    assert betas == pytest.approx([5.0 * 1.02**n for n in range(3)]) and trainer.beta == pytest.approx(5.0 * 1.02**3)
    assert min(kls) > 1e-3
    # Per token: loss = beta KL, the advantages being 0; TRL logs both over the same tokens, losses to 1e-4 or so.
    assert losses == pytest.approx([b * kl for b, kl in zip(betas, kls, strict=True)], rel=1e-3)


def test_the_coefficient_follows_the_kl_that_was_measured(tmp_path):
    trainer = trained(tmp_path, kl_target=0.3, beta=1.0, gradient_accumulation_steps=2)
    betas, kls = steps(trainer, "beta"), steps(trainer, "kl")
    for now, then, kl in zip(betas, [*betas[1:], trainer.beta], kls, strict=True):
        assert then == pytest.approx(adapted(now, kl, 0.3), rel=1e-6)
    assert len(set(betas)) == 3


def test_a_straight_line(tmp_path):
    trainer = trained(tmp_path, beta=3.0, beta_end=0.6)
    betas, kls, losses = (steps(trainer, name) for name in ("beta", "kl", "loss"))
    assert betas == pytest.approx([3.0, 1.8, 0.6])
    assert losses == pytest.approx([b * kl for b, kl in zip(betas, kls, strict=True)], rel=1e-3)


@pytest.mark.parametrize("option", [{"kl_target": 0.05}, {"beta_end": 0.5}])
def test_a_resume_goes_on_from_the_saved_coefficient(tmp_path, option):
    changes = {"beta": 2.0, "save_strategy": "steps", "save_steps": 2, **option}
    whole = trained(tmp_path, **changes)
    assert json.loads((tmp_path / "checkpoint-2" / STATE_FILE).read_text())["beta"] != 2.0
    again = trained(tmp_path, tmp_path / "checkpoint-2", **changes)
    assert steps(again, "beta") == pytest.approx(steps(whole, "beta"), rel=1e-6)
    assert len(set(steps(whole, "beta"))) == 3


def test_without_either_nothing_moves(tmp_path):
    for config in (MechRewardGRPOConfig, GRPOConfig):
        trainer = trained(tmp_path, config=config, beta=0.3, max_steps=1)
        assert trainer.beta == 0.3 and not steps(trainer, "beta")


def test_the_entropy_floor_turns_on_trls_bonus(tmp_path):
    """Nothing but the bonus moves the policy here: it raises the entropy, from the second step on."""
    without = trained(tmp_path, lora=False)
    trainer = trained(tmp_path, lora=False, entropy_floor=5.0, entropy_coef_delta=0.5)
    assert trainer.args.use_adaptive_entropy and trainer.args.entropy_target == 5.0
    assert steps(trainer, "entropy_coef") == [0.5, 1.0, 1.0] and not steps(without, "entropy_coef")
    assert steps(trainer, "entropy")[0] == pytest.approx(steps(without, "entropy")[0])
    assert steps(trainer, "entropy")[-1] > steps(without, "entropy")[-1] + 0.2


def test_above_the_floor_no_bonus_is_given(tmp_path):
    trainer = trained(tmp_path, lora=False, entropy_floor=1e-3, max_steps=2)
    assert steps(trainer, "entropy_coef") == [0.0] * 2


def test_a_configuration_may_be_made_again_from_its_own_values(tmp_path):
    first = MechRewardGRPOConfig(**options(tmp_path, entropy_floor=0.3, kl_target=0.1))
    again = MechRewardGRPOConfig(
        **options(tmp_path, entropy_floor=first.entropy_floor, kl_target=0.1),
        use_adaptive_entropy=first.use_adaptive_entropy,
        entropy_target=first.entropy_target,
    )
    assert (again.entropy_target, again.kl_target, again.beta_end) == (0.3, 0.1, None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kl_target": 0.0}, "kl_target must be a positive number, not 0.0"),
        ({"kl_target": float("nan")}, "kl_target must be a positive number"),
        ({"beta_end": 0.0}, "beta_end must be a positive number, not 0.0"),
        ({"beta_end": -1.0}, "beta_end must be"),
        ({"beta": 0.0, "beta_end": 0.1}, "beta_end needs beta > 0"),
        ({"beta": 0.0, "kl_target": 0.1}, "no reference model"),
        ({"beta_end": 0.1, "kl_target": 0.1}, "give one of them"),
        ({"entropy_floor": 0.0}, "entropy_floor must be a positive number"),
        ({"entropy_floor": 0.5, "use_adaptive_entropy": True, "entropy_target": 0.2}, "give one of them"),
        ({"kl_targt": 0.5}, "Did you mean 'kl_target'"),
    ],
)
def test_bad_values_are_refused(tmp_path, changes, says):
    with pytest.raises(ConfigError, match=says) as caught:
        MechRewardGRPOConfig(**options(tmp_path), **changes)
    assert "\n" not in str(caught.value)
