"""Experiment 07: what does RL cost elsewhere?

    python experiments/07_capability_preservation.py --config experiments/capability/pocket.yaml
    python experiments/07_capability_preservation.py --config experiments/capability/smollm2.yaml

Measures a model before RL and what RL made of it, on the same questions: pocket's own skills and perplexity, or
lm-eval's tasks (pip install '.[eval]'). A regression of more than 2 points is flagged. The result, with every
question's score, goes to experiments/results/capability-<name>.{json,md}; `--tables` makes the tables again from
these scores alone.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from mechreward.errors import DataError, MechRewardError
from mechreward.integrations.made import made_now
from mechreward.train import capability
from mechreward.train.capability import CapabilityConfig, Scores
from mechreward.train.capability_tasks import fingerprint, measure, packages
from mechreward.train.runner import quiet


def measured(config: CapabilityConfig, kept: Path) -> dict[str, Any]:
    """Every capability of the model before RL, and of each that came out of it."""
    now = made_now()
    # Which models there are is settled before any of them is measured.
    after = {name: capability.models_of(trained) for name, trained in config.after.items()}
    before = measure(config, config.before, kept)
    return {
        "command": f"python experiments/07_capability_preservation.py --config {options.config}",
        "made": now,
        "settings": config.model_dump(mode="json"),
        "environment": packages(),
        "questions": {what: scores.questions for what, scores in before.items()},
        "before": stored(config.before, before),
        "after": {
            name: [stored(model, on_the_same_questions(before, measure(config, model, kept))) for model in models]
            for name, models in after.items()
        },
    }


def on_the_same_questions(before: dict[str, Scores], after: dict[str, Scores]) -> dict[str, Scores]:
    """What was measured after, once it is sure that it can be paired."""
    for what, scores in after.items():
        capability.change(before[what], [scores])
    return after


def stored(model: str, scores: dict[str, Scores]) -> dict[str, Any]:
    """A model's scores, and whose they are."""
    return {"model": model, "sha256": fingerprint(model), "scores": {what: s.to_json() for what, s in scores.items()}}


def written(report: dict[str, Any], file: Path) -> str:
    """The report as JSON, one list to a line, with what follows from it; and as a page."""
    page = capability.markdown(report)
    follows = {
        name: {what: change.report() for what, change in changes.items()}
        for name, changes in capability.compared(report).items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**report, "compared": follows}, indent=1, allow_nan=False)
    Path(f"{file}.json").write_text(in_few_lines(text) + "\n", encoding="utf-8")
    Path(f"{file}.md").write_text(page, encoding="utf-8")
    return page


def in_few_lines(text: str) -> str:
    """Indented JSON with each list of numbers or names on one line."""
    innermost = r"\[\n\s+([^\[\]{}]*?)\n\s+\]"
    return re.sub(innermost, lambda found: "[" + re.sub(r"\n\s+", " ", found[1]) + "]", text)


def read_stored(file: Path) -> dict[str, Any]:
    """An earlier result."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}): leave --tables out to measure.") from None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, help="the comparison's YAML file")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--kept", type=Path, default=Path("runs/capability"), help="folder for what is measured")
    parser.add_argument("--tables", action="store_true", help="measure nothing: the tables again, from stored scores")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    options = parser.parse_args()
    quiet()
    try:
        config = capability.read_config(options.config)
        file = options.out / f"capability-{config.name}"
        report = read_stored(Path(f"{file}.json")) if options.tables else measured(config, options.kept)
        print(written(report, file))
    except MechRewardError as error:
        if options.debug:
            raise
        sys.exit(f"Error: {error}")
    print(f"Written: {file}.md, .json")
