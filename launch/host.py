"""The engine of the offline API: its processes, and the two threads of the user's process that serve them.

One thread starts the processes and watches them; it lives as long as they do, since the kernel kills processes when the
thread that started them ends. The other runs the event loop of the `EngineClient`, which here sits in the frontend's
place. Both are daemons: else a forgotten `close()` would keep the interpreter from ending. Knows no prompts.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any, TypeVar

from ramet.frontend.engine_client import EngineClient
from ramet.frontend.metrics import Metrics
from ramet.ipc.channel import FRONTEND, Inbox
from ramet.ipc.messages import EngineDown, ToFrontend
from ramet.launch.child import Process
from ramet.launch.config import EngineConfig
from ramet.launch.roles import engine_processes
from ramet.launch.server_args import ServerArgs
from ramet.launch.supervisor import EngineFailed, StopRequested, Supervisor

T = TypeVar("T")

# How long calls that are under way may take to raise when the engine is closed.
_LAST_CALLS_S = 1.0


class EngineHost:
    """Ready when it is made; raises EngineFailed. `client` may be used only in the loop: `submit`, `wait`, `run`."""

    client: EngineClient

    def __init__(self, args: ServerArgs, config: EngineConfig) -> None:
        self._supervisor = Supervisor(args)
        processes = [p for p in engine_processes(config, self._supervisor.addresses) if p.name != FRONTEND]
        self._max_live = config.frontend.max_queued_requests
        self._free = asyncio.Semaphore(self._max_live)
        self._turn = asyncio.Lock()
        self._loop = asyncio.new_event_loop()
        self._lock = threading.RLock()  # the garbage collector may end a stream in the middle of `submit`
        self._closed = False
        self._started: concurrent.futures.Future[None] = concurrent.futures.Future()
        targets = (self._loop.run_forever, functools.partial(self._supervise, processes))
        self._threads = [threading.Thread(target=target, daemon=True, name="ramet-engine") for target in targets]
        for thread in self._threads:
            thread.start()
        try:
            self.wait(self._open())
            self._started.result()
            self.wait(asyncio.wait_for(self.client.up.wait(), args.start_timeout))
        except BaseException:
            self.close()
            raise

    def submit(self, work: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
        with self._lock:
            if not self._closed:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise RuntimeError("the engine is closed")

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = self.submit(work)
        try:
            return future.result()
        finally:
            future.cancel()  # it matters after a Ctrl-C

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(self.submit(work))

    def drop(self, pieces: AsyncGenerator[Any, None]) -> None:
        """End a stream that may have been left in the middle, without waiting: this may be any thread."""
        with contextlib.suppress(RuntimeError):  # closed, and the stream with it
            self.submit(_close(pieces))

    @contextlib.asynccontextmanager
    async def places(self, count: int) -> AsyncIterator[None]:
        """Wait until so many requests more may be in the engine, which may have to be started again. More than there
        are at all go through, to be refused by the client. One caller at a time collects: two that wait for many would
        hold what the other needs."""
        taken = 0
        try:
            async with self._turn:
                while taken < count <= self._max_live:
                    await self._free.acquire()
                    taken += 1
            await self.client.settled.wait()
            yield
        finally:
            for _ in range(taken):
                self._free.release()

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        self._supervisor.request_stop()
        here = threading.current_thread()  # one of them, if the garbage collector happened to run there
        for thread in self._threads:
            if thread is not here:
                thread.join()
        if here not in self._threads:
            with self._lock:  # several may close at the same time
                self._loop.close()

    def _supervise(self, processes: list[Process]) -> None:
        try:
            self._supervisor.start(processes)
            self._started.set_result(None)
            self._supervisor.wait()
        except (EngineFailed, StopRequested, OSError) as error:
            if not self._started.done():
                self._started.set_exception(error)
            # Else processes died too often: the supervisor has told the client.
        finally:
            self._supervisor.stop()
            self._started.cancel()

    async def _open(self) -> None:
        addresses = self._supervisor.addresses
        self._inbox: Inbox[ToFrontend] = Inbox(addresses.inbox(FRONTEND), ToFrontend)
        self.client = EngineClient(addresses, self._max_live, Metrics())
        self._receiving = asyncio.create_task(self._receive())

    async def _receive(self) -> None:
        try:
            await self._inbox.deliver(self.client.dispatch)
        finally:
            self.client.dispatch(EngineDown("it was closed", final=True))

    async def _end(self) -> None:
        try:
            self._receiving.cancel()
            _, left = await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()}, timeout=_LAST_CALLS_S)
            for task in left:
                task.cancel()
            await self._loop.shutdown_asyncgens()
            self._inbox.close()
            self.client.close()
        finally:
            self._loop.stop()


async def _close(pieces: AsyncGenerator[str, None]) -> None:
    await pieces.aclose()
