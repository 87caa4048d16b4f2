"""Logs of the server: a line of JSON each, on standard error, without anybody's text."""

from __future__ import annotations

import json
import logging
import traceback
from datetime import UTC, datetime
from typing import Any


class JSONLines(logging.Formatter):
    """``{"time": ..., "level": ..., "logger": ..., ...}``; a message that is a dictionary is merged into it."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        line |= record.msg if isinstance(record.msg, dict) else {"message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)

    def formatException(self, ei: Any) -> str:
        """Where it was raised, and what; not its message, which may repeat what somebody sent."""
        kind, _, frames = ei
        return "".join(traceback.format_tb(frames)) + getattr(kind, "__name__", "")


CONFIG: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"json": {"()": JSONLines}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
    "root": {"handlers": ["stderr"], "level": "WARNING"},
    "loggers": {"mechreward.server": {"level": "INFO"}, "uvicorn": {"level": "INFO"}},
}
