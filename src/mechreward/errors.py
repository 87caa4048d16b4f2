"""What can go wrong, in one clear sentence each: what is wrong, where, and what to do."""

import difflib
from collections.abc import Iterable
from typing import Any


class MechRewardError(Exception):
    """Base class of every error that this library raises on purpose."""


class SAEError(MechRewardError):
    """A sparse autoencoder cannot be found, read, or used as asked."""


class PackError(MechRewardError):
    """A feature pack or a probe cannot be found, read, or used as asked."""


class ModelMismatchError(MechRewardError):
    """A readout was made for another model, layer or width."""


class CaptureError(MechRewardError):
    """Activations could not be read where they were expected."""


class RewardError(MechRewardError):
    """A reward was given something that it cannot score, or was combined in a way that makes no sense."""


class DataError(MechRewardError):
    """Rollouts, questions or texts cannot be found, read, or used as asked."""


class ServiceError(MechRewardError):
    """A service on the network cannot be reached, refuses, or gives an answer that cannot be read."""


class SandboxError(MechRewardError):
    """Code that is not trusted cannot be run safely here."""


class ConfigError(MechRewardError):
    """An option has an unknown name or an impossible value."""


class MissingExtraError(MechRewardError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, first: str = ""):
        super().__init__(
            f"This needs the package '{package}', which is not installed: {first}run pip install '.[{extra}]' in the "
            "mechreward checkout."
        )
        self._parts = package, extra, first

    def __reduce__(self) -> Any:  # Ray pickles what is raised; an exception is made again from its text alone
        return MissingExtraError, self._parts


class CandidateWarning(UserWarning):
    """A pack is used that has not passed its gate."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the known name closest to a mistyped one, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


class DetectorWarning(UserWarning):
    """A detector raised, or was never calibrated, and is out: training goes on with one guard less."""
