"""``mechreward features ...``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mechreward.cli.common import AsJson, console, expanded, made

features = typer.Typer(
    no_args_is_help=True,
    help="Latents: what makes them fire, and what they seem to stand for.\n\n"
    "Example: mechreward features show pocket/reasoning_pack",
)


@dataclass(frozen=True)
class Latents:
    """Which latents a command is about, and the texts that they are read on."""

    target: Annotated[
        str | None, typer.Argument(metavar="PACK_OR_SAE", help="A pack's name or file, or an SAE as release/sae_id.")
    ] = None
    sae: Annotated[str | None, typer.Option(help="An SAE as release/sae_id, or its folder.")] = None
    feature: Annotated[
        list[int] | None, typer.Option(help="A latent's index; may be repeated. Default: all of the pack.")
    ] = None
    model: Annotated[
        str | None, typer.Option(help="A hub id or a folder. Default: the model that the pack or SAE names.")
    ] = None
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="A .txt file, one text per line (or blocks between blank lines), or .jsonl with 'text', or with "
            "'prompt' and 'completion'. Default for pocket: its own discovery questions with their solutions.",
        ),
    ] = None
    texts: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of texts. Default: all, or 500 of pocket's own.")
    ] = None

    def chosen(self) -> Any:
        """Return the latents that are named, as :func:`mechreward.features.show.choose` finds them."""
        from mechreward.features.show import choose

        return choose(self.target, self.sae, self.feature or [])


@features.command("show")
@expanded
def show_features(
    *,
    latents: Latents,
    html: Annotated[Path | None, typer.Option(help="Write a page that needs nothing else, too.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Examples of each latent; on the page twice as many.")] = 5,
    context: Annotated[int, typer.Option(min=2, help="Tokens of an example.")] = 64,
    neuronpedia: Annotated[bool, typer.Option(help="Look up what Neuronpedia says of the latents.")] = False,
    offline: Annotated[bool, typer.Option(help="Read Neuronpedia's cache only, as with HF_HUB_OFFLINE=1.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the texts that make latents fire, tokens shaded by activation.

    Examples: mechreward features show pocket/reasoning_pack --html page.html

    mechreward features show --sae gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical --feature 123
    --model google/gemma-2-2b --corpus texts.txt --neuronpedia
    """
    from mechreward.errors import ConfigError
    from mechreward.features.neuronpedia import neuronpedia_id, published_feature
    from mechreward.features.show import Shown, page, print_feature

    if html is not None and not html.absolute().parent.is_dir():
        raise ConfigError(f"There is no folder {html.absolute().parent} for the page: make it first.")
    chosen = latents.chosen()
    # First: what is not on Neuronpedia need not wait for a model.
    np_id = neuronpedia_id(chosen.sae) if neuronpedia else None
    pages = [published_feature(np_id, i, offline=offline or None) if np_id else None for i in chosen.ids]
    found, read = _examples(chosen, latents, max(20, 2 * top), context)
    entries = [
        Shown(index, each, weight, note, published)
        for index, each, weight, note, published in zip(
            chosen.ids, found, chosen.weights, chosen.notes, pages, strict=True
        )
    ]
    if as_json:
        typer.echo(
            json.dumps({"sae": chosen.sae, "corpus": read, "features": [_told(e, top) for e in entries]}, indent=2)
        )
    else:
        console.print(f"{chosen.title}: {read}", soft_wrap=True, markup=False, highlight=False)
        for entry in entries:
            print_feature(console, entry, top)
    if html is not None:
        about = [("SAE", chosen.sae), ("reads", str(chosen.readout.hook_point)), ("corpus", read)]
        html.write_text(page(chosen.title, about, entries, 2 * top), encoding="utf-8")
        made(f"\nPage: {html}", as_json)


def _told(entry: Any, top: int) -> dict[str, Any]:
    """A latent for a script."""
    from dataclasses import asdict

    found = entry.examples
    examples = [{"tokens": e.tokens, "activations": [float(a) for a in e.activations]} for e in found.top[:top]]
    published = None if entry.published is None else asdict(entry.published)
    return {
        "index": entry.index,
        "weight": entry.weight,
        "note": entry.note,
        "firing_rate": found.firing_rate,
        "maximum": found.maximum,
        "published": published,
        "examples": examples,
    }


@features.command("explain")
@expanded
def explain_features(
    endpoint: Annotated[str, typer.Option(help="OpenAI-compatible, e.g. http://localhost:8000/v1.")],
    model_name: Annotated[str, typer.Option(help="The explaining model's name at the endpoint.")],
    *,
    latents: Latents,
    seed: Annotated[int, typer.Option(help="Deals out the examples and shuffles what is judged.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Let a language model explain latents, and score how well its words tell where they fire.

    The endpoint's key is taken from OPENAI_API_KEY. The score is a balanced accuracy; guessing gives 0.5.

    Example: mechreward features explain pocket/reasoning_pack --feature 1905 --endpoint http://localhost:8000/v1
    --model-name Qwen/Qwen3-8B
    """
    from dataclasses import asdict

    from mechreward.errors import DataError
    from mechreward.features.autointerp import Chat, explain
    from mechreward.features.show import visible

    chat, chosen = Chat(endpoint, model_name), latents.chosen()
    found, read = _examples(chosen, latents, 20, 64)
    if not as_json:
        console.print(f"{chosen.title}: {read}", soft_wrap=True, markup=False, highlight=False)
    results = []
    for index, each in zip(chosen.ids, found, strict=True):
        try:
            result = explain(each, chat, seed)
        except DataError as error:
            if len(found) == 1:
                raise
            typer.echo(f"Left out: {error}", err=True)
            continue
        accuracy = {"balanced_accuracy": result.detection.balanced_accuracy}
        detection = {"detection": asdict(result.detection) | accuracy}
        results.append({"sae": chosen.sae, "index": index, **asdict(result), **detection})
        if not as_json:
            line = f"\nfeature {index}: {visible(result.explanation)}\n  detection: {result.detection}"
            console.print(line, soft_wrap=True, markup=False, highlight=False)
    if as_json:
        typer.echo(json.dumps(results, indent=2))


@features.command("export")
@expanded
def export_features(
    out: Annotated[Path, typer.Option(help="The folder to write: Delphi's raw_dir.")],
    *,
    latents: Latents,
) -> None:
    """Write a corpus and the latents' activations as EleutherAI's Delphi reads them, for its explainers and scorers.

    Example: mechreward features export pocket/reasoning_pack --out delphi
    """
    from mechreward import progress
    from mechreward.features.autointerp import export_for_delphi

    chosen = latents.chosen()
    model, tokenizer, items, _ = _corpus(chosen, latents)
    with progress.shown():
        file = export_for_delphi(model, tokenizer, chosen.readout, chosen.ids, items, out)
    made(f"{file}: read it with delphi.latents.LatentDataset(raw_dir={str(out)!r}, ...).")


def _examples(chosen: Any, latents: Latents, top: int, context: int) -> tuple[list[Any], str]:
    """Read the corpus for the chosen latents; return their examples, and a sentence on what was read."""
    from mechreward import progress
    from mechreward.features.examples import collect

    model, tokenizer, items, where = _corpus(chosen, latents)
    with progress.shown():
        found = collect(model, tokenizer, chosen.readout, items, top=top, context=context)
    return found, f"{found[0].tokens:,} tokens of {found[0].texts:,} texts read by {where}"


def _corpus(chosen: Any, latents: Latents) -> tuple[Any, Any, Iterator[Any], str]:
    """Load the model that the options or the latents name, and open the corpus.

    Returns:
        The model, its tokenizer, the texts, and what was read by which model.

    Raises:
        ConfigError: Neither names a model, or there is no corpus.
    """
    import itertools

    from mechreward import pocket, progress
    from mechreward.errors import ConfigError
    from mechreward.features.examples import pocket_corpus, read_corpus
    from mechreward.rollout.sampling import load_model

    named = latents.model or chosen.model_name
    if named is None or ("/" not in named and not Path(named).exists()):
        raise ConfigError(
            f"{chosen.title} was made for {named or 'a model that it does not name'}, which is no hub id or folder: "
            "give the model with --model."
        )
    if latents.corpus is not None:
        count = sum(
            1 for _ in itertools.islice(read_corpus(latents.corpus), latents.texts)
        )  # for the time that is left
        items, where = itertools.islice(read_corpus(latents.corpus), latents.texts), str(latents.corpus)
    elif pocket.resolve(named) == pocket.path():
        count = latents.texts or 500
        items, where = pocket_corpus(count), "pocket's discovery questions with their solutions"
    else:
        raise ConfigError("Give the texts to read with --corpus.")
    return *load_model(named), progress.track(items, "Reading the corpus", count), f"{named}, from {where}"
