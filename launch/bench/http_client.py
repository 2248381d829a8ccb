"""A small HTTP/1.1 client for one server, on asyncio and httptools.

The pieces of an answer's body go to a callback as soon as they are read, so that a token's time of arrival is taken as
early as this process can. Knows https, chunked bodies, bodies of a given length and those that end with the
connection. No redirects, no proxies, no compression; nothing is sent twice. httpx would take four times as much CPU for
a streamed token, beside the server that is measured.
"""

import asyncio
import ssl
from collections.abc import Callable
from urllib.parse import urlsplit

import httptools

# Called with the status and a piece of the body, in the order they come.
OnBody = Callable[[int, bytes], None]

_READ_BYTES = 1 << 16


class RequestFailed(Exception):
    """A request without a whole answer. `kind` is a few words by which failures are counted."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _Answer:
    """One answer, as httptools tells of it. `status` is 0 until it has begun."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._body = b""
        self._has_length = False
        self.status = 0
        self.is_whole = self.keeps_alive = False

    def feed(self, data: bytes) -> bytes:
        """The part of the body in what was read, which is nothing if the connection has ended. Raises RequestFailed."""
        self._body = b""
        if data:
            self._parser.feed_data(data)
        elif self.status >= 200 and not self._has_length:
            self.is_whole = True
        else:
            place = "in the middle of the answer" if self.status else "before it answered (try --no-keep-alive)"
            raise RequestFailed("connection lost", f"the server closed the connection {place}")
        return self._body

    def on_header(self, name: bytes, _value: bytes) -> None:
        self._has_length |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self.status >= 200:  # 100: it is still to come
            self.is_whole, self.keeps_alive = True, self._parser.should_keep_alive()


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
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._headers = f"Host: {url.netloc.rpartition('@')[2]}\r\nContent-Type: application/json\r\n"
        self._headers += f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._headers += "" if keep_alive else "Connection: close\r\n"

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The bytes of a request, to be sent as often as wanted."""
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    async def send(self, request: bytes, on_body: OnBody) -> int:
        """The status of the answer, whose body went to `on_body`. Raises RequestFailed."""
        answer = _Answer()
        try:
            async with asyncio.timeout(self._timeout_s):
                reader, writer = await self._connection()
                try:
                    writer.write(request)
                    while not answer.is_whole:
                        if body := answer.feed(await reader.read(_READ_BYTES)):
                            on_body(answer.status, body)
                finally:
                    if answer.keeps_alive and self._keep_alive:
                        self._idle.append((reader, writer))
                    else:
                        writer.close()
        except TimeoutError as error:
            raise RequestFailed("timeout", f"no whole answer within {self._timeout_s:g} s") from error
        except OSError as error:
            raise RequestFailed("connection lost", str(error)) from error
        except httptools.HttpParserError as error:
            raise RequestFailed("not HTTP", str(error)) from error
        return answer.status

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        try:
            return await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        except OSError as error:
            raise RequestFailed("no connection", f"cannot connect to {self._host}:{self._port}: {error}") from error
