"""The trainers: what is read, from which pass, at what cost, and what becomes of it."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

import mechreward as mr
from mechreward.errors import ConfigError, ModelMismatchError, RewardError
from mechreward.integrations.trl_grpo import MechRewardGRPOConfig, MechRewardGRPOTrainer
from mechreward.readout import Request
from mechreward.reward.base import Reward
from mechreward.reward.guards import RepetitionDetector, Verdict
from mechreward.rollout.batch import Call, Scores
from mechreward.rollout.plain import describe

torch.manual_seed(0)
VECTOR = torch.randn(128)
POINT = mr.HookPoint(1)


def options(folder, **changes):
    return {
        "output_dir": str(folder),
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 24,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    } | changes


def independent(model, prompt_ids, completion_ids, point=POINT):
    """The reading by hand: one unpadded sequence, HF's own hidden states, one dot product a token."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    with torch.no_grad():
        ids = torch.tensor([[*prompt_ids, *completion_ids]])
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[point.layer + 1][0]
    for module, training in modes.items():
        module.training = training
    return hidden[len(prompt_ids) :] @ VECTOR


class Spy(Reward):
    """Compares what it is given with readings by hand, on the very weights of that step."""

    def __init__(self, reads=("policy",), read_last=False):
        super().__init__("spy")
        self.readout = mr.direction("direction", VECTOR, POINT)
        self.asks = [Request(self.readout, r, read_last) for r in reads]
        self.errors = {r: [] for r in reads}
        self.gaps = []
        self.models = {}
        self.masks = []

    @property
    def requests(self):
        return self.asks

    def score(self, batch, readings):
        for ask in self.asks:
            read, model = readings[ask], self.models[ask.reads]()
            for i, (prompt, completion) in enumerate(zip(batch.prompt_ids, batch.completion_ids, strict=True)):
                real = len(completion) - (0 if ask.read_last else 1)
                assert read.mask[i].sum() == real and read.mask[i, :real].all()
                want = independent(model, prompt, completion)[:real]
                scale = want.abs().max().item() if real else 1.0
                error = (read.values[i, :real, 0] - want).abs().max().item() if real else 0.0
                self.errors[ask.reads].append(error / scale)
            self.masks.append(read.mask)
        if len(self.asks) == 2:
            a, b = (readings[ask].values for ask in self.asks)
            self.gaps.append((a - b).abs().max().item())
        first = readings[self.asks[0]]
        return Scores((first.values[..., 0] * first.mask).sum(1) / first.mask.sum(1).clamp(min=1) / 100)


def spied(trainer_class, folder, reads=("policy",), peft=None, read_last=False, **changes):
    spy = Spy(reads, read_last)
    config = MechRewardGRPOConfig if trainer_class is MechRewardGRPOTrainer else GRPOConfig
    trainer = trainer_class(
        model=mr.pocket.path(),
        reward_funcs=spy,
        args=config(**options(folder, **changes)),
        train_dataset=mr.pocket.dataset("train", 64),
        eval_dataset=mr.pocket.dataset("test", 4),
        peft_config=peft,
    )
    start = AutoModelForCausalLM.from_pretrained(mr.pocket.path())
    spy.models = {"policy": lambda: trainer.model, "reference": lambda: start}
    return trainer, spy


class TestTaps:
    @pytest.mark.parametrize(
        ("tap", "changes"),
        [
            ("generation", {}),
            ("generation", {"beta": 0.0}),
            ("generation", {"gradient_accumulation_steps": 2}),
            ("old_logprobs", {"num_iterations": 2}),
            ("old_logprobs", {"num_iterations": 2, "gradient_accumulation_steps": 2, "beta": 0.0}),
            ("old_logprobs", {"steps_per_generation": 2, "per_device_train_batch_size": 4}),
            ("generation", {"steps_per_generation": 2, "mask_truncated_completions": True, "max_completion_length": 8}),
            ("generation", {"gradient_checkpointing": True}),
        ],
    )
    def test_policy_readings_equal_an_unpadded_forward(self, tmp_path, tap, changes):
        trainer, spy = spied(MechRewardGRPOTrainer, tmp_path, max_steps=3, **({} | changes))
        trainer.train()
        assert trainer.taps == {"policy": tap}
        assert spy.errors["policy"] and max(spy.errors["policy"]) < 1e-5

    @pytest.mark.parametrize("changes", [{}, {"num_iterations": 2}])
    def test_reference_and_policy_are_not_swapped(self, tmp_path, changes):
        trainer, spy = spied(MechRewardGRPOTrainer, tmp_path, ("policy", "reference"), max_steps=4, **changes)
        trainer.train()
        assert trainer.taps["reference"] == "reference"
        assert max(spy.errors["policy"]) < 1e-5 and max(spy.errors["reference"]) < 1e-5
        assert spy.gaps[-1] > 0.05, "after updates the policy's readings are no longer the reference's"

    def test_reference_without_kl_is_a_frozen_copy(self, tmp_path):
        trainer, spy = spied(MechRewardGRPOTrainer, tmp_path, ("policy", "reference"), max_steps=3, beta=0.0)
        trainer.train()
        assert trainer.taps["reference"] == "forward"
        assert max(spy.errors["reference"]) < 1e-5 and spy.gaps[-1] > 0.05

    def test_truncated_completions_are_read_whole_on_the_reference(self, tmp_path):
        # TRL's own reference pass hides them from the attention.
        changes = {"mask_truncated_completions": True, "max_completion_length": 8}
        trainer, spy = spied(MechRewardGRPOTrainer, tmp_path, ("reference",), **changes)
        trainer.train()
        assert trainer.taps == {"reference": "forward"} and max(spy.errors["reference"]) < 1e-5

    def test_the_last_token_is_read_on_request(self, tmp_path):
        trainer, spy = spied(MechRewardGRPOTrainer, tmp_path, read_last=True)
        trainer.train()
        assert trainer.taps == {"policy with last token": "forward"} and max(spy.errors["policy"]) < 1e-5

    @pytest.mark.parametrize("dropout", [0.0, 0.05])
    def test_lora(self, tmp_path, dropout):
        from peft import LoraConfig

        lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=dropout)
        changes = {"max_steps": 4, "learning_rate": 1e-2}
        trainer, spy = spied(MechRewardGRPOTrainer, tmp_path, ("policy", "reference"), peft=lora, **changes)
        trainer.train()
        assert trainer.taps == {"policy": "forward" if dropout else "generation", "reference": "reference"}
        assert max(spy.errors["policy"]) < 1e-5 and max(spy.errors["reference"]) < 1e-5
        assert spy.gaps[0] < 1e-4 and spy.gaps[-1] > 0.05

    def test_all_taps_agree_on_the_same_rollouts(self, tmp_path):
        trainer, _ = spied(MechRewardGRPOTrainer, tmp_path, num_iterations=2)
        from mechreward.rollout.plain import read_with_trainer

        seen = []

        class Compare(Spy):
            def score(self, batch, readings):
                bank = trainer.passes.banks["policy", False]
                own = read_with_trainer(trainer, batch, bank, "policy", False)
                tapped, forward = readings[self.asks[0]].values, next(iter(own.values())).values
                seen.append((tapped - forward).abs().max().item() / forward.abs().max().item())
                return Scores(torch.zeros(len(batch)))

        for changes in ({}, {"num_iterations": 2}):
            compare = Compare()
            args = MechRewardGRPOConfig(**options(tmp_path, **changes))
            trainer = MechRewardGRPOTrainer(
                mr.pocket.path(), compare, args, train_dataset=mr.pocket.dataset("train", 32)
            )
            trainer.train()
        assert len(seen) >= 3 and max(seen) < 1e-5


class TestPlainTrainer:
    def test_it_reads_the_live_policy(self, tmp_path):
        trainer, spy = spied(GRPOTrainer, tmp_path, ("policy", "reference"), max_steps=3)
        trainer.train()
        assert max(spy.errors["policy"]) < 1e-5 and max(spy.errors["reference"]) < 1e-5
        assert spy.gaps[-1] > 0.05

    def test_dense_rewards_are_refused(self, tmp_path):
        reward = mr.FeatureReward(mr.direction("d", VECTOR, POINT), aggregation="per_token")
        trainer = GRPOTrainer(mr.pocket.path(), reward, GRPOConfig(**options(tmp_path)), mr.pocket.dataset("train", 32))
        with pytest.raises(RewardError, match="MechRewardGRPOTrainer"):
            trainer.train()


def count_forwards(folder, reads, **changes):
    """Calls of the policy's and the reference's first layer in one step with generation."""

    def reward(completions, **_):
        return [float(len(c)) for c in completions]

    if reads is not None:
        reward = mr.FeatureReward(mr.direction("d", VECTOR, POINT), reads=reads)
    trainer = MechRewardGRPOTrainer(
        mr.pocket.path(),
        reward,
        MechRewardGRPOConfig(**options(folder, max_steps=1, seed=3, **changes)),
        mr.pocket.dataset("train", 32),
    )
    calls = {"policy": 0, "reference": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    trainer.model.model.layers[0].register_forward_hook(count("policy"))
    if trainer.ref_model is not None:
        trainer.ref_model.model.layers[0].register_forward_hook(count("reference"))
    trainer.train()
    return calls


@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2}])
@pytest.mark.parametrize("reads", ["policy", "reference"])
def test_readings_cost_no_forward_of_their_own(tmp_path, reads, changes):
    compared = int(reads == "reference")  # with the policy, once, before anything is trained
    plain = count_forwards(tmp_path, None, **changes)
    assert count_forwards(tmp_path, reads, **changes) == {name: n + compared for name, n in plain.items()}


class Recorder(MechRewardGRPOTrainer):
    """Keeps what each generation step hands to the loss."""

    def __init__(self, *args, **kwargs):
        self.outputs, self.reward_tables = [], []
        super().__init__(*args, **kwargs)

    def _calculate_rewards(self, *args):
        self.reward_tables.append(super()._calculate_rewards(*args))
        return self.reward_tables[-1]

    def _generate_and_score_completions(self, inputs):
        self.outputs.append(super()._generate_and_score_completions(inputs))
        self.batch = self._step_state.batch
        return self.outputs[-1]


def test_dense_advantages_against_a_loop_in_float64(tmp_path):
    dense = mr.FeatureReward(mr.direction("d", VECTOR, POINT), aggregation="per_token")
    composite = mr.CompositeReward([dense, mr.OutcomeReward(mr.verifiers.math_boxed)], [0.5, 1.0])
    args = MechRewardGRPOConfig(**options(tmp_path, max_steps=1, reward_weights=[2.0]))
    trainer = Recorder(mr.pocket.path(), composite, args, train_dataset=mr.pocket.dataset("train", 32))
    start = AutoModelForCausalLM.from_pretrained(mr.pocket.path())
    trainer.train()
    output, batch = trainer.outputs[0], trainer.batch
    assert output["advantages"].shape == output["completion_ids"].shape

    rewards = trainer.reward_tables[0][:, 0].double() * 2.0  # the dense part adds 0 to the scalar
    assert set(rewards.tolist()) <= {0.0, 2.0}
    for g in range(len(batch) // 4):
        rows = range(4 * g, 4 * g + 4)
        group = rewards[list(rows)]
        tokens = {}
        for i in rows:
            values = independent(start, batch.prompt_ids[i], batch.completion_ids[i]).double()
            for t in range(len(batch.completion_ids[i]) - 1):
                tokens[i, t] = values[t]
        pool = torch.stack(list(tokens.values()))
        for i in rows:
            scalar = (rewards[i] - group.mean()) / (group.std() + 1e-4)
            for t in range(len(batch.completion_ids[i])):
                z = (tokens[i, t] - pool.mean()) / (pool.std() + 1e-4) if (i, t) in tokens else 0.0
                want = float(scalar + 0.5 * 2.0 * z)  # lambda = weight x reward weight, once
                assert output["advantages"][i, t].item() == pytest.approx(want, abs=2e-4)


def test_dropped_rollouts_have_no_advantage_in_any_column(tmp_path):
    class DropFirst:
        requests = ()

        def __call__(self, batch, readings):
            from mechreward.hacking import Verdict

            gone = torch.arange(len(batch)) % 4 == 0
            return Verdict(torch.ones(len(batch)), gone, [["first"] if g else [] for g in gone.tolist()])

    dense = mr.FeatureReward(mr.direction("d", VECTOR, POINT), aggregation="per_token")
    length = lambda completion_ids, **_: [float(len(c)) for c in completion_ids]  # noqa: E731
    args = MechRewardGRPOConfig(**options(tmp_path, max_steps=1, log_completions=True))
    trainer = Recorder(mr.pocket.path(), [dense, length], args, mr.pocket.dataset("train", 32), guards=[DropFirst()])
    trainer.train()
    advantages = trainer.outputs[0]["advantages"]
    assert (advantages[0::4] == 0).all() and (advantages[1::4] != 0).any()
    table = pd.read_parquet(next((tmp_path / "completions").glob("*.parquet")))
    assert (table["flags"][0::4] == "first").all() and (table["flags"][1::4] == "").all()


def test_completions_table_and_metrics_show_every_part(tmp_path):
    feature = mr.FeatureReward(mr.direction("d", VECTOR, POINT), name="feature")
    composite = mr.CompositeReward([feature, mr.OutcomeReward(mr.verifiers.math_boxed)], [0.3, 1.0])
    watched = mr.FeatureReward(mr.direction("w", -VECTOR, POINT), name="watched")
    args = MechRewardGRPOConfig(**options(tmp_path, log_completions=True))
    trainer = MechRewardGRPOTrainer(
        mr.pocket.path(), composite, args, mr.pocket.dataset("train", 32), monitors=[watched]
    )
    assert args.beta == 0.04
    trainer.train()
    table = pd.read_parquet(sorted((tmp_path / "completions").glob("*.parquet"))[-1])
    assert {"composite", "composite/feature", "composite/math_boxed", "monitor/watched", "flags"} <= set(table.columns)
    whole = 0.3 * table["composite/feature"].fillna(0) + table["composite/math_boxed"]
    assert table["composite"].to_numpy() == pytest.approx(whole.to_numpy(), abs=1e-5)
    assert table["monitor/watched"].to_numpy() == pytest.approx(-table["composite/feature"].to_numpy(), abs=1e-4)
    log = trainer.state.log_history[0]
    assert {"composite/feature", "composite/seconds", "mechreward/hook_seconds", "guards/flagged"} <= set(log)


def test_guards_and_monitors_count_as_our_time(tmp_path):
    """Both sleep: what is logged must not be less than that."""

    class SlowGuard(RepetitionDetector):
        def __call__(self, batch, readings):
            time.sleep(0.3)
            return super().__call__(batch, readings)

    class SlowMonitor(mr.FeatureReward):
        def score(self, batch, readings, sense=1.0):
            time.sleep(0.3)
            return super().score(batch, readings, sense)

    watched = SlowMonitor(mr.direction("w", VECTOR, POINT))
    trainer = MechRewardGRPOTrainer(
        mr.pocket.path(),
        mr.OutcomeReward(mr.verifiers.math_boxed),
        MechRewardGRPOConfig(**options(tmp_path)),
        mr.pocket.dataset("train", 32),
        guards=[SlowGuard()],
        monitors=[watched],
    )
    trainer.train()
    assert trainer.state.log_history[0]["mechreward/hook_seconds"] >= 0.6


def test_without_args_kl_is_on_and_the_shipped_model_has_an_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mechreward.integrations.trl.trainer.MechRewardGRPOConfig", _on_cpu)
    trainer = MechRewardGRPOTrainer(
        "mechreward/pocket", mr.OutcomeReward(mr.verifiers.math_boxed), train_dataset=mr.pocket.dataset("train", 8)
    )
    assert trainer.beta == 0.04 and trainer.ref_model is not None
    assert trainer.model.config.model_type == "gemma2" and len(trainer.guards) == 1


def _on_cpu(output_dir):
    return MechRewardGRPOConfig(output_dir=output_dir, bf16=False, use_cpu=True, report_to=[])


def test_a_monitor_does_not_move_the_policy(tmp_path):
    """The same seed with and without a monitor ends with the same weights, bit for bit."""
    ends = []
    for monitors in ([], [mr.FeatureReward(mr.direction("w", 100 * VECTOR, POINT), name="watched")]):
        trainer = MechRewardGRPOTrainer(
            mr.pocket.path(),
            mr.OutcomeReward(mr.verifiers.math_boxed),
            MechRewardGRPOConfig(**options(tmp_path)),
            mr.pocket.dataset("train", 32),
            monitors=monitors,
        )
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(*ends)


def test_evaluation_during_training(tmp_path):
    trainer, spy = spied(
        MechRewardGRPOTrainer, tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4
    )
    trainer.train()
    assert max(spy.errors["policy"]) < 1e-5
    assert sum("eval_reward" in log for log in trainer.state.log_history) == 2


def hybrid(folder, **changes):
    feature = mr.FeatureReward(mr.direction("d", VECTOR, POINT), name="feature")
    composite = mr.CompositeReward([feature, mr.OutcomeReward(mr.verifiers.math_boxed)], [0.3, 1.0], mode="hero")
    args = MechRewardGRPOConfig(**options(folder, scale_rewards="none", **changes))
    return MechRewardGRPOTrainer(mr.pocket.path(), composite, args, mr.pocket.dataset("train", 64)), composite


def test_resume_gives_the_same_metrics(tmp_path):
    whole, composite = hybrid(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    again, resumed = hybrid(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    wanted = ("reward", "composite/feature", "composite/math_boxed", "composite/hero_sigma_bar", "kl", "loss")
    for step in (3, 4):
        a, b = (next(x for x in t.state.log_history if x["step"] == step) for t in (whole, again))
        for name in wanted:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), (step, name)
    assert resumed.sigma_bar == pytest.approx(composite.sigma_bar)


TWO_PROCESSES = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import mechreward as mr
from test_trl import *

def rollout(prompts, trainer):
    # Fixed completions, different for the rollouts of a group, decided by the prompt and the rollout's global index.
    ids = trainer._tokenize_prompts(prompts)[0]
    first = trainer.accelerator.process_index * len(prompts)
    done = [(p * 3)[: 5 + (first + i) % 4 * 3] + [2] for i, p in enumerate(ids)]
    return {{"prompt_ids": ids, "completion_ids": done, "logprobs": None}}

rewards = [
    mr.CompositeReward([mr.FeatureReward(mr.direction("f", VECTOR, POINT), name="f", normalize="group"),
                        mr.FeatureReward(mr.direction("t", VECTOR, POINT), name="t", aggregation="per_token")],
                       [1.0, 0.5]),
]
per_device = 8 // int({processes})
args = MechRewardGRPOConfig(**options({folder!r}, per_device_train_batch_size=per_device, max_steps=1,
                                      ddp_backend="gloo" if {processes} > 1 else None))
# Two questions, one batch: every process count sees the same groups.
trainer = Recorder(mr.pocket.path(), rewards, args, mr.pocket.dataset("train", 2), rollout_func=rollout)
trainer.train()
out = trainer.outputs[0]
mine = {{"rewards": trainer.reward_tables[0][:, 0].tolist(), "prompts": trainer.batch.prompts,
         "advantages": out["advantages"].tolist(), "lengths": out["completion_mask"].sum(1).tolist()}}
json.dump(mine, open({folder!r} + f"/result-{processes}-{{trainer.accelerator.process_index}}.json", "w"))
"""


@pytest.mark.slow
def test_two_processes_give_the_rewards_and_advantages_of_one(tmp_path):
    found = {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for processes in (1, 2):
        script = tmp_path / f"run{processes}.py"
        tests = str(Path(__file__).parent)
        script.write_text(TWO_PROCESSES.format(tests=tests, folder=str(tmp_path), processes=processes))
        running = []
        for rank in range(processes):
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
            names = {k: str(v) for k, v in group.items()} | {"MASTER_PORT": port} if processes > 1 else {}
            environment = {**os.environ, **names, "ACCELERATE_USE_CPU": "true"}
            running.append(
                subprocess.Popen([sys.executable, str(script)], env=environment, stderr=subprocess.PIPE, text=True)
            )
        for process in running:
            _, said = process.communicate(timeout=200)
            assert process.returncode == 0, said[-3000:]
        files = [tmp_path / f"result-{processes}-{rank}.json" for rank in range(processes)]
        found[processes] = [json.loads(f.read_text()) for f in files]
    one, two = found[1][0], found[2]
    assert [p for part in two for p in part["prompts"]] == one["prompts"]
    assert two[0]["rewards"] == pytest.approx(one["rewards"], abs=1e-5)
    halves = [row for part in two for row in part["advantages"]]
    for a, b, n in zip(one["advantages"], halves, one["lengths"], strict=True):
        assert a[:n] == pytest.approx(b[:n], abs=1e-4)


class TestBadInput:
    def test_config_typo(self, tmp_path):
        with pytest.raises(ConfigError, match=r"no option 'betta'\. Did you mean 'beta'\?"):
            MechRewardGRPOConfig(output_dir=str(tmp_path), betta=0.1)

    def test_wrong_width_is_refused_before_training(self, tmp_path):
        reward = mr.FeatureReward(mr.direction("d", torch.randn(64), POINT))
        with pytest.raises(ModelMismatchError, match="width 64"):
            MechRewardGRPOTrainer(
                mr.pocket.path(), reward, MechRewardGRPOConfig(**options(tmp_path)), mr.pocket.dataset("train", 8)
            )

    def test_dense_with_sequence_level_sampling(self, tmp_path):
        reward = mr.FeatureReward(mr.direction("d", VECTOR, POINT), aggregation="per_token")
        args = MechRewardGRPOConfig(**options(tmp_path, importance_sampling_level="sequence", loss_type="grpo"))
        with pytest.raises(RewardError, match="importance_sampling_level"):
            MechRewardGRPOTrainer(mr.pocket.path(), reward, args, mr.pocket.dataset("train", 8))

    def test_moving_reference(self, tmp_path):
        reward = mr.FeatureReward(mr.direction("d", VECTOR, POINT), reads="reference")
        args = MechRewardGRPOConfig(**options(tmp_path, sync_ref_model=True))
        with pytest.raises(RewardError, match="sync_ref_model"):
            MechRewardGRPOTrainer(mr.pocket.path(), reward, args, mr.pocket.dataset("train", 8))

    def test_hero_warns_where_its_weight_cancels(self, tmp_path):
        feature = mr.FeatureReward(mr.direction("d", VECTOR, POINT))
        composite = mr.CompositeReward([feature, mr.OutcomeReward(mr.verifiers.math_boxed)], mode="hero")
        with pytest.warns(UserWarning, match="scale_rewards"):
            MechRewardGRPOTrainer(
                mr.pocket.path(), composite, MechRewardGRPOConfig(**options(tmp_path)), mr.pocket.dataset("train", 8)
            )

    def test_a_reward_that_raises_loses_nothing(self, tmp_path):
        calls = []

        def breaks(completions, **_):
            calls.append(1)
            if len(calls) == 3:
                raise ZeroDivisionError("no tokens")
            return [float(len(c)) for c in completions]

        feature = mr.FeatureReward(mr.direction("d", VECTOR, POINT))
        args = MechRewardGRPOConfig(**options(tmp_path, max_steps=4))
        trainer = MechRewardGRPOTrainer(mr.pocket.path(), [feature, breaks], args, mr.pocket.dataset("train", 32))
        with pytest.raises(RewardError, match=r"ZeroDivisionError: no tokens \(step 2\)") as caught:
            trainer.train()
        assert "\n" not in str(caught.value)
        assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
        hooked = [m for m in trainer.model.model.layers if m._forward_hooks]
        assert len(hooked) == 1 and trainer.passes.policy_tap._reader is None, "no window is left open"
        calls.append(1)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert trainer.state.global_step == 4

    def test_no_gold_column(self, tmp_path):
        data = Dataset.from_list([{"prompt": "Question: 1+1?\nAnswer:", "anser": "2"}] * 8)
        args = MechRewardGRPOConfig(**options(tmp_path))
        trainer = MechRewardGRPOTrainer(mr.pocket.path(), mr.OutcomeReward(mr.verifiers.math_boxed), args, data)
        with pytest.raises(RewardError, match="there are: anser"):
            trainer.train()

    def test_eos_only_completions_have_no_feature_reward(self, tmp_path):
        def rollout(prompts, trainer):
            ids = trainer._tokenize_prompts(prompts)[0]
            done = [[2] if i % 2 else [*p[:6], 2] for i, p in enumerate(ids)]
            return {"prompt_ids": ids, "completion_ids": done, "logprobs": None}

        feature = mr.FeatureReward(mr.direction("d", VECTOR, POINT))
        args = MechRewardGRPOConfig(**options(tmp_path, max_steps=1))
        trainer = Recorder(mr.pocket.path(), feature, args, mr.pocket.dataset("train", 32), rollout_func=rollout)
        trainer.train()
        table, advantages = trainer.reward_tables[0][:, 0], trainer.outputs[0]["advantages"]
        assert table[1::2].isnan().all() and not table[0::2].isnan().any()
        assert (advantages[1::2] == 0).all()

    def test_ending_at_once_is_no_way_out_of_a_penalty_among_several_functions(self, tmp_path):
        def rollout(prompts, trainer):
            ids = trainer._tokenize_prompts(prompts)[0]
            done = [[2] if i % 4 == 3 else [*p[: 3 + i % 4], 2] for i, p in enumerate(ids)]
            return {"prompt_ids": ids, "completion_ids": done, "logprobs": None}

        penalty = mr.FeatureReward(mr.direction("d", VECTOR, POINT, bias=-1000.0))
        outcome = mr.OutcomeReward(mr.verifiers.math_boxed)
        args = MechRewardGRPOConfig(**options(tmp_path, max_steps=1))
        trainer = Recorder(
            mr.pocket.path(), [penalty, outcome], args, mr.pocket.dataset("train", 32), rollout_func=rollout
        )
        trainer.train()
        features, right = trainer.reward_tables[0].view(-1, 4, 2).unbind(-1)
        assert (features < -500).all() and not right.isnan().any()
        assert torch.equal(features[:, 3], features[:, :3].min(dim=1).values)  # TRL's sum would take it for 0
        assert (features[:, :3].std(dim=1) > 0).all()

    def test_what_a_guard_drops_and_what_weighs_nothing_are_not_filled(self, tmp_path):
        class DropsTheFirst:
            requests = ()

            def __call__(self, batch, readings):
                first = torch.arange(len(batch)) % 4 == 0
                return Verdict(torch.ones(len(batch)), first, [[] for _ in first])

        def rollout(prompts, trainer):
            ids = trainer._tokenize_prompts(prompts)[0]
            done = [[2] if i % 4 == 3 else [*p[: 3 + i % 4], 2] for i, p in enumerate(ids)]
            return {"prompt_ids": ids, "completion_ids": done, "logprobs": None}

        rewards = [mr.FeatureReward(mr.direction(n, VECTOR, POINT), name=n) for n in "ab"]
        outcome = mr.OutcomeReward(mr.verifiers.math_boxed)
        args = MechRewardGRPOConfig(**options(tmp_path, max_steps=1, reward_weights=[1.0, 0.0, 1.0]))
        trainer = Recorder(
            mr.pocket.path(), [*rewards, outcome], args, mr.pocket.dataset("train", 32), rollout_func=rollout,
            guards=[DropsTheFirst()],
        )  # fmt: skip
        trainer.train()
        a, b, _ = trainer.reward_tables[0].view(-1, 4, 3).unbind(-1)
        assert a[:, 0].isnan().all() and b[:, 0].isnan().all()  # dropped
        assert torch.equal(a[:, 3], a[:, 1:3].min(dim=1).values) and b[:, 3].isnan().all()
        assert trainer.state.log_history[0]["a/unscored"] == 2 and "b/unscored" not in trainer.state.log_history[0]


def test_readouts_at_several_layers_and_models(tmp_path):
    """Each pass reads its own layers, though the hooks of all are on the model."""
    from peft import LoraConfig

    rewards = [
        mr.FeatureReward(mr.direction("a", VECTOR, mr.HookPoint(1)), name="a"),
        mr.FeatureReward(mr.direction("b", VECTOR, mr.HookPoint(2)), name="b", reads="reference"),
        mr.FeatureReward(mr.direction("c", VECTOR, mr.HookPoint(0)), name="c", read_last=True),
    ]
    seen = {}

    def look(self, *args):
        table = super(Recorder, self)._calculate_rewards(*args)
        batch, start = self._step_state.batch, AutoModelForCausalLM.from_pretrained(mr.pocket.path())
        for i, (p, c) in enumerate(zip(batch.prompt_ids, batch.completion_ids, strict=True)):
            a = independent(self.model, p, c, mr.HookPoint(1))[:-1].mean()
            b = independent(start, p, c, mr.HookPoint(2))[:-1].mean()
            last = independent(self.model, p, c, mr.HookPoint(0)).mean()
            seen[i] = (table[i].tolist(), [a.item(), b.item(), last.item()])
        return table

    lora = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.0)
    args = MechRewardGRPOConfig(**options(tmp_path, num_iterations=2, max_steps=4, learning_rate=1e-2))
    watching = type("Watching", (Recorder,), {"_calculate_rewards": look})
    trainer = watching(mr.pocket.path(), rewards, args, mr.pocket.dataset("train", 32), peft_config=lora)
    trainer.train()
    assert trainer.taps == {"policy": "old_logprobs", "reference": "reference", "policy with last token": "forward"}
    for got, want in seen.values():
        assert got == pytest.approx(want, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("reads", ["policy", "reference"])
def test_with_lora_the_old_logprob_pass_is_not_taken_for_the_reference(tmp_path, reads):
    from peft import LoraConfig

    def forwards(reward):
        lora = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.0)
        args = MechRewardGRPOConfig(**options(tmp_path, max_steps=1, num_iterations=2))
        trainer = MechRewardGRPOTrainer(
            mr.pocket.path(), reward, args, mr.pocket.dataset("train", 32), peft_config=lora
        )
        calls = []
        trainer.model.get_base_model().model.layers[0].register_forward_hook(lambda *_: calls.append(1))
        trainer.train()
        return len(calls)

    tapped = forwards(mr.FeatureReward(mr.direction("d", VECTOR, POINT), reads=reads))
    compared = 2 * (reads == "reference")  # policy and reference, once, before anything is trained
    assert tapped == forwards(lambda completions, **_: [float(len(c)) for c in completions]) + compared


def test_generation_without_cache_is_not_tapped(tmp_path):
    trainer, spy = spied(MechRewardGRPOTrainer, tmp_path, generation_kwargs={"use_cache": False})
    trainer.train()
    assert trainer.taps == {"policy": "forward"} and max(spy.errors["policy"]) < 1e-5


def test_an_adapter_that_came_with_the_model_is_the_reference(tmp_path):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)

    def model():
        torch.manual_seed(1)
        return get_peft_model(AutoModelForCausalLM.from_pretrained(mr.pocket.path()), lora)

    reward = mr.FeatureReward(mr.direction("d", VECTOR, POINT), reads="reference")
    data = mr.pocket.dataset("train", 32)
    start = model().eval()
    for beta in (0.0, 0.04):  # a copy of ours; TRL's copy of the adapter
        args = MechRewardGRPOConfig(**options(tmp_path, max_steps=3, beta=beta, learning_rate=1e-2))
        trainer = Recorder(model(), reward, args, data)
        trainer.train()
        assert trainer.taps == {"reference": "forward"}, "its dropout is active in TRL's reference pass"
        ids = zip(trainer.batch.prompt_ids, trainer.batch.completion_ids, strict=True)
        for got, (p, c) in zip(trainer.reward_tables[-1][:, 0].tolist(), ids, strict=True):
            assert got == pytest.approx(independent(start, p, c)[:-1].mean().item(), rel=1e-4, abs=1e-4)


def test_images_are_never_read_without_the_images(tmp_path):
    trainer, spy = spied(MechRewardGRPOTrainer, tmp_path)
    call = Call([""], [""], [[5, 6]], {"images": [["a picture"]]})
    rollouts = describe(trainer, call, [[1, 2]])
    with pytest.raises(RewardError, match="images"):
        trainer.rollout_source.read(rollouts, spy.asks)  # no step has run: nothing was tapped
