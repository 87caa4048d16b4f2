"""Experiment 06: a policy that is trained to game the features, against each defence.

    python experiments/06_adversarial_hacking_suite.py --config experiments/hacking/pocket.yaml --jobs 2

Attack 4 of the red team trains on the features alone, without KL; attack 5 subtracts, besides, what the detectors and
the probe see. ``experiments/hacking_report.py`` makes the table and the plots, and adds attack 2, best-of-N.
"""

from hacking.defences import HackingConfig, outfit
from mechreward.train.runner import main


def fits(config: HackingConfig) -> str | None:
    """Every arm that is attacked must have features of the configuration's pack."""
    others = [name for name, arm in config.arms.items() if arm.features and arm.features.pack != config.pack]
    return f"arm '{others[0]}' rewards another pack than `pack`, which the guards are made for." if others else None


if __name__ == "__main__":
    main(__doc__ or "", fits, HackingConfig, outfit, "Report: python experiments/hacking_report.py")
