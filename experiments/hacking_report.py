"""The report of experiment 06: a table, plots, and every figure in them as JSON.

    python experiments/hacking_report.py --config experiments/hacking/pocket.yaml

Reads the finished runs, measures detection on what they wrote, and adds attack 2 (best of N). Written to
experiments/results/hacking.{json,md} and hacking-*.png.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

from hacking import page, results
from hacking.defences import HackingConfig
from mechreward.errors import CandidateWarning, MechRewardError
from mechreward.train.config import read_config

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, help="the experiment's YAML file")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    options = parser.parse_args()
    warnings.simplefilter("ignore", CandidateWarning)
    try:
        report = results.report(read_config(options.config, HackingConfig))
    except MechRewardError as error:
        if options.debug:
            raise
        sys.exit(f"Error: {error}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "hacking.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (options.out / "hacking.md").write_text(page.markdown(report), encoding="utf-8")
    page.draw(report, options.out)
    print(page.markdown(report))
    print(f"Written: {options.out}/hacking.md, .json, hacking-*.png")
