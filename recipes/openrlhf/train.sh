#!/usr/bin/env bash
# GRPO with OpenRLHF 0.11 on one machine with 8 GPUs, rewarded by a mechreward server on a ninth, or on another machine.
#
#   MODEL=google/gemma-2-2b-it PACK=my_pack.json DATA=openai/gsm8k bash recipes/openrlhf/train.sh
#
# First, where the server shall run (--host 0.0.0.0 wants MECHREWARD_TOKEN on both sides):
#
#   mechreward serve --model "$MODEL" --pack "$PACK" --verifier gsm8k --mode gated --port 8000
set -euo pipefail
: "${MODEL:?a Hugging Face model}" "${DATA:?a data set with prompts and answers}"
export MECHREWARD_URL="${MECHREWARD_URL:-http://127.0.0.1:8000}"

# Don't train against a server that is not there.
python - <<'PY'
import os, urllib.request
urllib.request.urlopen(os.environ["MECHREWARD_URL"] + "/readyz", timeout=10)
PY

options=(
  # Token ids go to the server, which reads the very tokens that were sampled. Instead of it
  # `--reward.remote_url $MECHREWARD_URL/get_reward` sends text, which may be encoded as other tokens.
  --train.agent_func_path recipes/openrlhf/agent.py

  # GRPO: advantages relative to the group, which must have more than one rollout.
  --algo.advantage.estimator group_norm
  --rollout.n_samples_per_prompt 8

  # KL to the start is the cheapest defence that there is; docs/goodhart.md says what it is worth.
  --algo.kl.init_coef 0.04

  # OpenRLHF cuts rewards to this range before anything else sees them. A feature reward is no number between 0 and 1:
  # look at a few before you train.
  --reward.clip_range -100 100

  # The server must be able to take prompt and response together.
  --data.max_len 2048
  --rollout.max_new_tokens 1024

  # The prompts, and the right answers, which reach the server as labels (--verifier needs them).
  --data.prompt_dataset "$DATA"
  --data.input_key question
  --data.label_key answer
  --data.apply_chat_template

  --actor.model_name_or_path "$MODEL"
  --actor.adam.lr 1e-6
  --rollout.batch_size 128
  --train.batch_size 128
  --train.micro_batch_size 4

  # All models share the GPUs, and sleep while others work.
  --train.colocate_all
  --vllm.num_engines 8
  --vllm.tensor_parallel_size 1
  --vllm.gpu_memory_utilization 0.6
  --vllm.enable_sleep
  --ds.enable_sleep
  --ds.zero_stage 2
  --actor.num_gpus_per_node 8
  --ref.num_gpus_per_node 8
  --actor.gradient_checkpointing_enable
  --ckpt.output_dir ./ckpt
)
python -m openrlhf.cli.train_ppo_ray "${options[@]}"
