#!/usr/bin/env bash
# GRPO with verl 0.9, rewarded by a mechreward server: one number for a rollout.
#
#   MODEL=google/gemma-2-2b-it TRAIN=train.parquet TEST=test.parquet bash recipes/verl/http.sh
#
# Further options of verl's may follow.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
source "$here/common.sh"
source "$here/server.sh"

options=(
  # Advantages relative to the group.
  algorithm.adv_estimator=grpo
)
exec python -m verl.trainer.main_ppo "${common[@]}" "${server[@]}" "${options[@]}" "$@"
