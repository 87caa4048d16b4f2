"""`load_sae`: published releases by name, through SAELens' registry, and the ones that are shipped here."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mechreward import pocket
from mechreward.errors import MissingExtraError, SAEError, nearest
from mechreward.readout import HookPoint
from mechreward.sae import formats
from mechreward.sae.handle import SAEHandle

SHIPPED = {
    "pocket-res-canonical": {
        "layer_2/width_2k/canonical": "jumprelu",
        "layer_2/width_2k/topk": "topk",
    }
}

LOCAL = "local"


CORRECTED_MODELS = {"gemma-scope-9b-it-res": "gemma-2-9b-it"}
"""Where SAELens' registry names another model than the release's repository does."""


def load_sae(
    release: str | None = None,
    sae_id: str | None = None,
    *,
    path: str | Path | None = None,
    revision: str | None = None,
) -> SAEHandle:
    """Find a sparse autoencoder; its weights are read later, and only the columns that are used.

    Args:
        release: A release name, as SAELens lists them, e.g. ``"gemma-scope-9b-pt-res-canonical"``; or a repository
            of the hub in a format that :func:`mechreward.sae.formats.open_path` knows, e.g.
            ``"EleutherAI/sae-llama-3-8b-32x"``; or ``"local"``, where a pack names a path as its id.
        sae_id: The id inside the release, e.g. ``"layer_22/width_16k/canonical"``; or the repository's folder or file.
        path: A local folder or file instead.
        revision: Branch, tag or commit of the release's repository.

    Raises:
        SAEError: The release, id or file does not exist, cannot be fetched, or is damaged.
        MissingExtraError: The release is SAELens', and SAELens is not installed.
    """
    if release == LOCAL and sae_id is not None:
        path = sae_id
    if path is not None:
        return formats.open_path(Path(path))
    if release is None or sae_id is None:
        raise SAEError("load_sae needs release= and sae_id=, or path=.")
    if release in SHIPPED:
        folder = pocket.files() / "saes" / _known(release, sae_id, SHIPPED[release])
        return replace(formats.saelens(folder), name=f"{release}/{sae_id}")
    if release.count("/") == 1:  # none of SAELens' names has one
        return _from_repository(release, sae_id, revision)
    entry = _known_release(release)
    found = {str(sae["id"]): sae for sae in entry["saes"]}
    stored_at = str(_known(release, sae_id, {known: sae["path"] for known, sae in found.items()}))
    name, model = f"{release}/{sae_id}", CORRECTED_MODELS.get(release, entry["model"])
    return replace(_fetch(name, model, entry, found[sae_id], stored_at, revision), name=name, model_name=model)


def reference(name: str) -> tuple[str, str]:
    """Release and id of a sparse autoencoder from its name in one piece, as :func:`load_sae` takes the two.

    ``release/sae_id`` of the shipped or SAELens' releases, ``user/repository/folder`` of the hub, or a path, whose
    release is :data:`LOCAL`.

    Raises:
        SAEError: It is none of these.
    """
    if Path(name).exists():
        return LOCAL, name
    release, _, sae_id = name.partition("/")
    if release not in SHIPPED and (importlib.util.find_spec("sae_lens") is None or release not in saelens_directory()):
        user, _, rest = name.partition("/")
        repository, _, sae_id = rest.partition("/")
        release = f"{user}/{repository}"
    if not sae_id:
        raise SAEError(
            f"'{name}' does not name a sparse autoencoder: write release/sae_id, user/repository/folder of the hub, or "
            f"the path of one that is there.{nearest(name.partition('/')[0], SHIPPED)}"
        )
    return release, sae_id


def _known(release: str, sae_id: str, ids: dict[str, Any]) -> Any:
    if sae_id not in ids:
        raise SAEError(f"Release '{release}' has no SAE '{sae_id}'.{nearest(sae_id, ids)}")
    return ids[sae_id]


@functools.cache
def saelens_directory() -> dict[str, Any]:
    """SAELens' list of releases, read from its data file: importing SAELens itself takes ten seconds.

    Raises:
        MissingExtraError: SAELens is not installed.
    """
    package = importlib.util.find_spec("sae_lens")
    if package is None or package.origin is None:
        raise MissingExtraError("sae-lens", "sae")
    import yaml

    text = (Path(package.origin).parent / "pretrained_saes.yaml").read_text()
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _known_release(release: str) -> dict[str, Any]:
    directory = saelens_directory()
    if release not in directory:
        raise SAEError(f"There is no release '{release}'.{nearest(release, [*SHIPPED, *directory])}")
    return directory[release]


def _fetch(
    name: str, model: str | None, entry: dict[str, Any], sae: dict[str, Any], stored_at: str, revision: str | None
) -> SAEHandle:
    convert, repo = entry.get("conversion_func"), entry["repo_id"]

    def folder(*files: str) -> Path:
        first, *_ = [download(repo, f"{stored_at}/{file}", revision) for file in files]
        return first.parent

    if convert == "gemma_2":
        if not repo.endswith("-res"):
            raise SAEError(f"{name} does not read the residual stream: choose a '-res' release.")
        layer = re.match(r"layer_(\d+)/", stored_at)
        if layer is None:
            raise SAEError(f"{name} reads the embedding, not the residual stream after a layer: choose a layer's.")
        return formats.gemma_scope(folder("params.npz") / "params.npz", HookPoint(int(layer[1])))
    if convert is None:
        scale, overrides = sae.get("norm_scaling_factor"), entry.get("config_overrides")
        return formats.saelens(folder("cfg.json", "sae_weights.safetensors"), model, scale, overrides)
    if convert == "gemma_3":
        if not stored_at.startswith("resid_post"):
            raise SAEError(f"{name} does not read the residual stream: choose a '-res' release.")
        return formats.gemma_scope_2(folder("params.safetensors"))
    if convert == "llama_scope":
        if "LXR" not in repo:
            raise SAEError(f"{name} does not read the residual stream: choose a 'lxr' release.")
        return formats.llama_scope(folder("hyperparams.json", "checkpoints/final.safetensors"))
    if convert == "llama_scope_r1_distill":
        return formats.llama_scope_r1(folder("config.json", "sae_weights.safetensors"), sae.get("norm_scaling_factor"))
    if convert in ("goodfire", "deepseek_r1"):
        return formats.goodfire(download(repo, stored_at, revision))
    if convert == "qwen_scope":
        k = re.search(r"L0_(\d+)$", repo)
        return formats.qwen_scope(download(repo, stored_at, revision), int(k[1]) if k else None)
    if convert == "dictionary_learning_1":
        return formats.dictionary_learning(folder("config.json", "ae.pt"))
    raise SAEError(f"{name} is stored in the format '{convert}', which this version does not read.")


def _from_repository(repo: str, sae_id: str, revision: str | None) -> SAEHandle:
    """A folder or file of a hub repository that SAELens does not list."""
    from huggingface_hub import snapshot_download

    with _the_ways_out(f"{repo}/{sae_id}"):
        root = Path(snapshot_download(repo, revision=revision, allow_patterns=[sae_id, f"{sae_id}/*"]))
    return replace(formats.open_path(root / sae_id), name=f"{repo}/{sae_id}")


def download(repo: str, file: str, revision: str | None = None) -> Path:
    """A file of a hub repository, from the cache or the network.

    Raises:
        SAEError: It cannot be had, with the ways out.
    """
    from huggingface_hub import hf_hub_download

    with _the_ways_out(f"{repo}/{file}"):
        return Path(hf_hub_download(repo, file, revision=revision))


@contextmanager
def _the_ways_out(wanted: str) -> Iterator[None]:
    """What the hub's client raises, in one sentence."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise SAEError(
            f"{wanted} could not be fetched ({type(error).__name__}): connect to the hub (or set HF_ENDPOINT to a "
            "mirror), or fill the cache elsewhere with 'hf download' and copy it here, or pass load_sae(path=...)."
        ) from error
