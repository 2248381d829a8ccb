"""Server-sent events: writes a generation's changes as they come, one write for all that is new.

Knows nothing of what a chunk holds: an `EventSource` renders it. Whatever goes wrong after the status line is told
in the stream as one error event; the last event is always `[DONE]`.
"""

import logging
from typing import Any, Protocol

import msgspec
from starlette.types import Send

from ramet.frontend.engine_client import ClientDisconnectedError, Generation
from ramet.frontend.errors import error_body
from ramet.ipc.errors import Failure, FailureKind, RequestError
from ramet.ipc.messages import TextDelta

log = logging.getLogger(__name__)

_DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Tells nginx not to hold the stream back.
    (b"x-accel-buffering", b"no"),
]


class EventSource(Protocol):
    """Renders one response's events; keeps what it must know of each choice."""

    def render(self, index: int, delta: TextDelta) -> bytes:
        """The events of a choice's news; empty if there is nothing to show."""

    def end(self) -> bytes:
        """The events after the last choice has ended."""


def event(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


async def write_events(send: Send, generation: Generation, source: EventSource) -> None:
    """Answer 200 and stream to the end. The generation has started: what fails now can only be told in the stream."""
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    try:
        async for changes in generation.changes():
            if body := b"".join([source.render(index, delta) for index, delta in changes]):
                await send({"type": "http.response.body", "body": body, "more_body": True})
        tail = source.end()
    except ClientDisconnectedError:
        return
    except RequestError as error:
        tail = event(error_body(error.failure))
    except Exception:
        log.exception("a stream broke")
        tail = event(error_body(Failure(FailureKind.INTERNAL, "internal error")))
    await send({"type": "http.response.body", "body": tail + _DONE})
