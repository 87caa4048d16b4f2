"""The report of experiment 06: a table, plots, and every figure in them as JSON.

    python experiments/hacking_report.py --config experiments/hacking/pocket.yaml

Reads the finished runs, measures detection on what they wrote, and adds attack 2 (best of N). Written to
experiments/results/hacking.{json,md} and hacking-*.png.
"""

import argparse
import warnings

from common.cli import start
from common.tables import write_results
from hacking import page, results
from hacking.defences import HackingConfig
from mechreward.errors import CandidateWarning
from mechreward.train.config import read_config


def work(options: argparse.Namespace) -> None:
    """Write the report."""
    warnings.simplefilter("ignore", CandidateWarning)
    report = results.report(read_config(options.config, HackingConfig))
    write_results(options.out / "hacking", report, page.markdown(report))
    page.draw(report, options.out)
    print(f"Written: {options.out}/hacking.md, .json, hacking-*.png")


if __name__ == "__main__":
    start(__doc__, work, "config out")
