"""Experiment 03: GRPO on outcome and features together, and on controls in the features' place.

    python experiments/03_hybrid_outcome_plus_mech.py --config configs/hybrid.yaml

Is it better than the outcome alone, at equal budget? And if so, is it because of these features?
"""

from common.cli import train
from mechreward.train.config import ExperimentConfig


def problem(config: ExperimentConfig) -> str | None:
    """Every arm must have both."""
    for name, arm in config.arms.items():
        if not arm.outcome or arm.features is None:
            return f"arm '{name}' lacks outcome or features, but this experiment is about both: use 01 or 02."
    return None


if __name__ == "__main__":
    train(__doc__, problem)
