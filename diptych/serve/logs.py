"""The lines of every process's log: text for people or JSON for machines, with the same facts in both.

A record's facts beside its message are a dict in `extra={"fields": …}`; `about` makes that of a line about a request.
Not responsible for what is worth a line.
"""

import logging
from typing import Any

import msgspec

from diptych.config import LogFormat, LogLevel


def set_up(process: str, style: LogFormat = "text", level: LogLevel = "info") -> None:
    """Make the root logger write to standard error; replaces what was set up before."""
    handler = logging.StreamHandler()
    handler.setFormatter(Json(process) if style == "json" else Lines(process))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for library in ("asyncio", "uvicorn", "httpx"):  # what they find worth saying, short of a warning, is not for users
        logging.getLogger(library).setLevel(max(logging.WARNING, logging.getLogger().level))


def about(request: str, rid: int = -1, **facts: Any) -> dict[str, Any]:
    """The `extra` of a line about a request: what its client knows it by, and which attempt it was."""
    attempt = {"attempt": rid} if rid >= 0 else {}
    return {"fields": {"request": request, **attempt, **facts}}


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


class Lines(logging.Formatter):
    """`time process LEVEL message key=value …`"""

    def __init__(self, process: str):
        super().__init__(f"%(asctime)s {process} %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """One line, without a traceback."""
        facts = "".join(f" {key}={value}" for key, value in _fields(record).items() if value != "")
        return super().formatMessage(record) + facts


class Json(logging.Formatter):
    """One JSON object a line: `time` (seconds since 1970), `process`, `level`, `logger`, `message`, and the facts."""

    def __init__(self, process: str):
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One line, tracebacks included."""
        said = {
            "time": round(record.created, 6),
            "process": self._process,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            said["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(said | _fields(record), enc_hook=str).decode()
