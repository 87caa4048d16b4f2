"""Train `pocket` with GRPO on the outcome and a pack of features, in one process or in several.

    accelerate launch --config_file recipes/trl/ddp.yaml recipes/trl/train.py

For a model of yours, change the first four names. Runs on a CPU where there is no GPU.
"""

import argparse

import torch

import mechreward as mr

MODEL = "mechreward/pocket"  # or a folder, or an id of the hub
PACK = "pocket/reasoning_pack"
QUESTIONS = mr.pocket.dataset("train", 2000)  # any dataset with the columns prompt and answer
VERIFIER = mr.verifiers.math_boxed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="GRPO steps (default 30)")
    parser.add_argument("--out", default="out", help="folder for checkpoints (default out)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint there")
    options = parser.parse_args()

    # The outcome leads; the features, read in the model that is being trained, only shape it.
    outcome = mr.OutcomeReward(verifier=VERIFIER)
    features = mr.FeatureReward.from_pack(PACK)
    reward = mr.CompositeReward(rewards=[outcome, features], weights=[1.0, 0.3])

    # The same features, read in the model that training started from: watched, never rewarded. Where the two part, the
    # policy has changed its activations rather than its answers.
    unmoved = mr.FeatureReward.from_pack(PACK, reads="reference")

    gpu = torch.cuda.is_available()
    config = mr.MechRewardGRPOConfig(
        output_dir=options.out,
        # Groups may span processes. The rollouts of a step, all processes together, must divide into them.
        num_generations=8,
        per_device_train_batch_size=32,
        max_completion_length=64,
        max_steps=options.steps,
        learning_rate=1e-4,
        logging_steps=1,
        save_steps=10,
        use_cpu=not gpu,
        bf16=gpu,
        report_to=[],
    )
    trainer = mr.MechRewardGRPOTrainer(
        model=MODEL, args=config, train_dataset=QUESTIONS, reward_funcs=reward, monitors=[unmoved]
    )
    trainer.train(resume_from_checkpoint=options.resume)

    if trainer.accelerator.is_main_process:  # what accelerate has made of its file, and where the readings come from
        print(trainer.accelerator.distributed_type, trainer.accelerator.num_processes, trainer.taps)


if __name__ == "__main__":
    main()
