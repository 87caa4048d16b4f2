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
    """A pack from the shipped catalogs, from a JSON file, or from the hub.

    Args:
        name: ``"pocket/reasoning_pack"``; a path to a ``.json`` file; or ``"hf:user/repo/reasoning_pack.json"``.

    Raises:
        PackError: There is none, or it is damaged.
    """
    if name.startswith("hf:"):
        return _from_hub(name)
    if name.endswith(".json"):
        return read_pack(Path(name))
    if name not in shipped_packs():
        hint = (
            nearest(name, shipped_packs()) or " 'mechreward packs list' names them; the path of a file ends in .json."
        )
        raise PackError(f"There is no pack '{name}' in the catalogs.{hint}")
    return read_pack(CATALOGS / f"{name}.json")


def push(file: Path, repo: str, private: bool = False) -> str:
    """Upload a pack, and its frozen encoder beside it, to a model repository of the hub.

    Returns:
        The name by which :func:`load_pack` finds it.

    Raises:
        PackError: The pack is not sound, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    pack, api = read_pack(file), HfApi()
    files = [file] if pack.frozen is None else [file, file.parent / pack.frozen.file]
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        for each in files:
            api.upload_file(path_or_fileobj=each, path_in_repo=each.name, repo_id=repo)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise PackError(
            f"{pack.name} could not be uploaded to {repo} ({type(error).__name__}): log in with 'hf auth login', and "
            "check the repository's name and the network."
        ) from error
    return f"hf:{repo}/{file.name}"


def _from_hub(name: str) -> FeaturePack:
    from mechreward.sae.registry import download

    parts = name.removeprefix("hf:").split("/")
    if len(parts) < 3 or not parts[-1].endswith(".json"):
        raise PackError(f"'{name}' is no pack on the hub: write hf:user/repository/file.json.")
    repo, file = "/".join(parts[:2]), "/".join(parts[2:])
    pack = read_pack(download(repo, file))
    if pack.frozen is not None:
        download(repo, str(Path(file).parent / pack.frozen.file))
    return pack
