"""Checked data from files: strict pydantic models, and one sentence about the first thing that is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from mechreward.errors import nearest

Location = tuple[int | str, ...]
"""Where in nested data: ``("features", 3, "weight")``."""


class Strict(BaseModel):
    """No unknown keys, no silent conversions, no NaN or infinity, no change after construction."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def most_telling(error: ValidationError) -> ErrorDetails:
    """The error to report: a mistyped key before the missing one that it causes."""
    return min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")


def sentence(first: ErrorDetails, root: type[BaseModel], what: str) -> str:
    """One of pydantic's errors in one sentence.

    Args:
        first: The error.
        root: The model that was validated, for the names that are allowed where a key is unknown.
        what: What the data is, e.g. ``"pack"``, for errors about the whole.
    """
    location = first["loc"]
    key = shown_location(location)
    if location[:1] == ("provenance",) and len(location) == 3:  # pydantic appends the type it tried: name the key alone
        key, value = shown_location(location[:2]), shown(first["input"])
        return f"key '{key}' is {value}, but it should be a text or a finite number; correct it there."
    match first["type"]:
        case "extra_forbidden":
            meant = nearest(str(location[-1]), known_keys(root, location[:-1]))
            return f"unknown key '{key}'.{meant} Rename or remove it."
        case "missing":
            return f"key '{key}' is missing; add it."
        case "model_type":
            return f"key '{key}' is {shown(first['input'])}, but it should be an object of named keys; correct it."
        case "value_error":
            says = first["msg"].removeprefix("Value error, ")
            return f"key '{key}' {says}." if location else f"the {what} {says}."
        case _:
            wanted = first["msg"].replace("Input should", "it should")
            return f"key '{key}' is {shown(first['input'])}, but {wanted}; correct it there."


def shown_location(location: Iterable[int | str]) -> str:
    """``("features", 3, "weight")`` as ``features[3].weight``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def shown(value: object) -> str:
    """A value as it may appear in a sentence."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def known_keys(root: type[BaseModel], location: Iterable[int | str]) -> Iterable[str]:
    """The keys that the schema allows in the object at a location."""
    model, annotation = root, None  # annotation: of a list or mapping whose item comes next
    for part in location:
        if annotation is None and isinstance(part, str) and part in model.model_fields:
            field = model.model_fields[part].annotation
            model = _model_in(field) or model
            annotation = field if _holds_items(field) else None
        else:
            annotation = None
    return model.model_fields


def _holds_items(annotation: Any) -> bool:
    return get_origin(annotation) in (list, dict) or any(map(_holds_items, get_args(annotation)))


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The schema class inside ``X``, ``list[X]``, ``dict[str, X]`` or ``X | None``, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for model in map(_model_in, get_args(annotation)) if model), None)
