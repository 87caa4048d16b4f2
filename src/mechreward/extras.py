"""Optional dependencies, imported where they are used."""

import importlib
from types import ModuleType

from mechreward.errors import MissingExtraError


def require(package: str, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        MissingExtraError: It is not installed: says which extra brings it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] != package.split(".")[0]:
            raise  # it is installed, and lacks something of its own
        raise MissingExtraError(package, extra) from error
