"""``mechreward packs ...``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from mechreward.cli.common import AsJson, Name, console, show_verdict
from mechreward.features.catalog import load_pack, shipped_packs
from mechreward.features.pack import FeaturePack

packs = typer.Typer(
    no_args_is_help=True,
    help="Feature packs: what there is, what they claim, and how to ship one.\n\nExample: mechreward packs list",
)


@packs.command("list")
def list_packs(as_json: AsJson = False) -> None:
    """List the packs of the catalogs.

    Example: mechreward packs list
    """
    found = [load_pack(name) for name in shipped_packs()]
    if as_json:
        typer.echo(json.dumps([{"name": p.name, "model": p.model, "status": p.status} for p in found], indent=2))
        return
    table = Table(Column("pack", no_wrap=True), "reads", "features", "status")
    for pack in found:
        what = str(len(pack.features)) if pack.features else "a recipe"
        table.add_row(pack.name, f"{pack.sae.release}\n{pack.sae.sae_id}", what, pack.status)
    console.print(table)


@packs.command()
def show(name: Name, as_json: AsJson = False) -> None:
    """Show a pack: its features, its evidence, and what the gate said.

    Example: mechreward packs show pocket/reasoning_pack
    """
    pack = load_pack(name)
    if as_json:
        typer.echo(pack.model_dump_json(indent=2))
        return
    console.print(f"[bold]{pack.name}[/bold], {pack.status}: {pack.status_reason}", soft_wrap=True)
    console.print(f"{pack.description} {pack.model}, {pack.hook_point}, {pack.aggregation}.", soft_wrap=True)
    if pack.features:
        table = Table("feature", "weight", "note")
        for feature in pack.features:
            table.add_row(str(feature.id), f"{feature.weight:+.4f}", feature.note)
        console.print(table)
    if pack.recipe is not None:
        console.print(f"Recipe: {pack.recipe.behaviour} {pack.recipe.contrast}", soft_wrap=True)
    show_verdict(pack)
    console.print(f"Licence: {pack.licence}. {_frozen(pack)}")


def _frozen(pack: FeaturePack) -> str:
    if pack.frozen is None:
        return "Not frozen: its sparse autoencoder is loaded."
    near = pack.frozen.approximation
    return "Frozen." if near is None else f"Frozen, approximate: {near.changed:.1%} of readings differ in being zero."


@packs.command()
def validate(file: Annotated[Path, typer.Argument(help="The pack's JSON file.")], as_json: AsJson = False) -> None:
    """Check a pack's file against the schema (its evidence is the gate's business).

    Example: mechreward packs validate my_pack.json
    """
    pack = load_pack(str(file) if file.suffix == ".json" else f"{file}.json")
    if pack.frozen is not None:
        from mechreward.features.frozen import frozen_readout

        frozen_readout(pack)
    if as_json:
        told = {"file": str(file), "name": pack.name, "status": pack.status, "status_reason": pack.status_reason}
        typer.echo(json.dumps(told, indent=2))
        return
    console.print(f"{file} is a sound {pack.status} pack. {pack.status_reason}", soft_wrap=True)


@packs.command()
def schema() -> None:
    """Print the JSON schema of a pack.

    Example: mechreward packs schema > pack.schema.json
    """
    typer.echo(json.dumps(FeaturePack.model_json_schema(), indent=2))


@packs.command()
def freeze(
    name: Name,
    out: Annotated[Path, typer.Option(help="Folder for the JSON and its safetensors file.")] = Path("."),
) -> None:
    """Let a pack carry its own encoder columns, so that training needs no SAE.

    Example: mechreward packs freeze pocket/reasoning_pack --out frozen
    """
    from mechreward.features.frozen import freeze as freeze_pack

    card = freeze_pack(load_pack(name), out)
    weights = card.with_suffix(".safetensors")
    console.print(f"Frozen: {card} and {weights.name} ({weights.stat().st_size / 1024:.0f} KiB).", soft_wrap=True)


@packs.command()
def push(
    file: Annotated[Path, typer.Argument(help="The pack's JSON file.")],
    repo: Annotated[str, typer.Argument(help="A model repository on the hub, e.g. me/my-packs; made if need be.")],
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
) -> None:
    """Upload a pack, and its frozen encoder, to the Hugging Face hub.

    Example: mechreward packs push frozen/reasoning_pack.json me/my-packs
    """
    from mechreward.features.catalog import push as push_pack

    console.print(f"Uploaded: {push_pack(file, repo, private)}", soft_wrap=True)
