"""A small HTTP/1.1 client for one server, on asyncio and httptools.

The pieces of an answer's body go to a callback straight from the socket, so that a token's time of arrival is taken as
early as this process can. Knows https, chunked bodies, bodies of a given length and those that end with the
connection. No redirects, no proxies, no compression; nothing is sent twice.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

import httptools

# Called with the status and a piece of the body, in the order they come.
OnBody = Callable[[int, bytes], None]


class RequestFailed(Exception):
    """A request without a whole answer. `kind` is a few words by which failures are counted."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Connection(asyncio.Protocol):
    """One request at a time. `is_open` says whether another may follow."""

    is_open = False
    _answer: asyncio.Future[int] | None = None
    _status = 0

    async def exchange(self, request: bytes, on_body: OnBody) -> int:
        """Send, and return the status once the answer is whole. Raises RequestFailed."""
        self._parser = httptools.HttpResponseParser(self)
        self._on_body, self._status, self._has_length = on_body, 0, False
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._answer
        finally:
            self._answer = None

    def close(self) -> None:
        self.is_open = False
        self._transport.close()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self.is_open = cast(asyncio.Transport, transport), True  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        if self._answer is None:  # nobody asked
            return self.close()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            cause = error.__context__  # what a callback raised
            self._fail(cause if isinstance(cause, RequestFailed) else RequestFailed("not HTTP", str(error)))

    def connection_lost(self, error: Exception | None) -> None:
        if self._status and not self._has_length and error is None:
            self.on_message_complete()
        place = "in the middle of the answer" if self._status else "before it answered (try --no-keep-alive)"
        self._fail(RequestFailed("connection lost", f"the server closed the connection {place}"))

    # What httptools calls.

    def on_header(self, name: bytes, _value: bytes) -> None:
        self._has_length |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._on_body(self._status, body)

    def on_message_complete(self) -> None:
        if self._status >= 200 and self._answer is not None and not self._answer.done():  # 100: it is still to come
            self.is_open = self.is_open and self._parser.should_keep_alive()
            self._answer.set_result(self._status)

    def _fail(self, error: RequestFailed) -> None:
        self.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


class Client:
    """`base_url` without a path means `/v1`. Raises ValueError for what is not the URL of a server."""

    def __init__(self, base_url: str, api_key: str | None, keep_alive: bool, timeout_s: float) -> None:
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"base_url {base_url!r} is not of the form http://HOST:PORT or https://HOST/PATH")
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        self._host, self._port = url.hostname, url.port or (443 if self._tls else 80)
        self._path = url.path.rstrip("/") or "/v1"
        self._keep_alive, self._timeout_s = keep_alive, timeout_s
        self._idle: list[Connection] = []
        self._headers = f"Host: {url.netloc.rpartition('@')[2]}\r\nContent-Type: application/json\r\n"
        self._headers += f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._headers += "" if keep_alive else "Connection: close\r\n"

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The bytes of a request, to be sent as often as wanted."""
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    async def send(self, request: bytes, on_body: OnBody) -> int:
        """The status of the answer, whose body went to `on_body`. Raises RequestFailed."""
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._connection()
                try:
                    status = await connection.exchange(request, on_body)
                except BaseException:
                    connection.close()
                    raise
        except TimeoutError as error:
            raise RequestFailed("timeout", f"no whole answer within {self._timeout_s:g} s") from error
        if self._keep_alive and connection.is_open:
            self._idle.append(connection)
        else:
            connection.close()
        return status

    def close(self) -> None:
        for connection in self._idle:
            connection.close()

    async def _connection(self) -> Connection:
        while self._idle:
            if (connection := self._idle.pop()).is_open:
                return connection
        loop = asyncio.get_running_loop()
        try:
            return (await loop.create_connection(Connection, self._host, self._port, ssl=self._tls))[1]
        except OSError as error:
            raise RequestFailed("no connection", f"cannot connect to {self._host}:{self._port}: {error}") from error
