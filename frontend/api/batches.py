"""`/v1/batches`: create, list, retrieve, cancel. The work is the batch worker's; here is only what the client asks."""

from typing import Annotated, Any

import msgspec
from starlette.requests import Request

from ramet.frontend.api.files import page_of
from ramet.frontend.batch_worker import BatchWorker
from ramet.frontend.config import FrontendConfig
from ramet.frontend.schemas.batches import Batch, BatchRequest
from ramet.frontend.store import Store


class BatchListQuery(msgspec.Struct, forbid_unknown_fields=True):
    limit: Annotated[int, msgspec.Meta(ge=1, le=100)] = 20
    after: Annotated[str, msgspec.Meta(pattern="^batch_[0-9a-f]{32}$")] | None = None


class BatchesApi:
    def __init__(self, config: FrontendConfig, store: Store, worker: BatchWorker) -> None:
        self._config = config
        self._store = store
        self._worker = worker
        self._batches = worker.batches

    async def create(self, _http: Request, body: BatchRequest) -> Batch:
        body.check()
        batch = await self._store.call(self._batches.create, body, self._config.completion_window_s)
        self._worker.notify()
        return batch

    async def list(self, _http: Request, query: BatchListQuery) -> dict[str, Any]:
        return page_of(await self._store.call(self._batches.page, query.after, query.limit + 1), query.limit)

    async def retrieve(self, http: Request) -> Batch:
        return await self._store.call(self._batches.get, http.path_params["batch_id"])

    async def cancel(self, http: Request) -> Batch:
        batch = await self._store.call(self._batches.cancel, http.path_params["batch_id"])
        self._worker.notify()
        return batch
