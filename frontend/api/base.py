"""`Api`: what the endpoints with a JSON body have in common, and the head of their answers."""

import time
import uuid
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Scope

from ramet.frontend.config import FrontendConfig
from ramet.frontend.engine_client import EngineClient
from ramet.frontend.errors import no_such_model
from ramet.frontend.exchange import BATCH_SERVER, read_json, time_limit

T = TypeVar("T")

BATCH_PRIORITY = 100


class Api:
    """The base of an endpoint, or of several that belong together."""

    def __init__(self, config: FrontendConfig, client: EngineClient) -> None:
        self._config = config
        self._client = client

    async def _read(self, http: Request, schema: type[T]) -> T:
        """The body. Raises what `read_json` raises, and `RequestError` if it names a model not served here."""
        request = await read_json(http, schema, self._config.max_body_bytes)
        model = getattr(request, "model", None)
        if model is not None and not self._config.serves(model):
            raise no_such_model(model)
        return request

    def _priority(self, scope: Scope, given: int | None) -> int:
        """A line of a batch yields to every interactive request that names none."""
        return (given or 0) + (BATCH_PRIORITY if scope["server"] == BATCH_SERVER else 0)

    def _limit_s(self, scope: Scope) -> float | None:
        """Seconds that the request has. Raises `RequestError` if its header says no number."""
        return time_limit(scope, self._config.request_timeout_s)


def head(kind: str, model: str, rid: str | None = None) -> dict[str, Any]:
    """The fields with which an answer, and each chunk of a stream, begins."""
    return {"id": rid or f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
