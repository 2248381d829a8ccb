"""What becomes of a request once it has ended: a line of the log, at the level that the operator asked for.

`RequestRecord` is what an HTTP exchange leaves behind for observers such as this and `frontend/tracing.py`; endpoints
put the decoded body and the generation, or the usage, into the scope. Headers are never shown, so no key is; prompts
and answers only at level `content`.
"""

import logging
from typing import Any

import msgspec
from starlette.types import Scope

from ramet.frontend.config import RequestLogLevel
from ramet.frontend.generation import Generation

logger = logging.getLogger(__name__)

# Fields of request bodies, of any endpoint, that are what the user says and not how it is answered.
CONTENT = {
    *("messages", "prompt", "suffix", "prediction", "text", "input_ids", "input_embeds", "image_data", "tokens"),
    *("input", "text_1", "text_2", "query", "documents"),
}
# Of an answer's body, no more bytes are kept and shown.
_MAX_BODY_BYTES = 65_536


class RequestRecord(msgspec.Struct):
    """Times are of `time.monotonic`, in seconds; `status` is 0 if the client left before there was one. `body`: what
    was sent, if it is wanted."""

    scope: Scope
    request_id: str
    began_at: float
    ended_at: float = 0.0
    route: str = "unmatched"
    status: int = 0
    body: bytes = b""

    @property
    def generation(self) -> Generation | None:
        """None if nothing was generated."""
        generation: Generation | None = self.scope.get("ramet.generation")
        return generation

    def usage(self) -> dict[str, int]:
        """Tokens of all prompts and choices, or of what was embedded; empty if nothing was computed."""
        embedded: dict[str, int] = self.scope.get("ramet.usage", {})
        return self.generation.usage() if self.generation is not None else embedded


class RequestLog:
    def __init__(self, level: RequestLogLevel) -> None:
        self._level = level
        self.kept_bytes = _MAX_BODY_BYTES if level == "content" else 0

    def __call__(self, record: RequestRecord) -> None:
        if self._level == "off":
            return
        fields: dict[str, Any] = {
            "id": record.request_id,
            "method": record.scope["method"],
            "route": record.route,
            "status": record.status,
            "seconds": round(record.ended_at - record.began_at, 4),
        }
        fields |= record.usage()
        choices = record.generation.records if record.generation is not None else []
        if begun := [it for it in choices if it.first_at]:
            fields["choices"] = len(choices)
            fields["queue_seconds"] = round(max(it.scheduled_at - it.tokenized_at for it in begun), 4)
            fields["first_token_seconds"] = round(min(it.first_at - it.submitted_at for it in begun), 4)
        if self._level != "summary" and (request := record.scope.get("ramet.request")) is not None:
            given = _present(msgspec.to_builtins(request))
            hidden = () if self._level == "content" else CONTENT
            fields["request"] = {name: value for name, value in given.items() if name not in hidden}
        if record.body:
            fields["response"] = record.body[:_MAX_BODY_BYTES].decode(errors="replace")
        logger.info("request", extra={"fields": fields})


def _present(value: Any) -> Any:
    """The value without what is null, which in a request is the same as absent."""
    if isinstance(value, dict):
        return {name: _present(item) for name, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value
