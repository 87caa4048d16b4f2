"""On Gemma-2-2B and Gemma Scope, where the hub can be reached: `pytest -m hub`."""

import pytest
import torch

import mechreward as mr

pytestmark = [pytest.mark.hub, pytest.mark.timeout(3600)]
RELEASE, SAE_ID = "gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical"


@pytest.fixture(scope="module")
def gemma():
    from huggingface_hub import HfApi
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        HfApi().model_info("google/gemma-2-2b", timeout=10)
    except Exception as error:
        pytest.skip(f"the Hugging Face hub cannot be reached, or google/gemma-2-2b may not be read: {error!r:.200}")
    model = AutoModelForCausalLM.from_pretrained("google/gemma-2-2b", dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained("google/gemma-2-2b")


def test_readings_equal_saelens_on_hf_hidden_states(gemma):
    from sae_lens import SAE

    from mechreward.readout import ReadoutBank
    from mechreward.rollout.hf import read_forward, sample

    model, tokenizer = gemma
    theirs = SAE.from_pretrained(RELEASE, SAE_ID)
    ids = list(range(0, 16384, 800))
    ours = mr.load_sae(RELEASE, SAE_ID).features(ids)
    batch = sample(model, tokenizer, ["2 + 2 =", "The capital of France is"], 2, max_new_tokens=16, do_sample=True)
    read = read_forward(model, batch, ReadoutBank([ours]))[ours]
    for i, (prompt, completion) in enumerate(zip(batch.prompt_ids, batch.completion_ids, strict=True)):
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([[*prompt, *completion]]), output_hidden_states=True).hidden_states[
                13
            ]
            want = theirs.encode(hidden[0, len(prompt) :])
        real = len(completion) - 1
        largest = want[:real].amax(dim=1, keepdim=True)
        assert ((read.values[i, :real] - want[:real, ids]).abs() <= 1e-5 * largest.clamp(min=1)).all()


def test_one_step_of_grpo(gemma, tmp_path):
    from datasets import Dataset

    sae = mr.load_sae(RELEASE, SAE_ID)
    reward = mr.FeatureReward(sae.features([100, 200, 300]))
    args = mr.MechRewardGRPOConfig(
        output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=2, max_completion_length=16,
        max_steps=1, logging_steps=1, bf16=False, report_to=[],
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "2 + 2 ="}] * 4)
    trainer = mr.MechRewardGRPOTrainer("google/gemma-2-2b", reward, args, train_dataset=data)
    trainer.train()
    assert trainer.taps == {"policy": "generation"} and "reward" in trainer.state.log_history[0]
