"""``mechreward discover``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mechreward import progress
from mechreward.cli.common import (
    AsJson,
    Data,
    SamplingOptions,
    beside,
    check_pack_file,
    console,
    expanded,
    made,
    resumable,
)
from mechreward.features.catalog import load_pack
from mechreward.features.pack import FeaturePack


@dataclass(frozen=True)
class Selection:
    """Which latents make the pack, and what they stand for. None leaves a setting to the recipe."""

    behaviour: Annotated[str, typer.Option(help="What the labels mean, in a sentence.")] = "The final answer is right."
    method: Annotated[str, typer.Option(help="effect, firing, lasso or reasonscore.")] = "effect"
    aggregation: Annotated[str | None, typer.Option(help="How a rollout's tokens become one number.")] = None
    n_positive: Annotated[int | None, typer.Option(min=0, help="Latents that rise with the behaviour.")] = None
    n_negative: Annotated[int | None, typer.Option(min=0, help="Latents that fall with it.")] = None
    min_firing: Annotated[
        float | None, typer.Option(min=0, max=1, help="Leave out latents that fire in a smaller share of the rollouts.")
    ] = None
    permutations: Annotated[
        int, typer.Option(min=0, help="Permutations of the labels; the gate needs 100 or more.")
    ] = 200


@expanded
def discover(
    data: Data,
    sae: Annotated[list[str] | None, typer.Option(help="release/sae_id, or a path; may be repeated.")] = None,
    model: Annotated[str | None, typer.Option(help="A hub id or a folder. Default: what the SAE was made for.")] = None,
    out: Annotated[Path, typer.Option(help="The pack's JSON file.")] = Path("pack.json"),
    recipe: Annotated[str | None, typer.Option(help="Fill in this pack, which has no features yet.")] = None,
    *,
    selection: Selection,
    options: SamplingOptions,
    as_json: AsJson = False,
) -> None:
    """Find the latents that tell rollouts with a behaviour from those without, and propose a pack.

    It can be interrupted: the same command does not sample again what it has sampled.

    Examples: mechreward discover --model mechreward/pocket --sae pocket-res-canonical/layer_2/width_2k/canonical
    --data mechreward/pocket --out my_pack.json

    mechreward discover --recipe gemma-2-9b/reasoning_pack --data openai/gsm8k --subset main
    --prompt "{question}" --verifier gsm8k --dtype bfloat16
    """
    check_pack_file(out, options.keep_rollouts)
    template = None if recipe is None else load_pack(recipe)
    names = sae or ([] if template is None else [f"{template.sae.release}/{template.sae.sae_id}"])
    made_for = model or (template.model if template else None)
    found, start, made_for = _found(names, made_for, template, selection, data, options, out)
    if as_json:
        figures = [{"id": index, **each} for index, each in _figures(found, start)]
        typer.echo(json.dumps({"file": str(out), "pack": found.pack.model_dump(mode="json"), "figures": figures}))
    else:
        _show_discovery(found, start)
    made(
        f"{out}: a candidate. Whether it is more than chance and more than words:\n  mechreward gate {out} --model "
        f"{made_for} --data OTHER_QUESTIONS",
        as_json,
    )


def _found(
    names: list[str],
    made_for: str | None,
    template: FeaturePack | None,
    selection: Selection,
    data: str,
    options: SamplingOptions,
    out: Path,
) -> tuple[Any, int, str]:
    """Find the pack and write it.

    Returns:
        What was found, where the pack's dictionary begins among the latents of all, and the model's name.
    """
    from mechreward.errors import ConfigError
    from mechreward.features.discover import Search, check_models, recorded_as, write_discovery
    from mechreward.features.discover import discover as find_features
    from mechreward.features.frozen import freeze as freeze_pack
    from mechreward.rollout.capture import check_fits
    from mechreward.rollout.sampling import load_model, parse_dtype
    from mechreward.sae.registry import load_sae, reference

    # An option, or else the recipe's setting, or else the default.
    wanted = {} if template is None or template.recipe is None else template.recipe.settings
    sampling = options.sampling(
        int(_setting(wanted, "questions", options.questions, 250)),
        int(_setting(wanted, "rollouts_per_question", options.rollouts, 4)),
    )
    search = Search(
        method=selection.method,
        aggregation=selection.aggregation or (template.aggregation if template else "mean"),
        n_positive=int(_setting(wanted, "n_positive", selection.n_positive, 10)),
        n_negative=int(_setting(wanted, "n_negative", selection.n_negative, 10)),
        min_firing=_setting(wanted, "min_firing", selection.min_firing, 0.01),
        permutations=selection.permutations,
        seed=options.seed,
    )
    pack_name, behaviour = (template.name, template.description) if template else (out.stem, selection.behaviour)

    # What is wrong shows before anything is sampled, which may take hours.
    if not names:
        raise ConfigError("Name a sparse autoencoder with --sae, or a pack without features with --recipe.")
    saes = [load_sae(*reference(name)) for name in names]
    check_models(saes)
    made_for = made_for or saes[0].model_name
    if made_for is None:
        raise ConfigError(f"{saes[0].name} does not say which model it was made for: name it with --model.")
    loaded, tokenizer = load_model(made_for, parse_dtype(options.dtype))
    check_fits([each.features([0]) for each in saes], loaded)

    with resumable(beside(out, "discover")) as unfinished, progress.shown():
        found_in = sampling.labelled(loaded, tokenizer, data, "discovery", unfinished=unfinished)
        found = find_features(loaded, tokenizer, found_in, saes, pack_name, behaviour, search)
        found = recorded_as(found, template.model if template else made_for)
        write_discovery(found, out)
        best = found.saes.index(found.pack.sae)
        if saes[best].kind not in ("topk", "groupmax"):  # those would carry their whole encoder
            freeze_pack(found.pack, out.parent, saes[best], stem=out.stem)
    return found, sum(each.d_sae for each in saes[:best]), made_for


def _setting(recipe: dict[str, str | int | float], name: str, chosen: float | None, default: float) -> float:
    """A number that an option sets, or else a recipe."""
    from mechreward.errors import PackError

    if chosen is not None:
        return chosen
    try:
        return float(recipe.get(name, default))
    except ValueError:
        raise PackError(f"The recipe's setting {name} is '{recipe[name]}', not a number: correct it there.") from None


def _figures(found: Any, start: int) -> Iterator[tuple[int, dict[str, float]]]:
    """What the scan says of each of the pack's latents."""
    columns = {}
    if found.scan is not None:
        columns = {"effect d": found.scan.effect, "firing gap": found.scan.firing_gap}
        columns |= {"fires": found.scan.firing, "adjusted p": found.scan.adjusted_p}
    if found.scores is not None:
        columns["ReasonScore"] = found.scores
    for feature in found.pack.features:
        yield feature.id, {column: float(values[start + feature.id]) for column, values in columns.items()}


def _show_discovery(found: Any, start: int) -> None:
    """The pack's latents with what the scan says of them, and how the dictionaries compare."""
    rows = list(_figures(found, start))
    table = Table("feature", "weight")
    for column in rows[0][1]:
        table.add_column(column, justify="right")
    for feature, (_, figures) in zip(found.pack.features, rows, strict=True):
        table.add_row(str(feature.id), f"{feature.weight:+.4g}", *(f"{value:.3g}" for value in figures.values()))
    console.print(table)
    if len(found.per_sae) > 1:
        for sae, selection in zip(found.saes, found.per_sae, strict=True):
            console.print(f"{sae.release}/{sae.sae_id}: {selection.strength:.3f}", soft_wrap=True, markup=False)
