"""The frontend process: from a bound port to a drained exit.

1. Bind the port and lock the file store, so that one in use is known before a model is loaded; nothing listens yet.
2. Wait for the launcher's word that the engine is ready, and for the way through it to be free. Then listen, serve,
   and say so.
3. SIGTERM: new requests get 503, and no more lines of batches are sent; what is in flight has `drain_timeout_s` to
   end, the rest fails; exit with 0.

SIGINT is the launcher's to handle: a terminal sends it to every process of the group.
"""

import asyncio
import contextlib
import functools
import logging
import math
import resource
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import uvicorn
import uvloop
from starlette.types import ASGIApp

from ramet.frontend.app import build_app
from ramet.frontend.batch_worker import BatchWorker
from ramet.frontend.config import FrontendConfig
from ramet.frontend.connection import Connection
from ramet.frontend.engine_client import DRAINING, EngineClient
from ramet.frontend.metrics import Metrics
from ramet.frontend.port import bind
from ramet.frontend.store import Store
from ramet.ipc.channel import FRONTEND, Addresses, Inbox
from ramet.ipc.errors import RequestError
from ramet.ipc.messages import ToFrontend
from ramet.ipc.pulse import BEAT_S, Pulse
from ramet.ipc.start import Startup
from ramet.ipc.watchdog import Watchdog

logger = logging.getLogger(__name__)

# Longer than the 5 s for which the usual clients keep a connection: the side that sends must be the one to close.
_KEEP_ALIVE_S = 75
# After the drain: for the last bytes to reach clients that read. The launcher allows 3 s for all that follows it.
_LAST_WRITES_S = 2


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: this module decides when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(config: FrontendConfig, addresses: Addresses) -> None:
    """Serve until SIGTERM. Exits with status 1, after a `Fatal` to the launcher, if the port cannot be had."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("ramet").setLevel(config.log_level.upper())
    startup = Startup(FRONTEND, addresses)
    store = Store(config.file_storage_path, config.max_storage_bytes)
    with contextlib.closing(store), startup.failing_with(RequestError):
        if store.exists:
            store.open()
        _raise_open_files()
        with _listening(startup, config):
            listener = bind(config.host, config.port)
            # Connections inherit it. One whose peer takes nothing for so long is closed by the kernel, which ends its
            # request, and so does one whose peer has vanished with something still to be sent.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(config.client_timeout_s * 1000))
        with listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(config, addresses, store, startup, listener))


def _raise_open_files() -> None:
    """Each connection is an open file, and the usual soft limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _listening(startup: Startup, config: FrontendConfig) -> contextlib.AbstractContextManager[None]:
    return startup.failing_with(OSError, words=f"cannot listen on {config.host}:{config.port}: ")


async def _run(
    config: FrontendConfig, addresses: Addresses, store: Store, startup: Startup, listener: socket.socket
) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    metrics = Metrics(config.metrics_buckets, config.served_names[0])
    client = EngineClient(addresses, config.max_queued_requests, metrics, config.max_queued_tokens)
    inbox: Inbox[ToFrontend] = Inbox(addresses.inbox(FRONTEND), ToFrontend)
    receiving = asyncio.create_task(inbox.deliver(client.dispatch))
    # Only a stop ends by itself; if another does, it is a bug, and the clients get their errors all the same.
    watchdog = Watchdog(addresses, config.watchdog_timeout_s)
    beating = asyncio.create_task(_beat(Pulse(addresses, FRONTEND), watchdog))
    running = {receiving, beating, asyncio.create_task(stop.wait())}
    up = asyncio.create_task(client.up.wait())
    try:
        await asyncio.wait({*running, up}, return_when=asyncio.FIRST_COMPLETED)
        if up.done():
            config = msgspec.structs.replace(config, **client.info)  # the scheduler's limits
            worker = BatchWorker(config, store, client, metrics)
            app = build_app(config, client, metrics, store, worker, watchdog)
            server = _Server(_uvicorn_config(config, app))
            with _listening(startup, config):  # two sockets may be bound to one port as long as neither listens
                listener.listen()
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            batching = asyncio.create_task(worker.run(app))
            startup.ready(port=listener.getsockname()[1])
            await asyncio.wait({*running, serving, batching}, return_when=asyncio.FIRST_COMPLETED)
            worker.stop()  # a batch goes on where it was when the server is started again
            left_s = await _drain(client, 0.0 if receiving.done() else config.drain_timeout_s)
            # Readers that are slow may use up what is left of the time.
            server.config.timeout_graceful_shutdown = max(_LAST_WRITES_S, int(left_s))
            server.should_exit = True
            await asyncio.gather(serving, batching)
        for task in (receiving, beating):
            if task.done():
                task.result()  # which raises
    finally:
        receiving.cancel()
        inbox.close()
        client.close()


async def _beat(pulse: Pulse, watchdog: Watchdog) -> None:
    while True:
        pulse.beat()
        watchdog.stuck(())  # by its looks it knows whether this process ran
        await asyncio.sleep(min(BEAT_S, watchdog.patience_s(())))


async def _drain(client: EngineClient, timeout_s: float) -> float:
    """Let the engine end what it has, fail the rest; the seconds that are left of `timeout_s`."""
    client.drain()
    deadline = time.monotonic() + timeout_s
    while client.live and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    client.fail_all(DRAINING)
    return deadline - time.monotonic()


def _uvicorn_config(config: FrontendConfig, app: ASGIApp) -> uvicorn.Config:
    tls: dict[str, Any] = {}
    if config.tls is not None:
        required = ssl.CERT_REQUIRED if config.tls.ssl_ca_certs else ssl.CERT_NONE
        tls = {**msgspec.structs.asdict(config.tls), "ssl_cert_reqs": required}
    return uvicorn.Config(
        app,
        http=functools.partial(Connection, client_timeout_s=config.client_timeout_s),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        **tls,
    )
