"""`/health`, `/ready`, `/health_generate` and `/metrics`.

`/health` is about life: 200 while every process is alive and its loop has turned lately, which is read from their
pulses without asking them; the launcher's too, without which nothing is restarted or stopped in order. `/ready` is
about work: 503 while the engine is down or the server drains. `/health_generate` asks for a token. The TCP port is not
open before the engine is ready, so none answers during the start.
"""

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ramet.frontend.config import FrontendConfig
from ramet.frontend.engine_client import EngineClient
from ramet.frontend.errors import failure_response
from ramet.frontend.metrics import Metrics
from ramet.ipc.errors import Failure, FailureKind
from ramet.ipc.messages import Completion, Embedding
from ramet.ipc.sampling import SamplingParams
from ramet.ipc.watchdog import Watchdog


class Health:
    def __init__(self, config: FrontendConfig, client: EngineClient, metrics: Metrics, watchdog: Watchdog) -> None:
        self._config = config
        self._client = client
        self._metrics = metrics
        self._watchdog = watchdog

    async def health(self, _request: Request) -> Response:
        return _answer(self._client.down or self._stuck())

    async def ready(self, _request: Request) -> Response:
        return _answer(self._client.refusal)

    async def generate(self, _request: Request) -> Response:
        """Computes one token of a one-token prompt, or its embedding."""
        timeout_s = self._config.watchdog_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._one_token()
        except TimeoutError:
            return _answer(Failure(FailureKind.ENGINE_DOWN, f"no token was computed within {timeout_s:g} s"))
        return _answer(None)

    async def metrics(self, request: Request) -> Response:
        page, content_type = self._metrics.page(request.headers.get("accept", ""))
        return Response(page, headers={"content-type": content_type})

    def _stuck(self) -> Failure | None:
        stuck = self._watchdog.stuck(self._client.processes)
        words = "; ".join(f"{name} hangs, silent for more than {silent_s:.1f} s" for name, silent_s in stuck.items())
        return Failure(FailureKind.ENGINE_DOWN, words) if stuck else None

    async def _one_token(self) -> None:
        if self._config.is_embedding:
            await self._client.ask_all([lambda rid: Embedding(rid, [0])], resumes=False)
            return
        params = SamplingParams(max_tokens=1, temperature=0.0)
        with self._client.submit([lambda job: Completion(job, [0])], params, stream=False) as generation:
            generation.resumes = False  # after a restart it would be the answer to another question
            await generation.whole()


def _answer(failure: Failure | None) -> Response:
    return JSONResponse({"status": "ok"}) if failure is None else failure_response(failure)
