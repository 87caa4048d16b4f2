"""Experiment 01: GRPO on the outcome alone.

    python experiments/01_baseline_outcome_only.py --config configs/baseline.yaml

The floor that features have to beat. RESEARCH.md says beforehand what would count against it.
"""

from mechreward.train.config import ExperimentConfig
from mechreward.train.runner import main


def fits(config: ExperimentConfig) -> str | None:
    """Every arm must do without features."""
    wrong = [name for name, arm in config.arms.items() if arm.features is not None]
    return (
        f"arm '{wrong[0]}' has features, but this experiment is about the outcome alone: use 02 or 03."
        if wrong
        else None
    )


if __name__ == "__main__":
    main(__doc__ or "", fits)
