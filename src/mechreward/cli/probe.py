"""``mechreward probe ...``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mechreward import progress
from mechreward.cli.common import AsJson, console, made

probe = typer.Typer(
    no_args_is_help=True,
    help="Linear probes: train one on labelled rollouts, and see what it can do.\n\n"
    "Example: mechreward probe show pocket/correctness_probe",
)


@probe.command("train")
def train_a_probe(
    model: Annotated[str, typer.Option(help="A hub id, a folder, or mechreward/pocket.")],
    data: Annotated[Path, typer.Option(help="Labelled rollouts, JSONL: prompt, completion, label.")],
    out: Annotated[Path, typer.Option(help="Where to: OUT.json and OUT.safetensors.")],
    held_out: Annotated[
        Path | None, typer.Option(help="Rollouts of other questions, to judge by. Default: half of DATA's questions.")
    ] = None,
    layers: Annotated[str, typer.Option(help="Layers to try: all, one, or several with commas.")] = "all",
    pooling: Annotated[str, typer.Option(help="mean, last, max, attention, or mean_last_N_tokens.")] = "mean",
    plot: Annotated[Path | None, typer.Option(help="Draw the AUC of each layer into this PNG.")] = None,
    description: Annotated[str, typer.Option(help="What a high logit means, for the card.")] = "",
    licence: Annotated[str | None, typer.Option(help="Licence of the probe, for the card.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a probe, choose its layer by cross-validation, calibrate it, and measure it on held-out rollouts.

    Example: mechreward probe train --model mechreward/pocket --data rollouts.jsonl --out probes/correctness
    """
    from mechreward.extras import require
    from mechreward.probes.linear_probe import files_of, save_probe
    from mechreward.probes.training import check_writable, draw_sweep, parse_layers, train_probe
    from mechreward.rollout.labelled import read_rollouts
    from mechreward.rollout.sampling import load_model

    for file in (*files_of(out), *([plot] if plot else [])):
        check_writable(file)
    if plot:
        require("matplotlib", "report")
    loaded, tokenizer = load_model(model)
    chosen, rollouts = parse_layers(layers, loaded), read_rollouts(data, loaded, tokenizer)
    others = None if held_out is None else read_rollouts(held_out, loaded, tokenizer)
    with progress.shown():
        trained = train_probe(
            loaded, rollouts, chosen, pooling, others, files_of(out)[0].stem, model, description, licence
        )
    save_probe(trained.probe, out)
    if plot:
        draw_sweep(trained.probe.card, plot)
    _tell_probe(trained.probe.card, as_json)
    files = ", ".join(map(str, (*files_of(out), *([plot] if plot else []))))
    made(f"Saved: {files}. Use it: mr.FeatureReward(mr.load_probe('{out}')).", as_json)


@probe.command("show")
def show_a_probe(
    name: Annotated[str, typer.Argument(help="A probe of the catalogs, a path, or hf:user/repository/name.")],
    as_json: AsJson = False,
) -> None:
    """Show a probe: where it reads, how it was trained, and what it can do.

    Example: mechreward probe show pocket/correctness_probe
    """
    from mechreward.probes.linear_probe import load_probe

    _tell_probe(load_probe(name).card, as_json)


def _tell_probe(card: Any, as_json: bool) -> None:
    """A probe's card."""
    if as_json:
        typer.echo(card.model_dump_json(indent=2))
        return
    said = [f"{card.name}: {card.aggregation} pooling at {card.hook_point} of {card.model or 'an unnamed model'}."]
    if card.training is not None:
        title = f"{card.training.pooling_of_sweep} pooling (*: chosen)"
        table = Table("layer", "C", "AUC, cross-validated", "AUC, held out", title=title)
        for layer in card.training.layers:
            mark = " *" if card.hook_point == f"blocks.{layer.layer}.hook_resid_post" else ""
            figures = (layer.cross_validated.shown(), layer.held_out.shown())
            table.add_row(f"{layer.layer}{mark}", f"{layer.strength:g}", *figures)
        console.print(table)
        said.append(f"Cross-validated AUC {card.training.cross_validated.shown()}.")
    if card.evidence is not None:
        chance = " No better than chance." if card.evidence.auc.low <= 0.5 else ""
        said.append(f"AUC on {card.evidence.n} held-out rollouts {card.evidence.auc.shown()}.{chance}")
    if card.calibration is not None:
        c = card.calibration
        said.append(
            f"Calibrated: Brier score {c.brier.shown()} ({c.brier_uncalibrated:.3f} uncalibrated, "
            f"{c.brier_of_the_share:.3f} for the share alone), expected calibration error {c.ece:.3f} "
            f"({c.ece_uncalibrated:.3f} uncalibrated)."
        )
    said += [f"Trained on {card.trained_on}."] if card.trained_on else []
    said += [f"Licence: {card.licence}."] if card.licence else []
    console.print("\n".join(said), soft_wrap=True, markup=False, highlight=False)
