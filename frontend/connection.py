"""`Connection`: uvicorn's HTTP/1.1 protocol, with limits on what comes before and beside a body.

httptools itself has none: a head may be of any size and take any time. Bodies are limited where they are read
(`frontend/exchange.py`), and how long an answer may stay unread by the socket's own timeout (`frontend/main.py`).

Invariants: of a message no more than `MAX_HEAD_BYTES` and one read are kept beside its body; a connection on which
a message has begun, or none ever, is closed if nothing of it comes for `client_timeout_s`, and a head must have come
within that time.
"""

import asyncio
import functools
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ramet.frontend.errors import http_error

MAX_HEAD_BYTES = 65_536
MAX_HEADERS = 100


class _HeadTooLargeError(Exception):
    pass


def _write(transport: asyncio.Transport, flow: FlowControl, piece: bytes) -> bool:
    """Send a piece of a body in chunks whose head `send` has sent. Does not wait, so no task has to be woken, which
    costs more than the piece. False if `send` would wait now: the next piece should."""
    if not transport.is_closing():
        transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
    return not flow.write_paused


class Connection(HttpToolsProtocol):
    """Leaves `ramet.write` in the scope, which is `_write` to this connection."""

    def __init__(self, *args: Any, client_timeout_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._client_timeout_s = client_timeout_s
        self._timer: asyncio.TimerHandle | None = None
        self._head_bytes = self._num_headers = 0
        self._unparsed_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # The parser gathers a header until it is whole, and skips extensions of chunks without a word.
        self._unparsed_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._decline(data[offer.args[0] :])
        except httptools.HttpParserError as error:  # also of what the methods below raise
            self._refuse(400, f"this is not a request of HTTP/1.1: {error}")
        if self._unparsed_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = self._num_headers = 0
        self._wait()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Also of a trailer, behind a body in chunks."""
        super().on_header(name, value)
        self._num_headers += 1
        self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self.scope["ramet.write"] = functools.partial(_write, self.transport, self.flow)  # type: ignore[typeddict-unknown-key]
        self._wait()

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._unparsed_bytes = 0
        self._wait()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._unparsed_bytes = 0
        self._stop_waiting()

    def _should_upgrade(self) -> bool:
        """Keeps uvicorn from answering before `_decline` has put a message with an offer right."""
        return True

    def _decline(self, rest: bytes) -> None:
        """Read a message again without its offer of another protocol, at which the parser ended it; `rest` is what
        follows its head. Java's client makes such an offer, of HTTP/2, with a body behind it."""
        method, version = self.scope["method"].encode(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            self._refuse(405, "this is not a proxy: CONNECT is not served")
            return
        head = b"".join(b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade")
        self.parser = httptools.HttpRequestParser(self)  # the other one may take the connection for closed
        self.data_received(b"%b %b HTTP/%b\r\n%b\r\n%b" % (method, self.url, version, head, rest))

    def _count(self, num_bytes: int) -> None:
        self._unparsed_bytes = 0
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES or self._num_headers > MAX_HEADERS:
            self._refuse_head()
            raise _HeadTooLargeError

    def _refuse_head(self) -> None:
        self._refuse(
            431,
            f"a request may have {MAX_HEADERS} headers, and {MAX_HEAD_BYTES} bytes of path and headers: got "
            f"{self._num_headers} headers and {max(self._head_bytes, self._unparsed_bytes)} bytes, or more",
        )

    def _refuse(self, status: int, message: str) -> None:
        """Close, with an answer first if one is still owed for what is being read. If the one for what was read before
        it is, that one is the last."""
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if cycle is not None and not cycle.more_body and not cycle.response_complete:
            cycle.keep_alive = False
            return
        if cycle is None or (not cycle.more_body or not cycle.response_started):
            response = http_error(status, message, {"connection": "close"})
            head = b"".join(b"%b: %b\r\n" % header for header in response.raw_headers)
            self.transport.write(b"HTTP/1.1 %d \r\n%b\r\n%b" % (status, head, bytes(response.body)))
        self.transport.close()

    def _wait(self) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(self._client_timeout_s, self._give_up)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _give_up(self) -> None:
        if self.flow.read_paused:  # it is this side that does not read: an answer is under way, or a disk is slow
            self._wait()
        elif self.scope is None:
            self.transport.close()  # it has never said a word
        else:
            self._refuse(408, f"nothing came for {self._client_timeout_s:g} seconds in the middle of the request")
