"""Experiment 01: GRPO on the outcome alone.

    python experiments/01_baseline_outcome_only.py --config configs/baseline.yaml

The floor that features have to beat. RESEARCH.md says beforehand what would count against it.
"""

from common.cli import train
from mechreward.train.config import ExperimentConfig


def problem(config: ExperimentConfig) -> str | None:
    """Every arm must do without features."""
    for name, arm in config.arms.items():
        if arm.features is not None:
            return f"arm '{name}' has features, but this experiment is about the outcome alone: use 02 or 03."
    return None


if __name__ == "__main__":
    train(__doc__, problem)
