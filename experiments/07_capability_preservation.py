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
from pathlib import Path
from typing import Any

from capability import comparison
from capability.comparison import CapabilityConfig
from common.cli import start
from common.tables import write_results
from mechreward.errors import DataError
from mechreward.files import made_now
from mechreward.train.capability import Scores, fingerprint, measure, packages
from mechreward.train.config import read_config
from mechreward.train.runner import quiet


def work(options: argparse.Namespace) -> None:
    """Measure, or read what was measured; then write the comparison."""
    quiet()
    config = read_config(options.config, CapabilityConfig)
    file = options.out / f"capability-{config.name}"
    command = f"python experiments/07_capability_preservation.py --config {options.config}"
    report = read_stored(Path(f"{file}.json")) if options.tables else measured(config, options.kept, command)
    follows = {
        name: {what: change.report() for what, change in changes.items()}
        for name, changes in comparison.compared(report).items()
    }
    write_results(file, {**report, "compared": follows}, comparison.markdown(report), flat=True)
    print(f"Written: {file}.md, .json")


def measured(config: CapabilityConfig, kept: Path, command: str) -> dict[str, Any]:
    """Measure every capability of the model before RL, and of each that came out of it."""
    now = made_now()
    # Find all models before any of them is measured.
    after = {name: comparison.models_of(trained) for name, trained in config.after.items()}

    def scores_of(model: str) -> dict[str, Scores]:
        return measure(model, config.suites, config.batch_size, config.seed, kept)

    before = scores_of(config.before)
    return {
        "command": command,
        "made": now,
        "settings": config.model_dump(mode="json"),
        "environment": packages(),
        "questions": {what: scores.questions for what, scores in before.items()},
        "before": stored(config.before, before),
        "after": {
            name: [stored(model, paired(before, scores_of(model))) for model in models]
            for name, models in after.items()
        },
    }


def paired(before: dict[str, Scores], after: dict[str, Scores]) -> dict[str, Scores]:
    """Check that the scores after RL can be paired with those before, and return them."""
    for what, scores in after.items():
        comparison.change(before[what], [scores])
    return after


def stored(model: str, scores: dict[str, Scores]) -> dict[str, Any]:
    """Return a model's scores for JSON, with the model's name and fingerprint."""
    return {"model": model, "sha256": fingerprint(model), "scores": {what: s.to_json() for what, s in scores.items()}}


def read_stored(file: Path) -> dict[str, Any]:
    """Read an earlier result."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}): leave --tables out to measure.") from None


if __name__ == "__main__":
    start(
        __doc__,
        work,
        "config out",
        {
            "--kept": {"type": Path, "default": Path("runs/capability"), "help": "folder for what is measured"},
            "--tables": {"action": "store_true", "help": "measure nothing: the tables again, from stored scores"},
        },
    )
