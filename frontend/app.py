"""The ASGI application: the table of routes, error handlers, and the layers around them.

Order, from outside: `Envelope` (request id, metrics, log lines), CORS (a preflight has no key), `ApiKeys`, routing. The
layers are plain ASGI: one that owns the response stream would hide the client's disconnect from the endpoints.
"""

import functools
import hmac
import logging
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import ramet
from ramet.frontend import errors
from ramet.frontend.api.base import read_body
from ramet.frontend.api.batches import BatchesApi, BatchListQuery
from ramet.frontend.api.chat import ChatCompletions
from ramet.frontend.api.completions import Completions
from ramet.frontend.api.embeddings import Embeddings
from ramet.frontend.api.files import BINARY, FORM, FileListQuery, Files, UploadForm
from ramet.frontend.api.generate import NativeGenerate
from ramet.frontend.api.server import AbortRequest, Server
from ramet.frontend.api.tokenize import Tokens
from ramet.frontend.batch_worker import BatchWorker
from ramet.frontend.config import FrontendConfig
from ramet.frontend.engine_client import EngineClient
from ramet.frontend.exchange import BodyRoom, NoQuery, json_response, read_query
from ramet.frontend.generation import ClientDisconnectedError
from ramet.frontend.metrics import Metrics
from ramet.frontend.openapi import JSON, Endpoint, document
from ramet.frontend.request_log import RequestLog, RequestRecord
from ramet.frontend.schemas.batches import Batch, BatchRequest
from ramet.frontend.schemas.chat import ChatRequest
from ramet.frontend.schemas.completions import CompletionRequest
from ramet.frontend.schemas.embeddings import EmbeddingRequest, RerankRequest, ScoreRequest
from ramet.frontend.schemas.generate import GenerateRequest
from ramet.frontend.schemas.tokenize import DetokenizeRequest, TokenizeRequest
from ramet.frontend.store import File, Store
from ramet.frontend.tracing import Tracer
from ramet.ipc.errors import RequestError
from ramet.ipc.watchdog import Watchdog

logger = logging.getLogger(__name__)

# A client's own request id comes back in a header and in the log, so it must be short and printable.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,256}")


def build_app(
    config: FrontendConfig,
    client: EngineClient,
    metrics: Metrics,
    store: Store,
    worker: BatchWorker,
    watchdog: Watchdog,
) -> ASGIApp:
    table = endpoints(config, client, store, worker, Server(config, client, metrics, watchdog))
    by_path: dict[str, dict[str, Endpoint]] = {}
    for row in table:
        for path in row.paths:
            by_path.setdefault(path, {}).update(dict.fromkeys(row.methods, row))
    # One route for each path: of several, a 405 would name only the first one's methods.
    routes = [
        Route(path, functools.partial(_handle, found, config), methods=list(found)) for path, found in by_path.items()
    ]
    app: ASGIApp = Starlette(
        routes=routes,
        exception_handlers={
            RequestError: errors.on_request_error,
            ClientDisconnect: errors.on_disconnect,
            ClientDisconnectedError: errors.on_disconnect,
            HTTPException: errors.on_http_error,
            Exception: errors.on_bug,
        },
    )
    if config.api_keys:
        app = ApiKeys(app, config.api_keys, frozenset(path for row in table if row.open for path in row.paths))
    if config.cors_allow_origins:
        app = CORSMiddleware(
            app,
            allow_origins=config.cors_allow_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return Envelope(app, routes, metrics, config)


async def _handle(by_method: Mapping[str, Endpoint], config: FrontendConfig, http: Request) -> ASGIApp:
    endpoint = by_method["GET" if http.method == "HEAD" else http.method]
    given: list[Any] = []
    if endpoint.query is not None:
        given.append(read_query(http, endpoint.query))
    elif not endpoint.open:  # probes and scrapers may add what they like
        read_query(http, NoQuery)
    if endpoint.body is not None and endpoint.media == JSON:
        given.append(await read_body(http, endpoint, config))
    answer = await endpoint.handler(http, *given)
    return answer if callable(answer) else json_response(answer)


def endpoints(
    config: FrontendConfig, client: EngineClient, store: Store, worker: BatchWorker, server: Server
) -> list[Endpoint]:
    """Every route of the server, in the order in which they are tried."""
    tokens = Tokens(config, client)
    files = Files(config, store, worker.notify)
    batches = BatchesApi(config, store, worker)
    chat = ChatCompletions(config, client).create
    completions = Completions(config, client).create
    generate = NativeGenerate(config, client).create
    vectors = Embeddings(config, client)

    async def describe(_http: Request) -> dict[str, Any]:
        return description

    get, post = ("GET",), ("POST",)
    texts: Any = {"answers": (JSON, "text/event-stream"), "embeds": False}
    metrics_types = ("text/plain", "application/openmetrics-text")
    table = [
        Endpoint("The next message of a conversation", post, ("/v1/chat/completions",), chat, ChatRequest, **texts),
        Endpoint("Texts or token ids continued", post, ("/v1/completions",), completions, CompletionRequest, **texts),
        Endpoint("Completions in SGLang's native form", post, ("/generate",), generate, GenerateRequest, **texts),
        Endpoint("Embeddings of texts or ids", post, ("/v1/embeddings",), vectors.embed, EmbeddingRequest, embeds=True),
        Endpoint("How alike texts are", post, ("/score", "/v1/score"), vectors.score, ScoreRequest, embeds=True),
        Endpoint("Documents by likeness", post, ("/rerank", "/v1/rerank"), vectors.rerank, RerankRequest, embeds=True),
        Endpoint("The models served", get, ("/v1/models",), server.models),
        Endpoint("One model", get, ("/v1/models/{model:path}",), server.model),
        Endpoint("A file uploaded", post, ("/v1/files",), files.create, UploadForm, media=FORM, answer=File),
        Endpoint("The files", get, ("/v1/files",), files.list, query=FileListQuery),
        Endpoint("One file", get, ("/v1/files/{file_id}",), files.retrieve, answer=File),
        Endpoint("A file deleted", ("DELETE",), ("/v1/files/{file_id}",), files.delete),
        Endpoint("The content of a file", get, ("/v1/files/{file_id}/content",), files.content, None, (BINARY,)),
        Endpoint("A batch of requests", post, ("/v1/batches",), batches.create, BatchRequest, answer=Batch),
        Endpoint("The batches", get, ("/v1/batches",), batches.list, query=BatchListQuery),
        Endpoint("One batch", get, ("/v1/batches/{batch_id}",), batches.retrieve, answer=Batch),
        Endpoint(
            "A batch cancelled", post, ("/v1/batches/{batch_id}/cancel",), batches.cancel, answer=Batch, errors=(409,)
        ),
        Endpoint("Tokens of a text or chat", post, ("/tokenize", "/v1/tokenize"), tokens.tokenize, TokenizeRequest),
        Endpoint("Text of token ids", post, ("/detokenize", "/v1/detokenize"), tokens.detokenize, DetokenizeRequest),
        Endpoint("Facts about the model", get, ("/get_model_info",), server.model_info),
        Endpoint("Special tokens and chat template", get, ("/tokenizer_info",), server.tokenizer_info),
        Endpoint("Settings and state", get, ("/get_server_info",), server.server_info),
        Endpoint("The version of Ramet", get, ("/version",), server.version),
        Endpoint("Forget cached prefixes", ("GET", "POST"), ("/flush_cache",), server.flush_cache),
        Endpoint("Abort requests by their rid, or all", post, ("/abort_request",), server.abort, AbortRequest),
        Endpoint("Whether every process lives", get, ("/health",), server.health, open=True),
        Endpoint("Whether requests are taken", get, ("/ready",), server.ready, open=True),
        Endpoint("Whether a token can be computed", get, ("/health_generate",), server.health_generate),
        Endpoint("Measures for Prometheus", get, ("/metrics",), server.metrics, None, metrics_types, open=True),
        Endpoint("This document", get, ("/openapi.json",), describe, open=True),
    ]
    description = document(table, ramet.__version__, keyed=bool(config.api_keys))
    return table


class Envelope:
    """Gives each response its `x-request-id`, counts it, and tells the observers when it has ended."""

    def __init__(self, app: ASGIApp, routes: list[Route], metrics: Metrics, config: FrontendConfig) -> None:
        self._app = app
        # Routing leaves the endpoint in the scope; paths that clients make up must not become metric labels.
        self._paths: dict[object, str] = {route.endpoint: route.path for route in routes}
        self._metrics = metrics
        self._body_room = BodyRoom()
        self._log = RequestLog(config.log_requests)
        self._tracer = None if config.otlp_traces_endpoint is None else Tracer(config.otlp_traces_endpoint)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        record = RequestRecord(scope, request_id, time.monotonic())
        kept_bytes = self._log.kept_bytes

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            elif kept_bytes and "ramet.request" in scope and len(record.body) < kept_bytes:
                record.body += message.get("body", b"")[:kept_bytes]
            await send(message)

        scope["ramet.body_room"] = self._body_room
        if kept_bytes:  # no piece of a body may pass by
            scope.pop("ramet.write", None)
        self._metrics.http_in_flight.inc()
        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            # Answered already, by `on_bug` or as far as the response had come; the server closes what is incomplete.
            logger.exception("request %s failed", request_id)
        finally:
            record.ended_at = time.monotonic()
            record.route = self._paths.get(scope.get("endpoint"), "unmatched")
            self._metrics.http_in_flight.dec()
            self._metrics.http_requests.labels(record.route, str(record.status)).inc()
            self._log(record)
            if self._tracer is not None:
                self._tracer(record)


class ApiKeys:
    """Asks for one of the keys, except on the open paths."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...], open_paths: frozenset[str]) -> None:
        self._app = app
        self._open_paths = open_paths
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in self._open_paths or self._accepts(Headers(scope=scope).get("authorization", "")):
            await self._app(scope, receive, send)
            return
        refusal = errors.http_error(401, "missing or wrong API key", {"www-authenticate": "Bearer"})
        await refusal(scope, receive, send)

    def _accepts(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        given = key.strip().encode("latin-1")
        # Every key is compared in full, so that the time taken tells nothing about them.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(matches)
