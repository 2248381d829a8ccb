"""What endpoints have in common: how a body is read, `Api` for those that ask the engine, the head of answers."""

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import Request

from ramet.frontend.config import FrontendConfig
from ramet.frontend.engine_client import EngineClient
from ramet.frontend.errors import no_such_model
from ramet.frontend.exchange import BATCH_SERVER, read_json, time_limit, watching
from ramet.frontend.openapi import Endpoint
from ramet.ipc.errors import invalid
from ramet.ipc.messages import Question

BATCH_PRIORITY = 100
# Of a server that embeds or does not: what it is, and how to get one.
_KINDS = {
    True: ("embeds (--is-embedding, or a model that only embeds)", "embeds: with --is-embedding"),
    False: ("generates text", "generates: without --is-embedding"),
}


async def read_body(http: Request, endpoint: Endpoint, config: FrontendConfig) -> Any:
    """The body as the endpoint's struct, with the time limit in the scope. Raises what `read_json` raises, and
    `RequestError` if this is no server for the endpoint, the body names a model that is not served, or a header a limit
    that is none."""
    assert endpoint.body is not None
    if endpoint.embeds not in (None, config.is_embedding):
        here, wanted = _KINDS[config.is_embedding][0], _KINDS[bool(endpoint.embeds)][1]
        words = f"this server {here}; for {http.url.path}, start one that {wanted}"
        raise invalid(words, code="unsupported_endpoint")
    http.scope["ramet.limit_s"] = time_limit(http.scope, config.request_timeout_s)
    body = await read_json(http, endpoint.body, config.max_body_bytes)
    model = getattr(body, "model", None)
    if model is not None and not config.serves(model):
        raise no_such_model(model)
    return body


class Api:
    """The base of an endpoint, or of several that belong together."""

    def __init__(self, config: FrontendConfig, client: EngineClient) -> None:
        self._config = config
        self._client = client

    def _priority(self, http: Request, given: int | None) -> int:
        """A line of a batch yields to every interactive request that names none."""
        return (given or 0) + (BATCH_PRIORITY if http.scope["server"] == BATCH_SERVER else 0)

    async def _ask(self, http: Request, questions: Sequence[Callable[[str], Question]]) -> list[Any]:
        """The answers, in their order. Raises `RequestError`, also if the time is up, and `ClientDisconnectedError`."""
        asked = self._client.ask(questions)
        async with watching(http.scope, http.receive, asked):
            return await asked.answers()


def head(kind: str, model: str, rid: str | None = None) -> dict[str, Any]:
    """The fields with which an answer, and each chunk of a stream, begins."""
    return {"id": rid or f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
