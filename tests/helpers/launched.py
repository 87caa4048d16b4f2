"""Runs a recipe in each process that `accelerate launch` starts, and writes down what the trainer saw.

    accelerate launch --config_file FILE tests/helpers/launched.py FOLDER CHANGES recipes/trl/train.py ...

CHANGES is JSON, of options of the config. accelerate 1.15 has no FSDP on CPUs: it runs DDP where a file says FSDP. Here
its state says FSDP, and everything behind that (accelerate, transformers, TRL, torch) does what it does on GPUs.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

import mechreward as mr

torch.set_num_threads(1)
folder, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
sys.argv = sys.argv[3:]
as_it_is = AcceleratorState.__init__


def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    as_it_is(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
    if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin


AcceleratorState.__init__ = with_fsdp


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


class Recorder(mr.MechRewardGRPOTrainer):
    """Keeps each step's rollouts, readings, rewards and advantages, and the weights that were read."""

    steps, last = [], None

    def _show_monitors(self, batch, readings, rewards):
        super()._show_monitors(batch, readings, rewards)
        step = {
            "prompt_ids": batch.prompt_ids,
            "completion_ids": batch.completion_ids,
            "completions": batch.texts,
            "answers": batch.columns["answer"],
            "readings": {f"{ask.reads} {ask.readout.name}": (read.values, read.mask) for ask, read in readings.items()},
            "rewards": rewards[:, 0],
            "trust": batch.trust,
            "weights": {name: whole(p) for name, p in self.model.named_parameters()},
        }
        self.steps.append(step)
        Recorder.last = self

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.steps[-1]["advantages"] = output["advantages"]
        return output


as_given = mr.MechRewardGRPOConfig
mr.MechRewardGRPOTrainer = Recorder
mr.MechRewardGRPOConfig = lambda **options: as_given(**options | changes)  # a checkpoint pickles the config
runpy.run_path(sys.argv[0], run_name="__main__")
trainer = Recorder.last
found = {
    "steps": trainer.steps,
    "taps": trainer.taps,
    "log": trainer.state.log_history,
    "sharded": all(isinstance(p, DTensor) for p in trainer.model.parameters()),
    "weights": {name: whole(p) for name, p in trainer.model.named_parameters()},
}
torch.save(found, folder / f"process-{os.environ['RANK']}.pt")
