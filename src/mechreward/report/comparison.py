"""Runs side by side: a row for each arm, and in words what its difference to the baseline allows one to say.

The statistics are those of :mod:`mechreward.train.results`: paired by seed and question, two intervals, and a
difference counts as shown only if both leave out 0. Arms that were not trained alike are not compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mechreward.errors import ConfigError, nearest
from mechreward.report.runs import Folder
from mechreward.train.results import (
    Difference,
    Run,
    difference,
    over_seeds,
    reading_moved,
    verdict,
    without_infinities,
)
from mechreward.train.runner import first_difference

ENDS = 5
"""Training steps that a figure at the start or the end of a training is the mean of."""


def by_arm(folders: Sequence[Folder]) -> dict[str, list[Folder]]:
    """The runs of each arm, in the order in which they were given."""
    arms: dict[str, list[Folder]] = {}
    for folder in folders:
        arms.setdefault(folder.arm, []).append(folder)
    return arms


def compare(folders: Sequence[Folder], baseline: str | None = None) -> dict[str, Any]:
    """The comparison as JSON.

    Args:
        folders: All runs.
        baseline: The arm to compare with; by default ``outcome`` if there is one, else the first.

    Returns:
        ``baseline``; ``compared``, how many arms have a verdict; and for each of ``arms``: seeds, how many runs are
        finished, ``accuracy`` at the start and the end, what was ``gained`` in training, the ``difference`` to the
        baseline, the ``verdict``, the watched ``readings``, and ``training`` figures of the first and last
        :data:`ENDS` steps.

    Raises:
        ConfigError: There is no such arm.
    """
    arms = by_arm(folders)
    if baseline is not None and baseline not in arms:
        raise ConfigError(f"There is no arm '{baseline}', only {', '.join(arms)}.{nearest(baseline, arms)}")
    tested = [arm for arm, runs in arms.items() if _judged(runs)] or list(arms)
    base = baseline or ("outcome" if "outcome" in tested else tested[0])
    rows = {arm: _row(arm, arms, base) for arm in sorted(arms, key=lambda arm: arm != base)}
    with_verdict = sum(row["difference"] is not None for row in rows.values())
    return without_infinities({"baseline": base, "compared": with_verdict, "arms": rows})


def _judged(runs: Sequence[Folder]) -> list[Run]:
    """The finished runs that were tested."""
    return sorted((r.tested for r in runs if r.finished and r.tested is not None), key=lambda run: run.seed)


def _row(arm: str, arms: dict[str, list[Folder]], base: str) -> dict[str, Any]:
    judged, watched = _judged(arms[arm]), []
    if judged:
        watched = [pack.split("/")[-1] for pack in arms[arm][0].config.get("watch", [])]
    minus, said = _difference(arm, arms, base)
    return {
        "seeds": [run.seed for run in arms[arm]],
        "runs": len(arms[arm]),
        "finished": sum(run.finished is True for run in arms[arm]),
        "accuracy": _ends(judged) if judged else None,
        "gained": _gained(judged).report() if judged else None,
        "difference": None if minus is None else minus.report(),
        "verdict": said,
        "readings": {name: reading_moved(judged, name) for name in watched if name in judged[0].rows[0]},
        "training": _training(arms[arm]),
    }


def _difference(arm: str, arms: dict[str, list[Folder]], base: str) -> tuple[Difference | None, str]:
    """An arm minus the baseline, if that can be said, and a sentence."""
    judged, others = _judged(arms[arm]), _judged(arms[base])
    if not judged:
        return None, f"{arm}: no finished run with an evaluation on test questions, so nothing can be said of it."
    unlike = _unlike([*arms[base], *arms[arm]], apart=("arm", "seed")) or _unlike(arms[arm], apart=("seed",))
    if arm == base:
        return None, f"{arm} is what the others are compared with."
    if not others:
        return None, f"{arm}: {base} has no finished run with an evaluation to compare it with."
    if unlike is not None:
        key, old, new = unlike
        return None, f"{arm} and {base} were not trained alike ({key}: {new} and {old}), so they are not compared."
    try:
        found = difference(judged, others)
    except ConfigError as error:
        return None, f"{arm}: {error}"
    return found, verdict(arm, without_infinities(found.report()))


def _unlike(runs: Sequence[Folder], apart: tuple[str, ...]) -> tuple[str, Any, Any] | None:
    """Where the configurations of runs first differ, seeds (and arms) aside."""
    first, *others = [{k: v for k, v in run.config.items() if k not in apart} for run in runs]
    return next((first_difference(first, other) for other in others if other != first), None)


def _ends(runs: Sequence[Run]) -> dict[str, Any]:
    curves = [run.curve("right") for run in runs]
    return {"start": over_seeds([c[0] for c in curves]), "end": over_seeds([c[-1] for c in curves])}


def _gained(runs: Sequence[Run]) -> Difference:
    """The last step minus the first, on the same questions."""
    return Difference.of([run.rows[-1]["right"] - run.rows[0]["right"] for run in runs])


def _training(runs: Sequence[Folder]) -> dict[str, Any]:
    """Mean over seeds of what was logged at the start and at the end; None for what was not."""
    wanted = {"reward": "reward", "kl": "kl", "length": "completions/mean_length", "flagged": "guards/flagged"}
    found: dict[str, Any] = dict.fromkeys(wanted)
    for name, key in wanted.items():
        ends = []
        for part in (slice(None, ENDS), slice(-ENDS, None)):
            means = [_known(run.metrics[part], key) for run in runs]
            ends.append([float(np.mean(values)) for values in means if values])
        if all(ends):
            found[name] = {"first": over_seeds(ends[0]), "last": over_seeds(ends[1])}
    return found


def _known(logs: Sequence[dict[str, Any]], key: str) -> list[float]:
    """The finite values of a figure."""
    return [log[key] for log in logs if isinstance(log.get(key), (int, float)) and np.isfinite(log[key])]
