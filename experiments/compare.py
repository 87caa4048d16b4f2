"""Compare the finished runs of an experiment.

    python experiments/compare.py runs/pocket

Writes tables, a figure, and everything in them as JSON to experiments/results/<folder's name>.{md,png,json}.
"""

import argparse
import json
import sys
from pathlib import Path

from mechreward.errors import MechRewardError
from mechreward.train import page, results

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the experiment's output folder")
    parser.add_argument("--baseline", default="outcome", help="the arm to compare with (default: outcome)")
    parser.add_argument("--target", type=float, default=0.6, help="accuracy to count the steps to (default: 0.6)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    options = parser.parse_args()
    try:
        report = results.compare(options.runs, options.baseline, options.target)
    except MechRewardError as error:
        if options.debug:
            raise
        sys.exit(f"Error: {error}")
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / options.runs.resolve().name
    Path(f"{file}.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    Path(f"{file}.md").write_text(page.markdown(report), encoding="utf-8")
    page.draw(report, Path(f"{file}.png"))
    print(page.markdown(report))
    print(f"Written: {file}.md, .png, .json")
