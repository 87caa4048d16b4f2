"""Compare the finished runs of an experiment.

    python experiments/compare.py runs/pocket

Writes tables, a figure, and everything in them as JSON to experiments/results/<folder's name>.{md,png,json}.
"""

import argparse
from pathlib import Path

from common import page
from common.cli import start
from common.comparison import compare
from common.tables import write_results


def work(options: argparse.Namespace) -> None:
    """Write the comparison."""
    report = compare(options.runs, options.baseline, options.target)
    file = options.out / options.runs.resolve().name
    write_results(file, report, page.markdown(report))
    page.draw(report, Path(f"{file}.png"))
    print(f"Written: {file}.md, .png, .json")


if __name__ == "__main__":
    start(
        __doc__,
        work,
        "out",
        {
            "runs": {"type": Path, "help": "the experiment's output folder"},
            "--baseline": {"default": "outcome", "help": "the arm to compare with (default: outcome)"},
            "--target": {"type": float, "default": 0.6, "help": "accuracy to count the steps to (default: 0.6)"},
        },
    )
