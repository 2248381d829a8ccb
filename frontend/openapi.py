"""`Endpoint`, a row of the table of routes, and `document`, which makes OpenAPI 3.1 of that table.

The table stands in `frontend/app.py`; the schemas of the bodies are msgspec's own. Answers without a struct are
described by their media types only. Source: https://spec.openapis.org/oas/v3.1.0
"""

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from ramet.frontend.errors import ERROR_SCHEMA

JSON = "application/json"
# Gets the request, and its body if that is a struct in JSON. Returns what is to be written as JSON, or an ASGI
# application that responds by itself.
Handler = Callable[..., Awaitable[Any]]

# What a request with a body may be answered; 404 is for a model or a file that is not there.
_BODY_ERRORS = (400, 411, 413, 415, 499, 504)
_ERRORS = {
    400: "A parameter or the JSON is wrong; `param` names it",
    401: "Missing or wrong API key",
    404: "Not known here",
    409: "It has ended before",
    411: "Nothing tells where the body ends",
    413: "The body is too large",
    415: "The content type is not supported",
    429: "The queue is full; `retry-after` says when to try again",
    499: "The request was aborted",
    500: "A bug or a failed step",
    503: "The engine is down, or the server is stopping",
    504: "The time that the request had is up",
}


class Endpoint(msgspec.Struct, frozen=True):
    """One operation under each of `paths`. `body` is the struct of its body, of type `media`, `answers` the media types
    of a good answer, `answer` its struct, if it has one, `errors` more statuses than the usual. `query` is the struct
    of its query, which the handler gets before the body; without one, it takes none. An `open` one needs no key, and
    takes no notice of its query. `embeds` says for which kind of server it is; None is both."""

    summary: str
    methods: tuple[str, ...]
    paths: tuple[str, ...]
    handler: Handler
    body: type[msgspec.Struct] | None = None
    answers: tuple[str, ...] = (JSON,)
    open: bool = False
    media: str = JSON
    answer: type[msgspec.Struct] | None = None
    embeds: bool | None = None
    errors: tuple[int, ...] = ()
    query: type[msgspec.Struct] | None = None


def document(endpoints: Sequence[Endpoint], version: str, *, keyed: bool) -> dict[str, Any]:
    """The description of the server; `keyed` tells whether it asks for API keys."""
    kinds = [kind for endpoint in endpoints for kind in (endpoint.body, endpoint.answer) if kind is not None]
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    for schema in schemas.values():
        schema.pop("description", None)  # docstrings are for readers of the code
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        for path in endpoint.paths:
            shown = re.sub(r"\{(\w+):\w+\}", r"{\1}", path)
            operations = {method.lower(): _operation(endpoint, method, shown, keyed) for method in endpoint.methods}
            paths.setdefault(shown, {}).update(operations)
    components: dict[str, Any] = {"schemas": {**schemas, "Error": ERROR_SCHEMA}}
    if keyed:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    info = {"title": "Ramet", "version": version}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}


def _operation(endpoint: Endpoint, method: str, path: str, keyed: bool) -> dict[str, Any]:
    names = re.findall(r"\{(\w+)\}", path)
    statuses = {429, 500, 503, *endpoint.errors, *(() if endpoint.open else (400,))}
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}{path}").rstrip("_"),
        "summary": endpoint.summary,
    }
    if names:
        statuses.add(404)
        in_path = {"in": "path", "required": True, "schema": {"type": "string"}}
        operation["parameters"] = [{"name": name, **in_path} for name in names]
    if endpoint.query is not None:
        [fields] = msgspec.json.schema_components([endpoint.query])[1].values()
        operation["parameters"] = [{"name": n, "in": "query", "schema": s} for n, s in fields["properties"].items()]
    if endpoint.body is not None:
        statuses.update(_BODY_ERRORS)
        if {"model", "input_file_id"} & {*endpoint.body.__struct_fields__}:
            statuses.add(404)
        operation["requestBody"] = {"required": True, "content": {endpoint.media: _schema(endpoint.body)}}
    if keyed and not endpoint.open:
        statuses.add(401)
        operation["security"] = [{"key": []}]
    error = {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    operation["responses"] = {
        "200": {"description": "The answer", "content": dict.fromkeys(endpoint.answers, _schema(endpoint.answer))},
        **{str(status): {"description": _ERRORS[status], "content": error} for status in sorted(statuses)},
    }
    return operation


def _schema(kind: type[msgspec.Struct] | None) -> dict[str, Any]:
    return {} if kind is None else {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}
