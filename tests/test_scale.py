"""Several processes: a sharded model reads what a whole one does, and stays as it was."""

import copy
import os
import socket

import torch
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

from conftest import WIDTH, build, residual
from mechreward.readout import HookPoint, ReadoutBank, direction
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.hf import read_forward

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


def test_a_sharded_model_reads_as_a_whole_one_and_stays_as_it_was():
    torch.multiprocessing.spawn(in_process, (free_port(),), nprocs=2)
