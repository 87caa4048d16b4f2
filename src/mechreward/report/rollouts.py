"""The rollouts of the report's browser: a bounded number, in a form that is small in a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mechreward.report.runs import Folder

KEPT = ("step", "set", "row", "group", "gold", "right", "more", "unread", "reward", "rewards", "parts", "advantage")


class _Numbered(dict[str, int]):
    """Texts by the order in which they were first seen."""

    def __missing__(self, text: str) -> int:
        return self.setdefault(text, len(self))


def rollouts(folders: Sequence[Folder], most: int) -> dict[str, Any]:
    """At most so many rollouts, evenly of all runs and of each run's steps.

    Returns:
        ``rows``, whose ``prompt`` and ``tokens`` are numbers in the lists ``prompts`` and ``tokens``, ``run`` in
        ``runs``; whose readings are keyed by the place of the readout in ``readouts`` and of the column in its
        ``labels``; and ``recorded``, how many there were.
    """
    prompts, tokens = _Numbered(), _Numbered()
    labels: dict[str, _Numbered] = {}
    about: dict[str, dict[str, Any]] = {}
    with_any = [run for run in folders if run.trace]
    rows = []
    for number, run in enumerate(folders):
        for name, readout in run.recording.get("readouts", {}).items():
            known = labels.setdefault(name, _Numbered())
            where = about.setdefault(name, {**readout, "weights": {}})
            for label, weight in zip(readout["labels"], readout["weights"], strict=True):
                where["weights"].setdefault(known[label], weight)
        for record in _thinned(run.trace, most // max(len(with_any), 1)):
            readings = {
                list(labels).index(name): {
                    "score": read["score"],
                    "features": {labels[name][label]: where for label, where in read["features"].items()},
                }
                for name, read in record["readings"].items()
                if labels.setdefault(name, _Numbered()) is not None
            }
            prompt = None if record["prompt"] is None else prompts[record["prompt"]]
            said = {"flags": record.get("flags", []), "dropped": bool(record.get("dropped"))}
            kept = {key: record.get(key) for key in KEPT}
            words = [tokens[token] for token in record["tokens"]]
            rows.append({"run": number, **kept, "prompt": prompt, "tokens": words, "readings": readings, **said})
    readouts = [
        {
            "name": name,
            "labels": list(known),
            "weights": [about.get(name, {}).get("weights", {}).get(k) for k in range(len(known))],
            "width": about.get(name, {}).get("width"),
            "hook_point": about.get(name, {}).get("hook_point"),
        }
        for name, known in labels.items()
    ]
    return {
        "rows": rows,
        "prompts": list(prompts),
        "tokens": list(tokens),
        "readouts": readouts,
        "runs": [{"arm": run.arm, "seed": run.seed, "name": run.name} for run in folders],
        "recorded": sum(len(run.trace) for run in folders),
    }


def _thinned(trace: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Evenly spaced, in their order."""
    if len(trace) <= most:
        return list(trace)
    places = np.linspace(0, len(trace) - 1, max(most, 1)).round().astype(int)
    return [trace[place] for place in sorted(set(places.tolist()))]
