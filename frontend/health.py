"""`/health`, `/ready` and `/metrics`: open to any caller, and answered without a request to the engine.

`/health` is about life: 200 until a process of the engine has died. `/ready` is about work: 503 also while the server
drains. The TCP port is not open before the engine is ready, so neither answers during the start.
"""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ramet.frontend.engine_client import EngineClient
from ramet.frontend.errors import failure_response
from ramet.frontend.metrics import Metrics
from ramet.ipc.errors import Failure


class Health:
    def __init__(self, client: EngineClient, metrics: Metrics) -> None:
        self._client = client
        self._metrics = metrics

    async def health(self, _request: Request) -> Response:
        return _answer(self._client.down)

    async def ready(self, _request: Request) -> Response:
        return _answer(self._client.refusal)

    async def metrics(self, request: Request) -> Response:
        page, content_type = self._metrics.page(request.headers.get("accept", ""))
        return Response(page, headers={"content-type": content_type})


def _answer(failure: Failure | None) -> Response:
    return JSONResponse({"status": "ok"}) if failure is None else failure_response(failure)
