"""A rollout server that generates with Hugging Face's `generate`, and keeps each version of the policy's weights."""

import os
from pathlib import Path

import ray
import torch
from safetensors.torch import save_file
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

from verl_bench import RECORDS


class Server:
    def __init__(self, path, longest):
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        self.model, self.longest = AutoModelForCausalLM.from_pretrained(path).eval(), longest
        self.steps = None

    async def generate(self, prompt_ids, sampling_params, **_):
        asked = torch.tensor([list(prompt_ids)])
        with torch.no_grad():
            output = self.model.generate(asked, do_sample=True, top_k=0, max_new_tokens=self.longest)
        ids = output[0, asked.shape[1] :]
        return TokenOutput(token_ids=ids.tolist(), stop_reason="completed", extra_fields={"global_steps": self.steps})

    async def load(self, weights, steps):
        state = {name: torch.from_numpy(array) for name, array in weights.items()}
        self.model.load_state_dict(state, strict=False)
        self.steps = steps
        save_file(state, Path(os.environ[RECORDS], f"policy_{steps}.safetensors"))

    async def nothing(self, *_, **__):
        pass

    wake_up = sleep = abort_all_requests = resume_generation = clear_kv_cache = release_kv_cache = nothing
    resume_kv_cache = start_profile = stop_profile = nothing


class Replica(RolloutReplica):
    async def launch_servers(self):
        options = {"name": f"rollout_server_{self.replica_rank}", "num_cpus": 0.1}
        server = ray.remote(Server).options(**options).remote(self.model_config.path, self.config.response_length)
        self.servers, self._server_handle, self._server_address = [server], server, "hugging-face"


class Adapter(BaseRollout):
    async def resume(self, tags):
        pass

    async def release(self):
        pass

    async def update_weights(self, weights, global_steps=None, **_):
        arrays = {name: tensor.detach().float().cpu().numpy() for name, tensor in weights}
        await ray.get_actor("rollout_server_0").load.remote(arrays, global_steps)
