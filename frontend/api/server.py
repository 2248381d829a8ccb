"""What is asked of a running server beside its work: what it serves and with which settings, how it is, to drop its
cache, to abort requests.

But for those of the models and the tokenizer, names follow SGLang, whose tools ask for them. Settings come from the
launcher, without keys and passwords.

`/health` is about life: 200 while every process is alive and its loop has turned lately, which is read from their
pulses without asking them; the launcher's too, without which nothing is restarted or stopped in order. `/ready` is
about work: 503 while the engine is down or the server drains. `/health_generate` asks for a token. The TCP port is not
open before the engine is ready, so none answers during the start.
"""

import asyncio
import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

import ramet
from ramet.frontend.api.base import Api
from ramet.frontend.config import FrontendConfig
from ramet.frontend.engine_client import EngineClient
from ramet.frontend.errors import failure_response, no_such_model
from ramet.frontend.metrics import Metrics
from ramet.ipc.errors import Failure, FailureKind, invalid
from ramet.ipc.messages import Completion, Embedding, FlushCache
from ramet.ipc.sampling import SamplingParams
from ramet.ipc.watchdog import Watchdog


class AbortRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`rid` is the one that the request to be aborted gave; several may have given the same."""

    rid: str | None = None
    abort_all: bool | None = None


class Server(Api):
    def __init__(self, config: FrontendConfig, client: EngineClient, metrics: Metrics, watchdog: Watchdog) -> None:
        super().__init__(config, client)
        self._metrics, self._watchdog = metrics, watchdog
        self._created = int(time.time())

    async def models(self, _http: Request) -> dict[str, Any]:
        """One model under each of its served names; its path is accepted as a name too."""
        return {"object": "list", "data": [self._card(name) for name in self._config.served_names]}

    async def model(self, http: Request) -> dict[str, Any]:
        name = http.path_params["model"]
        if not name:
            return await self.models(http)
        if not self._config.serves(name):
            raise no_such_model(name)
        return self._card(name)

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "ramet",
            "root": self._config.model_path,
            "max_model_len": self._config.context_length,
        }

    async def version(self, _http: Request) -> dict[str, Any]:
        return {"version": ramet.__version__}

    async def model_info(self, _http: Request) -> dict[str, Any]:
        config = self._config
        return {
            "model_path": config.model_path,
            "tokenizer_path": config.settings.get("tokenizer_path") or config.model_path,
            "served_model_names": config.served_names,
            "is_generation": not config.is_embedding,
            "preferred_sampling_params": config.default_sampling or None,
            "max_model_len": config.context_length,
            "vocab_size": config.vocab_size,
        }

    async def tokenizer_info(self, _http: Request) -> dict[str, str | None]:
        """vLLM's name, and of what it tells what clients need to tokenize here."""
        return self._config.tokenizer_info

    async def server_info(self, _http: Request) -> dict[str, Any]:
        stats = self._metrics.engine.stats
        names = ("running", "waiting", "pages_total", "pages_free", "pages_cached")
        state = {} if stats is None else {name: getattr(stats, name) for name in names}
        return {
            **self._config.settings,
            "version": ramet.__version__,
            "context_length": self._config.context_length,
            "max_total_num_tokens": self._config.kv_tokens,
            "live_requests": self._client.live,
            "internal_states": [state],
        }

    async def flush_cache(self, _http: Request) -> dict[str, Any]:
        with self._client.ask([FlushCache]) as asked:
            [flushed] = await asked.answers()
        return {"success": True, "pages": flushed.pages}

    async def abort(self, _http: Request, request: AbortRequest) -> dict[str, Any]:
        if not request.rid and not request.abort_all:
            raise invalid("give the rid of the requests to abort, or abort_all", "rid")
        return {"aborted": self._client.abort_named(None if request.abort_all else request.rid)}

    # ---- health -----------------------------------------------------------------------------------------------------

    async def health(self, _http: Request) -> Any:
        return _status(self._client.down or self._stuck())

    async def ready(self, _http: Request) -> Any:
        return _status(self._client.refusal)

    async def health_generate(self, _http: Request) -> Any:
        """Computes one token of a one-token prompt, or its embedding."""
        timeout_s = self._config.watchdog_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._one_token()
        except TimeoutError:
            return _status(Failure(FailureKind.ENGINE_DOWN, f"no token was computed within {timeout_s:g} s"))
        return _status(None)

    async def metrics(self, http: Request) -> Response:
        page, content_type = self._metrics.page(http.headers.get("accept", ""))
        return Response(page, headers={"content-type": content_type})

    def _stuck(self) -> Failure | None:
        stuck = self._watchdog.stuck(self._client.processes)
        words = "; ".join(f"{name} hangs, silent for more than {silent_s:.1f} s" for name, silent_s in stuck.items())
        return Failure(FailureKind.ENGINE_DOWN, words) if stuck else None

    async def _one_token(self) -> None:
        if self._config.is_embedding:
            work = self._client.ask([lambda rid: Embedding(rid, [0])])
        else:
            params = SamplingParams(max_tokens=1, temperature=0.0)
            work = self._client.submit([lambda job: Completion(job, [0])], params, stream=False)
        with work:
            work.resumes = False  # after a restart it would be the answer to another question
            await work.parts()


def _status(failure: Failure | None) -> Any:
    return {"status": "ok"} if failure is None else failure_response(failure)
