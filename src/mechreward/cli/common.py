"""What all commands share."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from mechreward.features.pack import FeaturePack

console = Console()

Name = Annotated[str, typer.Argument(help="A pack of the catalogs, or a path to its JSON file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def show_verdict(pack: FeaturePack) -> None:
    if pack.evidence is not None:
        for test in pack.evidence.verdict:
            said = f"{'passed' if test.passed else 'FAILED'}  {test.name}: {test.sentence}"
            console.print(said, soft_wrap=True, markup=False, highlight=False)
