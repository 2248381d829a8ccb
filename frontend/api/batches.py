"""`/v1/batches`: create, list, retrieve, cancel. The work is the batch worker's; here is only what the client asks."""

from typing import Annotated

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ramet.frontend.api.files import list_response
from ramet.frontend.batch_worker import BatchWorker
from ramet.frontend.config import FrontendConfig
from ramet.frontend.exchange import json_response, read_json, read_query
from ramet.frontend.schemas.batches import BatchRequest
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

    async def create(self, request: Request) -> Response:
        body = await read_json(request, BatchRequest, self._config.max_body_bytes)
        body.check()
        batch = await self._store.call(self._batches.create, body, self._config.completion_window_s)
        self._worker.notify()
        return json_response(batch)

    async def list(self, request: Request) -> Response:
        query = read_query(request, BatchListQuery)
        return list_response(await self._store.call(self._batches.page, query.after, query.limit + 1), query.limit)

    async def retrieve(self, request: Request) -> Response:
        return json_response(await self._store.call(self._batches.get, request.path_params["batch_id"]))

    async def cancel(self, request: Request) -> Response:
        batch = await self._store.call(self._batches.cancel, request.path_params["batch_id"])
        self._worker.notify()
        return json_response(batch)
