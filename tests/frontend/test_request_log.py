"""What the request log says at each level; a field of any endpoint that holds what the user said is content."""

import asyncio
import logging
from typing import Any

import msgspec
import pytest

from ramet.frontend.app import Envelope
from ramet.frontend.config import FrontendConfig, RequestLogLevel
from ramet.frontend.metrics import Metrics
from ramet.frontend.request_log import RequestLog, RequestRecord
from ramet.frontend.schemas.chat import ChatRequest
from ramet.frontend.schemas.completions import CompletionRequest
from ramet.frontend.schemas.embeddings import EmbeddingRequest, RerankRequest, ScoreRequest
from ramet.frontend.schemas.generate import GenerateRequest
from ramet.frontend.schemas.tokenize import DetokenizeRequest, TokenizeRequest

SAID = "what the user said"
IDS = [271828, 314159]
USER = {"role": "user", "content": SAID}
BODIES: list[tuple[type[msgspec.Struct], dict[str, Any]]] = [
    (ChatRequest, {"model": "m", "messages": [USER], "max_tokens": 3}),
    (CompletionRequest, {"model": "m", "prompt": SAID, "suffix": SAID, "max_tokens": 3}),
    (CompletionRequest, {"model": "m", "prompt": IDS}),
    (GenerateRequest, {"text": SAID, "sampling_params": {"top_k": 4}}),
    (GenerateRequest, {"input_ids": IDS}),
    (EmbeddingRequest, {"model": "m", "input": [SAID]}),
    (ScoreRequest, {"model": "m", "text_1": SAID, "text_2": [SAID]}),
    (RerankRequest, {"model": "m", "query": SAID, "documents": [SAID]}),
    (TokenizeRequest, {"prompt": SAID}),
    (TokenizeRequest, {"messages": [USER]}),
    (DetokenizeRequest, {"tokens": IDS}),
]


def logged(caplog: pytest.LogCaptureFixture, level: RequestLogLevel, **scope: Any) -> list[dict[str, Any]]:
    caplog.set_level(logging.INFO, logger="ramet.frontend.request_log")
    caplog.clear()
    body = b'{"text": "the answer"}' if RequestLog(level).kept_bytes else b""
    RequestLog(level)(RequestRecord({"method": "POST", **scope}, "id-1", 10.0, 10.5, "/x", 200, body))
    return [record.fields for record in caplog.records]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("schema", "body"), BODIES)
def test_levels(caplog: pytest.LogCaptureFixture, schema: type[msgspec.Struct], body: dict[str, Any]) -> None:
    request = msgspec.convert(body, schema)
    assert logged(caplog, "off", **{"ramet.request": request}) == []
    summary = {"id": "id-1", "method": "POST", "route": "/x", "status": 200, "seconds": 0.5}
    assert logged(caplog, "summary", **{"ramet.request": request}) == [summary]
    [line] = logged(caplog, "parameters", **{"ramet.request": request})
    parameters = line.pop("request")
    assert line == summary
    assert not any(word in str(parameters) for word in (SAID, *map(str, IDS)))
    assert {name: parameters[name] for name in ("model", "max_tokens", "sampling_params") if name in body} == {
        name: body[name] for name in ("model", "max_tokens", "sampling_params") if name in body
    }
    [line] = logged(caplog, "content", **{"ramet.request": request})
    assert line == {**summary, "request": body, "response": '{"text": "the answer"}'}


def test_tokens_of_what_was_not_generated(caplog: pytest.LogCaptureFixture) -> None:
    [line] = logged(caplog, "summary", **{"ramet.usage": {"prompt_tokens": 7, "total_tokens": 7}})
    assert (line["prompt_tokens"], line["total_tokens"]) == (7, 7)


def test_a_request_without_a_body(caplog: pytest.LogCaptureFixture) -> None:
    assert "request" not in logged(caplog, "parameters")[0]


@pytest.mark.parametrize(("level", "passes_by"), [("parameters", True), ("content", False)])
def test_no_piece_of_a_logged_body_passes_by(level: RequestLogLevel, passes_by: bool) -> None:
    found = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found.append("ramet.write" in scope)

    config = FrontendConfig(
        host="x", port=1, served_names=("m",), model_path="/m", context_length=9, vocab_size=9, log_requests=level
    )
    scope = {"type": "http", "method": "POST", "path": "/x", "headers": [], "ramet.write": print}
    asyncio.run(Envelope(app, [], Metrics(), config)(scope, None, None))  # type: ignore[arg-type]
    assert found == [passes_by]
