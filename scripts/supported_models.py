"""Which published SAEs can be read, and what was verified: the table in the README is made from this.

    python scripts/supported_models.py   # writes the table into the README, between its two markers

Releases are looked up in SAELens' registry, so that a row cannot name one that is not there. Tests hold the rest to it:
every id of every release named here leads to a file, every other release is refused, and ``widths`` and ``saelens`` are
what files of that size, and SAELens' own reading of such files, gave.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path

from mechreward.sae.registry import CORRECTED_MODELS, saelens_directory

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- supported-models -->\n", "<!-- end of supported-models -->"
FOLDER = "a repository of the hub by `release` and folder by `sae_id`, or `path=`"


@dataclass(frozen=True)
class Supported:
    """One row: releases in one format.

    Attributes:
        format: The format's name.
        releases: Patterns of SAELens' release names, or none.
        widths: (d_model, d_sae) of one that is published, at which files with random values were read and checked.
        saelens: How SAELens' own reading of the same files compares.
        models: The models; by default those of the releases.
        found: How ``load_sae`` finds it; by default SAELens' registry.
    """

    format: str
    releases: tuple[str, ...]
    widths: tuple[int, int]
    saelens: str
    models: str = ""
    found: str = "SAELens' names"


EQUAL = "equals SAELens"
BUT_FOR_NORMS = "equals SAELens but for the decoder's norms, which SAELens leaves out"
SUPPORTED = [
    Supported(
        "Gemma Scope (npz, JumpReLU)", ("gemma-scope-[29]b-?t-res*", "gemma-scope-27b-pt-res*"), (3584, 16384), EQUAL
    ),
    Supported("Gemma Scope 2 (safetensors, JumpReLU)", ("gemma-scope-2-*-res*",), (3840, 16384), EQUAL),
    Supported(
        "Llama Scope (safetensors, JumpReLU)", ("llama_scope_lxr_*",), (4096, 32768),
        BUT_FOR_NORMS,
    ),
    Supported("Llama Scope R1 (safetensors, JumpReLU)", ("llama_scope_r1_distill",), (4096, 32768), BUT_FOR_NORMS),
    Supported("Goodfire (.pth, ReLU)", ("goodfire-llama-3.1-8b-instruct",), (4096, 65536), EQUAL),
    Supported("Goodfire (.pt, ReLU)", ("goodfire-llama-3.3-70b-instruct",), (8192, 65536), EQUAL),
    Supported("Qresearch (.pt, ReLU)", ("deepseek-r1-distill-llama-8b-qresearch",), (4096, 65536), EQUAL),
    Supported("Qwen Scope (.pt, TopK)", ("qwen-scope-*",), (4096, 65536), EQUAL),
    Supported("dictionary_learning (ae.pt, BatchTopK)", ("*-andyrdt",), (3584, 131072), EQUAL),
    Supported(
        "dictionary_learning (ae.pt, standard, gated, TopK, BatchTopK, Matryoshka, JumpReLU)",
        ("sae*bench_*",), (2304, 65536),
        "equals SAELens but for the standard class, whose decoder SAELens does not normalise",
    ),
    Supported(
        "SAELens (standard, gated, TopK, JumpReLU; BatchTopK and Matryoshka, which it saves as JumpReLU)",
        ("*-matryoshka-dc", "gpt2-small-res-*", "gpt2-small-res_*", "gpt2-small-resid-post-*", "gemma-2b*-res-jb",
         "llama-3-8b-it-res-jh", "mistral-7b-res-wg", "pythia-70m-deduped-res-sm"),
        (2304, 32768), EQUAL, found="SAELens' names, or `path=`",
    ),
    Supported(
        "EleutherAI sparsify (safetensors, TopK and GroupMax)", (), (512, 32768), "SAELens reads it wrongly",
        models="any, e.g. `EleutherAI/sae-llama-3-8b-32x`, `layers.24`", found=FOLDER,
    ),
    Supported(
        "one .pt with its k (TopK)", (), (2560, 40960), "SAELens does not read it",
        models="Qwen3.5-4B: `caiovicentino1/Qwen3.5-4B-SAE-L18-topk`, `sae_final.pt`", found=FOLDER,
    ),
]  # fmt: skip


def releases(row: Supported) -> list[str]:
    """SAELens' releases that a row's patterns name, in order."""
    return sorted(name for name in saelens_directory() if any(fnmatchcase(name, each) for each in row.releases))


def sae_ids(release: str) -> list[str]:
    """The ids of a release that read the residual stream after a layer: all but Gemma Scope's of the embedding."""
    return [sae["id"] for sae in saelens_directory()[release]["saes"] if not str(sae["id"]).startswith("embedding")]


def table() -> str:
    """The table of supported models, in markdown."""
    lines = ["| model | SAE releases | format | how `load_sae` finds it | verified how |", "|---|---|---|---|---|"]
    total = 0
    for row in SUPPORTED:
        names = releases(row)
        count = sum(len(sae_ids(name)) for name in names)
        total += count
        models = row.models or ", ".join(sorted({_model(name) for name in names}, key=str.casefold))
        which = ", ".join(f"`{pattern}`" for pattern in row.releases)
        which += f" ({len(names)}: {count:,} SAEs)" if len(names) > 1 else ""
        d, n = row.widths
        verified = f"formula, at {d:,} x {n:,}; {row.saelens}"
        lines.append(f"| {models} | {which} | {row.format} | {row.found} | {verified} |")
    return "\n".join([*lines, "", NOTE.format(version=version("sae-lens"), total=total)])


NOTE = """\
The releases are patterns of names in the registry of SAELens {version}: {total:,} SAEs on the residual stream. Tests
check that each leads to its repository and file, and that its id and its path name the same layer; what reads
elsewhere is refused. Every format is also read from local files, with `path=`. "Formula": chosen columns of files of
the published layout, at the width given, equal the publisher's formula in float64; values within 1e-5 of a threshold,
which may flip, are counted, and are less than one in a thousand. **The files hold random values: no published weights
could be fetched where this was developed.** `pytest -m hub` reads Gemma Scope's, where the hub can be reached."""


def _model(release: str) -> str:
    return str(CORRECTED_MODELS.get(release) or saelens_directory()[release]["model"]).split("/")[-1]


def updated(text: str) -> str:
    """Return the README's text with the table as the code makes it."""
    before, rest = text.split(START)
    return before + START + table() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
