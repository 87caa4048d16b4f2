"""Experiment 06: a policy that is trained to game the features, against each defence.

    python experiments/06_adversarial_hacking_suite.py --config experiments/hacking/pocket.yaml --jobs 2

Attack 4 of the red team trains on the features alone, without KL; attack 5 subtracts, besides, what the detectors and
the probe see. ``experiments/hacking_report.py`` makes the table and the plots, and adds attack 2, best-of-N.
"""

from common.cli import train
from hacking.defences import HackingConfig, setup


def problem(config: HackingConfig) -> str | None:
    """Every arm that is attacked must have features of the configuration's pack."""
    for name, arm in config.arms.items():
        if arm.features and arm.features.pack != config.pack:
            return f"arm '{name}' rewards another pack than `pack`, which the guards are made for."
    return None


if __name__ == "__main__":
    train(__doc__, problem, HackingConfig, setup, "Report: python experiments/hacking_report.py")
