"""One HTTP exchange: reads a JSON body within its limits, watches for the client's departure, writes JSON.

Knows ASGI and nothing of the API's fields. The watch is one task per request, not per token: it is what turns a
closed connection into an `Abort`, in a stream as well as while a whole answer is being waited for.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ramet.frontend.engine_client import ClientDisconnectedError
from ramet.frontend.errors import invalid_json
from ramet.ipc.errors import invalid

T = TypeVar("T")


async def read_json(scope: Scope, receive: Receive, decoder: "msgspec.json.Decoder[T]", max_bytes: int) -> T:
    """The body, decoded, and left in the scope for the log. Raises `HTTPException` 413 and 415, and `RequestError` for
    JSON that is not of the type."""
    headers = Headers(scope=scope)
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise HTTPException(415, f"content-type must be application/json, got {content_type or 'none'!r}")
    if (encoding := headers.get("content-encoding", "identity")) != "identity":
        raise HTTPException(415, f"a body with content-encoding {encoding!r} is not supported")
    body = await _read_body(headers, receive, max_bytes)
    try:
        scope["ramet.request"] = request = decoder.decode(body)
        return request
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise invalid_json(error) from None


async def _read_body(headers: Headers, receive: Receive, max_bytes: int) -> bytes:
    """Stops reading at the limit, whether the client announced the length or sends chunks."""
    if int(headers.get("content-length", "0")) > max_bytes:
        raise _too_large(max_bytes, headers["content-length"])
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > max_bytes:
            raise _too_large(max_bytes, f"at least {size}")
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large(max_bytes: int, size: str) -> HTTPException:
    return HTTPException(413, f"the body must be at most {max_bytes} bytes, got {size}")


class _Cancellable(Protocol):
    def cancel(self) -> object: ...


@contextlib.asynccontextmanager
async def watching(receive: Receive, work: _Cancellable) -> AsyncIterator[None]:
    """Cancels the work (a generation, a task) as soon as the client is gone. The body must have been read before."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        work.cancel()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. As soon as the client is gone, cancels it and raises `ClientDisconnectedError`."""
    task = asyncio.ensure_future(work)
    async with watching(receive, task):
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            raise ClientDisconnectedError from None


def json_response(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


async def send_json(send: Send, value: Any) -> None:
    body = msgspec.json.encode(value)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def read_query(request: Request, kind: type[T]) -> T:
    """The query string as a struct. Raises `RequestError` for what is unknown or out of range."""
    try:
        return msgspec.convert(dict(request.query_params), kind, strict=False)
    except msgspec.ValidationError as error:
        failure = invalid_json(error).failure
        got = request.query_params.get(failure.param or "")
        raise invalid(f"{failure.message}, got {got!r}", failure.param, failure.code) from None
