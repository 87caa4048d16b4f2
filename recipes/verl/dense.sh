#!/usr/bin/env bash
# REINFORCE++ with verl 0.9, rewarded by a mechreward server: a number for each token.
#
#   MODEL=google/gemma-2-2b-it TRAIN=train.parquet TEST=test.parquet bash recipes/verl/dense.sh
#
# Further options of verl's may follow.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
source "$here/common.sh"
source "$here/server.sh"

options=(
  # The agent loop that keeps the server's rewards per token, where verl's own puts one number at the last. verl finds
  # it through the plug-in: no agent_loop_config_path is needed.
  actor_rollout_ref.rollout.agent.default_agent_loop=mechreward_dense

  # Returns add up the rewards that follow a token. grpo and its like add up all of a rollout's, and are refused; gae
  # works, and needs a critic.
  algorithm.adv_estimator=reinforce_plus_plus
)
exec python -m verl.trainer.main_ppo "${common[@]}" "${server[@]}" "${options[@]}" "$@"
