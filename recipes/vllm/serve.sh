#!/usr/bin/env bash
# vLLM's own server, as TRL expects it, with a worker that reads features while it generates.
#
#   MODEL=google/gemma-2-2b POINTS='["blocks.12.hook_resid_post"]' bash recipes/vllm/serve.sh
set -euo pipefail
: "${MODEL:?the model that the trainer starts from: a hub id or a folder}"
: "${POINTS:?where rewards read, as JSON, e.g. [\"blocks.12.hook_resid_post\"]; a pack says it in its hook_point}"

# TRL needs two routes of vLLM's that exist in this mode alone: new weights, and a prefix cache that forgets. We need a
# third, remote calls. Whoever reaches the port can use them: let nobody but the trainer reach it.
export VLLM_SERVER_DEV_MODE=1

flags=(
  # Where the trainer finds it: vllm_server_base_url.
  --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}"
  # As the trainer's own passes; bfloat16 is less exact, and readings near a threshold flip.
  --dtype "${DTYPE:-bfloat16}"
  # Prompt and completion together.
  --max-model-len "${LENGTH:-2048}"
  # Reads while it generates, at these hook points; "hook" in place of "aux" needs --enforce-eager as well.
  --worker-cls mechreward.rollout.vllm_worker.ReadingWorker
  --additional-config "{\"mechreward\": {\"backend\": \"${BACKEND:-aux}\", \"points\": $POINTS}}"
  # Log-probabilities after temperature and the like, of any number of tokens: TRL corrects for the engine with them.
  --logprobs-mode processed_logprobs --max-logprobs -1
  # TRL hands new weights over by NCCL.
  --weight-transfer-config '{"backend": "nccl"}'
)
exec vllm serve "$MODEL" "${flags[@]}" "$@"
