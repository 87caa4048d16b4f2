"""Several processes: a sharded model reads what a whole one does, and stays as it was."""

import copy
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import by_hand
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import mechreward as mr
from conftest import WIDTH, build, residual
from mechreward.integrations.trl_grpo import STATE_FILE
from mechreward.readout import HookPoint, ReadoutBank, direction
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.hf import read_forward

RECIPE = Path(__file__).parents[2] / "recipes" / "trl"
POINTS = [HookPoint(1), HookPoint(2, "resid_pre")]
READOUTS = [direction(str(p), torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)), p) for p in POINTS]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def as_accelerate_does(model):
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard([model.model.norm, model.model.embed_tokens, model.lm_head], reshard_after_forward=False)
    return fully_shard(model)


def as_trl_does_to_the_reference(model):
    return fully_shard(model)


def fsdp1(model):
    policy = ModuleWrapPolicy({type(model.model.layers[0])})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


KINDS = (as_accelerate_does, as_trl_does_to_the_reference, fsdp1)


def whole_weights(model) -> dict[str, torch.Tensor]:
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in model.named_parameters()}
    return {name: p.full_tensor() for name, p in model.named_parameters()}


def held(model) -> int:
    """How many weights are in this process."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())


def rollouts(*lengths: int) -> RolloutBatch:
    completions = [[3 + (7 * n + t) % 90 for t in range(n)] for n in lengths]
    return RolloutBatch(["p"] * len(lengths), ["c"] * len(lengths), [[5, 6]] * len(lengths), completions)


def check(model, plain, batch) -> None:
    """Read as long as 24 padded tokens a pass allow, and compare with one unpadded pass of a whole model."""
    found = read_forward(model, batch, ReadoutBank(READOUTS), max_tokens=24)
    for readout in READOUTS:
        for row, completion in enumerate(batch.completion_ids):
            count = len(completion) - 1
            stream = residual(plain, [5, 6, *completion], readout.hook_point).detach()[2 : 2 + count]
            want = (stream.double() @ readout.weight.double())[:, 0]
            got = found[readout].values[row, :count, 0].double()
            assert found[readout].mask[row].sum() == count
            assert ((got - want).abs() <= 1e-5 * stream.norm(dim=1) * readout.weight.norm()).all()


def in_process(rank: int, port: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    for shard in KINDS:
        check_sharded(rank, shard)
    distributed.destroy_process_group()


def check_sharded(rank: int, shard) -> None:
    plain = build("gemma2")
    model = shard(copy.deepcopy(plain))
    # Six passes in one process and one in the other; then nothing to read at all in one.
    unequal = rollouts(20, 3, 9, 17, 20, 12) if rank == 0 else rollouts(4)
    nothing = rollouts(6, 22) if rank == 0 else rollouts(1)
    passes, before = [], held(model)
    counting = model.register_forward_pre_hook(lambda *_: passes.append(1))
    check(model, plain, unequal)
    check(model, plain, nothing)
    counting.remove()
    everyone = [None, None]
    distributed.all_gather_object(everyone, len(passes))
    assert everyone[0] == everyone[1] > 2
    assert held(model) == before

    # Training goes on as if nothing had been read, and what is read next are the new weights.
    untouched = shard(copy.deepcopy(plain))
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(rank))
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=1e-3) for m in (model, untouched))
    for _ in range(2):
        loss, same = (m(input_ids=ids, labels=ids).loss for m in (model, untouched))
        assert loss == same
        loss.backward()
        same.backward()
        if shard is not fsdp1:  # whose next step would lack gradients after any pass here, ours or not
            check(model, plain, unequal)
        ours.step(), theirs.step(), ours.zero_grad(), theirs.zero_grad()
        plain.load_state_dict(whole_weights(model), strict=False)
        check(model, plain, nothing)


@pytest.mark.slow
def test_a_sharded_model_reads_as_a_whole_one_and_stays_as_it_was():
    torch.multiprocessing.spawn(in_process, (free_port(),), nprocs=2)


# The recipe, as `accelerate launch` runs it


def launch(folder: Path, file: str, *options: str, **changes) -> list[dict]:
    """What each of the two processes has seen."""
    small = {"per_device_train_batch_size": 4, "max_completion_length": 24, "disable_tqdm": True}
    command = [
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(RECIPE / file)),
        *(str(Path(__file__).parents[1] / "helpers" / "launched.py"), str(folder), json.dumps(small | changes)),
        *(str(RECIPE / "train.py"), "--out", str(folder / "out"), *options),
    ]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return [torch.load(folder / f"process-{rank}.pt", weights_only=False) for rank in range(2)]


def check_training(processes: list[dict]) -> None:
    """Readings, rewards and advantages by hand, on a whole model; in the end, both processes hold the same."""
    plain = AutoModelForCausalLM.from_pretrained(mr.pocket.path()).eval()
    start = {name: weight.clone() for name, weight in plain.state_dict().items()}
    pack = mr.load_pack("pocket/reasoning_pack")
    features, weights = [f.id for f in pack.features], torch.tensor([f.weight for f in pack.features])
    for steps in zip(*(process["steps"] for process in processes), strict=True):
        rewards = []
        for reads in ("reference", "policy"):
            # The head is tied: named_parameters leaves it out.
            plain.load_state_dict(steps[0]["weights"] if reads == "policy" else start, strict=False)
            for step in steps:
                values, mask = next(read for name, read in step["readings"].items() if name.startswith(reads))
                both = zip(step["prompt_ids"], step["completion_ids"], strict=True)
                for row, (prompt, completion) in enumerate(both):
                    count = len(completion) - 1
                    assert mask[row].sum() == count and mask[row, :count].all()
                    with torch.no_grad():
                        ids = torch.tensor([[*prompt, *completion]])
                        stream = plain(input_ids=ids, output_hidden_states=True).hidden_states[3][0, len(prompt) : -1]
                        acts = by_hand.saelens("jumprelu").encode(stream)
                    error = (values[row, :count] - acts[:, features]).abs().amax(dim=1)
                    # A value this close to its threshold may flip.
                    assert (error <= 1e-5 * acts.amax(dim=1)).float().mean() > 0.98
                    if reads == "policy":
                        right = mr.verifiers.math_boxed([step["completions"][row]], [step["answers"][row]])[0]
                        rewards.append(float(right) + 0.3 * float((acts[-32:, features] @ weights).mean()))
        assert all((step["trust"] == 1).all() for step in steps)
        total = torch.tensor(rewards)
        for step in steps:
            assert step["rewards"] == pytest.approx(total, rel=1e-4, abs=1e-4, nan_ok=True)
        # One group of eight, half of it in each process.
        wanted = (total - total.mean()) / (total.std() + 1e-4)
        assert torch.cat([step["advantages"] for step in steps]) == pytest.approx(wanted, abs=1e-3)
    first, second = processes
    assert first["taps"] == second["taps"]
    assert all(first["weights"][name].equal(weight) for name, weight in second["weights"].items())
    assert any(not first["weights"][name].equal(start[name]) for name in first["weights"])
    losses = [log["loss"] for log in first["log"] if "loss" in log]
    assert losses and all(map(math.isfinite, losses))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "changes", "policy"),
    [
        ("ddp.yaml", {}, "generation"),
        ("fsdp2.yaml", {}, "forward"),
        ("fsdp2.yaml", {"num_iterations": 2, "max_steps": 3}, "old_logprobs"),
        ("fsdp2.yaml", {"beta": 0.0}, "forward"),
    ],
)
def test_two_launched_processes_read_what_one_does(tmp_path, file, changes, policy):
    processes = launch(tmp_path, file, "--steps", "2", **changes)
    assert processes[0]["taps"] == {"policy": policy, "reference": "forward" if "beta" in changes else "reference"}
    assert all(process["sharded"] == (file == "fsdp2.yaml") for process in processes)
    check_training(processes)


@pytest.mark.slow
def test_a_sharded_training_goes_on_from_its_checkpoint(tmp_path):
    straight = launch(tmp_path, "fsdp2.yaml", "--steps", "3", save_steps=2)
    folder = tmp_path / "out" / "checkpoint-2"
    assert json.loads((folder / STATE_FILE).read_text())["beta"] == 0.04
    shutil.rmtree(tmp_path / "out" / "checkpoint-3")
    resumed = launch(tmp_path, "fsdp2.yaml", "--steps", "3", "--resume")
    for before, after in zip(straight, resumed, strict=True):
        assert len(after["steps"]) == 1
        assert after["steps"][0]["completion_ids"] == before["steps"][2]["completion_ids"]
        assert after["steps"][0]["rewards"] == pytest.approx(before["steps"][2]["rewards"], abs=1e-5)
        for name, weight in before["weights"].items():
            assert (after["weights"][name] - weight).abs().max() < 1e-6


@pytest.mark.parametrize("file", ["ddp.yaml", "fsdp2.yaml", "deepspeed_zero3.yaml"])
def test_accelerate_reads_the_recipes_files(file):
    given = yaml.safe_load((RECIPE / file).read_text())
    config = load_config_from_file(str(RECIPE / file))
    assert config.num_processes == 2 and config.distributed_type == given["distributed_type"]
    known = {action.dest for action in launch_command_parser()._actions}
    for plugin in ("fsdp_config", "deepspeed_config"):
        assert set(given.get(plugin, {})) <= known  # accelerate takes any key, and forgets those that it does not know
