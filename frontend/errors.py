"""Every error the HTTP API can answer, and the one table from `FailureKind` to status, type and code.

All errors share the body `{"error": {"message", "type", "param", "code"}}`, in a response or as an event of a stream
that has begun. A failure keeps its own `code` where it has one; the table holds the code for those without.
"""

import re
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ramet.ipc.errors import Failure, FailureKind, RequestError, invalid

# nginx's number: no status of HTTP says it, and clients must not try again by themselves, as they do after a 5xx.
CLIENT_CLOSED_REQUEST = 499

# kind -> (status, type, code)
FAILURES: dict[FailureKind, tuple[int, str, str]] = {
    FailureKind.INVALID_REQUEST: (400, "invalid_request_error", "invalid_value"),
    FailureKind.CONTEXT_LENGTH_EXCEEDED: (400, "invalid_request_error", "context_length_exceeded"),
    FailureKind.NOT_FOUND: (404, "invalid_request_error", "not_found"),
    FailureKind.CONFLICT: (409, "invalid_request_error", "conflict"),
    FailureKind.STORAGE_FULL: (413, "invalid_request_error", "storage_full"),
    FailureKind.STORAGE_UNUSABLE: (503, "server_error", "storage_unusable"),
    FailureKind.QUEUE_FULL: (429, "rate_limit_error", "queue_full"),
    FailureKind.TIMEOUT: (504, "server_error", "deadline_exceeded"),
    FailureKind.ENGINE_DOWN: (503, "server_error", "engine_down"),
    FailureKind.INTERNAL: (500, "server_error", "internal_error"),
    FailureKind.ABORTED: (CLIENT_CLOSED_REQUEST, "request_aborted", "aborted"),
}

# What HTTP itself refuses, before any request exists: status -> code.
HTTP_CODES: dict[int, str] = {
    400: "invalid_http",
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    411: "length_required",
    413: "request_too_large",
    415: "unsupported_media_type",
    431: "headers_too_large",
}

# Seconds a client should wait where the failure does not say: a queue moves within a second, a restart takes longer.
RETRY_AFTER_S: dict[int, int] = {429: 1, 503: 5}

# What other servers call parameters of the OpenAI endpoints, or what to say of those that are not here.
_ELSEWHERE = {
    **dict.fromkeys(("guided_json", "json_schema", "format"), "is response_format here"),
    **dict.fromkeys(("guided_regex", "guided_choice"), "is regex here"),
    **dict.fromkeys(("guided_grammar", "grammar"), "is ebnf here"),
    **dict.fromkeys(("max_new_tokens", "n_predict", "num_predict"), "is max_tokens here"),
    **dict.fromkeys(("enable_thinking", "thinking"), "goes into chat_template_kwargs here"),
    "structured_outputs": "is response_format, regex or ebnf here",
    "repeat_penalty": "is repetition_penalty here",
    "cache_prompt": "is not needed: known prefixes are always reused",
}

_FIELD = re.compile(r"^Object (contains unknown|missing required) field `(.*?)`")
_PATH = re.compile(r" - at (?:`key` in )?`\$\.?(.*)`$", re.DOTALL)


def no_such_model(model: str) -> RequestError:
    words = f"The model {model!r} does not exist. GET /v1/models lists those that do."
    return RequestError(FailureKind.NOT_FOUND, words, param="model", code="model_not_found")


def error_body(failure: Failure) -> dict[str, Any]:
    """The error object of a failure, with its status left out: that is in the status line, if still to be sent."""
    _, kind, code = FAILURES[failure.kind]
    return _body(failure.message, kind, failure.param, failure.code or code)


def invalid_json(error: msgspec.MsgspecError | ValueError | RecursionError) -> RequestError:
    """What to answer to a body that does not decode: the words of msgspec and the path of the field at fault."""
    if not isinstance(error, msgspec.ValidationError):
        return invalid(f"the body is not valid JSON: {error}", code="invalid_json")
    text = str(error)
    at = _PATH.search(text)
    path = at[1].replace("[...]", "") if at else ""
    if found := _FIELD.match(text):
        param = f"{path}.{found[2]}" if path else found[2]
        what = "unknown" if found[1] == "contains unknown" else "missing required"
        hint = f", which {_ELSEWHERE[param]}" if param in _ELSEWHERE else ""
        return invalid(f"{what} parameter: {param!r}{hint}", param, f"{what.replace(' ', '_')}_parameter")
    where = f"{path}: " if path else ""
    return invalid(where + (text[: at.start()] if at else text), path or None, "invalid_type")


def failure_response(failure: Failure) -> Response:
    wait_s = failure.retry_after_s
    headers = None if wait_s is None else {"retry-after": str(wait_s)}
    return _response(FAILURES[failure.kind][0], error_body(failure), headers)


async def on_request_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return failure_response(error.failure)


async def on_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def on_bug(_request: Request, _error: Exception) -> Response:
    """The traceback is for the log alone."""
    return failure_response(Failure(FailureKind.INTERNAL, "internal error"))


async def on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code in (404, 405):
        message = f"{error.detail}: {request.method} {request.url.path}"
    versioned = {**request.scope, "path": f"/v1{request.scope['path']}"}
    if error.status_code == 404 and any(route.matches(versioned)[0].value for route in request.app.routes):
        message += f"; it is /v1{request.url.path} here"
    elif request.url.path in ("/v1/responses", "/responses", "/v1/messages", "/api/chat"):  # OpenAI, Anthropic, Ollama
        message += "; the nearest that this server has is /v1/chat/completions"
    return http_error(error.status_code, message, error.headers)


def http_error(status: int, message: str, headers: Any = None) -> Response:
    return _response(status, _body(message, "invalid_request_error", None, HTTP_CODES.get(status)), headers)


# The body as a JSON schema.
_WORDS: dict[str, Any] = {"type": "string"}
_WORDS_OR_NULL: dict[str, Any] = {"type": ["string", "null"]}
_FIELDS = {"message": _WORDS, "type": _WORDS, "param": _WORDS_OR_NULL, "code": _WORDS_OR_NULL}
ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"error": {"type": "object", "properties": _FIELDS, "required": [*_FIELDS]}},
    "required": ["error"],
}

# Of a value or a name that a client sent, an error shows no more characters.
_MAX_SHOWN = 1000


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    param = None if param is None else _shortened(param)
    return {"error": {"message": _shortened(message), "type": kind, "param": param, "code": code}}


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}… ({len(text)} characters)"


def _response(status: int, body: dict[str, Any], headers: Any = None) -> Response:
    response = Response(msgspec.json.encode(body), status, headers, "application/json")
    if status in RETRY_AFTER_S:
        response.headers.setdefault("retry-after", str(RETRY_AFTER_S[status]))
    return response
