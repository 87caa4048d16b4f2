"""Latents and their examples for people to look at: in the terminal, and as a page that needs nothing else.

Tokens, explanations and notes come from elsewhere. They are shown as text: never as rich's markup, never as HTML, and
without the control characters that could rewrite a terminal.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from mechreward.errors import ConfigError, PackError, SAEError, nearest
from mechreward.features.autointerp import MARKED
from mechreward.features.catalog import load_pack, shipped_packs
from mechreward.features.examples import Example, FeatureExamples
from mechreward.features.frozen import frozen_readout
from mechreward.features.neuronpedia import PublishedFeature
from mechreward.readout import Readout
from mechreward.sae.registry import SHIPPED, load_sae, reference

PALE, HOT = (255, 237, 205), (234, 88, 12)
"""Red, green and blue of the weakest and the strongest shade in the terminal."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """Latents to look at.

    Attributes:
        title: The pack's or the SAE's name.
        sae: ``release/sae_id``, or the SAE's folder.
        model_name: The model that they belong to, as far as known.
        readout: K columns.
        ids: K indices in the SAE.
        weights: What each adds to the pack's reward per unit, or None where there is no pack, or it leaves it out.
        notes: What the pack says that each stands for.
    """

    title: str
    sae: str
    model_name: str | None
    readout: Readout
    ids: list[int]
    weights: list[float | None]
    notes: list[str]


@dataclass(frozen=True, eq=False)
class Shown:
    """One latent to show.

    Attributes:
        index: In the SAE.
        examples: What it does in the corpus.
        weight: In the pack.
        note: The pack's.
        published: What Neuronpedia knows of it, if that was asked for.
    """

    index: int
    examples: FeatureExamples
    weight: float | None = None
    note: str = ""
    published: PublishedFeature | None = None


def choose(target: str | None, sae: str | None, ids: Sequence[int]) -> Chosen:
    """Find the latents that somebody names.

    Args:
        target: A pack's name or file; or an SAE as :func:`mechreward.sae.registry.reference` takes it.
        sae: An SAE.
        ids: Indices of latents; by default all of the pack.

    Raises:
        ConfigError: None or both are named, no latent is, or the name is neither a pack's nor an SAE's.
        PackError, SAEError: The pack or the SAE cannot be read, or has no such latent.
    """
    if (target is None) == (sae is None):
        raise ConfigError("Name a pack, or an SAE with --sae release/sae_id: one of the two.")
    if target is not None and (target in shipped_packs() or target.endswith(".json") or target.startswith("hf:")):
        return _of_pack(target, list(dict.fromkeys(ids)))
    name = sae or target or ""
    try:
        release, sae_id = reference(name)
    except SAEError as error:
        if sae is not None:
            raise
        known = nearest(name, [*shipped_packs(), *SHIPPED])
        raise ConfigError(f"'{name}' is neither a pack nor a sparse autoencoder (release/sae_id).{known}") from error
    if not ids:
        raise ConfigError(f"Say which latents of {name} with --feature.")
    handle, chosen = load_sae(release, sae_id), list(dict.fromkeys(ids))
    return Chosen(
        title=handle.name,
        sae=handle.name,
        model_name=handle.model_name,
        readout=handle.features(chosen),
        ids=chosen,
        weights=[None] * len(chosen),
        notes=[""] * len(chosen),
    )


def _of_pack(name: str, ids: list[int]) -> Chosen:
    pack = load_pack(name)
    if not pack.features:
        raise PackError(f"{pack.name} is a recipe without features: there is nothing to show yet.")
    entries = {feature.id: feature for feature in pack.features}
    chosen = ids or list(entries)
    if pack.frozen is not None:
        if missing := [index for index in chosen if index not in entries]:
            raise PackError(f"{pack.name} is frozen and carries no feature {missing[0]}: name the SAE with --sae.")
        everything = frozen_readout(pack)
        columns = [list(entries).index(index) for index in chosen]
        readout = _columns(everything, columns)
    else:
        readout = load_sae(pack.sae.release, pack.sae.sae_id).features(chosen)
    return Chosen(
        title=pack.name,
        sae=f"{pack.sae.release}/{pack.sae.sae_id}",
        model_name=pack.model,
        readout=readout,
        ids=chosen,
        weights=[entries[index].weight if index in entries else None for index in chosen],
        notes=[entries[index].note if index in entries else "" for index in chosen],
    )


def _columns(readout: Readout, columns: list[int]) -> Readout:
    """Some columns of a readout."""
    import torch

    labels, wanted = tuple(readout.labels[column] for column in columns), torch.tensor(columns)
    return replace(readout, labels=labels, keep=wanted if readout.keep is None else readout.keep[wanted])


def visible(text: str) -> str:
    """A token as it may be shown: a sign for line breaks and tabs, and for what could rewrite a terminal or a line.

    Control characters (Unicode category Cc) and those that turn the writing direction become ``\\ufffd``.
    """
    text = text.replace("\r\n", "↵").replace("\n", "↵").replace("\t", "⇥")
    return "".join(
        "\ufffd" if unicodedata.category(c) == "Cc" or "\u202a" <= c <= "\u202e" or "\u2066" <= c <= "\u2069" else c
        for c in text
    )


# In the terminal.


def print_feature(console: Console, shown: Shown, count: int) -> None:
    """Print a latent: how often it fires, what is said of it, its strongest examples, and one of every strength."""
    found = shown.examples
    console.print()
    console.print(_heading(shown), soft_wrap=True)
    console.print(_summary(found), soft_wrap=True, markup=False, highlight=False)
    if shown.published is not None:
        for line in _sayings(shown.published):
            console.print(Text(visible(line)), soft_wrap=True)
    if not found.top:
        return
    console.print(_legend(console, found.maximum))
    console.print(_lines(console, found.top[:count], found.maximum))
    weaker = [example for group in found.quantiles(groups=4, each=1) for example in group]
    if len(found.sample) > count:
        console.print(Text("at random, one of each quarter by strength:", style="italic"))
        console.print(_lines(console, weaker, found.maximum))


def _heading(shown: Shown) -> Text:
    text = Text(f"feature {shown.index}", style="bold")
    if shown.weight is not None:
        text.append(f"  weight {shown.weight:+.4f}", style="not bold")
    if shown.note:
        text.append(f"  {visible(shown.note)}", style="not bold italic")
    return text


def _summary(found: FeatureExamples) -> str:
    if not found.top:
        return f"never fires on the {found.tokens:,} tokens of the {found.texts:,} texts."
    return (
        f"fires on {found.firing_rate:.3%} of {found.tokens:,} tokens, in {found.texts_fired:,} of {found.texts:,} "
        f"texts; largest {found.maximum:.2f}; activations above 0: {_sparkline(found)}"
    )


def _sayings(published: PublishedFeature) -> Iterator[str]:
    yield f"Neuronpedia: {published.url}"
    if published.density is not None:
        yield f"  fires on {published.density:.3%} of the tokens there"
    for explanation in published.explanations or ():
        by = f" [{explanation.model}]" if explanation.model else ""
        yield f"  “{explanation.text}”{by}"
    if not published.explanations:
        yield "  no explanation"
    if published.promoted:
        yield "  promotes " + ", ".join(repr(token) for token, _ in published.promoted[:8])


def _sparkline(found: FeatureExamples) -> str:
    """The histogram in a line, up to the largest activation, on a logarithmic scale."""
    bars = " ▁▂▃▄▅▆▇█"
    heights = [height for _, _, _, height in histogram(found, 16)]
    return "0 " + "".join(bars[round(8 * height)] for height in heights) + f" {found.maximum:.2f}"


def histogram(found: FeatureExamples, bars: int) -> list[tuple[float, float, int, float]]:
    """At most so many bars up to the largest activation: from, to, count, and height in 0..1 (log of 1 + count)."""
    used = int(np.flatnonzero(found.counts)[-1]) + 1
    merged = -(-used // bars)
    counts = np.add.reduceat(found.counts[:used], np.arange(0, used, merged))
    heights = np.log1p(counts) / np.log1p(counts.max())
    step = float(found.edges[1]) * merged
    return [(i * step, (i + 1) * step, int(c), float(h)) for i, (c, h) in enumerate(zip(counts, heights, strict=True))]


def _legend(console: Console, maximum: float) -> Text:
    if console.color_system is None:
        return Text(f"largest activation, and a text with tokens above {MARKED:.0%} of its largest in << >>:")
    text = Text("activation: 0 ", style="dim")
    for share in (0.05, 0.25, 0.5, 0.75, 1.0):
        text.append("  ", style=_shade(share))
    return text.append(f" {maximum:.2f}; grey: not read", style="dim")


def _lines(console: Console, examples: Sequence[Example], maximum: float) -> Table:
    """Each example's largest activation and its text."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", width=8)
    table.add_column(overflow="fold")
    for example in examples:
        text = _shaded(console, example, maximum)
        text = text[len(text.plain) - len(text.plain.lstrip()) :]  # texts stand in line
        table.add_row(Text(f"{example.maximum:.2f}", style="dim"), text)
    return table


def _shaded(console: Console, example: Example, maximum: float) -> Text:
    """Tokens shaded by activation; or with marks where there are no colours."""
    text, colours = Text(), console.color_system is not None
    for piece in pieces(example, maximum):
        if piece.kind == "unread":
            text.append(piece.text, style="dim" if colours else "")
        elif piece.kind == "silent":
            text.append(piece.text)
        elif colours:
            text.append(piece.text, style=_shade(piece.shade))
        else:
            text.append(f"<<{piece.text}>>" if piece.activation > MARKED * example.maximum else piece.text)
    return text


def _shade(share: float) -> Style:
    red, green, blue = (round(p + (h - p) * share) for p, h in zip(PALE, HOT, strict=True))
    return Style.parse(f"#000000 on #{red:02x}{green:02x}{blue:02x}")


# As a page.


class Piece(NamedTuple):
    """A run of an example's text on the page: a token that fires, or neighbours that do not.

    Attributes:
        text: As it is shown.
        kind: ``fires``, ``silent`` or ``unread``.
        shade: 0..1, for tokens that fire.
        activation: Likewise.
        peak: Whether it is the example's largest.
    """

    text: str
    kind: str
    shade: float = 0.0
    activation: float = 0.0
    peak: bool = False


def pieces(example: Example, maximum: float) -> list[Piece]:
    """An example's text in runs; ``maximum`` is what is shaded most."""
    found: list[Piece] = []
    for place, (token, activation, read) in enumerate(
        zip(example.tokens, example.activations.tolist(), example.read, strict=True)
    ):
        if read and activation > 0:
            shade = max(0.0, min(1.0, activation / maximum)) if maximum > 0 else 0.0
            found.append(Piece(visible(token), "fires", shade, activation, place == example.peak))
        else:
            found.append(Piece(visible(token), "silent" if read else "unread"))
    merged: list[Piece] = []
    for kind, run in itertools.groupby(found, key=lambda piece: piece.kind):
        members = list(run)
        merged += members if kind == "fires" else [Piece("".join(piece.text for piece in members), kind)]
    return merged


def _published_examples(published: PublishedFeature, count: int) -> tuple[list[Example], float]:
    """Neuronpedia's own examples, cut around the peak, and the largest activation of all, which is shaded most."""
    largest = max((max(a.values, default=0.0) for a in published.activations), default=0.0)
    found = []
    for activation in published.activations[:count]:
        values = np.array(activation.values, dtype=np.float32)
        if len(values) == 0 or values.max() <= 0:
            continue
        peak = int(values.argmax())
        kept = slice(max(0, peak - 48), peak + 16)
        example = Example(
            tokens=tuple(token.replace("▁", " ") for token in activation.tokens[kept]),
            token_ids=(),
            activations=values[kept],
            read=np.ones(len(values[kept]), bool),
            peak=peak - kept.start,
            text=0,
            start=kept.start,
        )
        found.append(example)
    return found, largest


def page(title: str, about: Sequence[tuple[str, str]], features: Sequence[Shown], count: int) -> str:
    """A page of HTML that asks nothing of the network: styles within, no scripts, and a policy that forbids both.

    Args:
        title: The page's.
        about: What was read: names and values, shown in the head.
        features: The latents.
        count: How many examples of each kind.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    environment.globals |= {"pieces": pieces, "histogram": histogram, "published_examples": _published_examples}
    template = environment.get_template("show.html.j2")
    return template.render(title=title, about=about, features=features, count=count, day=date.today().isoformat())
