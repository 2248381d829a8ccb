"""One HTTP exchange: reads a JSON body within its limits, watches for the client's departure, writes JSON.

Knows ASGI and nothing of the API's fields. The watch is one task per request, not per token: it is what turns a
closed connection into an `Abort`, in a stream as well as while a whole answer is being waited for. The same task keeps
the request's deadline.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import msgspec
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope

from ramet.frontend.errors import invalid_json
from ramet.frontend.generation import ClientDisconnectedError, Generation
from ramet.ipc.errors import FailureKind, RequestError, invalid

T = TypeVar("T")

TIMEOUT_HEADER = "x-request-timeout"
# The `server` in the scope of a batch's line: it has the batch's window for its deadline, and if the engine dies under
# it, the batch sends it again, which must know of each death to find the line that kills.
BATCH_SERVER = ("batch", None)


# Of the largest size, so many bodies fit into the room for those on their way. Small ones always do: many clients that
# send slowly must not keep the others out.
_MAX_BODIES, _SMALL_BODY_BYTES = 8, 65_536


class BodyRoom:
    """What all bodies on their way to this server hold."""

    num_bytes = 0


async def read_json(http: Request, schema: type[T], max_bytes: int) -> T:
    """The body, decoded, and left in the scope for the log. Raises `HTTPException` 413 and 415, and `RequestError` for
    JSON that is not of the type."""
    content_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise HTTPException(415, f"content-type must be application/json, got {content_type or 'none'!r}")
    body = await _read_body(http, max_bytes)
    try:
        http.scope["ramet.request"] = request = msgspec.json.decode(body, type=schema)
        return request
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise invalid_json(error) from None


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """Stops reading at a limit, whether the client announced the length or sends chunks."""
    check_head(request, max_bytes)
    body, room = bytearray(), request.scope["ramet.body_room"]
    try:
        async for chunk in request.stream():
            body += chunk
            room.num_bytes += len(chunk)
            if len(body) > max_bytes:
                raise too_large("body", max_bytes, len(body))
            if len(body) > _SMALL_BODY_BYTES and room.num_bytes > (most := _MAX_BODIES * max_bytes):
                raise RequestError(FailureKind.QUEUE_FULL, f"bodies under way: {room.num_bytes} bytes, at most {most}")
        return bytes(body)
    finally:
        room.num_bytes -= len(body)


def check_head(http: Request, max_bytes: int) -> None:
    """Raises `HTTPException` 415 for an encoded body, 413 if it is said to be longer, 411 if nothing tells its end."""
    if (encoding := http.headers.get("content-encoding", "identity")) != "identity":
        raise HTTPException(415, f"a body with content-encoding {encoding!r} is not supported")
    length = http.headers.get("content-length")
    if length is None and "transfer-encoding" not in http.headers:
        raise HTTPException(411, "a body needs a content-length, or to be sent in chunks")
    if length is not None and int(length) > max_bytes:
        raise HTTPException(413, f"the body must be at most {max_bytes} bytes, got {length}")


def too_large(what: str, max_bytes: int, num_bytes: int) -> HTTPException:
    return HTTPException(413, f"the {what} must be at most {max_bytes} bytes, got at least {num_bytes}")


def time_limit(scope: Scope, server_limit_s: float | None) -> float | None:
    """Seconds that the request has from its admission: the server's limit, or less if its header says so. None is no
    limit. Raises `RequestError` for a header that is no such number."""
    if scope["server"] == BATCH_SERVER:
        return None
    given = Headers(scope=scope).get(TIMEOUT_HEADER)
    if given is None:
        return server_limit_s
    try:
        limit_s = float(given)
    except ValueError:
        limit_s = 0.0
    if not 0 < limit_s < float("inf"):
        raise invalid(f"{TIMEOUT_HEADER} must be a number of seconds above 0, got {given!r}", TIMEOUT_HEADER)
    return limit_s if server_limit_s is None else min(limit_s, server_limit_s)


@contextlib.asynccontextmanager
async def watching(scope: Scope, receive: Receive, generation: Generation) -> AsyncIterator[None]:
    """Stops the generation as soon as the client is gone, or its time is up, and aborts what is live of it at the end.
    The body must have been read before."""
    generation.resumes = scope["server"] != BATCH_SERVER
    limit_s: float | None = scope["ramet.limit_s"]

    async def watch() -> None:
        try:
            async with asyncio.timeout(limit_s):
                while (await receive())["type"] != "http.disconnect":
                    continue
        except TimeoutError:
            words = f"the request did not end within its limit of {limit_s:g} seconds"
            generation.stop(RequestError(FailureKind.TIMEOUT, words))
        else:
            generation.stop(ClientDisconnectedError())

    task = asyncio.create_task(watch())
    with generation:
        try:
            yield
        finally:
            task.cancel()


def json_response(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


class NoQuery(msgspec.Struct, forbid_unknown_fields=True):
    """That of most endpoints."""


def read_query(request: Request, kind: type[T]) -> T:
    """The query string as a struct. Raises `RequestError` for what is unknown, out of range or given twice."""
    if len(request.query_params.multi_items()) > len(request.query_params):
        raise invalid(f"a parameter is given more than once: {request.url.query!r}")
    # Azure's clients always send its version of the API, which means nothing here.
    given = {name: value for name, value in request.query_params.items() if name != "api-version"}
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        failure = invalid_json(error).failure
        got = request.query_params.get(failure.param or "")
        raise invalid(f"{failure.message}, got {got!r}", failure.param, failure.code) from None
