"""``mechreward report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mechreward.cli.common import AsJson, console
from mechreward.errors import ConfigError


def report(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of trainings, or of whole experiments.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.")] = Path("report.html"),
    baseline: Annotated[
        str | None, typer.Option(help="The arm to compare with; by default 'outcome', else the first that was tested.")
    ] = None,
    rollouts: Annotated[int, typer.Option(min=0, help="How many rollouts to take into the page.")] = 2000,
    title: Annotated[str | None, typer.Option(help="The page's title.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make one HTML file of runs: result, curves, rollouts with shaded tokens, packs, cost. It needs no network.

    With --json the comparison is printed, and nothing is written.

    Example: mechreward report runs/pocket -o report.html
    """
    from mechreward.report.runs import find

    folders = find(runs)
    if as_json:
        from mechreward.report.comparison import compare

        typer.echo(json.dumps(compare(folders, baseline), indent=2, allow_nan=False))
        return
    from mechreward.report.page import page

    html = page(folders, baseline, rollouts, title)
    try:
        out.write_text(html, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}): give another file with --out.") from None
    count = f"{len(folders)} run{'s' if len(folders) != 1 else ''}"
    console.print(f"Report of {count}: {out} ({out.stat().st_size / 1e6:.1f} MB).", soft_wrap=True, highlight=False)
