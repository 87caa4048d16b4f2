"""A rollout server and collectives for verl on a CPU."""

import torch
from torch.distributed.fsdp import CPUOffloadPolicy
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.rollout import base as rollouts
from verl.workers.rollout.replica import RolloutReplicaRegistry

from mechreward.integrations.verl import MechRewardEngine
from verl_bench.recording import record_steps


def _hugging_face():
    from verl_bench.rollout import Replica

    return Replica


EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")(MechRewardEngine)
rollouts._ROLLOUT_REGISTRY["hugging_face", "async"] = "verl_bench.rollout.Adapter"
RolloutReplicaRegistry.register("hugging_face", _hugging_face)
record_steps()

# verl offloads a reference model to pinned memory, which needs a GPU.
transformer_impl.CPUOffloadPolicy = lambda pin_memory: CPUOffloadPolicy(pin_memory=False)

_init = torch.distributed.init_process_group


def _init_with_gloo(backend=None, *args, **options):
    """verl names a backend for the device and one for the CPU, which are one here."""
    return _init("gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **options)


torch.distributed.init_process_group = _init_with_gloo
