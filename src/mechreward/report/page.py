"""The report as one HTML file that asks nothing of the network.

What comes from runs (completions, names, answers) is only ever shown as text: the tables by jinja2's escaping, the rest
by the page's script, which sets text and never HTML. Data travels compressed in base64, so that nothing in it can end
a tag; a content security policy lets no other script run than the page's own and plotly's, by their hashes.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from mechreward.extras import require
from mechreward.features.pack import FeaturePack
from mechreward.features.show import visible
from mechreward.report.comparison import compare
from mechreward.report.curves import COST, alarms, cost, curves
from mechreward.report.rollouts import rollouts
from mechreward.report.runs import Folder
from mechreward.train.results import widest, without_infinities

HERE = Path(__file__).parent


def page(folders: Sequence[Folder], baseline: str | None = None, most: int = 2000, title: str | None = None) -> str:
    """The report's HTML.

    Args:
        folders: The runs.
        baseline: The arm to compare with; see :func:`mechreward.report.comparison.compare`.
        most: Rollouts in the browser.
        title: The page's; by default the arms' names.

    Raises:
        ConfigError: There is no such arm.
        MissingExtraError: plotly is not installed.
    """
    plotly, script = _plotly(), (HERE / "page.js").read_text(encoding="utf-8")
    comparison, packs = compare(folders, baseline), _packs(folders)
    shown = rollouts(folders, most)
    data = {
        "baseline": comparison["baseline"],
        "arms": list(comparison["arms"]),
        "curves": curves(folders),
        "rollouts": shown,
        "packs": [_charts(pack) for pack in packs],
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": visible, "with_interval": _with_interval, "duration": _duration}
    return environment.get_template("page.html.j2").render(
        title=title or f"Report: {', '.join(list(comparison['arms'])[:6])}",
        day=date.today().isoformat(),
        comparison=comparison,
        differences={arm: _difference(row["difference"]) for arm, row in comparison["arms"].items()},
        gains={arm: _difference(row["gained"]) for arm, row in comparison["arms"].items()},
        groups=data["curves"],
        shown=len(shown["rows"]),
        recorded=shown["recorded"],
        packs=packs,
        nameless=_nameless(folders, packs),
        alarms=alarms(folders),
        costs=cost(folders),
        parts=list(COST),
        runs=folders,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        hashes=Markup(" ".join([_hash(script), plotly.hash])),
        data=packed(json.dumps(without_infinities(data), separators=(",", ":"), ensure_ascii=False, allow_nan=False)),
        plotly=plotly.packed,
    )


class _Script(NamedTuple):
    packed: str
    hash: str


@functools.cache
def _plotly() -> _Script:
    """The script that draws charts, from the plotly package."""
    require("plotly", "report")
    from plotly.offline import get_plotlyjs

    return _Script(packed(script := get_plotlyjs()), _hash(script))


def packed(text: str) -> str:
    """Compressed, in base64: a fifth of a script's size."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _packs(folders: Sequence[Folder]) -> list[FeaturePack]:
    return list({pack.name: pack for run in folders for pack in run.packs()}.values())


def _nameless(folders: Sequence[Folder], packs: Sequence[FeaturePack]) -> list[str]:
    """Packs that runs name and that cannot be had."""
    named = {name for run in folders for name in run.pack_names}
    return sorted(named - {pack.name for pack in packs})


def _charts(pack: FeaturePack) -> dict[str, Any]:
    """What is drawn of a pack."""
    evidence = pack.evidence
    return {
        "name": pack.name,
        "quantiles": None if pack.calibration is None else pack.calibration.quantiles,
        "curve": None if evidence is None or evidence.curve is None else [b.model_dump() for b in evidence.curve],
        "null": None if evidence is None else evidence.null_spearman,
        "observed": None if evidence is None else evidence.spearman.value,
        "q95": None if evidence is None else evidence.null_spearman_q95,
        "largest": None if evidence is None else evidence.null_spearman_max,
        "share": None if evidence is None else evidence.n_positive / max(evidence.n, 1),
    }


def _with_interval(figure: dict[str, Any] | None, form: str = ".3f") -> str:
    """A mean and its 95 % interval over seeds."""
    if figure is None or figure["mean"] is None:
        return "–"
    ends = [end for end in figure["interval"] if end is not None]
    said = f" ({' to '.join(f'{end:{form}}' for end in ends)})" if len(ends) == 2 else ""
    return f"{figure['mean']:{form}}{said}"


def _difference(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    if None in found["student"]:
        return f"{found['mean']:+.3f} (no interval)"
    low, high = widest(found)
    return f"{found['mean']:+.3f} ({low:+.3f} to {high:+.3f})"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
