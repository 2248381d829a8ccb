"""Runs batches: checks their input, keeps a window of their lines in the engine, and ends them.

Two loops. The clerk checks new batches and ends those that have stopped; the feeder runs the lines of one batch at a
time, the oldest. A line is sent to the application in this process, as a client would send it, so that checks and
answers are those of the endpoint; only its priority is lower. Results are counted and shown once they are on disk.

Whatever raises, the state on disk stays right, and the loops begin anew from it: a batch whose model is not served
waits, and so does all when the disk is full.
"""

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
from starlette.types import ASGIApp

from ramet.frontend.batch_input import InputCheck
from ramet.frontend.batch_job import INDEX, INPUT, BatchJob, BatchLine
from ramet.frontend.batch_store import Batches
from ramet.frontend.config import FrontendConfig
from ramet.frontend.engine_client import EngineClient
from ramet.frontend.exchange import BATCH_SERVER
from ramet.frontend.metrics import Metrics
from ramet.frontend.schemas.batches import Batch, RequestCounts
from ramet.frontend.store import Store
from ramet.ipc.errors import RequestError

logger = logging.getLogger(__name__)

_FLUSH_S = 0.2
_STEP_LINES = 500
_TROUBLE_S = 10.0
_BACKOFF_S = 1.0
# The clock of the wall may jump, as when the machine sleeps: what expires is late by so much at most.
_IDLE_S = 60.0

# Status, request id and body.
Answer = tuple[int, str, bytes]
Result = tuple[BatchLine, int, str, bytes]
Sending = asyncio.Task[tuple[BatchLine, Answer | None]]


class BatchWorker:
    """`run` it once; `notify` it when a batch or file was made, or a batch cancelled; `stop` it before the drain."""

    def __init__(self, config: FrontendConfig, store: Store, client: EngineClient, metrics: Metrics) -> None:
        self.batches = Batches(store)
        self._config = config
        self._store = store
        self._client = client
        self._metrics = metrics
        self._app: httpx.ASGITransport
        self._clerk, self._feeder = asyncio.Event(), asyncio.Event()
        self._stopping = asyncio.Event()
        self._news = False
        self._active = ""
        self._window = float(config.batch_window)

    async def run(self, app: ASGIApp) -> None:
        """Returns after `stop`, when the lines in the engine have ended."""
        self._app = httpx.ASGITransport(app, raise_app_exceptions=False)
        for batch in await self._unfinished():
            logger.info("batch %s: %s, goes on", batch.id, batch.status)
            if batch.model is not None and not self._config.serves(batch.model):
                logger.warning("batch %s: waits for a server of its model %r", batch.id, batch.model)
        await asyncio.gather(self._loop(self._clerk, self._tidy), self._loop(self._feeder, self._feed))

    def notify(self) -> None:
        self._news = True
        self._clerk.set()
        self._feeder.set()

    def stop(self) -> None:
        """Send no more lines."""
        self._stopping.set()
        self.notify()

    async def _loop(self, woken: asyncio.Event, turn: Callable[[], Awaitable[float]]) -> None:
        """`turn` does what there is to do, and returns after how many seconds there may be more."""
        while not self._stopping.is_set():
            woken.clear()
            try:
                pause_s = await turn()
            except Exception:
                logger.exception("the batches are in trouble; trying again in %g s", _TROUBLE_S)
                pause_s = _TROUBLE_S
            await _wait(woken, pause_s)

    # ---- the clerk --------------------------------------------------------------------------------------------------

    async def _tidy(self) -> float:
        unfinished = await self._unfinished()
        now = time.time()
        for batch in unfinished:
            if batch.status == "validating":
                await self._guarded(batch, self._check)
            elif batch.id != self._active and (batch.status != "in_progress" or batch.expires_at <= now):
                await self._guarded(batch, self._end)
        if not self._store.exists:
            return _IDLE_S
        next_at = await self._store.call(self._store.expire)
        unfinished = await self._unfinished()
        oldest_at = unfinished[0].created_at if unfinished else None
        self._metrics.batches.show(await self._store.call(self.batches.counts), oldest_at)
        deadlines = [batch.expires_at for batch in unfinished if batch.expires_at > now]
        return max(0.1, min([*deadlines, next_at or now + _IDLE_S, now + _IDLE_S]) - now)

    async def _check(self, batch: Batch) -> None:
        folder = self.batches.folder(batch.id)
        check = await self._store.call(InputCheck, folder / INPUT, batch.endpoint, self._config)
        with contextlib.closing(check):
            while not await self._store.call(check.step, _STEP_LINES):
                if self._stopping.is_set():
                    return
            fields: dict[str, Any] = {"errors": {"object": "list", "data": check.errors}}
            if not check.errors:
                await self._store.call(check.write_index, folder / INDEX)
                fields = {"model": check.model, "request_counts": RequestCounts(check.total)}
            end = "failed" if check.errors else "in_progress"
            await self._store.call(self.batches.move, batch.id, "validating", end, **fields)
        self.notify()

    async def _end(self, batch: Batch) -> None:
        folder = self.batches.folder(batch.id)
        if (folder / INDEX).exists():
            job = await self._store.call(BatchJob, folder, batch.id)
            expired = batch.status == "in_progress"
            while expired and await self._store.call(job.expire, _STEP_LINES):
                pass
            await self._store.call(self._close, batch.id, job, in_peace=True)
        await self._store.call(self.batches.publish, batch.id)

    async def _guarded(self, batch: Batch, work: Callable[[Batch], Awaitable[None]]) -> None:
        """A fault that is not the disk's fails this batch, and does not stop those behind it."""
        try:
            await work(batch)
        except (OSError, sqlite3.Error, RequestError):
            raise
        except Exception:
            logger.exception("batch %s: failed", batch.id)
            error = {"code": "internal_error", "message": "internal error", "param": None, "line": None}
            errors = {"object": "list", "data": [error]}
            state = await self._store.call(self.batches.get, batch.id)
            await self._store.call(self.batches.move, batch.id, state.status, "failed", errors=errors)

    async def _unfinished(self) -> list[Batch]:
        return await self._store.call(self.batches.unfinished) if self._store.exists else []

    # ---- the feeder -------------------------------------------------------------------------------------------------

    async def _feed(self) -> float:
        unfinished = await self._unfinished()
        now = time.time()
        for batch in unfinished:
            # The clerk leaves the active batch alone; no waiting between this check and that mark.
            if batch.status == "in_progress" and batch.expires_at > now and self._config.serves(batch.model or ""):
                self._active = batch.id
                try:
                    await self._guarded(batch, self._run)
                finally:
                    self._active = ""
                    self._clerk.set()
                return 0.0
        return _IDLE_S

    async def _run(self, batch: Batch) -> None:
        """Until all lines are settled, or the batch is cancelled or expires, or the server stops."""
        job = await self._store.call(BatchJob, self.batches.folder(batch.id), batch.id)
        tasks: set[Sending] = set()
        results: list[Result] = []
        flushed_at = time.monotonic()
        try:
            while True:
                self._feeder.clear()
                self._take_answers(job, tasks, results)
                if results and (not tasks or time.monotonic() - flushed_at >= _FLUSH_S):
                    await self._flush(batch.id, job, results)
                    flushed_at = time.monotonic()
                if not await self._goes_on(batch):
                    break
                room = int(self._window) - len(tasks)
                if room > 0 and not self._stopping.is_set():
                    for line in await self._store.call(job.take, room):
                        task = asyncio.create_task(self._send(batch.endpoint, line))
                        task.add_done_callback(lambda _: self._feeder.set())
                        tasks.add(task)
                self._metrics.batches.in_flight.set(len(tasks))
                if not tasks and not results:
                    break
                await _wait(self._feeder, _FLUSH_S if results else batch.expires_at - time.time())
        finally:
            self._metrics.batches.in_flight.set(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            try:
                self._take_answers(job, tasks, results)
                await self._flush(batch.id, job, results)
            finally:
                await self._store.call(self._close, batch.id, job, in_peace=self._client.down is None)
        if job.is_done:
            await self._store.call(self.batches.move, batch.id, "in_progress", "finalizing")

    async def _goes_on(self, batch: Batch) -> bool:
        if self._news:
            self._news = False
            batch = await self._store.call(self.batches.get, batch.id)
        return batch.status == "in_progress" and batch.expires_at > time.time()

    def _take_answers(self, job: BatchJob, tasks: set[Sending], results: list[Result]) -> None:
        """Move the lines that have left the engine, but for those to be sent again, from the tasks to the results."""
        for task in [task for task in tasks if task.done()]:
            tasks.remove(task)
            if not task.cancelled():
                line, answer = task.result()
                if answer is not None and (answer[0] < 500 or not job.retry(line)):
                    results.append((line, *answer))

    async def _flush(self, batch_id: str, job: BatchJob, results: list[Result]) -> None:
        # Taken before the write: one that fails may have written some of them, and must not be made again. What is on
        # disk is found out when the job is opened anew.
        ready = results.copy()
        results.clear()

        def save() -> None:
            job.append(ready)
            self._show_counts(batch_id, job)

        await self._store.call(save)

    def _close(self, batch_id: str, job: BatchJob, *, in_peace: bool) -> None:
        job.close(in_peace=in_peace)
        self._show_counts(batch_id, job)

    def _show_counts(self, batch_id: str, job: BatchJob) -> None:
        """In the store's thread. What a killed server had on disk and did not show yet is shown now."""
        before, after = self.batches.get(batch_id).request_counts, job.counts
        if after != before:
            self.batches.set_counts(batch_id, after)
            self._metrics.batches.add_lines(after.completed - before.completed, after.failed - before.failed)

    async def _send(self, endpoint: str, line: BatchLine) -> tuple[BatchLine, Answer | None]:
        """The line with its answer, or None if the server stops first."""
        answer: Answer | None = None
        while not self._stopping.is_set():
            if self._client.refusal is None:
                answer = await self._ask(endpoint, line.body)
                if answer[0] != 429:
                    break
                # Interactive requests have filled the queue: ask for less, and slowly for more.
                answer, self._window = None, max(1.0, self._window / 2)
            await _wait(self._stopping, _BACKOFF_S)
        self._window = min(self._window + 0.1, self._config.batch_window)
        if answer is not None and answer[0] >= 500:
            await _wait(self._stopping, _BACKOFF_S)
            if self._stopping.is_set():
                answer = None
        return line, answer

    async def _ask(self, endpoint: str, body: bytes) -> Answer:
        """Cancelling aborts the request."""
        headers = {"content-type": "application/json"}
        if self._config.api_keys:
            headers["authorization"] = f"Bearer {self._config.api_keys[0]}"
        request = httpx.Request("POST", f"http://{BATCH_SERVER[0]}{endpoint}", headers=headers, content=body)
        response = await self._app.handle_async_request(request)
        return response.status_code, response.headers.get("x-request-id", ""), await response.aread() or b"null"


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    """For the event, at most so long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, timeout_s)):
            await event.wait()
