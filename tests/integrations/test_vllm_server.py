"""`mechreward serve --vllm`: the reward server with a real vLLM behind it, against Hugging Face's own hidden states."""

import json

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import Process
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechreward import pocket
from mechreward.reward.feature_reward import FeatureReward

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore::mechreward.errors.CandidateWarning")]

OPTIONS = {"enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8, "distributed_executor_backend": "uni"}
FOLDER = pocket.resolve("mechreward/pocket")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    arguments = ["--model", "mechreward/pocket", "--pack", "pocket/reasoning_pack", "--live"]
    process = Process(tmp_path_factory.mktemp("server"), *arguments, "--vllm", json.dumps(OPTIONS))
    yield process
    process.end()


@torch.no_grad()
def by_hand(model, prompt, response):
    """The pack's reward of one rollout, from Hugging Face's hidden states and the encoder's formula in float64."""
    reward = FeatureReward.from_pack("pocket/reasoning_pack")
    readout = reward.readout
    hidden = model(torch.tensor([prompt + response]), output_hidden_states=True).hidden_states[3][0]
    x = readout.transform(hidden[len(prompt) : -1]).double()
    z = x @ readout.weight.double() + readout.bias.double()
    active = z.relu() * (z > readout.nonlinearity.parameters["threshold"].double())
    assert reward.aggregation == "mean_last_32_tokens"
    return float(active[-32:].mean(dim=0) @ reward.weights.double())


def test_rewards_are_those_of_the_model_and_then_of_the_pushed_one(server, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    questions = pocket.dataset("discovery", 4, seed=0, kind="reasoning")
    prompts = [tokenizer(q["prompt"]).input_ids for q in questions]
    responses = [
        [*tokenizer(q["solution"], add_special_tokens=False).input_ids, tokenizer.eos_token_id] for q in questions
    ]
    moved = {name: w + 0.02 * torch.randn_like(w) for name, w in load_file(f"{FOLDER}/model.safetensors").items()}
    save_file(moved, tmp_path / "moved.safetensors")
    with httpx.Client(base_url=server.url, timeout=120, trust_env=False) as client:
        asked = {"prompt_ids": prompts, "response_ids": responses}
        before = client.post("/score_tokens", json=asked).json()
        bad = client.post("/weights?version=2", content=b"none", headers={"Content-Type": "application/octet-stream"})
        pushed = client.post(
            "/weights?version=2", content=(tmp_path / "moved.safetensors").read_bytes(),
            headers={"Content-Type": "application/octet-stream"},
        )  # fmt: skip
        after = client.post("/score_tokens", json=asked).json()
        long = client.post("/score_tokens", json={"prompt_ids": [[5] * 200], "response_ids": [[5] * 60]})
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="eager").eval()
    for reply, version in ((before, "initial"), (after, "2")):
        assert reply["version"] == version
        expected = [by_hand(model, p, r) for p, r in zip(prompts, responses, strict=True)]
        assert reply["rewards"] == pytest.approx(expected, rel=1e-4)
        model.load_state_dict(moved, strict=False)
        model.tie_weights()
    assert max(abs(a - b) for a, b in zip(before["rewards"], after["rewards"], strict=True)) > 1e-3
    assert bad.status_code == 422 and "not whole safetensors" in bad.json()["detail"]
    assert pushed.status_code == 200
    assert long.status_code == 422 and "260 tokens, and the model takes 256" in long.json()["detail"]
