"""``mechreward doctor``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mechreward.cli.common import AsJson, console

COLOURS = {"ok": "", "warning": "yellow", "problem": "red"}


def doctor(
    model: Annotated[str | None, typer.Option(help="A hub id or a folder: does it fit into memory?")] = None,
    sae: Annotated[str | None, typer.Option(help="release/sae_id: does it fit the model, and into memory?")] = None,
    dtype: Annotated[str, typer.Option(help="Type of the model's weights: float32, bfloat16 or float16.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Check this machine: versions, extras, the GPU, the sandbox, memory; and say what to do.

    The exit code is 1 if there is a problem.

    Example: mechreward doctor --model google/gemma-2-2b --dtype bfloat16
    --sae gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical
    """
    from mechreward.doctor import examine
    from mechreward.errors import ConfigError
    from mechreward.rollout.sampling import parse_dtype

    if sae is not None and model is None:
        raise ConfigError("--sae is compared with a model: name it with --model.")
    found = []
    for finding in examine(model, sae, parse_dtype(dtype)):
        found.append(finding)
        if not as_json:
            line = f"{finding.state:<8} {finding.area:<15} {finding.says} {finding.do}"
            console.print(line, style=COLOURS[finding.state], soft_wrap=True, markup=False, highlight=False)
    if as_json:
        typer.echo(json.dumps([finding._asdict() for finding in found], indent=2))
    raise typer.Exit(1 if any(finding.state == "problem" for finding in found) else 0)
