"""What Neuronpedia knows of a latent: explanations, top activations, the tokens that it promotes, and a link.

Through the official client (PyPI ``neuronpedia``, in the extra ``interp``), which is used for what it sends and where;
around it stand what it lacks: a timeout, patience with a busy server, a cache, and silence on stdout.

Answers are kept as JSON files in ``$MECHREWARD_CACHE/neuronpedia``, by default ``~/.cache/mechreward/neuronpedia`` (or
``$XDG_CACHE_HOME/mechreward``), and are not asked for again: delete a file to have it fetched anew. With
``HF_HUB_OFFLINE=1`` only the cache is read. Reading needs no key; ``NEURONPEDIA_API_KEY`` is sent where it is set. (On
import the client reads a ``.env`` file in the folders above its own, as python-dotenv does.)

Explanations are somebody's words, and often a language model's: show them as text, never as markup.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mechreward.errors import SAEError, ServiceError
from mechreward.extras import require
from mechreward.retry import BUSY, Again, patiently, wait_asked_for
from mechreward.sae.registry import SHIPPED, saelens_directory

SITE = "https://www.neuronpedia.org"

TIMEOUT = 30.0
"""Seconds that one attempt may take to connect, and between two pieces of its answer."""


@dataclass(frozen=True)
class Explanation:
    """Somebody's account of a latent.

    Attributes:
        text: The account; not to be trusted as markup.
        method: How it was made, e.g. ``oai_token-act-pair``, if known.
        model: The language model that wrote it, if one did.
    """

    text: str
    method: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class Activation:
    """A text of T tokens and the latent's activations on them, as Neuronpedia keeps it.

    Attributes:
        tokens: T texts of tokens.
        values: T activations, in the units of the SAE.
    """

    tokens: tuple[str, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class PublishedFeature:
    """A latent's page on Neuronpedia.

    Attributes:
        url: The page, for people.
        explanations: All accounts of it, in Neuronpedia's order.
        activations: Examples, in Neuronpedia's order: the largest first, as a rule.
        density: Share of the tokens of their corpus on which it fires, if known.
        promoted: The tokens whose logits it raises most, with by how much.
        suppressed: Those that it lowers most.
    """

    url: str
    explanations: tuple[Explanation, ...]
    activations: tuple[Activation, ...]
    density: float | None
    promoted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]


def neuronpedia_id(sae: str) -> str:
    """Neuronpedia's name of an SAE, from SAELens' list of releases; ids are never guessed.

    Args:
        sae: ``release/sae_id``: ``SAEHandle.name``, or both parts of a pack's SAE.

    Returns:
        E.g. ``gemma-2-9b/22-gemmascope-res-16k``.

    Raises:
        SAEError: The list has no such SAE, or no name of Neuronpedia's for it.
        MissingExtraError: SAELens is not installed.
    """
    release, _, sae_id = sae.partition("/")
    listed = {} if release in SHIPPED else saelens_directory().get(release, {})
    entry = next((entry for entry in listed.get("saes", []) if str(entry["id"]) == sae_id), {})
    found = entry.get("neuronpedia")
    if not isinstance(found, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", found):
        raise SAEError(
            f"{sae} has no page on Neuronpedia that is known: SAELens' list of releases names none for it, and ids are "
            "not guessed."
        )
    return found


def page(np_id: str, index: int) -> str:
    """The address of a latent's page, for people."""
    return f"{SITE}/{np_id}/{index}"


def published_feature(
    np_id: str, index: int, *, offline: bool | None = None, base_url: str | None = None
) -> PublishedFeature:
    """What Neuronpedia knows of a latent, from the cache or the network.

    Args:
        np_id: Model and source, as :func:`neuronpedia_id` gives them.
        index: The latent's index in the SAE.
        offline: Read the cache alone; by default if ``HF_HUB_OFFLINE`` is set.
        base_url: The API of another Neuronpedia, e.g. ``http://localhost:3000/api``; by default the client's own.

    Raises:
        ServiceError: Neuronpedia has no such latent, refuses, cannot be reached, or is not to be asked and the cache
            has nothing.
        MissingExtraError: The client is not installed (the cache is read without it).
    """
    host = urlsplit(base_url).netloc.replace(":", "_") if base_url else ""
    file = cache_folder() / host / np_id / f"{int(index)}.json"
    raw = _cached(file)
    if raw is None:
        if _offline() if offline is None else offline:
            raise ServiceError(
                f"Feature {index} of {np_id} is not in the cache ({cache_folder()}), and Neuronpedia is not asked when "
                "offline: look it up once while online, or copy the cache from where that was done."
            )
        raw = _fetch(np_id, index, base_url)
        feature = _parsed(raw, np_id, index)  # what cannot be read is not kept
        _keep(file, raw)
        return feature
    return _parsed(raw, np_id, index)


def cache_folder() -> Path:
    """Where answers are kept."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("MECHREWARD_CACHE") or f"{caches}/mechreward"
    return Path(home).expanduser() / "neuronpedia"


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _cached(file: Path) -> dict[str, Any] | None:
    """A kept answer; one that is damaged counts as missing, since it can be had again."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return raw if isinstance(raw, dict) else None


def _keep(file: Path, raw: dict[str, Any]) -> None:
    """Whole or not at all, since another process may be reading; a cache that cannot be written is no error."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as part:
            json.dump(raw, part)
        os.replace(part.name, file)
    except OSError:
        return


def _fetch(np_id: str, index: int, base_url: str | None) -> dict[str, Any]:
    """One latent's record, by the client's own request."""
    client = require("neuronpedia", "interp")
    requests = require("requests", "interp")
    # The client refuses to start without a key, which the server does not ask for where something is only read:
    # requests leaves out a header whose value is None.
    request = client.FeatureRequest(api_key="none")
    request.api_key = client.get_api_key() or os.environ.get("NEURONPEDIA_API_KEY") or None
    if base_url is not None:
        request.BASE_URL = base_url.rstrip("/")
    what = f"Asking Neuronpedia for feature {index} of {np_id}"
    model, source = np_id.split("/")

    def attempt() -> Any:
        answers: list[Any] = []  # the client's errors say neither the status nor how long to wait
        hooks = {"response": lambda answer, **_: answers.append(answer)}
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
                return request.send_request(method="GET", uri=f"{model}/{source}/{index}", timeout=TIMEOUT, hooks=hooks)
        except Exception as error:  # the client's own have no base class
            status = answers[-1].status_code if answers else None
            if status in BUSY:
                raise Again(f"status {status}", wait_asked_for(answers[-1].headers)) from error
            if isinstance(
                error, (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
            ):
                raise Again(type(error).__name__) from error
            if status is None:
                raise
            raise ServiceError(f"{what} failed: {_refusal(status)}") from error

    raw = patiently(attempt, what)
    if raw is None:
        raise ServiceError(f"{what} failed: {_refusal(404)}")
    if not isinstance(raw, dict):
        raise ServiceError(f"{what} failed: the answer is a JSON {type(raw).__name__} where an object was expected.")
    return raw


def _refusal(status: int) -> str:
    match status:
        case 401 | 403:
            return f"status {status}, not allowed; correct or unset NEURONPEDIA_API_KEY."
        case 404:
            return "there is no such feature; check its index, and whether this SAE is on Neuronpedia."
        case 200:
            return "the answer is not JSON; check the address and whether something stands in between."
    return f"status {status}; check the feature's index and the address."


def _parsed(raw: dict[str, Any], np_id: str, index: int) -> PublishedFeature:
    try:
        return PublishedFeature(
            url=page(np_id, index),
            explanations=tuple(
                Explanation(str(each["description"]).strip(), each.get("typeName"), each.get("explanationModelName"))
                for each in raw.get("explanations") or []
                if each.get("description")
            ),
            activations=tuple(
                Activation(tuple(map(str, each["tokens"])), tuple(map(float, each["values"])))
                for each in raw.get("activations") or []
                if len(each["tokens"]) == len(each["values"])
            ),
            density=None if raw.get("frac_nonzero") is None else float(raw["frac_nonzero"]),
            promoted=_logits(raw, "pos"),
            suppressed=_logits(raw, "neg"),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ServiceError(
            f"What Neuronpedia says of feature {index} of {np_id} is not of the known form ({type(error).__name__}: "
            f"{error}): update mechreward, or look at {page(np_id, index)}."
        ) from error


def _logits(raw: dict[str, Any], side: str) -> tuple[tuple[str, float], ...]:
    tokens, values = raw.get(f"{side}_str") or [], raw.get(f"{side}_values") or []
    return tuple((str(token), float(value)) for token, value in zip(tokens, values, strict=False))
