"""Finding packs: the shipped catalogs, or a file."""

from __future__ import annotations

from pathlib import Path

from mechreward.errors import PackError, nearest
from mechreward.features.pack import FeaturePack, read_pack

CATALOGS = Path(__file__).parent.parent / "catalogs"


def shipped_packs() -> list[str]:
    """Names of the packs in the catalogs, e.g. ``pocket/reasoning_pack``."""
    return sorted(f"{file.parent.name}/{file.stem}" for file in CATALOGS.glob("*/*_pack.json"))


def load_pack(name: str) -> FeaturePack:
    """A pack from the shipped catalogs, or from a JSON file.

    Raises:
        PackError: There is none, or it is damaged.
    """
    if name.endswith(".json"):
        return read_pack(Path(name))
    if name not in shipped_packs():
        raise PackError(f"There is no pack '{name}' in the catalogs.{nearest(name, shipped_packs())}")
    return read_pack(CATALOGS / f"{name}.json")
