"""``mechreward gate``."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mechreward import progress
from mechreward.cli.common import (
    AsJson,
    Data,
    Name,
    SamplingOptions,
    Seed,
    beside,
    check_pack_file,
    expanded,
    made,
    resumable,
    show_verdict,
)
from mechreward.features.catalog import load_pack


@dataclass(frozen=True)
class GateSampling(SamplingOptions):
    """The same with another seed than discovery's: the gate needs other rollouts."""

    seed: Seed = 1


@expanded
def gate(
    name: Name,
    data: Data,
    model: Annotated[str | None, typer.Option(help="A hub id or a folder. Default: the pack's.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where the pack goes with its evidence. Default: its file, or one of its name here."),
    ] = None,
    *,
    options: GateSampling,
    as_json: AsJson = False,
) -> None:
    """Test a pack on rollouts that its discovery never saw, and write the evidence and the verdict into it.

    Exit code 0 where it is validated, 1 where it stays a candidate. It can be interrupted: the same command does not
    sample again what it has sampled.

    Example: mechreward gate my_pack.json --data mechreward/pocket
    """
    from mechreward.features.discover import chance_file, read_chance
    from mechreward.features.frozen import write_pack
    from mechreward.features.judge import judge, pack_readout
    from mechreward.rollout.capture import check_fits
    from mechreward.rollout.sampling import load_model, parse_dtype

    pack, local = load_pack(name), name.endswith(".json") and not name.startswith("hf:")
    file = out or (Path(name) if local else Path(f"{name.split('/')[-1].removesuffix('.json')}.json"))
    check_pack_file(file, options.keep_rollouts)
    own, chance = pack_readout(pack), read_chance(Path(name)) if local else None
    loaded, tokenizer = load_model(model or pack.model, parse_dtype(options.dtype))
    check_fits([own], loaded)  # before anything is sampled, which may take hours

    sampling = options.sampling(options.questions or 250, options.rollouts or 4)
    used = chance.asked if chance else ()
    with resumable(beside(file, "gate")) as unfinished, progress.shown():
        held_out = sampling.labelled(loaded, tokenizer, data, "gate", used, unfinished)
        judged = judge(pack, loaded, tokenizer, held_out, chance, options.seed)
        write_pack(judged, file)
    if chance is not None and file != Path(name):
        shutil.copy2(chance_file(Path(name)), chance_file(file))  # so that it can be gated again

    if as_json:
        typer.echo(json.dumps({"file": str(file), "pack": judged.model_dump(mode="json")}))
    else:
        show_verdict(judged)
    made(f"{file}: {judged.status}.", as_json)
    raise typer.Exit(0 if judged.status == "validated" else 1)
