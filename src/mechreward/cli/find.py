"""``mechreward discover`` and ``mechreward gate``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mechreward import progress
from mechreward.cli.common import (
    Answer,
    AsJson,
    BatchSize,
    Dtype,
    MaxNewTokens,
    Name,
    Prompt,
    Seed,
    Split,
    Subset,
    Verifier,
    beside,
    check_pack_file,
    console,
    made,
    resumable,
    show_verdict,
)
from mechreward.features.catalog import load_pack

Data = Annotated[
    str,
    typer.Option(
        help="Labelled rollouts (a .jsonl with prompt, completion and label), or questions to sample the model on: "
        "mechreward/pocket, a dataset of the hub, or a .jsonl. The options on sampling are for questions alone."
    ),
]
Questions = Annotated[int | None, typer.Option(min=2, help="So many questions at most. Default: a recipe's, else 250.")]
Rollouts = Annotated[
    int | None,
    typer.Option(min=1, help="Rollouts a question, at temperature 1. Default: a recipe's, else 4."),
]
Keep = Annotated[Path | None, typer.Option(help="Write the sampled and labelled rollouts to this .jsonl.")]
SAEs = Annotated[list[str] | None, typer.Option(help="release/sae_id, or a path; may be repeated.")]
MadeFor = Annotated[str | None, typer.Option(help="A hub id or a folder. Default: what the SAE was made for.")]
OfPack = Annotated[str | None, typer.Option(help="A hub id or a folder. Default: the pack's.")]
PackFile = Annotated[Path, typer.Option(help="The pack's JSON file.")]
Recipe = Annotated[str | None, typer.Option(help="Fill in this pack, which has no features yet.")]
Behaviour = Annotated[str, typer.Option(help="What the labels mean, in a sentence.")]
Method = Annotated[str, typer.Option(help="effect, firing, lasso or reasonscore.")]
Aggregation = Annotated[str | None, typer.Option(help="How a rollout's tokens become one number.")]
Positive = Annotated[int | None, typer.Option(min=0, help="Latents that rise with the behaviour.")]
Negative = Annotated[int | None, typer.Option(min=0, help="Latents that fall with it.")]
MinFiring = Annotated[
    float | None, typer.Option(min=0, max=1, help="Leave out latents that fire in a smaller share of the rollouts.")
]
Permutations = Annotated[int, typer.Option(min=0, help="Of the labels; the gate needs 100 or more.")]
Judged = Annotated[
    Path | None,
    typer.Option(help="Where the pack goes with its evidence. Default: its file, or one of its name here."),
]


def discover(
    data: Data,
    sae: SAEs = None,
    model: MadeFor = None,
    out: PackFile = Path("pack.json"),
    recipe: Recipe = None,
    behaviour: Behaviour = "The final answer is right.",
    method: Method = "effect",
    aggregation: Aggregation = None,
    n_positive: Positive = None,
    n_negative: Negative = None,
    min_firing: MinFiring = None,
    permutations: Permutations = 200,
    verifier: Verifier = "math_boxed",
    split: Split = None,
    subset: Subset = None,
    prompt: Prompt = "{prompt}",
    answer: Answer = "answer",
    questions: Questions = None,
    rollouts: Rollouts = None,
    max_new_tokens: MaxNewTokens = 256,
    batch_size: BatchSize = 64,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    keep_rollouts: Keep = None,
    as_json: AsJson = False,
) -> None:
    """Find the latents that tell rollouts with a behaviour from those without, and propose a pack.

    It can be interrupted: the same command does not sample again what it has sampled.

    Examples: mechreward discover --model mechreward/pocket --sae pocket-res-canonical/layer_2/width_2k/canonical
    --data mechreward/pocket --out my_pack.json

    mechreward discover --recipe gemma-2-9b/reasoning_pack --data openai/gsm8k --subset main
    --prompt "{question}" --verifier gsm8k --dtype bfloat16
    """
    from mechreward.train.sampling import Sampling

    check_pack_file(out, keep_rollouts)
    template = None if recipe is None else load_pack(recipe)
    wanted = {} if template is None or template.recipe is None else template.recipe.settings
    asked, each = _setting(wanted, "questions", questions, 250), _setting(wanted, "rollouts_per_question", rollouts, 4)
    sampling = Sampling(
        verifier, split, subset, prompt, answer, int(asked), int(each), max_new_tokens, batch_size, seed, keep_rollouts
    )
    settings = {
        "name": out.stem if template is None else template.name,
        "behaviour": behaviour if template is None else template.description,
        "method": method,
        "aggregation": aggregation or (template.aggregation if template else "mean"),
        "n_positive": int(_setting(wanted, "n_positive", n_positive, 10)),
        "n_negative": int(_setting(wanted, "n_negative", n_negative, 10)),
        "min_firing": _setting(wanted, "min_firing", min_firing, 0.01),
        "permutations": permutations,
        "seed": seed,
    }
    names = sae or ([] if template is None else [f"{template.sae.release}/{template.sae.sae_id}"])
    made_for = model or (template.model if template else None)
    found, start, made_for = _found(names, made_for, template, dtype, sampling, data, settings, out)
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
    template: Any,
    dtype: str,
    sampling: Any,
    data: str,
    settings: dict[str, Any],
    out: Path,
) -> tuple[Any, int, str]:
    """What was found, where the pack's dictionary begins among the latents of all, and the model; all is written."""
    from mechreward.errors import ConfigError
    from mechreward.features.discover import Search, check_models, recorded_as, write_discovery
    from mechreward.features.discover import discover as find_features
    from mechreward.features.frozen import freeze as freeze_pack
    from mechreward.rollout.capture import check_fits
    from mechreward.rollout.sampling import load_model, parse_dtype
    from mechreward.sae.registry import load_sae, reference

    if not names:
        raise ConfigError("Name a sparse autoencoder with --sae, or a pack without features with --recipe.")
    # Before anything is sampled, which may take hours.
    name, behaviour = settings.pop("name"), settings.pop("behaviour")
    search = Search(**settings)
    saes = [load_sae(*reference(name)) for name in names]
    check_models(saes)
    made_for = made_for or saes[0].model_name
    if made_for is None:
        raise ConfigError(f"{saes[0].name} does not say which model it was made for: name it with --model.")
    loaded, tokenizer = load_model(made_for, parse_dtype(dtype))
    check_fits([each.features([0]) for each in saes], loaded)
    with resumable(beside(out, "discover")) as unfinished, progress.shown():
        found_in = sampling.labelled(loaded, tokenizer, data, "discovery", unfinished=unfinished)
        found = find_features(loaded, tokenizer, found_in, saes, name, behaviour, search)
        found = recorded_as(found, template.model if template else made_for)
        write_discovery(found, out)
        best = found.saes.index(found.pack.sae)
        if saes[best].kind not in ("topk", "groupmax"):  # those would carry their whole encoder
            freeze_pack(found.pack, out.parent, saes[best], stem=out.stem)
    return found, sum(each.d_sae for each in saes[:best]), made_for


def gate(
    name: Name,
    data: Data,
    model: OfPack = None,
    out: Judged = None,
    verifier: Verifier = "math_boxed",
    split: Split = None,
    subset: Subset = None,
    prompt: Prompt = "{prompt}",
    answer: Answer = "answer",
    questions: Questions = None,
    rollouts: Rollouts = None,
    max_new_tokens: MaxNewTokens = 256,
    batch_size: BatchSize = 64,
    dtype: Dtype = "float32",
    seed: Seed = 1,
    keep_rollouts: Keep = None,
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
    from mechreward.train.sampling import Sampling

    pack, local = load_pack(name), name.endswith(".json") and not name.startswith("hf:")
    file = out or (Path(name) if local else Path(f"{name.split('/')[-1].removesuffix('.json')}.json"))
    check_pack_file(file, keep_rollouts)
    own, chance = pack_readout(pack), read_chance(Path(name)) if local else None
    loaded, tokenizer = load_model(model or pack.model, parse_dtype(dtype))
    check_fits([own], loaded)  # before anything is sampled, which may take hours
    each = rollouts or 4
    sampling = Sampling(
        verifier, split, subset, prompt, answer, questions or 250, each, max_new_tokens, batch_size, seed, keep_rollouts
    )
    used = chance.asked if chance else ()
    with resumable(beside(file, "gate")) as unfinished, progress.shown():
        held_out = sampling.labelled(loaded, tokenizer, data, "gate", used, unfinished)
        judged = judge(pack, loaded, tokenizer, held_out, chance, seed)
        write_pack(judged, file)
    if chance is not None and file != Path(name):
        shutil.copy2(chance_file(Path(name)), chance_file(file))  # so that it can be gated again
    if as_json:
        typer.echo(json.dumps({"file": str(file), "pack": judged.model_dump(mode="json")}))
    else:
        show_verdict(judged)
    made(f"{file}: {judged.status}.", as_json)
    raise typer.Exit(0 if judged.status == "validated" else 1)


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
