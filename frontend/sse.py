"""Answers a request with a generation: whole, or as server-sent events, one write for all that is new.

Knows nothing of what an answer looks like: a `Rendering` makes it. Whatever goes wrong after the status line is told in
the stream as one error event; the last event is always `[DONE]`.
"""

import logging
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
from starlette.types import Receive, Scope, Send

from ramet.frontend.errors import error_body
from ramet.frontend.exchange import json_response, watching
from ramet.frontend.generation import ClientDisconnectedError, Generation
from ramet.ipc.errors import Failure, FailureKind, RequestError
from ramet.ipc.messages import TextDelta

logger = logging.getLogger(__name__)

_DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Tells nginx not to hold the stream back.
    (b"x-accel-buffering", b"no"),
]


class Rendering(Protocol):
    """One answer in the form of its API; keeps what it must know of each choice."""

    def render(self, index: int, delta: TextDelta) -> bytes:
        """The events of a choice's news; empty if there is nothing to show."""

    def end(self) -> bytes:
        """The events after the last choice has ended."""

    def whole(self, parts: list[list[TextDelta]]) -> Any:
        """The JSON body, from the deltas of each choice."""


async def respond(
    generation: Generation, rendering: Rendering, stream: bool | None, scope: Scope, receive: Receive, send: Send
) -> None:
    """Answer, and abort what still runs if the client leaves or the time is up. The generation stays in the scope for
    the log. Raises what failed before an answer began."""
    scope["ramet.generation"] = generation
    async with watching(scope, receive, generation):
        if stream:
            await generation.started()
            await write_events(send, scope.get("ramet.write"), generation, rendering)
        else:
            response = json_response(rendering.whole(await generation.parts()))
            await response(scope, receive, send)


def event(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


async def write_events(
    send: Send, write: Callable[[bytes], bool] | None, generation: Generation, rendering: Rendering
) -> None:
    """Answer 200 and stream to the end. The generation has started: what fails now can only be told in the stream.
    `write` sends a piece of the body at once (`frontend/connection.py`); without it, each token wakes this task."""

    def pass_on(index: int, delta: TextDelta) -> bool:
        body = rendering.render(index, delta)
        return not body or write is None or write(body)

    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    try:
        while changes := await generation.change(write and pass_on):
            if body := b"".join([rendering.render(index, delta) for index, delta in changes]):
                await send({"type": "http.response.body", "body": body, "more_body": True})
        tail = rendering.end()
    except ClientDisconnectedError:
        return
    except RequestError as error:
        tail = event(error_body(error.failure))
    except Exception:
        logger.exception("a stream broke")
        tail = event(error_body(Failure(FailureKind.INTERNAL, "internal error")))
    await send({"type": "http.response.body", "body": tail + _DONE})
