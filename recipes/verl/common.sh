# What the three recipes share: verl 0.9 on one machine with 8 GPUs. Sourced by them, after `set -euo pipefail`.
: "${MODEL:?a Hugging Face model}" "${TRAIN:?a parquet file, as verl reads it}" "${TEST:?another}"

# verl loads our plug-in in each of its processes. On several machines, set it on all of them before `ray start`.
export VERL_USE_EXTERNAL_MODULES=mechreward.integrations.verl

common=(
  # verl's synchronous trainer, which ends the run where a reward fails. verl's own ("sync") logs the failure, and
  # trains on the rollouts that are left.
  trainer.v1.trainer_mode=mechreward

  # Prompts, and right answers in reward_model.ground_truth.
  data.train_files="$TRAIN"
  data.val_files="$TEST"
  data.train_batch_size=128
  data.max_prompt_length=1024
  data.max_response_length=1024

  actor_rollout_ref.model.path="$MODEL"
  actor_rollout_ref.model.enable_gradient_checkpointing=True
  # Only fsdp and fsdp2 can be read from in process. A server does not mind.
  actor_rollout_ref.actor.strategy=fsdp2
  actor_rollout_ref.actor.optim.lr=1e-6
  actor_rollout_ref.actor.ppo_mini_batch_size=128
  actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4

  # KL to the start is the cheapest defence that there is; docs/goodhart.md says what it is worth. verl's default is
  # none.
  actor_rollout_ref.actor.use_kl_loss=True
  actor_rollout_ref.actor.kl_loss_coef=0.04
  actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8

  actor_rollout_ref.rollout.name=vllm
  actor_rollout_ref.rollout.n=8
  actor_rollout_ref.rollout.tensor_model_parallel_size=1
  actor_rollout_ref.rollout.gpu_memory_utilization=0.6
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8

  trainer.nnodes=1
  trainer.n_gpus_per_node=8
  trainer.logger=[console]
  trainer.save_freq=50
  trainer.test_freq=50
  trainer.total_epochs=1
)
