"""Retry HTTP requests with exponential backoff."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from email.utils import mktime_tz, parsedate_tz
from typing import Any, TypeVar

from mechreward.errors import ServiceError

T = TypeVar("T")

PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds between attempts, where the service does not name a time."""

LONGEST_WAIT = 60.0
"""Seconds: a service that asks for a longer wait is not asked again."""

BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that may change a moment later."""


class Busy(Exception):
    """The service is busy or out of reach: a later attempt may succeed.

    Args:
        reason: What happened, e.g. ``"status 429"``.
        wait: Seconds that the service asks to wait, if it does.
    """

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason if wait is None else f"{reason}, which asks to wait {wait:.0f} s")
        self.reason, self.wait = reason, wait


def raise_if_busy(answer: Any, **_: Any) -> None:
    """Raise :class:`Busy` for an answer with a status in :data:`BUSY`; a response hook for httpx and for requests."""
    if answer.status_code in BUSY:
        raise Busy(f"status {answer.status_code}", retry_after(answer.headers))


def with_backoff(send: Callable[[], T], unreachable: type[Exception], what: str) -> T:
    """Return what ``send()`` returns, called again after a pause while it fails for a moment.

    Args:
        send: Sends the request; raises :class:`Busy` or ``unreachable``.
        unreachable: What the HTTP library raises when it gets no answer.
        what: Begins the error's sentence, e.g. "Asking the model".

    Raises:
        ServiceError: The last attempt failed too, or the service asks for a wait beyond :data:`LONGEST_WAIT`.
    """
    pauses = iter(PAUSES)
    while True:
        try:
            return send()
        except unreachable as error:
            failure = Busy(type(error).__name__)
        except Busy as busy:
            failure = busy
        pause = next(pauses, None)
        if pause is None or (failure.wait or 0) > LONGEST_WAIT:
            raise ServiceError(
                f"{what} failed ({failure}): check the address and the network, or try again later."
            ) from failure
        time.sleep(pause if failure.wait is None else failure.wait)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds in a ``Retry-After`` header, which holds a number or a date, or None."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    date = parsedate_tz(text)
    return None if date is None else max(0.0, mktime_tz(date) - time.time())
