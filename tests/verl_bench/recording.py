"""Writes down what verl trains on in each step: ids, rewards and advantages."""

import os
from pathlib import Path

import torch
import transfer_queue as tq
from verl.trainer.ppo.v1 import PPOTrainerSync

from verl_bench import RECORDS

FIELDS = ["prompts", "responses", "response_mask", "rm_scores", "advantages", "reward_model"]


def record_steps():
    update = PPOTrainerSync._update_actor

    def recorded(self, batch, metrics):
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=FIELDS)
        columns = {name: [row.tolist() for row in data[name].unbind()] for name in FIELDS[:-1]}
        golds = [getattr(row, "data", row)["ground_truth"] for row in data["reward_model"]]
        batch = update(self, batch, metrics)
        told = {name: value for name, value in metrics.items() if "mechreward" in name}
        torch.save(
            {**columns, "golds": golds, "keys": batch.keys, "metrics": told},
            Path(os.environ[RECORDS], f"step_{self.global_steps}.pt"),
        )
        return batch

    PPOTrainerSync._update_actor = recorded
