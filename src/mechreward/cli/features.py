"""``mechreward features ...``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mechreward.cli.common import AsJson, console, made

features = typer.Typer(
    no_args_is_help=True,
    help="Latents: what makes them fire, and what they seem to stand for.\n\n"
    "Example: mechreward features show pocket/reasoning_pack",
)

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
    as_json: AsJson = False,
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

    from mechreward import pocket, progress
    from mechreward.errors import ConfigError
    from mechreward.features.examples import collect, pocket_corpus, read_corpus
    from mechreward.rollout.sampling import load_model

    named = model or chosen.model_name
    if named is None or ("/" not in named and not Path(named).exists()):
        raise ConfigError(
            f"{chosen.title} was made for {named or 'a model that it does not name'}, which is no hub id or folder: "
            "give the model with --model."
        )
    if corpus is not None:
        count = sum(1 for _ in itertools.islice(read_corpus(corpus), texts))  # for the time that is left
        items, where = itertools.islice(read_corpus(corpus), texts), str(corpus)
    elif pocket.resolve(named) == pocket.path():
        count = texts or 500
        items, where = pocket_corpus(count), "pocket's discovery questions with their solutions"
    else:
        raise ConfigError("Give the texts to read with --corpus.")
    loaded, tokenizer = load_model(named)
    with progress.shown():
        corpus_read = progress.track(items, "Reading the corpus", count)
        found = collect(loaded, tokenizer, chosen.readout, corpus_read, top=top, context=context)
    return found, f"{found[0].tokens:,} tokens of {found[0].texts:,} texts read by {named}, from {where}"
