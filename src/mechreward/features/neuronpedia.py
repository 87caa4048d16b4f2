"""What Neuronpedia knows of a latent: explanations, top activations, the tokens that it promotes, and a link.

The official client (PyPI ``neuronpedia``, in the extra ``interp``) sends the requests. Answers are kept as JSON files
in ``$MECHREWARD_CACHE/neuronpedia``, by default ``~/.cache/mechreward/neuronpedia`` (or
``$XDG_CACHE_HOME/mechreward``), and are not asked for again: delete a file to have it fetched anew. With
``HF_HUB_OFFLINE=1`` only the cache is read. Reading needs no key; ``NEURONPEDIA_API_KEY`` is sent where it is set. (On
import the client reads a ``.env`` file in the folders above its own, as python-dotenv does.)

Explanations are written by people or language models: show them as text, never as markup.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechreward.errors import SAEError, ServiceError
from mechreward.extras import require
from mechreward.files import write
from mechreward.retry import raise_if_busy, with_backoff
from mechreward.sae.registry import SHIPPED, saelens_directory

TIMEOUT = 30.0
"""Seconds that one attempt may take to connect, and between two pieces of its answer."""


@dataclass(frozen=True)
class Explanation:
    """An account of a latent.

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
    """Return Neuronpedia's name of an SAE, from SAELens' list of releases; ids are never guessed.

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


def published_feature(np_id: str, index: int, *, offline: bool | None = None) -> PublishedFeature:
    """Return what Neuronpedia knows of a latent, from the cache or the network.

    Args:
        np_id: Model and source, as :func:`neuronpedia_id` gives them.
        index: The latent's index in the SAE.
        offline: Read the cache alone; by default if ``HF_HUB_OFFLINE`` is set.

    Raises:
        ServiceError: Neuronpedia has no such latent, refuses, cannot be reached, or is not to be asked and the cache
            has nothing.
        MissingExtraError: The client is not installed (the cache is read without it).
    """
    from huggingface_hub import constants

    file = cache_folder() / np_id / f"{int(index)}.json"
    with contextlib.suppress(OSError, ValueError):  # what is damaged is fetched again
        return _parsed(json.loads(file.read_text(encoding="utf-8")), np_id, index)
    if constants.HF_HUB_OFFLINE if offline is None else offline:
        raise ServiceError(
            f"Feature {index} of {np_id} is not in the cache ({cache_folder()}), and Neuronpedia is not asked when "
            "offline: look it up once while online, or copy the cache from where that was done."
        )
    raw = _fetch(np_id, index)
    if raw is None:
        raise ServiceError(
            f"Neuronpedia has no feature {index} of {np_id}: check the index, and whether this SAE is on Neuronpedia."
        )
    try:
        feature = _parsed(raw, np_id, index)
    except ValueError as error:
        raise ServiceError(
            f"Neuronpedia's answer on feature {index} of {np_id} is not of the known form ({error}): update "
            f"mechreward, or look at {_page(np_id, index)}."
        ) from error
    with contextlib.suppress(OSError):  # a cache that cannot be written is no error
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, json.dumps(raw))  # another process may be reading
    return feature


def cache_folder() -> Path:
    """Return the folder in which answers are kept."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("MECHREWARD_CACHE") or f"{caches}/mechreward"
    return Path(home).expanduser() / "neuronpedia"


def _fetch(np_id: str, index: int) -> Any:
    """Return a latent's record, by the client's own request."""
    client = require("neuronpedia", "interp")
    errors = require("neuronpedia.requests.base_request", "interp")
    requests = require("requests", "interp")
    # The client refuses to start without a key, which the server does not ask for where something is only read:
    # requests leaves out a header whose value is None.
    request = client.FeatureRequest(api_key="none")
    request.api_key = client.get_api_key() or os.environ.get("NEURONPEDIA_API_KEY") or None
    what = f"Asking Neuronpedia for feature {index} of {np_id}"

    def check(answer: Any, **_: Any) -> None:
        """Raise before the client does: its errors tell neither the status nor how long to wait."""
        raise_if_busy(answer)
        if answer.status_code in (401, 403):
            raise ServiceError(f"{what} failed: not allowed; correct or unset NEURONPEDIA_API_KEY.")
        if not answer.ok:
            raise ServiceError(
                f"{what} failed: status {answer.status_code}; check the feature's index, and whether this SAE is on "
                "Neuronpedia."
            )

    def send() -> Any:
        with contextlib.redirect_stdout(io.StringIO()):  # the client prints what it does
            return request.send_request(f"{np_id}/{index}", "GET", timeout=TIMEOUT, hooks={"response": check})

    try:
        return with_backoff(send, requests.RequestException, what)
    except errors.NPInvalidResponseError as error:
        raise ServiceError(
            f"{what} failed: the answer is not JSON; check whether a proxy or a login page stands in between."
        ) from error


def _page(np_id: str, index: int) -> str:
    return f"https://www.neuronpedia.org/{np_id}/{index}"


def _parsed(raw: Any, np_id: str, index: int) -> PublishedFeature:
    """Read a latent's record.

    Raises:
        ValueError: It is not of the known form.
    """
    try:
        return PublishedFeature(
            url=_page(np_id, index),
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
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _logits(raw: dict[str, Any], side: str) -> tuple[tuple[str, float], ...]:
    tokens, values = raw.get(f"{side}_str") or [], raw.get(f"{side}_values") or []
    return tuple((str(token), float(value)) for token, value in zip(tokens, values, strict=False))
