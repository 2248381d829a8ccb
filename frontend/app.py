"""The ASGI application: routes, error handlers, and the two layers around them.

Order, from outside: `Envelope` (request id, metrics, log lines), `ApiKeys`, routing. The
layers are plain ASGI: one that owns the response stream would hide the client's disconnect from the endpoints.
"""

import hmac
import logging
import re
import time
import uuid

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ramet.frontend import errors
from ramet.frontend.api.chat import ChatCompletions
from ramet.frontend.api.completions import Completions
from ramet.frontend.api.models import Models
from ramet.frontend.config import FrontendConfig
from ramet.frontend.engine_client import ClientDisconnectedError, EngineClient
from ramet.frontend.health import OPEN_PATHS, Health
from ramet.frontend.metrics import Metrics
from ramet.ipc.errors import RequestError

log = logging.getLogger(__name__)

# A client's own request id comes back in a header and in the log, so it must be short and printable.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,256}")


def build_app(config: FrontendConfig, client: EngineClient, metrics: Metrics) -> ASGIApp:
    models = Models(config)
    health = Health(client, metrics)
    routes = [
        Route("/v1/chat/completions", ChatCompletions(config, client, models), methods=["POST"]),
        Route("/v1/completions", Completions(config, client, models), methods=["POST"]),
        Route("/v1/models", models.list),
        Route("/v1/models/{model:path}", models.retrieve),
        Route("/health", health.health),
        Route("/ready", health.ready),
        Route("/metrics", health.metrics),
    ]
    app: ASGIApp = Starlette(
        routes=routes,
        exception_handlers={
            RequestError: errors.on_request_error,
            errors.ModelNotFoundError: errors.on_model_not_found,
            ClientDisconnectedError: errors.on_disconnect,
            HTTPException: errors.on_http_error,
            Exception: errors.on_bug,
        },
    )
    if config.api_keys:
        app = ApiKeys(app, config.api_keys)
    return Envelope(app, routes, metrics, config.log_requests)


class Envelope:
    """Gives each response its `x-request-id`, counts it, and logs what broke."""

    def __init__(self, app: ASGIApp, routes: list[Route], metrics: Metrics, log_requests: bool) -> None:
        self._app = app
        # Routing leaves the endpoint in the scope; paths that clients make up must not become metric labels.
        self._paths: dict[object, str] = {route.endpoint: route.path for route in routes}
        self._metrics = metrics
        self._log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        started_at = time.monotonic()
        self._metrics.http_in_flight.inc()
        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            # Answered already, by `on_bug` or as far as the response had come; the server closes what is incomplete.
            log.exception("request %s failed", request_id)
        finally:
            self._metrics.http_in_flight.dec()
            route = self._paths.get(scope.get("endpoint"), "unmatched")
            self._metrics.http_requests.labels(route, str(status)).inc()
            if self._log_requests:
                took_s = time.monotonic() - started_at
                log.info("%s %s %d %.3f s id=%s", scope["method"], scope["path"], status, took_s, request_id)


class ApiKeys:
    """Asks for one of the keys, except on the open paths."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in OPEN_PATHS or self._accepts(Headers(scope=scope).get("authorization", "")):
            await self._app(scope, receive, send)
            return
        challenge = HTTPException(401, "missing or wrong API key", {"www-authenticate": "Bearer"})
        response = await errors.on_http_error(Request(scope), challenge)
        await response(scope, receive, send)

    def _accepts(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        given = key.strip().encode("latin-1")
        # Every key is compared in full, so that the time taken tells nothing about them.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(matches)
