"""The command line: ``mechreward packs ...``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from typer.core import TyperGroup

from mechreward.errors import MechRewardError
from mechreward.features.catalog import load_pack, shipped_packs
from mechreward.features.pack import FeaturePack

console = Console()


class OneSentence(TyperGroup):
    """What goes wrong on purpose is said in one sentence; ``--debug`` shows where it comes from."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MechRewardError as error:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(cls=OneSentence, no_args_is_help=True, pretty_exceptions_enable=False)
packs = typer.Typer(no_args_is_help=True, help="Feature packs: what there is, what they claim, and how to ship one.")
app.add_typer(packs, name="packs")

Name = Annotated[str, typer.Argument(help="A pack of the catalogs, or a path to its JSON file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def options(debug: Annotated[bool, typer.Option(help="Show where an error comes from.")] = False) -> None:
    """Mechanistic-interpretability rewards for GRPO."""


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
    _show_verdict(pack)
    console.print(f"Licence: {pack.licence}. {_frozen(pack)}")


def _frozen(pack: FeaturePack) -> str:
    if pack.frozen is None:
        return "Not frozen: its sparse autoencoder is loaded."
    near = pack.frozen.approximation
    return "Frozen." if near is None else f"Frozen, approximate: {near.changed:.1%} of readings differ in being zero."


@packs.command()
def validate(file: Annotated[Path, typer.Argument(help="The pack's JSON file.")]) -> None:
    """Check a pack's file against the schema (its evidence is the gate's business).

    Example: mechreward packs validate my_pack.json
    """
    pack = load_pack(str(file) if file.suffix == ".json" else f"{file}.json")
    if pack.frozen is not None:
        from mechreward.features.frozen import frozen_readout

        frozen_readout(pack)
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


Data = Annotated[
    str,
    typer.Option(
        help="Labelled rollouts (a .jsonl with prompt, completion and label), or questions to sample the model on: "
        "mechreward/pocket, a dataset of the hub, or a .jsonl."
    ),
]
Verifier = Annotated[str, typer.Option(help="What labels sampled rollouts: math_boxed, gsm8k or exact_match.")]
Split = Annotated[str | None, typer.Option(help="The dataset's split, e.g. train[:500].")]
Subset = Annotated[str | None, typer.Option(help="The hub dataset's configuration, e.g. main.")]
Prompt = Annotated[str, typer.Option(help="What the model reads, with the dataset's columns in braces.")]
Answer = Annotated[str, typer.Option(help="The column with the gold answer.")]
Questions = Annotated[int, typer.Option(min=2, help="So many questions at most.")]
Rollouts = Annotated[int, typer.Option(min=1, help="Rollouts sampled a question, at temperature 1.")]
MaxNewTokens = Annotated[int, typer.Option(min=2, help="The longest completion.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rollouts sampled at once.")]
Dtype = Annotated[str, typer.Option(help="Of the model's weights: float32, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Keep = Annotated[Path | None, typer.Option(help="Write the sampled and labelled rollouts to this .jsonl.")]


@app.command()
def discover(
    data: Data,
    sae: Annotated[list[str] | None, typer.Option(help="release/sae_id, or a path; may be repeated.")] = None,
    model: Annotated[str | None, typer.Option(help="A hub id or a folder. Default: what the SAE was made for.")] = None,
    out: Annotated[Path, typer.Option(help="The pack's JSON file.")] = Path("pack.json"),
    recipe: Annotated[str | None, typer.Option(help="Fill in this pack, which has no features yet.")] = None,
    behaviour: Annotated[str, typer.Option(help="What the labels mean, in a sentence.")] = "The final answer is right.",
    method: Annotated[str, typer.Option(help="effect, firing, lasso or reasonscore.")] = "effect",
    aggregation: Annotated[str | None, typer.Option(help="How a rollout's tokens become one number.")] = None,
    n_positive: Annotated[int | None, typer.Option(min=0, help="Latents that rise with the behaviour.")] = None,
    n_negative: Annotated[int | None, typer.Option(min=0, help="Latents that fall with it.")] = None,
    min_firing: Annotated[
        float | None, typer.Option(min=0, max=1, help="Leave out latents that fire in a smaller share of the rollouts.")
    ] = None,
    permutations: Annotated[int, typer.Option(min=0, help="Of the labels; the gate needs 100 or more.")] = 200,
    verifier: Verifier = "math_boxed",
    split: Split = None,
    subset: Subset = None,
    prompt: Prompt = "{prompt}",
    answer: Answer = "answer",
    questions: Questions = 250,
    rollouts: Rollouts = 4,
    max_new_tokens: MaxNewTokens = 256,
    batch_size: BatchSize = 64,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    keep_rollouts: Keep = None,
) -> None:
    """Find the latents that tell rollouts with a behaviour from those without, and propose a pack.

    Examples: mechreward discover --model mechreward/pocket --sae pocket-res-canonical/layer_2/width_2k/canonical
    --data mechreward/pocket --out my_pack.json

    mechreward discover --recipe gemma-2-9b/reasoning_pack --data openai/gsm8k --subset main
    --prompt "{question}" --verifier gsm8k --dtype bfloat16
    """
    from mechreward.errors import ConfigError
    from mechreward.features.discover import check_models, check_settings, recorded_as, write_discovery
    from mechreward.features.discover import discover as find_features
    from mechreward.features.frozen import freeze as freeze_pack
    from mechreward.rollout.capture import check_fits
    from mechreward.rollout.hf import load_model
    from mechreward.sae.registry import load_sae, reference

    _check_files(out, keep_rollouts)
    template = None if recipe is None else load_pack(recipe)
    wanted = {} if template is None or template.recipe is None else template.recipe.settings
    names = sae or ([] if template is None else [f"{template.sae.release}/{template.sae.sae_id}"])
    if not names:
        raise ConfigError("Name a sparse autoencoder with --sae, or a pack without features with --recipe.")
    chosen = {
        "n_positive": n_positive if n_positive is not None else int(_setting(wanted, "n_positive", 10)),
        "n_negative": n_negative if n_negative is not None else int(_setting(wanted, "n_negative", 10)),
        "min_firing": min_firing if min_firing is not None else _setting(wanted, "min_firing", 0.01),
    }
    how = aggregation or (template.aggregation if template else "mean")
    # Before anything is sampled, which may take hours.
    check_settings(method, how, chosen["n_positive"], 0 if method == "reasonscore" else chosen["n_negative"])
    saes = [load_sae(*reference(name)) for name in names]
    check_models(saes)
    made_for = model or (template.model if template else saes[0].model_name)
    if made_for is None:
        raise ConfigError(f"{saes[0].name} does not say which model it was made for: name it with --model.")
    loaded, tokenizer = load_model(made_for, _dtype(dtype))
    check_fits([each.features([0]) for each in saes], loaded)
    found_in = _labelled(
        loaded,
        tokenizer,
        data,
        split,
        "discovery",
        subset,
        prompt,
        answer,
        verifier,
        questions,
        rollouts,
        max_new_tokens,
        batch_size,
        seed,
        keep_rollouts,
    )
    with _progress("Reading every latent") as tell:
        found = find_features(
            loaded,
            tokenizer,
            found_in,
            saes,
            name=out.stem if template is None else template.name,
            behaviour=behaviour if template is None else template.description,
            method=method,  # pyright: ignore[reportArgumentType] (it checks the name)
            aggregation=how,
            permutations=permutations,
            seed=seed,
            tell=tell,
            **chosen,
        )
    found = recorded_as(found, template.model if template else made_for)
    write_discovery(found, out)
    best = found.saes.index(found.pack.sae)
    if saes[best].kind not in ("topk", "groupmax"):  # those would carry their whole encoder
        freeze_pack(found.pack, out.parent, saes[best], stem=out.stem)
    _show_discovery(found, sum(each.d_sae for each in saes[:best]))
    console.print(
        f"{out}: a candidate. Whether it is more than chance and more than words:\n  mechreward gate {out} --model "
        f"{made_for} --data OTHER_QUESTIONS",
        soft_wrap=True,
        markup=False,
    )


@app.command()
def gate(
    name: Name,
    data: Data,
    model: Annotated[str | None, typer.Option(help="A hub id or a folder. Default: the pack's.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where the pack goes with its evidence. Default: its file, or one of its name here."),
    ] = None,
    verifier: Verifier = "math_boxed",
    split: Split = None,
    subset: Subset = None,
    prompt: Prompt = "{prompt}",
    answer: Answer = "answer",
    questions: Questions = 250,
    rollouts: Rollouts = 4,
    max_new_tokens: MaxNewTokens = 256,
    batch_size: BatchSize = 64,
    dtype: Dtype = "float32",
    seed: Seed = 1,
    keep_rollouts: Keep = None,
) -> None:
    """Test a pack on rollouts that its discovery never saw, and write the evidence and the verdict into it.

    Exit code 0 where it is validated, 1 where it stays a candidate.

    Example: mechreward gate my_pack.json --data mechreward/pocket
    """
    from mechreward.errors import ConfigError
    from mechreward.features.discover import read_chance
    from mechreward.features.frozen import write_pack
    from mechreward.features.judge import judge, pack_readout
    from mechreward.rollout.capture import check_fits
    from mechreward.rollout.hf import load_model

    pack, local = load_pack(name), name.endswith(".json") and not name.startswith("hf:")
    if out is None and not local:
        raise ConfigError(f"{name} lies in a catalog: say with --out where its evidence is to be written.")
    file = out or Path(name)
    _check_files(file, keep_rollouts)
    own, chance = pack_readout(pack), read_chance(Path(name)) if local else None
    loaded, tokenizer = load_model(model or pack.model, _dtype(dtype))
    check_fits([own], loaded)  # before anything is sampled, which may take hours
    held_out = _labelled(
        loaded,
        tokenizer,
        data,
        split,
        "gate",
        subset,
        prompt,
        answer,
        verifier,
        questions,
        rollouts,
        max_new_tokens,
        batch_size,
        seed,
        keep_rollouts,
    )
    with console.status("Reading ..."):
        judged = judge(pack, loaded, tokenizer, held_out, chance, seed)
    write_pack(judged, file)
    _show_verdict(judged)
    console.print(f"{file}: {judged.status}.", soft_wrap=True, markup=False)
    raise typer.Exit(0 if judged.status == "validated" else 1)


def _dtype(name: str) -> Any:
    import torch

    from mechreward.errors import ConfigError, nearest

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigError(f"There is no dtype '{name}' for a model here.{nearest(name, known)}")
    return known[name]


def _setting(recipe: dict[str, str | int | float], name: str, default: float) -> float:
    """A number that a recipe sets."""
    from mechreward.errors import PackError

    try:
        return float(recipe.get(name, default))
    except ValueError:
        raise PackError(f"The recipe's setting {name} is '{recipe[name]}', not a number: correct it there.") from None


def _check_files(pack_file: Path, keep_rollouts: Path | None) -> None:
    """Find out before the work, not after it, what cannot be written."""
    import re

    from mechreward.errors import ConfigError
    from mechreward.probes.training import check_writable

    if not re.fullmatch(r"[\w.-]+\.json", pack_file.name):
        raise ConfigError(
            f"--out {pack_file}: a pack's file is called by letters, digits, '.', '-' and '_', and ends in .json."
        )
    for file in (pack_file, *([keep_rollouts] if keep_rollouts else [])):
        check_writable(file)


def _labelled(
    model: Any,
    tokenizer: Any,
    data: str,
    split: str | None,
    of_pocket: str,
    subset: str | None,
    prompt: str,
    answer: str,
    verifier: str,
    questions: int,
    rollouts: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    keep: Path | None,
) -> Any:
    """Rollouts from a file, or sampled on questions and labelled by a verifier."""
    from pydantic import ValidationError

    from mechreward import pocket, verifiers
    from mechreward.errors import ConfigError, nearest
    from mechreward.experiments.config import Source
    from mechreward.experiments.data import load
    from mechreward.rollout.labelled import holds_rollouts, read_rollouts, sample_rollouts, write_rollouts
    from mechreward.schema import most_telling, sentence

    if data.endswith(".jsonl") and holds_rollouts(Path(data)):
        return read_rollouts(data, model, tokenizer)
    if verifier not in verifiers.__all__:
        raise ConfigError(f"There is no verifier '{verifier}'.{nearest(verifier, verifiers.__all__)}")
    ours = pocket.resolve(data) == pocket.path()
    try:
        source = Source(
            path=data,
            subset=subset,
            split=split or (of_pocket if ours else "train"),
            rows=questions,
            prompt=prompt,
            answer=answer,
        )
    except ValidationError as error:
        raise ConfigError(f"--data: {sentence(most_telling(error), Source, 'source')}") from None
    asked = load([source])
    with console.status(f"Sampling {len(asked) * rollouts} rollouts ..."):
        found = sample_rollouts(
            model,
            tokenizer,
            asked,
            getattr(verifiers, verifier),
            rollouts,
            f"{len(asked) * rollouts} rollouts on {data} ({source.split}), seed {seed}, labelled by {verifier}",
            seed,
            batch_size,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
        )
    if keep is not None:
        write_rollouts(found, keep)
    return found


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time that is left, on stderr."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def _show_discovery(found: Any, start: int) -> None:
    """The pack's latents with what the scan says of them, and how the dictionaries compare."""
    table = Table("feature", "weight")
    columns = {} if found.scan is None else {"effect d": found.scan.effect, "firing gap": found.scan.firing_gap}
    if found.scan is not None:
        columns |= {"fires": found.scan.firing, "adjusted p": found.scan.adjusted_p}
    if found.scores is not None:
        columns["ReasonScore"] = found.scores
    for column in columns:
        table.add_column(column, justify="right")
    for feature in found.pack.features:
        figures = [f"{values[start + feature.id]:.3g}" for values in columns.values()]
        table.add_row(str(feature.id), f"{feature.weight:+.4g}", *figures)
    console.print(table)
    if len(found.per_sae) > 1:
        for sae, selection in zip(found.saes, found.per_sae, strict=True):
            console.print(f"{sae.release}/{sae.sae_id}: {selection.strength:.3f}", soft_wrap=True, markup=False)


def _show_verdict(pack: FeaturePack) -> None:
    if pack.evidence is not None:
        for test in pack.evidence.verdict:
            said = f"{'passed' if test.passed else 'FAILED'}  {test.name}: {test.sentence}"
            console.print(said, soft_wrap=True, markup=False, highlight=False)


features = typer.Typer(no_args_is_help=True, help="Latents: what makes them fire, and what they seem to stand for.")
app.add_typer(features, name="features")

Target = Annotated[
    str | None, typer.Argument(metavar="PACK_OR_SAE", help="A pack's name or file, or an SAE as release/sae_id.")
]
SAEName = Annotated[str | None, typer.Option("--sae", help="An SAE as release/sae_id, or its folder.")]
FeatureIds = Annotated[
    list[int] | None, typer.Option("--feature", help="A latent's index; may be repeated. Default: all of the pack.")
]
ModelName = Annotated[
    str | None, typer.Option("--model", help="A hub id or a folder. Default: the model that the pack or SAE names.")
]
CorpusFile = Annotated[
    Path | None,
    typer.Option(
        "--corpus",
        help="A .txt file, one text per line (or blocks between blank lines), or .jsonl with 'text', or with 'prompt' "
        "and 'completion'. Default for pocket: its own discovery questions with their solutions.",
    ),
]
MaxTexts = Annotated[
    int | None, typer.Option("--texts", min=1, help="Read so many texts at most. Default: all; of pocket's own, 500.")
]


@features.command("show")
def show_features(
    target: Target = None,
    sae: SAEName = None,
    feature: FeatureIds = None,
    model: ModelName = None,
    corpus: CorpusFile = None,
    texts: MaxTexts = None,
    html: Annotated[Path | None, typer.Option(help="Write a page that needs nothing else, too.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Examples of each latent; on the page twice as many.")] = 5,
    context: Annotated[int, typer.Option(min=2, help="Tokens of an example.")] = 64,
    neuronpedia: Annotated[bool, typer.Option(help="Look up what Neuronpedia says of the latents.")] = False,
    offline: Annotated[bool, typer.Option(help="Read Neuronpedia's cache only, as with HF_HUB_OFFLINE=1.")] = False,
) -> None:
    """Show the texts that make latents fire, tokens shaded by activation.

    Examples: mechreward features show pocket/reasoning_pack --html page.html

    mechreward features show --sae gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical --feature 123
    --model google/gemma-2-2b --corpus texts.txt --neuronpedia
    """
    from mechreward.errors import ConfigError
    from mechreward.features.neuronpedia import neuronpedia_id, published_feature
    from mechreward.features.show import Shown, choose, page, print_feature

    if html is not None and not html.absolute().parent.is_dir():
        raise ConfigError(f"There is no folder {html.absolute().parent} for the page: make it first.")
    chosen = choose(target, sae, feature or [])
    # First: what is not on Neuronpedia need not wait for a model.
    np_id = neuronpedia_id(chosen.sae) if neuronpedia else None
    pages = [published_feature(np_id, i, offline=offline or None) if np_id else None for i in chosen.ids]
    found, read = _examples(chosen, model, corpus, texts, max(20, 2 * top), context)
    entries = [
        Shown(index, each, weight, note, published)
        for index, each, weight, note, published in zip(
            chosen.ids, found, chosen.weights, chosen.notes, pages, strict=True
        )
    ]
    console.print(f"{chosen.title}: {read}", soft_wrap=True, markup=False, highlight=False)
    for entry in entries:
        print_feature(console, entry, top)
    if html is not None:
        about = [("SAE", chosen.sae), ("reads", str(chosen.readout.hook_point)), ("corpus", read)]
        html.write_text(page(chosen.title, about, entries, 2 * top), encoding="utf-8")
        console.print(f"\nPage: {html}", soft_wrap=True, markup=False, highlight=False)


@features.command("explain")
def explain_features(
    endpoint: Annotated[str, typer.Option(help="OpenAI-compatible, e.g. http://localhost:8000/v1.")],
    model_name: Annotated[str, typer.Option(help="The explaining model's name at the endpoint.")],
    target: Target = None,
    sae: SAEName = None,
    feature: FeatureIds = None,
    model: ModelName = None,
    corpus: CorpusFile = None,
    texts: MaxTexts = None,
    engine: Annotated[str, typer.Option(help="builtin, or delphi where EleutherAI's Delphi is installed.")] = "builtin",
    seed: Annotated[int, typer.Option(help="Deals out the examples and shuffles what is judged.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Let a language model explain latents, and score how well its words tell where they fire.

    The endpoint's key is taken from OPENAI_API_KEY. Scores are balanced accuracies; guessing gives 0.5.

    Example: mechreward features explain pocket/reasoning_pack --feature 1905 --endpoint http://localhost:8000/v1
    --model-name Qwen/Qwen3-8B
    """
    from dataclasses import asdict

    from mechreward.errors import ConfigError, DataError
    from mechreward.features.autointerp import Chat, explain, explain_with_delphi
    from mechreward.features.show import choose, visible

    engines = {"builtin": explain, "delphi": explain_with_delphi}
    if engine not in engines:
        raise ConfigError(f"There is no engine '{engine}': choose builtin or delphi.")
    chat, chosen = Chat(endpoint, model_name), choose(target, sae, feature or [])
    found, read = _examples(chosen, model, corpus, texts, 20, 64)
    if not as_json:
        console.print(f"{chosen.title}: {read}", soft_wrap=True, markup=False, highlight=False)
    results = []
    for index, each in zip(chosen.ids, found, strict=True):
        try:
            said = engines[engine](each, chat, seed)
        except DataError as error:
            if len(found) == 1:
                raise
            typer.echo(f"Left out: {error}", err=True)
            continue
        scores = {"detection": said.detection, "fuzzing": said.fuzzing}
        results.append(
            {"sae": chosen.sae, "index": index, **asdict(said)}
            | {name: asdict(score) | {"balanced_accuracy": score.balanced_accuracy} for name, score in scores.items()}
        )
        if not as_json:
            lines = [f"\nfeature {index}: {visible(said.explanation)}"]
            lines += [f"  {name}: {score}" for name, score in scores.items()]
            console.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)
    if as_json:
        typer.echo(json.dumps(results, indent=2))


def _examples(
    chosen: Any, model: str | None, corpus: Path | None, texts: int | None, top: int, context: int
) -> tuple[list[Any], str]:
    """Read the corpus for the chosen latents; their examples, and a sentence on what was read."""
    import itertools

    from mechreward import pocket
    from mechreward.errors import ConfigError
    from mechreward.features.examples import collect, pocket_corpus, read_corpus
    from mechreward.rollout.hf import load_model

    named = model or chosen.model_name
    if named is None or ("/" not in named and not Path(named).exists()):
        raise ConfigError(
            f"{chosen.title} was made for {named or 'a model that it does not name'}, which is no hub id or folder: "
            "give the model with --model."
        )
    if corpus is not None:
        items, where = itertools.islice(read_corpus(corpus), texts), str(corpus)
    elif pocket.resolve(named) == pocket.path():
        items, where = pocket_corpus(texts or 500), "pocket's discovery questions with their solutions"
    else:
        raise ConfigError("Give the texts to read with --corpus.")
    loaded, tokenizer = load_model(named)
    with console.status("Reading ..."):
        found = collect(loaded, tokenizer, chosen.readout, items, top=top, context=context)
    return found, f"{found[0].tokens:,} tokens of {found[0].texts:,} texts read by {named}, from {where}"


probe = typer.Typer(no_args_is_help=True, help="Linear probes: train one on labelled rollouts, and see what it can do.")
app.add_typer(probe, name="probe")


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
    from mechreward.rollout.hf import load_model
    from mechreward.rollout.labelled import read_rollouts

    for file in (*files_of(out), *([plot] if plot else [])):
        check_writable(file)
    if plot:
        require("matplotlib", "report")
    loaded, tokenizer = load_model(model)
    chosen, rollouts = parse_layers(layers, loaded), read_rollouts(data, loaded, tokenizer)
    others = None if held_out is None else read_rollouts(held_out, loaded, tokenizer)
    with console.status("Training ..."):
        trained = train_probe(
            loaded, rollouts, chosen, pooling, others, files_of(out)[0].stem, model, description, licence
        )
    save_probe(trained.probe, out)
    if plot:
        draw_sweep(trained.probe.card, plot)
    _tell_probe(trained.probe.card, as_json)
    if not as_json:
        files = ", ".join(map(str, (*files_of(out), *([plot] if plot else []))))
        console.print(f"Saved: {files}. Use it: mr.FeatureReward(mr.load_probe('{out}', logits=True)).", soft_wrap=True)


@probe.command("show")
def show_a_probe(
    name: Annotated[str, typer.Argument(help="A probe of the catalogs, a path, or hf:user/repository/name.")],
    as_json: AsJson = False,
) -> None:
    """Show a probe: where it reads, how it was trained, and what it can do.

    Example: mechreward probe show pocket/correctness_probe
    """
    from mechreward.probes.linear_probe import load_probe

    _tell_probe(load_probe(name, logits=True).card, as_json)


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
            figures = (_shown_interval(layer.cross_validated), _shown_interval(layer.held_out))
            table.add_row(f"{layer.layer}{mark}", f"{layer.strength:g}", *figures)
        console.print(table)
        said.append(f"Cross-validated AUC {_shown_interval(card.training.cross_validated)}.")
    if card.evidence is not None:
        chance = " No better than chance." if card.evidence.auc.low <= 0.5 else ""
        said.append(f"AUC on {card.evidence.n} held-out rollouts {_shown_interval(card.evidence.auc)}.{chance}")
    if card.calibration is not None:
        c = card.calibration
        said.append(
            f"Calibrated: Brier score {_shown_interval(c.brier)} ({c.brier_uncalibrated:.3f} uncalibrated, "
            f"{c.brier_of_the_share:.3f} for the share alone), expected calibration error {c.ece:.3f} "
            f"({c.ece_uncalibrated:.3f} uncalibrated)."
        )
    said += [f"Trained on {card.trained_on}."] if card.trained_on else []
    said += [f"Licence: {card.licence}."] if card.licence else []
    console.print("\n".join(said), soft_wrap=True, markup=False, highlight=False)


def _shown_interval(interval: Any) -> str:
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"
