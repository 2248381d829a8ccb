"""What OpenAI's specification says of answers, as strict JSON schemas, and a client that checks every answer by them.

`checking_client(server)` is the official SDK over a transport that reads along: each JSON answer and each event of a
stream is validated as it passes, before the SDK's lenient types see it. Strict: a field that the specification does
not have is an error, but for the extras that Ramet documents. `required` follows the specification, where nullable
fields are often required; that no field is made up, `test_contract_schemas.py` checks with the SDK's types, which are
generated from the specification.
"""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai

STRING: dict[str, Any] = {"type": "string"}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
NUMBER: dict[str, Any] = {"type": "number"}


def nullable(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def array(items: dict[str, Any], **limits: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **limits}


def record(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    properties = {**required, **(optional or {})}
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


LOGPROB = {"type": "number", "maximum": 0, "minimum": -9999}
FINISH_REASON = {"enum": ["stop", "length", "tool_calls", "content_filter", "function_call"]}
# Ramet's extra: the token id or the string that ended a choice.
MATCHED_STOP = {"anyOf": [STRING, COUNT, {"type": "null"}]}

USAGE = record(
    {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT},
    {
        "prompt_tokens_details": nullable(record({"cached_tokens": COUNT})),
        "completion_tokens_details": nullable(record({"reasoning_tokens": COUNT})),
    },
)

_BYTES = nullable(array({"type": "integer", "minimum": 0, "maximum": 255}))
_TOP = {"token": STRING, "logprob": LOGPROB, "bytes": _BYTES}
TOKEN_LOGPROB = record({**_TOP, "top_logprobs": array(record(_TOP), maxItems=20)})
CHAT_LOGPROBS = nullable(record({"content": nullable(array(TOKEN_LOGPROB)), "refusal": nullable(array(TOKEN_LOGPROB))}))
TOOL_CALL = record(
    {"id": STRING, "type": {"const": "function"}, "function": record({"name": STRING, "arguments": STRING})}
)
MESSAGE = record(
    {"role": {"const": "assistant"}, "content": nullable(STRING), "refusal": nullable(STRING)},
    {"tool_calls": array(TOOL_CALL, minItems=1), "reasoning_content": nullable(STRING)},
)
CHAT_COMPLETION = record(
    {
        "id": STRING,
        "object": {"const": "chat.completion"},
        "created": COUNT,
        "model": STRING,
        "choices": array(
            record(
                {"index": COUNT, "message": MESSAGE, "logprobs": CHAT_LOGPROBS, "finish_reason": FINISH_REASON},
                {"matched_stop": MATCHED_STOP},
            ),
            minItems=1,
        ),
    },
    {"usage": USAGE, "system_fingerprint": nullable(STRING), "service_tier": nullable(STRING)},
)

TOOL_CALL_DELTA = record(
    {"index": COUNT},
    {"id": STRING, "type": {"const": "function"}, "function": record({}, {"name": STRING, "arguments": STRING})},
)
DELTA = record(
    {},
    {
        "role": {"const": "assistant"},
        "content": nullable(STRING),
        "refusal": nullable(STRING),
        "tool_calls": array(TOOL_CALL_DELTA, minItems=1),
        "reasoning_content": nullable(STRING),
    },
)
CHAT_CHUNK = record(
    {
        "id": STRING,
        "object": {"const": "chat.completion.chunk"},
        "created": COUNT,
        "model": STRING,
        "choices": array(
            record(
                {"index": COUNT, "delta": DELTA, "finish_reason": nullable(FINISH_REASON)},
                {"logprobs": CHAT_LOGPROBS, "matched_stop": MATCHED_STOP},
            )
        ),
    },
    {"usage": nullable(USAGE), "system_fingerprint": nullable(STRING), "service_tier": nullable(STRING)},
)

# The first echoed token has no log-probability, which the specification does not say and every server does.
COMPLETION_LOGPROBS = nullable(
    record(
        {
            "tokens": array(STRING),
            "token_logprobs": array(nullable(LOGPROB)),
            "top_logprobs": array(nullable({"type": "object", "additionalProperties": LOGPROB})),
            "text_offset": array(COUNT),
        }
    )
)


def _completion(finish_reason: dict[str, Any], usage: dict[str, Any]) -> dict[str, Any]:
    choice = {"index": COUNT, "text": STRING, "logprobs": COMPLETION_LOGPROBS, "finish_reason": finish_reason}
    return record(
        {
            "id": STRING,
            "object": {"const": "text_completion"},
            "created": COUNT,
            "model": STRING,
            "choices": array(record(choice, {"matched_stop": MATCHED_STOP})),
        },
        {"usage": usage, "system_fingerprint": nullable(STRING)},
    )


_COMPLETION_FINISH = {"enum": ["stop", "length", "content_filter"]}
COMPLETION = _completion(_COMPLETION_FINISH, USAGE)
# The specification has one object for both; a chunk that is not a choice's last has no finish_reason.
COMPLETION_CHUNK = _completion(nullable(_COMPLETION_FINISH), nullable(USAGE))

MODEL = record(
    {"id": STRING, "object": {"const": "model"}, "created": COUNT, "owned_by": STRING},
    {"root": STRING, "max_model_len": COUNT},  # extras
)
MODEL_LIST = record({"object": {"const": "list"}, "data": array(MODEL)})
EMBEDDING_LIST = record(
    {
        "object": {"const": "list"},
        "model": STRING,
        "data": array(
            record(
                {
                    "object": {"const": "embedding"},
                    "index": COUNT,
                    "embedding": {
                        "anyOf": [array(NUMBER, minItems=1), {"type": "string", "contentEncoding": "base64"}]
                    },
                }
            )
        ),
        "usage": record({"prompt_tokens": COUNT, "total_tokens": COUNT}),
    }
)
ERROR = record(
    {"error": record({"message": STRING, "type": STRING, "param": nullable(STRING), "code": nullable(STRING)})}
)

# Path -> schema of the whole answer, schema of an event.
ANSWERS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "/v1/chat/completions": (CHAT_COMPLETION, CHAT_CHUNK),
    "/v1/completions": (COMPLETION, COMPLETION_CHUNK),
    "/v1/embeddings": (EMBEDDING_LIST, None),
    "/v1/models": (MODEL_LIST, None),
}


def check(value: Any, schema: dict[str, Any]) -> None:
    """Raises AssertionError with the place and the words of jsonschema."""
    for error in jsonschema.Draft202012Validator(schema).iter_errors(value):
        raise AssertionError(f"{error.json_path}: {error.message}\nin {json.dumps(value)[:2000]}")


def check_answer(path: str, status: int, content_type: str, body: bytes) -> None:
    """A whole answer, or the whole text of a stream."""
    if status >= 400:
        check(json.loads(body), ERROR)
        return
    whole, event = ANSWERS.get(path) or (MODEL, None)
    if not content_type.startswith("text/event-stream"):
        check(json.loads(body), whole)
        return
    assert event is not None
    *events, done, rest = body.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", ""), f"the stream ends with {done!r}, {rest!r}"
    for text in events:
        assert text.startswith("data: ") and "\n" not in text, text
        value = json.loads(text.removeprefix("data: "))
        check(value, ERROR if "error" in value else event)


class _ReadAlong(httpx.SyncByteStream):
    """Hands a body on, and checks it when all of it has passed; one that is left in the middle is not checked."""

    def __init__(self, stream: httpx.SyncByteStream, response: httpx.Response, path: str) -> None:
        self._stream = stream
        self._response = response
        self._path = path

    def __iter__(self) -> Iterator[bytes]:
        parts = []
        for part in self._stream:
            parts.append(part)
            yield part
        content_type = self._response.headers["content-type"]
        check_answer(self._path, self._response.status_code, content_type, b"".join(parts))

    def close(self) -> None:
        self._stream.close()


class CheckingTransport(httpx.HTTPTransport):
    """`answers` counts those that were seen."""

    answers = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = super().handle_request(request)
        assert response.headers["x-request-id"]
        assert isinstance(response.stream, httpx.SyncByteStream)
        response.stream = _ReadAlong(response.stream, response, request.url.path)
        self.answers += 1
        return response


@contextlib.contextmanager
def checking_client(url: str) -> Iterator[openai.OpenAI]:
    """The SDK's client of the server at `url`; it hides no failure by trying again."""
    with (
        httpx.Client(transport=CheckingTransport(), timeout=60) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="None", max_retries=0, http_client=http) as client,
    ):
        yield client
