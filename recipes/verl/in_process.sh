#!/usr/bin/env bash
# GRPO with verl 0.9, rewarded for the live policy's own activations: no server, and no forward pass more.
#
#   MODEL=google/gemma-2-2b-it PACK=my_pack.json TRAIN=train.parquet TEST=test.parquet bash recipes/verl/in_process.sh
#
# Further options of verl's may follow.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
source "$here/common.sh"
: "${PACK:?a pack: a catalog name or a file that all nodes see}"

options=(
  # What to read in the pass that computes the policy's log-probabilities. The words are those of `mechreward serve`:
  # packs, probes, weights, verifier, mode, guard, aggregation.
  +mechreward.packs="[$PACK]"

  # Features count where the answer is right.
  +mechreward.verifier=gsm8k
  +mechreward.mode=gated

  # Rewards per token: set this to true, and algorithm.adv_estimator to reinforce_plus_plus or gae.
  +mechreward.dense=false
  algorithm.adv_estimator=grpo

  # What is read is added to what verl's reward manager gives. This one gives nothing: the verifier above judges the
  # outcome already.
  reward.reward_manager.source=importlib
  reward.reward_manager.name=NoReward
  reward.reward_manager.module.path=pkg://mechreward.integrations.verl
)
exec python -m verl.trainer.main_ppo "${common[@]}" "${options[@]}" "$@"
