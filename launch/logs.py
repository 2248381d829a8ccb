"""One log format for every process, on stderr: lines of text (`time level process message`) or of JSON.

What a line says besides its words, such as a request's counts, is in `fields` of the record's `extra`: text shows them
as `name=value` after the words, JSON as members of the object.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]

# Libraries that log each request, each file or each lock; only what they warn of is of interest.
_CHATTY = ("httpx", "httpcore", "urllib3", "filelock", "huggingface_hub", "transformers", "asyncio", "uvicorn.access")


class _Text(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s.%(msecs)03d %(levelname)-7s {process:<12} %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        for name, value in getattr(record, "fields", {}).items():
            # What a client sent must not look like another field or line.
            plain = isinstance(value, str) and value.isascii() and value.isprintable() and " " not in value
            line += f" {name}={value if plain else json.dumps(value, default=str)}"
        return line


class _Json(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up_logging(process: str, level: str, form: LogFormat = "text") -> None:
    """Send all records of this process from `level` up to stderr. Call once, before anything logs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(process) if form == "json" else _Text(process))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    # It warns of each malformed upload, which is answered 400, without saying whose it is.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    logging.captureWarnings(True)
