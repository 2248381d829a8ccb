"""Typed one-way channels between processes: msgpack over ZeroMQ `ipc://` sockets in a private folder.

The only module that imports zmq. Each process has one inbox, named by its address; whoever knows the address may
write to it. Never pickle: a message that does not decode to the inbox's union is logged and dropped.

Queues inside ZeroMQ are unbounded on purpose: load is bounded where requests are admitted (frontend), and a sender
that blocks on a peer that died would hang.
"""

import logging
import os
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import zmq
import zmq.asyncio

from ramet.ipc.messages import Message

log = logging.getLogger(__name__)

T = TypeVar("T", bound=Message)

# A Unix socket's path is limited by the kernel (sockaddr_un) to 108 bytes with the final NUL.
MAX_SOCKET_PATH = 107
_LINGER_MS = 300


class ChannelError(Exception):
    """An address that cannot be bound."""


class Addresses(msgspec.Struct, frozen=True):
    """Where each process listens. Made once by the launcher; `folder` has mode 0700."""

    folder: str
    tokenizers: int = 1

    def tokenizer(self, index: int) -> str:
        return f"{self.folder}/tokenizer-{index}"

    @property
    def scheduler(self) -> str:
        return f"{self.folder}/scheduler"

    @property
    def detokenizer(self) -> str:
        return f"{self.folder}/detokenizer"

    @property
    def frontend(self) -> str:
        return f"{self.folder}/frontend"

    @property
    def launcher(self) -> str:
        return f"{self.folder}/launcher"

    def pulse(self, process: str) -> str:
        """The file of `ipc/pulse.py` for a process of this name."""
        return f"{self.folder}/{process}.pulse"


class Inbox(Generic[T]):
    """The receiving end of a channel, for a process with a loop of its own. `union` is the type of its messages."""

    def __init__(self, address: str, union: object) -> None:
        self._socket = _bind(zmq.Context.instance(), address)
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)

    def receive(self, timeout_s: float | None) -> T | None:
        """The next message; None if none came within `timeout_s` (0: only what is there; None: wait for ever)."""
        timeout_ms = None if timeout_s is None else int(timeout_s * 1000)
        while self._socket.poll(timeout_ms):
            if (message := _decode(self._decoder, self._socket.recv())) is not None:
                return message
        return None

    def close(self) -> None:
        self._socket.close(linger=0)


class AsyncInbox(Generic[T]):
    """The receiving end of a channel inside an asyncio loop."""

    def __init__(self, address: str, union: object) -> None:
        self._socket = _bind(zmq.asyncio.Context.instance(), address)
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)

    async def receive(self) -> T:
        while (message := _decode(self._decoder, await self._socket.recv())) is None:
            pass  # dropped
        return message

    def close(self) -> None:
        self._socket.close(linger=0)


class Outbox:
    """The sending end of a channel. Never blocks: what the peer has not read yet waits in memory."""

    def __init__(self, address: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.connect(f"ipc://{address}")
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: Message) -> None:
        self._socket.send(self._encoder.encode(message))

    def close(self) -> None:
        """Closes after at most `_LINGER_MS` for what is still unsent."""
        self._socket.close()


def _bind(context: "zmq.Context[Any]", address: str) -> Any:
    if len(os.fsencode(address)) > MAX_SOCKET_PATH:
        raise ChannelError(f"socket path {address!r} is longer than the {MAX_SOCKET_PATH} bytes a Unix socket allows")
    socket = context.socket(zmq.PULL)
    socket.set_hwm(0)
    Path(address).unlink(missing_ok=True)
    socket.bind(f"ipc://{address}")
    return socket


def _decode(decoder: "msgspec.msgpack.Decoder[T]", data: bytes) -> T | None:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError) as error:
        log.error("dropped a message of %d bytes that is not of the expected type: %s", len(data), error)
        return None


__all__ = ["Addresses", "AsyncInbox", "ChannelError", "Inbox", "Outbox"]
