"""One process of verl's own training worker on a CPU: reads pocket in a pass of the engine, and writes what it read.

``python -m verl_bench.engine fsdp2 packed FILE``
"""

import json
import os
import sys
from dataclasses import asdict

import torch
import verl  # noqa: F401  with the plug-ins
from verl import DataProto
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine_workers import TrainingWorker, TrainingWorkerConfig
from verl.workers.utils.padding import left_right_2_no_padding

import mechreward as mr
from mechreward.integrations.served import Served
from mechreward.integrations.verl.engine import READ, READINGS

ROLLOUTS = [([1, 30, 31, 32], [40, 41, 42]), ([1, 50], [60, 61, 62, 63, 64]), ([1, 33, 34], [70, 2])]


def worker(strategy, packed):
    model = HFModelConfig(
        path=mr.pocket.path(),
        use_remove_padding=packed,
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "eager"},
    )
    engine = FSDPEngineConfig(
        strategy=strategy,
        use_torch_compile=False,
        mixed_precision={f"{kind}_dtype": "fp32" for kind in ("param", "reduce", "buffer")},
        use_dynamic_bsz=False,
        infer_micro_batch_size_per_gpu=3,
        micro_batch_size_per_gpu=3,
    )
    config = TrainingWorkerConfig(
        model_type="language_model",
        model_config=model,
        engine_config=engine,
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )
    made = TrainingWorker(config)
    made.reset()
    return made


def batch():
    """The rollouts as verl's older paths hand them over, then without padding."""
    before, after = max(len(p) for p, _ in ROLLOUTS), max(len(r) for _, r in ROLLOUTS)
    prompts = torch.tensor([[0] * (before - len(p)) + p for p, _ in ROLLOUTS])
    responses = torch.tensor([r + [0] * (after - len(r)) for _, r in ROLLOUTS])
    ids = torch.cat([prompts, responses], dim=1)
    mask = (ids != 0).long()
    columns = {
        "prompts": prompts,
        "responses": responses,
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "response_mask": mask[:, before:],
    }
    return left_right_2_no_padding(DataProto.from_dict(tensors=columns).to_tensordict())


def main(strategy, rows, file):
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    engine = worker(strategy, packed=rows == "packed")
    found = {}
    for name, asked in {
        "asked": {READ: json.dumps(asdict(Served("x", ("pocket/reasoning_pack",))))},
        "not": {},
    }.items():
        data = batch()
        tu.assign_non_tensor(data, calculate_entropy=True, compute_loss=False, temperature=1.0, **asked)
        output = engine.infer_batch(data)
        found[name] = [row.tolist() for row in output[READINGS].unbind()] if READINGS in output else None
    with open(file, "w") as opened:
        json.dump(found | {"ids": [p + r for p, r in ROLLOUTS], "engine": type(engine.engine).__name__}, opened)


if __name__ == "__main__":
    main(*sys.argv[1:])
