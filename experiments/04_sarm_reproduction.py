"""Experiment 04: SARM, a reward model that reads a sparse autoencoder (arXiv 2508.08746), and its controls.

    python experiments/04_sarm_reproduction.py --config configs/sarm.yaml
    python experiments/04_sarm_reproduction.py --config configs/sarm.yaml --stage report

Makes preference pairs, trains reward models on them, trains policies with some of these as the reward, and writes
experiments/results/<name>.{json,md}. What is finished is not done again: the same command goes on where it was
interrupted.
"""

from sarm.cells import main

if __name__ == "__main__":
    main(__doc__ or "")
