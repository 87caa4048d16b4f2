"""Asking a service on the network again, with patience, when it is busy or out of reach for a moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from mechreward.errors import ServiceError

T = TypeVar("T")

ATTEMPTS = 5
"""How often a service is asked before it is given up: waits of 1, 2, 4 and 8 s lie between."""

LONGEST_WAIT = 60.0
"""Seconds: a service that wants more (``Retry-After``) is given up at once, and its wish is told."""

BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that may be another a moment later."""


class Again(Exception):
    """Raised by one attempt: it may go better a moment later.

    Args:
        reason: What happened, e.g. ``"status 429"``.
        wait: Seconds that the service asks for, if it does.
    """

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


def patiently(attempt: Callable[[], T], what: str) -> T:
    """What ``attempt()`` returns, called up to :data:`ATTEMPTS` times while it raises :class:`Again`.

    Raises:
        ServiceError: It never went well, or the service asks for a longer wait than :data:`LONGEST_WAIT`.
    """
    for trial in range(ATTEMPTS):
        try:
            return attempt()
        except Again as again:
            wait = 2.0**trial if again.wait is None else again.wait
            if wait > LONGEST_WAIT:
                raise ServiceError(
                    f"{what} failed ({again}), and the service asks to wait {wait:.0f} s: try again then."
                ) from again
            if trial == ATTEMPTS - 1:
                raise ServiceError(
                    f"{what} failed {ATTEMPTS} times, last with {again}: check the address and the network, or try "
                    "again later."
                ) from again
            time.sleep(wait)
    raise AssertionError  # the last trial returns or raises


def wait_asked_for(headers: Mapping[str, str]) -> float | None:
    """Seconds in a ``Retry-After`` header (RFC 9110, section 10.2.3: a number of them, or a date), if there is one."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        when = parsedate_to_datetime(text)
    except ValueError:
        return None
    if when.tzinfo is None:  # RFC 5322's -0000; HTTP dates are in GMT
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())
