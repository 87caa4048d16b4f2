"""Whole runs of verl's trainer on a CPU, whose rewards are computed anew from the same ids, and what is refused.

Needs verl 0.9.1 (see recipes/verl/README.md). `verl_bench` says what stands in for GPUs and vLLM.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from safetensors.torch import load_file

import mechreward as mr
from mechreward.errors import CaptureError, ConfigError, RewardError
from mechreward.pocket.questions import questions

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
EOS = 2

QUICK = [
    "+ray_kwargs.ray_init.num_gpus=1", "ray_kwargs.ray_init.num_cpus=24",
    "+ray_kwargs.ray_init.include_dashboard=False", "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    "data.train_batch_size=4", "data.max_prompt_length=96", "data.max_response_length=40",
    "data.dataloader_num_workers=0", "data.shuffle=False",
    f"actor_rollout_ref.model.path={mr.pocket.path()}",
    "actor_rollout_ref.model.enable_gradient_checkpointing=False",
    "+actor_rollout_ref.model.override_config.attn_implementation=eager",
    "actor_rollout_ref.actor.strategy=fsdp2", "actor_rollout_ref.actor.optim.lr=1e-3",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.actor.use_torch_compile=False", "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
    "actor_rollout_ref.ref.fsdp_config.use_torch_compile=False",
    *(
        f"+actor_rollout_ref.{model}.fsdp_config.mixed_precision={{{','.join(f'{d}_dtype:fp32' for d in kinds)}}}"
        for model, kinds in (("actor", ("param", "reduce", "buffer")), ("ref", ("param", "reduce", "buffer")))
    ),
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4", "actor_rollout_ref.rollout.name=hugging_face",
    "actor_rollout_ref.rollout.n=2", "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2", "actor_rollout_ref.rollout.agent.num_workers=1",
    "actor_rollout_ref.rollout.free_cache_engine=False", "actor_rollout_ref.rollout.calculate_log_probs=False",
    "reward.num_workers=1",
    "trainer.n_gpus_per_node=1", "trainer.nnodes=1", "trainer.device=cpu", "trainer.logger=[console]",
    "trainer.total_training_steps=2", "trainer.val_before_train=False", "trainer.test_freq=-1", "trainer.save_freq=-1",
    "trainer.v1.trainer_mode=mechreward",
]  # fmt: skip


ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("MECHREWARD")} | {
    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]),
    "VERL_PLATFORM": "cpu",
    "VERL_USE_EXTERNAL_MODULES": "verl_bench.platform,mechreward.integrations.verl,verl_bench.stand_ins",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


def train(folder, *options):
    """Two steps of ``verl.trainer.main_ppo`` in a process of its own: its exit code, its output, and what it recorded.

    Prompts are pocket's; advantages are GRPO's unless ``options`` say otherwise.
    """
    import pandas

    rows = [
        {
            "data_source": "pocket",
            "prompt": [{"role": "user", "content": q.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")}],
            "reward_model": {"style": "rule", "ground_truth": q.answer},
            "extra_info": {"index": index},
        }
        for index, q in enumerate(itertools.islice(questions("train", 0, "reasoning"), 8))
    ]
    pandas.DataFrame(rows).to_parquet(folder / "questions.parquet")
    files = [f"data.{split}_files={folder / 'questions.parquet'}" for split in ("train", "val")]
    estimator = [] if any("adv_estimator" in option for option in options) else ["algorithm.adv_estimator=grpo"]
    environment = ENVIRONMENT | {"VERL_BENCH_RECORDS": str(folder)}
    local = f"trainer.default_local_dir={folder / 'checkpoints'}"
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *QUICK, *files, *estimator, local, *options]
    ended = subprocess.run(command, env=environment, cwd=folder, text=True, capture_output=True, timeout=600)
    (folder / "output.txt").write_text(ended.stdout + ended.stderr)
    steps = {int(re.findall(r"\d+", file.name)[0]): torch.load(file) for file in sorted(folder.glob("step_*.pt"))}
    return ended.returncode, ended.stdout + ended.stderr, steps


# -- by hand -----------------------------------------------------------------------------------------------------------


def policy(folder=None, version=0):
    """Pocket, or the policy with the weights of which a step's rollouts were generated."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(mr.pocket.path(), dtype=torch.float32).eval()
    if folder is not None:
        model.load_state_dict(load_file(folder / f"policy_{version}.safetensors"), strict=False)
    return model


@torch.no_grad()
def fired(model, ids):
    """The pack's features at each token, ``[T, K]``, by hidden states and the dictionary's own formula; its weights."""
    pack = json.loads((Path(mr.__file__).parent / "catalogs/pocket/reasoning_pack.json").read_text())
    (file,) = (mr.pocket.files() / "saes" / "jumprelu").glob("*.safetensors")
    sae = load_file(file)
    chosen, weights = ([feature[key] for feature in pack["features"]] for key in ("id", "weight"))
    hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[3][0]
    z = (hidden - sae["b_dec"]) @ sae["W_enc"][:, chosen] + sae["b_enc"][chosen]
    return z.relu() * (z > sae["threshold"][chosen]), torch.tensor(weights)


def token_values(model, prompt, response):
    """The pack's w f(h_t) at the response tokens that are read: not the last that was sampled."""
    features, weights = fired(model, prompt + response)
    return (features @ weights)[len(prompt) : len(prompt) + real(response) - 1]


def real(response):
    """Tokens up to and including the first end token."""
    return response.index(EOS) + 1 if EOS in response else len(response)


def kept(response, reward):
    """What the detector leaves that runs by default: of a reward, nothing where more than half of 4-grams repeat."""
    grams = [tuple(response[k : k + 4]) for k in range(real(response) - 3)]
    return 0.0 if reward > 0 and len(grams) >= 16 and 1 - len(set(grams)) / len(grams) > 0.5 else 1.0


def by_rollout(model, prompt, response):
    """One number, at the last token: the pack's mean over the last 32 tokens that are read."""
    values = token_values(model, prompt, response)
    reward = float(values[-32:].mean()) if len(values) else 0.0
    return [0.0] * (len(response) - 1) + [reward * kept(response, reward)]


def by_token(model, prompt, response):
    """A number for each token, which sum to the mean over all that are read."""
    values = token_values(model, prompt, response)
    shares = (values * kept(response, float(values.sum())) / max(len(values), 1)).tolist()
    return shares + [0.0] * (len(response) - len(values))


def rewards(step, model, each):
    return [each(model, prompt, response) for prompt, response in zip(step["prompts"], step["responses"], strict=True)]


def close(found, expected):
    """Equal up to what another batch's shape does to float32."""
    pairs = list(zip(itertools.chain(*found), itertools.chain(*expected), strict=True))
    return all(abs(a - b) <= 2e-3 * max(1, abs(b)) for a, b in pairs)


def assert_grpo(step):
    """Advantages are the rewards that were asserted, relative to their group."""
    sums = {key: sum(row) for key, row in zip(step["keys"], step["rm_scores"], strict=True)}
    for key, advantages in zip(step["keys"], step["advantages"], strict=True):
        group = torch.tensor([value for other, value in sums.items() if other.split("_")[0] == key.split("_")[0]])
        expected = float((sums[key] - group.mean()) / (group.std() + 1e-6))
        assert len(group) == 2 and advantages == pytest.approx([expected] * len(advantages), abs=1e-2)


def assert_reinforce(step):
    """Advantages are the rewards to come, whitened over all tokens of the step."""
    returns = [torch.tensor(row).flip(0).cumsum(0).flip(0) for row in step["rm_scores"]]
    every = torch.cat(returns)
    expected = [((row - every.mean()) / every.std()).tolist() for row in returns]
    assert close(step["advantages"], expected)


# -- a server ----------------------------------------------------------------------------------------------------------


@contextmanager
def busy(url, times):
    """In front of a server: answers 503 to the first requests, hands on what comes after."""
    asked = []

    class Door(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.path)
            if len(asked) <= times:
                status, answer = 503, b'{"detail": "Not now."}'
            else:
                reply = httpx.post(url + self.path, content=body, headers={"Content-Type": "application/json"})
                status, answer = reply.status_code, reply.content
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    door = ThreadingHTTPServer(("127.0.0.1", 0), Door)
    threading.Thread(target=door.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{door.server_port}", asked
    door.shutdown()


MANAGER = (
    "reward.reward_manager.source=importlib",
    "reward.reward_manager.name=RewardManager",
    "reward.reward_manager.module.path=pkg://mechreward.integrations.verl",
)
NOTHING = ("reward.reward_manager.name=NoReward", *(option for option in MANAGER if ".name" not in option))
PACK = "+mechreward.packs=[pocket/reasoning_pack]"
DENSE = "actor_rollout_ref.rollout.agent.default_agent_loop=mechreward_dense"
REINFORCE = "algorithm.adv_estimator=reinforce_plus_plus"

# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rewards_come_from_a_server_which_was_busy_at_first(tmp_path, server):
    with busy(server.url, times=3) as (url, asked):
        code, output, steps = train(tmp_path, *MANAGER, f"+reward.reward_kwargs.url={url}")
    assert code == 0, output[-5000:]
    assert list(steps) == [1, 2] and len(asked) == 2 * 8 + 3
    for step in steps.values():
        assert len(step["keys"]) == 8
        assert close(step["rm_scores"], rewards(step, policy(), by_rollout))  # the server's model stays as it was
        assert_grpo(step)
    for name in ("unscored", "flagged"):
        assert output.count(f"mechreward/server_{name}:0.0") == 2


@pytest.mark.slow
def test_rewards_per_token_come_from_a_server(tmp_path, server):
    options = (*MANAGER, DENSE, REINFORCE, f"+reward.reward_kwargs.url={server.url}")
    code, output, steps = train(tmp_path, *options)
    assert code == 0, output[-5000:]
    assert list(steps) == [1, 2]
    for step in steps.values():
        assert close(step["rm_scores"], rewards(step, policy(), by_token))
        assert_reinforce(step)


@pytest.mark.slow
def test_a_server_that_stays_busy_ends_the_run_with_the_reason(tmp_path, server):
    with busy(server.url, times=10**6) as (url, _):
        options = (f"+reward.reward_kwargs.url={url}", "+reward.reward_kwargs.deadline=3")
        code, output, steps = train(tmp_path, *MANAGER, *options)
    assert code != 0 and not steps
    assert "mechreward.errors.RewardError: Rollouts of " in output
    assert re.search(
        r"/score_tokens gave no reward within 3 s \(\d+ attempts, the last: status 503, Not now.\)", output
    )


def test_rewards_per_token_are_read_from_the_live_policy(tmp_path):
    padded = "actor_rollout_ref.model.use_remove_padding=False"
    code, output, steps = train(tmp_path, PACK, "+mechreward.dense=true", REINFORCE, padded, *NOTHING)
    assert code == 0, output[-5000:]
    assert list(steps) == [1, 2]
    for number, step in steps.items():
        assert close(step["rm_scores"], rewards(step, policy(tmp_path, number - 1), by_token))
        assert_reinforce(step)
        assert step["metrics"]["mechreward/unscored"] == 0 and "mechreward/reasoning_pack/raw" in step["metrics"]
    # That these can fail: the policy has moved, and one place beside is another reading.
    assert not close(steps[2]["rm_scores"], rewards(steps[2], policy(), by_token))
    assert not close(
        [row[1:] + row[:1] for row in steps[2]["rm_scores"]], rewards(steps[2], policy(tmp_path, 1), by_token)
    )


@pytest.mark.slow
def test_gated_rewards_are_read_from_the_live_policy_beside_a_reference(tmp_path):
    """Packed sequences, GRPO, a verifier's gate, and a reference model whose pass comes after the policy's."""
    gated = ("+mechreward.verifier=gsm8k", "+mechreward.mode=gated", "actor_rollout_ref.actor.use_kl_loss=True")
    pieces = (  # micro-batches of their own order
        "actor_rollout_ref.actor.use_dynamic_bsz=True",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=300",
    )
    code, output, steps = train(tmp_path, PACK, *gated, *pieces, *NOTHING)
    assert code == 0, output[-5000:]
    assert list(steps) == [1, 2]

    def expected(step, model):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(mr.pocket.path())
        texts = [re.findall(r"#### (-?\d+)", tokenizer.decode(response)) for response in step["responses"]]
        right = [found[-1:] == [gold] for found, gold in zip(texts, step["golds"], strict=True)]
        return right, [
            [*row[:-1], 1 + row[-1] if good else 0.0]
            for good, row in zip(right, rewards(step, model, by_rollout), strict=True)
        ]

    judged = []
    for number, step in steps.items():
        right, wanted = expected(step, policy(tmp_path, number - 1))
        judged += right
        assert close(step["rm_scores"], wanted)
        assert_grpo(step)
    assert any(judged) and not all(judged)


# -- the engine alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_the_engine_reads_each_token_of_the_pass_that_asks(rows, tmp_path):
    file = tmp_path / "found.json"
    command = [sys.executable, "-m", "verl_bench.engine", "fsdp2", rows, file]
    ended = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, text=True, capture_output=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(file.read_text())
    assert found["engine"] == "MechRewardEngine" and found["not"] is None
    for ids, read in zip(found["ids"], found["asked"], strict=True):
        torch.testing.assert_close(torch.tensor(read), fired(policy(), ids)[0], atol=1e-3, rtol=1e-3)
    assert [len(ids) for ids in found["ids"]] == [7, 7, 5]


# -- without a run -----------------------------------------------------------------------------------------------------


def configured(*options):
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        common = ["actor_rollout_ref.model.path=x", "actor_rollout_ref.rollout.name=vllm"]
        return compose("ppo_trainer", [*common, "trainer.v1.trainer_mode=mechreward", *options])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([DENSE, "algorithm.adv_estimator=grpo"], "use gae or reinforce_plus_plus"),
        ([PACK, "+mechreward.dense=true", "algorithm.adv_estimator=rloo"], "adv_estimator=rloo adds up"),
        (["trainer.v1.trainer_mode=sync"], "set trainer.v1.trainer_mode=mechreward"),
        (["trainer.use_v1=False"], "trainer.use_v1=False goes on"),
        (["trainer.v1.trainer_mode=separate_async"], "trainer_mode=separate_async goes on without the rollouts"),
        (["algorithm.filter_groups.enable=True"], "algorithm.filter_groups drops groups"),
        (["trainer.v1.sampler.custom_sampler.path=mine.py"], "custom_sampler would take the place"),
        ([PACK, "algorithm.rollout_correction.bypass_mode=True"], "bypass_mode skips the log-prob pass"),
        ([PACK, "actor_rollout_ref.actor.strategy=megatron"], "use fsdp or fsdp2"),
        ([PACK, "+mechreward.aggregation=per_token"], "set +mechreward.dense=true"),
        (["+mechreward.pack=[x]"], "Did you mean 'packs'?"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(options, says):
    from mechreward.integrations.verl import MechRewardTrainer, NoReward, RewardManager

    config = configured(*options)
    with pytest.raises(ConfigError) as caught:
        MechRewardTrainer(config)
    assert says in str(caught.value) and str(caught.value).count(". ") <= 1
    for manager in (RewardManager, NoReward):
        with pytest.raises(ConfigError, match=re.escape(says)):
            manager(config, None, None)


def test_a_server_does_not_mind_where_the_log_probs_come_from():
    from mechreward.integrations.verl.options import check, served

    bypass, gae = "algorithm.rollout_correction.bypass_mode=True", "algorithm.adv_estimator=gae"
    for options in ([bypass], [DENSE, REINFORCE], [DENSE, gae]):
        config = configured(*options)
        check(config)
        assert served(config) is None
    asked = served(configured(PACK, "+mechreward.weights=[0.5]", "+mechreward.mode=gated", "+mechreward.dense=true"))
    assert asked.packs == ["pocket/reasoning_pack"] and asked.weights == [0.5] and asked.mode == "gated"


def test_a_reward_manager_needs_an_address(monkeypatch):
    from mechreward.integrations.verl import RewardManager

    monkeypatch.delenv("MECHREWARD_URL", raising=False)
    with pytest.raises(ConfigError, match=r"mechreward serve.*\+reward.reward_kwargs.url"):
        RewardManager(configured(), None, None)
    monkeypatch.setenv("MECHREWARD_URL", "http://127.0.0.1:1/")
    assert RewardManager(configured(), None, None).client.url == "http://127.0.0.1:1"
    given = configured("+reward.reward_kwargs.url=http://127.0.0.1:2", "+reward.reward_kwargs.deadline=7")
    assert RewardManager(given, None, None).client.deadline == 7


def one_rollout(turns=2, response=(5, 6), rows=1):
    """What verl hands a reward manager, padded as its older paths do."""
    import numpy as np
    from verl import DataProto

    asked, answered = torch.tensor([[0, 1, 4]] * rows), torch.tensor([[*response, 0]] * rows)
    return DataProto.from_dict(
        tensors={
            "prompts": asked,
            "responses": answered,
            "attention_mask": torch.tensor([[0, 1, 1, *[1] * len(response), 0]] * rows),
        },
        non_tensors={
            "reward_model": np.array([{"ground_truth": 19}] * rows, dtype=object),
            "__num_turns__": np.array([turns] * rows),
        },
    )


class Asked:
    """In the client's place: keeps what is asked, and answers as told."""

    def __init__(self, reward, tokens, flags):
        from mechreward.integrations.protocol import ScoreReply

        self.reply = ScoreReply(rewards=[reward], version="initial", token_rewards=[tokens], flags=[flags])

    async def score_tokens(self, *rollouts, include):
        self.rollouts = rollouts
        return self.reply


@pytest.mark.parametrize(
    ("answer", "reward", "unscored", "flagged", "scores"),
    [
        ((1.5, [1.0, 0.5], []), 1.5, 0.0, 0.0, [1.0, 0.5]),
        ((-2.0, [-2.0, None], ["repetition: made up"]), -2.0, 0.0, 1.0, [-2.0, 0.0]),
        ((None, [None, None], []), 0.0, 1.0, 0.0, [0.0, 0.0]),
    ],
)
def test_what_a_manager_says_becomes_a_rollouts_scores(answer, reward, unscored, flagged, scores):
    import asyncio

    from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics

    from mechreward.integrations.verl import RewardManager
    from mechreward.integrations.verl.workers import DenseOutput

    config = configured(DENSE, REINFORCE, "+reward.reward_kwargs.url=http://127.0.0.1:1")
    manager = RewardManager(config, None, None)
    manager.client = Asked(*answer)
    said = asyncio.run(manager.run_single(one_rollout()))
    assert manager.client.rollouts == ([[1, 4]], [[5, 6]], ["19"])  # without padding
    assert said["reward_score"] == reward
    info = said["reward_extra_info"]
    assert (info["unscored"], info["flagged"]) == (unscored, flagged)
    output = DenseOutput(
        prompt_ids=[1, 4], response_ids=[5, 6], response_mask=[1, 1], metrics=AgentLoopMetrics(), extra_fields={}
    )
    output.reward_score, output.extra_fields["reward_extra_info"] = said["reward_score"], info
    stored = output.as_dict()
    assert stored["rm_scores"].tolist() == scores and stored["rm_scores"].dtype == torch.float32
    assert stored["extra_fields"]["reward_extra_info"] == {"unscored": unscored, "flagged": flagged}


def test_rewards_per_token_that_nobody_gave_and_several_turns_are_refused():
    import asyncio

    from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics

    from mechreward.integrations.verl import RewardManager
    from mechreward.integrations.verl.workers import DenseOutput

    output = DenseOutput(prompt_ids=[1], response_ids=[5], response_mask=[1], metrics=AgentLoopMetrics())
    output.reward_score = 1.0
    with pytest.raises(ConfigError, match="found no rewards per token"):
        output.as_dict()
    manager = RewardManager(configured("+reward.reward_kwargs.url=http://127.0.0.1:1"), None, None)
    for rollout in (one_rollout(turns=4), one_rollout(rows=2)):
        with pytest.raises(RewardError, match="several turns"):
            asyncio.run(manager.run_single(rollout))


@pytest.mark.parametrize("recipe", ["http", "dense", "in_process"])
def test_verl_knows_every_flag_of_the_recipes(recipe, tmp_path, server):
    """``--cfg job`` prints the configuration, or says which flag verl does not know."""
    from omegaconf import OmegaConf

    from mechreward.integrations.verl.options import check

    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    stand_in.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "MECHREWARD_URL": server.url,
        **{"MODEL": "some/model", "PACK": "pocket/reasoning_pack", "TRAIN": "a.parquet", "TEST": "b.parquet"},
    }
    script = ROOT / "recipes" / "verl" / f"{recipe}.sh"
    ended = subprocess.run(
        ["bash", script, "--cfg", "job"], env=environment, cwd=tmp_path, text=True, capture_output=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    config = OmegaConf.create(ended.stdout[ended.stdout.index("actor_rollout_ref:") :])
    check(config)
    assert config.actor_rollout_ref.model.path == "some/model" and config.actor_rollout_ref.rollout.n == 8


# -- one step of the trainer, with made-up readings --------------------------------------------------------------------


class Queue:
    """In TransferQueue's place: columns by key."""

    def __init__(self, rows):
        self.rows = rows

    def kv_batch_get(self, keys, partition_id, select_fields):
        def column(values):
            tensors = isinstance(values[0], torch.Tensor)
            return torch.nested.as_nested_tensor(values, layout=torch.jagged) if tensors else values

        there = [name for name in select_fields if name in self.rows[keys[0]]]
        return {name: column([self.rows[key][name] for key in keys]) for name in there}

    def kv_batch_put(self, keys, partition_id, fields):
        for key, scores in zip(keys, fields["rm_scores"].unbind(), strict=True):
            self.rows[key]["rm_scores"] = scores


@pytest.fixture
def step(monkeypatch):
    """Makes a trainer that has just read the policy, on rollouts in verl's order, one of which fills the batch up."""
    import transformers

    from mechreward.integrations.verl import trainer as module
    from mechreward.integrations.verl.engine import READINGS

    tokenizer = transformers.AutoTokenizer.from_pretrained(mr.pocket.path())
    generator = torch.Generator().manual_seed(0)
    width = len(mr.load_pack("pocket/reasoning_pack").features)

    def rollout(prompt, response):
        return {
            "prompts": torch.tensor(prompt),
            "responses": torch.tensor(response),
            "response_mask": torch.tensor([1] * len(response)),
            "rm_scores": torch.full((len(response),), 0.125),
            "reward_model": {"ground_truth": "19"},
            READINGS: torch.rand(len(prompt) + len(response), width, generator=generator),
        }

    rows = {
        "b_1_0": rollout([1, 30], [40, 41, 42, 43, EOS]),
        "a_0_0": rollout([1, 30, 31], [50, 51, EOS, 52]),  # goes on after its end
        "pad_0_0": rollout([EOS] * 7, [EOS]),
        "a_1_0": rollout([1, 30, 31], [60]),  # nothing to read
        "b_0_0": rollout([1, 30], [70, 71, 72, 73, 74]),
    }

    def made(*options):
        config = configured(PACK, "algorithm.adv_estimator=gae", *options)
        trainer = module.MechRewardTrainer.__new__(module.MechRewardTrainer)
        asked = module.served(config)
        trainer._served, trainer._reward = asked, module.build_reward(asked)
        trainer._dense = module.dense_in_process(config)
        trainer.config, trainer.tokenizer, trainer._ends = config, tokenizer, frozenset([EOS])
        trainer.global_steps, trainer.total_training_steps = 1, 2
        monkeypatch.setattr(module, "tq", Queue(rows))
        return trainer

    tags = [{"is_padding": key.startswith("pad")} for key in rows]
    return made, SimpleNamespace(keys=list(rows), tags=tags, partition_id="train"), rows


READ = {"b_1_0": [0, 1, 2, 3], "a_0_0": [0, 1], "a_1_0": [], "b_0_0": [0, 1, 2, 3]}


def pack_values(rows, key):
    """The pack's weights times what was read at the response's tokens."""
    weights = torch.tensor([feature.weight for feature in mr.load_pack("pocket/reasoning_pack").features])
    row = rows[key]
    return (row["mechreward_readings"] @ weights)[len(row["prompts"]) :]


@pytest.mark.parametrize("tool", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_what_was_read_is_added_to_verls_own_scores(step, dense, tool):
    made, batch, rows = step
    wanted = dict(READ)
    if tool:  # wrote 72 and 73; and with several turns an end token ends nothing
        rows["b_0_0"]["response_mask"] = torch.tensor([1, 1, 0, 0, 1])
        wanted |= {"b_0_0": [0, 1], "a_0_0": [0, 1, 2]}
    trainer, metrics = made(f"+mechreward.dense={dense}"), {}
    trainer._add_rewards(batch, trainer._reward, metrics)
    for key, read in wanted.items():
        values, found = pack_values(rows, key), rows[key]["rm_scores"] - 0.125
        expected = torch.zeros(len(found))
        if dense and read:
            expected[read] = values[read] / len(read)
        elif read:
            expected[-1] = values[read].mean()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert rows["pad_0_0"]["rm_scores"].tolist() == [0.125]
    assert metrics["mechreward/unscored"] == 0.25 and metrics["mechreward/flagged"] == 0
    raw = [float(pack_values(rows, key)[read].mean()) for key, read in wanted.items() if read]
    assert metrics["mechreward/reasoning_pack/raw"] == pytest.approx(sum(raw) / 3, abs=1e-5)


def test_guards_see_whole_groups_and_what_they_drop_gets_nothing(step):
    from mechreward.hacking import Verdict

    made, batch, rows = step
    trainer, seen = made("+mechreward.dense=true", "actor_rollout_ref.rollout.n=2"), []

    class Dropping:
        requests = ()

        def __call__(self, batch, readings):
            seen.append((batch.num_generations, [ids[0] for ids in batch.completion_ids]))
            dropped = torch.tensor([ids[0] == 40 for ids in batch.completion_ids])
            return Verdict(torch.full((4,), 0.5), dropped, [["made up"] if gone else [] for gone in dropped])

    trainer._reward.guards, metrics = [Dropping()], {}
    trainer._add_rewards(batch, trainer._reward, metrics)
    assert seen == [(2, [50, 60, 70, 40])]
    assert rows["b_1_0"]["rm_scores"].tolist() == [0.125] * 5
    kept = pack_values(rows, "b_0_0")[:4]
    torch.testing.assert_close(rows["b_0_0"]["rm_scores"][:4] - 0.125, kept / 4 * (0.5 if kept.sum() > 0 else 1))
    assert metrics["mechreward/unscored"] == 0.5 and metrics["mechreward/flagged"] == 0.25


def test_an_engine_that_is_not_ours_is_named(step):
    made, batch, rows = step
    for row in rows.values():
        del row["mechreward_readings"]
    trainer = made()
    with pytest.raises(CaptureError, match="VERL_USE_EXTERNAL_MODULES"):
        trainer._add_rewards(batch, trainer._reward, {})


@pytest.mark.parametrize("chosen", [False, True])
def test_what_guards_have_learned_is_saved_with_checkpoints(step, tmp_path, monkeypatch, chosen):
    from verl.trainer.ppo.v1 import PPOTrainerSync

    monkeypatch.setattr(PPOTrainerSync, "_save_checkpoint", lambda self: None)
    monkeypatch.setattr(PPOTrainerSync, "_load_checkpoint", lambda self: setattr(self, "global_steps", 1))
    resume = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={tmp_path}/global_step_1"] if chosen else []
    folder = f"trainer.default_local_dir={tmp_path / 'elsewhere' if chosen else tmp_path}"
    made, _, _ = step
    before = made(f"trainer.default_local_dir={tmp_path}", "+mechreward.guard=standard")
    (guard,) = before._reward.guards
    guard.thresholds["length"] = 12.5
    before._save_checkpoint()
    after = made(folder, *resume, "+mechreward.guard=standard")
    assert "length" not in after._reward.guards[0].thresholds
    after._load_checkpoint()
    assert after._reward.guards[0].thresholds["length"] == 12.5
