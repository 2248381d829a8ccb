"""Typed channels between processes: msgpack over ZeroMQ, `ipc://` sockets in a private folder.

The only module that imports zmq. Each process has one inbox, named by its address; whoever knows the address may
write to it. Never pickle: a message that does not decode to the inbox's union is logged and dropped. Between the
tensor-parallel ranks of several machines it is `tcp://` with CURVE (encrypted, both ends authenticated), whose keys are
made from a secret that the machines share.

Queues inside ZeroMQ are unbounded on purpose: load is bounded where requests are admitted (frontend), and a sender
that blocks on a peer that died would hang.
"""

import asyncio
import hashlib
import logging
import os
import select
import time
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from ramet.ipc.messages import Message

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=Message)

# Names of processes. Beside the first, ranks are `scheduler-1` and so on.
LAUNCHER, FRONTEND, SCHEDULER, DETOKENIZER = "launcher", "frontend", "scheduler-0", "detokenizer"
TOKENIZER = "tokenizer-{}"

# A Unix socket's path is limited by the kernel (sockaddr_un) to 108 bytes with the final NUL.
MAX_SOCKET_PATH = 107
_LINGER_MS = 300
# A machine that is gone closes no connection: after so long without a sign of life it counts as closed.
_HEARTBEAT_MS, _SILENCE_MS = 2_000, 10_000
_REFUSALS = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


class ChannelError(Exception):
    """An address that cannot be bound, or does not accept this process; the message is for the user."""


class PeerLost(Exception):
    """The other end of a rank's channel is gone; the message is for the user."""


class Addresses(msgspec.Struct, frozen=True):
    """Where each process listens. Made once by the launcher; `folder` has mode 0700."""

    folder: str
    tokenizers: int = 1

    def inbox(self, process: str) -> str:
        """Of the process of this name."""
        return f"{self.folder}/{process}"

    @property
    def ranks(self) -> str:
        return f"ipc://{self.folder}/ranks"

    def pulse(self, process: str) -> str:
        """The file of `ipc/pulse.py` for a process of this name."""
        return f"{self.folder}/{process}.pulse"


class Inbox(Generic[T]):
    """The receiving end of a channel. `union` is the type of its messages. A process with a loop of its own calls
    `receive`; one that lives in asyncio awaits `deliver`."""

    def __init__(self, address: str, union: object) -> None:
        self._socket = _bind(address)
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)
        self._timeout_ms = -1  # as the socket has it
        # Once the socket was found empty, its descriptor tells of what comes, at a fifth of the price of trying again.
        self._signal = select.poll()
        self._signal.register(self._socket.fileno(), select.POLLIN)
        self._was_empty = False

    def receive(self, timeout_s: float | None) -> T | None:
        """The next message; None if none came within `timeout_s` (0: only what is there; None: wait for ever)."""
        timeout_ms = -1 if timeout_s is None else int(timeout_s * 1000)
        if timeout_ms == 0 and self._was_empty and not self._signal.poll(0):
            return None
        if timeout_ms != self._timeout_ms:  # a poll before each `recv` would cost more than the message
            self._socket.setsockopt(zmq.RCVTIMEO, timeout_ms)
            self._timeout_ms = timeout_ms
        try:
            while (message := _decode(self._decoder, self._socket.recv())) is None:
                pass  # dropped
        except zmq.Again:
            message = None
        self._was_empty = message is None
        return message

    async def deliver(self, handle: Callable[[T], None]) -> None:
        """Give each message to `handle` as it comes, for ever. Raises what that raises.

        The loop watches the socket's descriptor all the while: `zmq.asyncio`, and a task that waits anew for each
        message, cost several callbacks and system calls."""
        loop, descriptor = asyncio.get_running_loop(), self._socket.fileno()  # `close` may come before a cancellation
        broken: asyncio.Future[None] = loop.create_future()

        def drain() -> None:
            try:
                # To the end: the descriptor tells of what comes to an empty socket, not of what is there. An exception
                # for an empty one would cost more than the question.
                while not broken.done() and int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                    if (message := _decode(self._decoder, self._socket.recv())) is not None:
                        handle(message)
            except Exception as error:  # noqa: BLE001 - it goes on where this is awaited
                broken.set_exception(error)

        loop.add_reader(descriptor, drain)
        try:
            drain()
            await broken
        finally:
            loop.remove_reader(descriptor)

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


class RankServer(Generic[T]):
    """Rank 0's end of the channel to the other ranks. `address` is a ZeroMQ one; with a secret, only ranks that have
    the same can connect. `union` is the type of what they say. Raises ChannelError if it cannot listen there."""

    def __init__(self, address: str, secret: str, union: object) -> None:
        context: zmq.Context[Any] = zmq.Context.instance()
        self._socket = context.socket(zmq.ROUTER)
        _set_up(self._socket, secret)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to a peer that has left is an error
        self._gate: ThreadAuthenticator | None = None
        if secret:
            self._socket.curve_server = True
            self._socket.curve_publickey, self._socket.curve_secretkey = _keys(secret, b"ramet rank 0")
            self._gate = ThreadAuthenticator(context)
            self._gate.start()
            known, _ = _keys(secret, b"ramet rank")
            lets_in = types.SimpleNamespace(callback=lambda _domain, key: key == known)
            self._gate.configure_curve_callback(credentials_provider=lets_in)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise ChannelError(f"cannot listen on {address} for the other ranks: {error}") from error
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)
        self._encoder = msgspec.msgpack.Encoder()

    def receive(self, deadline: float) -> tuple[bytes, T] | None:
        """Who has connected, by a name that `send` takes, and what it says; None if nobody does before the deadline (of
        `time.monotonic`)."""
        while self._socket.poll(int(max(0.0, deadline - time.monotonic()) * 1000)):
            peer, data = self._socket.recv_multipart()
            if (message := _decode(self._decoder, data)) is not None:
                return peer, message
        return None

    def send(self, peers: Iterable[bytes], message: Message) -> None:
        """Raises PeerLost. Never blocks."""
        data = self._encoder.encode(message)
        for peer in peers:
            try:
                self._socket.send_multipart([peer, data])
            except zmq.ZMQError as error:
                raise PeerLost(f"a tensor-parallel rank is gone: {error}") from error

    def close(self) -> None:
        self._socket.close()
        if self._gate is not None:
            self._gate.stop()


class RankClient(Generic[T]):
    """Another rank's end. It tries to connect until it can; a connection that is lost is not made again."""

    def __init__(self, address: str, secret: str, union: object) -> None:
        self._address = address
        context: zmq.Context[Any] = zmq.Context.instance()
        self._socket = context.socket(zmq.DEALER)
        _set_up(self._socket, secret)
        if secret:
            self._socket.curve_serverkey, _ = _keys(secret, b"ramet rank 0")
            self._socket.curve_publickey, self._socket.curve_secretkey = _keys(secret, b"ramet rank")
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | _REFUSALS)
        self._socket.connect(address)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)

    def send(self, message: Message) -> None:
        self._socket.send(msgspec.msgpack.encode(message))

    def receive(self, timeout_s: float | None = None) -> T | None:
        """The next message; None if none came within `timeout_s` (None: wait for ever). Raises PeerLost, also for a
        message that does not decode, and ChannelError if rank 0 does not let this one in."""
        ready = dict(self._poller.poll(None if timeout_s is None else int(max(0.0, timeout_s) * 1000)))
        if not ready:
            return None
        if self._socket in ready:  # what came before the connection was lost still counts
            try:
                return self._decoder.decode(self._socket.recv())
            except msgspec.MsgspecError as error:
                raise PeerLost(f"rank 0 at {self._address} sent what cannot be read: {error}") from error
        if recv_monitor_message(self._monitor)["event"] & _REFUSALS:
            raise ChannelError(
                f"rank 0 at {self._address} does not accept this rank: is the secret the same on both machines?"
            )
        raise PeerLost(f"rank 0 at {self._address} is gone")

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()


def _keys(secret: str, role: bytes) -> tuple[bytes, bytes]:
    """The public and the private CURVE key of a role. scrypt (RFC 7914) makes guessing a weak secret slow."""
    private = z85.encode(hashlib.scrypt(secret.encode(), salt=role, n=2**14, r=8, p=1, dklen=32))
    return zmq.curve_public(private), private


def _set_up(socket: Any, secret: str) -> None:
    socket.set_hwm(0)
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket.setsockopt(zmq.IPV6, 1)
    if secret:  # on one machine a silent process has been stopped for a while, and the launcher watches it
        socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _SILENCE_MS)


def _bind(address: str) -> "zmq.Socket[bytes]":
    if len(os.fsencode(address)) > MAX_SOCKET_PATH:
        raise ChannelError(f"socket path {address!r} is longer than the {MAX_SOCKET_PATH} bytes a Unix socket allows")
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
    socket.set_hwm(0)
    Path(address).unlink(missing_ok=True)
    socket.bind(f"ipc://{address}")
    return socket


def _decode(decoder: "msgspec.msgpack.Decoder[T]", data: bytes) -> T | None:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError) as error:
        logger.error("dropped a message of %d bytes that is not of the expected type: %s", len(data), error)
        return None
