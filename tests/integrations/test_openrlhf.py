"""OpenRLHF's own executor, client and advantage code against a real reward server.

Needs OpenRLHF (``pip install --no-deps openrlhf==0.11.2`` with aiohttp, pylatexenc, torchdata, einops). What runs on
GPUs alone (flash-attn, DeepSpeed, vLLM) and Ray are stood in for where they are not installed: none takes part here.
"""

import asyncio
import importlib.abc
import importlib.machinery
import importlib.util
import math
import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import planting
import pytest
import torch

import mechreward as mr
from mechreward.errors import ConfigError, ServiceError
from mechreward.readout import ReadoutBank
from mechreward.rollout.batch import RolloutBatch
from mechreward.rollout.hf import read_forward

pytestmark = pytest.mark.engine
RECIPE = Path(__file__).parents[2] / "recipes" / "openrlhf"
PROMPT = "Ana has 12 apples. Ana buys 7 more. How many apples does Ana have?\nAnswer:"
ANSWERS = [" 12+7=19.\n#### 19", " 12-7=5.\n#### 5"]


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules whose every name is a mock."""

    def __init__(self, *packages):
        self.packages = [package for package in packages if importlib.util.find_spec(package) is None]

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__, module.__version__ = [], "0.29.0"
        module.__getattr__ = lambda name: _no_dunder(name) or MagicMock(name=f"{spec.name}.{name}")
        return module

    def exec_module(self, module):
        pass


def _no_dunder(name):
    if name.startswith("__"):
        raise AttributeError(name)


@pytest.fixture(scope="module")
def openrlhf():
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401  transformers looks for flash-attn: before it is stood in for

    finder = StandIns("flash_attn", "deepspeed", "vllm", "ray")
    sys.meta_path.insert(0, finder)
    from openrlhf.trainer.ppo_utils import experience_maker, samples_generator
    from openrlhf.utils import agent

    yield SimpleNamespace(agent=agent, samples=samples_generator, maker=experience_maker)
    sys.meta_path.remove(finder)


class Engine:
    """What OpenRLHF's vLLM actor offers an executor; says what it is told to."""

    def __init__(self, ids):
        self.ids = ids

    async def generate(self, prompt_token_ids, sampling_params, multi_modal_data=None):
        output = SimpleNamespace(token_ids=self.ids, text="", finish_reason="stop", logprobs=None)
        return SimpleNamespace(outputs=[output])


def encoded(text):
    return planting.pocket()[1](text, add_special_tokens=False).input_ids


def executed(executor, ids, label="19"):
    sampling = SimpleNamespace(max_tokens=32, logprobs=None)
    run = executor.execute(PROMPT, label, sampling, 256, planting.pocket()[1], Engine(ids))
    return asyncio.run(run)


def expected(ids):
    """The pack's reward of a response by a forward pass of Hugging Face and the encoder's formula."""
    model, _ = planting.pocket()
    pack = mr.load_pack("pocket/reasoning_pack")
    sae = mr.load_sae(pack.sae.release, pack.sae.sae_id)
    layer, asked = int(re.findall(r"\d+", pack.hook_point)[0]), encoded(PROMPT)
    with torch.no_grad():
        states = model(torch.tensor([asked + ids]), output_hidden_states=True).hidden_states[layer + 1][0]
    batch = RolloutBatch([PROMPT], ["x"], [asked], [ids])
    readout = sae.features([feature.id for feature in pack.features])
    by_hand = torch.zeros(len(asked + ids), len(pack.features))
    ReadoutBank([readout]).encode(readout.hook_point, states, by_hand)
    read = read_forward(model, batch, ReadoutBank([readout]))[readout].values[0, : len(ids) - 1]
    assert torch.allclose(read, by_hand[len(asked) : -1], atol=1e-4)
    return float((by_hand[len(asked) : -1] @ torch.tensor([f.weight for f in pack.features])).mean())


@pytest.fixture
def address(server, monkeypatch):
    monkeypatch.setenv("MECHREWARD_URL", server.url)
    return server.url


def test_the_executor_has_the_sampled_ids_scored(openrlhf, address):
    from mechreward.integrations.openrlhf import AgentExecutor

    loaded = AgentExecutor()
    for answer in ANSWERS:
        ids = encoded(answer)
        output = executed(loaded, ids)
        assert output["reward"] == output["scores"] == pytest.approx(expected(ids), abs=1e-4)
        assert output["extra_logs"] == {"flagged": 0.0, "unscored": 0.0}
        assert output["observation_tokens"] == encoded(PROMPT) + ids
    alone = executed(loaded, [planting.pocket()[1].eos_token_id])
    assert alone["reward"] == 0 and alone["extra_logs"]["unscored"] == 1


def test_the_recipes_files_are_what_openrlhf_loads(openrlhf, address, monkeypatch):
    spec = importlib.util.spec_from_file_location("agent_module", RECIPE / "agent.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert issubclass(module.AgentExecutor, openrlhf.agent.AgentExecutorBase)
    by_file = openrlhf.agent.SingleTurnAgentExecutor([str(RECIPE / "reward.py")])
    with pytest.warns(UserWarning, match="encoded anew"):
        output = executed(by_file, encoded(ANSWERS[0]))
    assert output["reward"] == pytest.approx([expected(encoded(ANSWERS[0]))], abs=1e-4)


def test_rewards_come_through_openrlhfs_own_client_and_become_its_advantages(openrlhf, address):
    by_http = openrlhf.agent.SingleTurnAgentExecutor([f"{address}/get_reward"])
    from mechreward.integrations.openrlhf import AgentExecutor

    generator = openrlhf.samples.SamplesGenerator.__new__(openrlhf.samples.SamplesGenerator)
    for executor in (by_http, AgentExecutor()):
        rewards, made = [expected(encoded(answer)) for answer in ANSWERS], []
        for index, answer in enumerate(ANSWERS):
            experience = generator._process_response_into_experience(executed(executor, encoded(answer)), max_len=256)
            experience.index, experience.kl = [index], torch.zeros(experience.action_mask.shape)
            made.append(experience)
        assert [float(e.rewards.flatten()) for e in made] == pytest.approx(rewards, abs=1e-4)
        maker = openrlhf.maker.RemoteExperienceMaker.__new__(openrlhf.maker.RemoteExperienceMaker)
        advantage = SimpleNamespace(estimator="group_norm", gamma=1.0, lambd=1.0, no_std_norm=False)
        maker.args = SimpleNamespace(
            algo=SimpleNamespace(advantage=advantage),
            rollout=SimpleNamespace(n_samples_per_prompt=2),
            reward=SimpleNamespace(clip_range=(-100, 100), overlong_buffer_len=None, stop_properly_penalty_coef=None),
        )
        maker.strategy, maker.kl_ctl = SimpleNamespace(args=maker.args), SimpleNamespace(value=0.0)
        maker.advantage_estimator = "group_norm"
        found = [e.advantages[e.action_mask.bool()].unique() for e in maker.compute_advantages_and_returns(made)]
        mean, half = sum(rewards) / 2, abs(rewards[0] - rewards[1]) / math.sqrt(2)  # of two, with Bessel's correction
        for reward, advantages in zip(rewards, found, strict=True):
            assert advantages.tolist() == pytest.approx([(reward - mean) / half], abs=1e-3)


def test_rewards_per_token_are_refused_with_the_reason(openrlhf, address):
    from mechreward.integrations.openrlhf import AgentExecutor

    with pytest.raises(ConfigError, match="one number a rollout"):
        AgentExecutor(dense=True)


def test_without_an_address_or_a_server_training_ends_with_a_sentence(openrlhf, monkeypatch):
    from mechreward.integrations import openrlhf as ours

    monkeypatch.delenv("MECHREWARD_URL", raising=False)
    with pytest.raises(ConfigError, match="MECHREWARD_URL is not set"):
        ours.AgentExecutor()
    monkeypatch.setenv("MECHREWARD_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(ours, "_client", lambda: ours.RewardClient("http://127.0.0.1:9", deadline=0.5))
    with pytest.raises(ServiceError, match="gave no reward within"):
        executed(ours.AgentExecutor(), encoded(ANSWERS[0]))
