"""Experiment 02: GRPO on features alone.

    python experiments/02_mechreward_only.py --config configs/mechreward_only.yaml

Does the accuracy follow the reading, or does the policy learn to produce the reading without the behaviour?
"""

from mechreward.train.config import ExperimentConfig
from mechreward.train.runner import main


def fits(config: ExperimentConfig) -> str | None:
    """No arm may look at the outcome."""
    wrong = [name for name, arm in config.arms.items() if arm.outcome]
    return (
        f"arm '{wrong[0]}' rewards the outcome, but this experiment is about features alone: use 03." if wrong else None
    )


if __name__ == "__main__":
    main(__doc__ or "", fits)
