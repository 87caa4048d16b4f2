"""Experiment 02: GRPO on features alone.

    python experiments/02_mechreward_only.py --config configs/mechreward_only.yaml

Does the accuracy follow the reading, or does the policy learn to produce the reading without the behaviour?
"""

from common.cli import train
from mechreward.train.config import ExperimentConfig


def problem(config: ExperimentConfig) -> str | None:
    """No arm may reward the outcome."""
    for name, arm in config.arms.items():
        if arm.outcome:
            return f"arm '{name}' rewards the outcome, but this experiment is about features alone: use 03."
    return None


if __name__ == "__main__":
    train(__doc__, problem)
