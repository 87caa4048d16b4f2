"""Refused: a request that gets an error's answer."""

from __future__ import annotations

from fastapi import HTTPException
from fastapi.responses import JSONResponse

RESTART = 5
"""Seconds after which to ask again where the worker has to be started anew."""


class Refused(HTTPException):
    """A request that gets an error's answer.

    Args:
        status: HTTP status.
        detail: One sentence.
        wait: Seconds after which to try again, if that may help.
    """

    def __init__(self, status: int, detail: str, wait: float | None = None):
        headers = {} if wait is None else {"Retry-After": str(max(1, round(wait)))}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if status == 408:  # or the rest of the body would keep the connection
            headers["Connection"] = "close"
        super().__init__(status, detail, headers)

    @property
    def response(self) -> JSONResponse:
        """As it is sent."""
        return JSONResponse({"detail": self.detail}, self.status_code, self.headers)
