"""`POST /v1/embeddings`, and `/v1/score` and `/v1/rerank` by the cosine similarity of embeddings.

All inputs of a request are asked of the engine at once, which batches them with those of others.
"""

import array
import base64
import functools
import math
import sys
import time
import uuid
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from ramet.frontend.api.models import Models
from ramet.frontend.config import FrontendConfig
from ramet.frontend.engine_client import EngineClient
from ramet.frontend.exchange import read_json, send_json, time_limit, while_connected
from ramet.frontend.schemas.embeddings import EmbeddingRequest, RerankRequest, ScoreRequest
from ramet.ipc.messages import Embedded, Embedding

T = TypeVar("T", EmbeddingRequest, ScoreRequest, RerankRequest)


class EmbeddingEndpoint:
    """What the three endpoints share: reading a body, and asking for embeddings."""

    def __init__(self, config: FrontendConfig, client: EngineClient, models: Models) -> None:
        self._config = config
        self._client = client
        self._models = models

    async def _read(self, scope: Scope, receive: Receive, schema: type[T]) -> T:
        request = await read_json(scope, receive, msgspec.json.Decoder(schema), self._config.max_body_bytes)
        self._models.check(request.model)
        return request

    async def _embed(self, scope: Scope, receive: Receive, request: T, inputs: list[Any]) -> list[Embedded]:
        """In the order of the inputs. Raises `RequestError`, also if the time is up, and `ClientDisconnectedError` if
        the client leaves."""
        questions = [functools.partial(Embedding, prompt=prompt, priority=request.priority or 0) for prompt in inputs]
        limit_s = time_limit(scope, self._config.request_timeout_s)
        answers = await while_connected(receive, self._client.ask_all(questions), limit_s)
        return [answer for answer in answers if isinstance(answer, Embedded)]


class Embeddings(EmbeddingEndpoint):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = await self._read(scope, receive, EmbeddingRequest)
        request.check_dimensions(self._config)
        answers = await self._embed(scope, receive, request, request.inputs(self._config.vocab_size))
        data = [
            {"object": "embedding", "index": index, "embedding": _encoded(answer.vector, request)}
            for index, answer in enumerate(answers)
        ]
        await send_json(send, {"object": "list", "data": data, "model": request.model, "usage": _usage(answers)})


class Score(EmbeddingEndpoint):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = await self._read(scope, receive, ScoreRequest)
        first, second = request.pairs()
        answers = await self._embed(scope, receive, request, first + second)
        vectors = [_unit(_floats(answer.vector)) for answer in answers]
        left, right = vectors[: len(first)], vectors[len(first) :]
        scores = map(_dot, left * (len(right) // len(left)), right)
        body = {
            **_head("score", request.model),
            "object": "list",
            "data": [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)],
            "usage": _usage(answers),
        }
        await send_json(send, body)


class Rerank(EmbeddingEndpoint):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = await self._read(scope, receive, RerankRequest)
        request.check()
        answers = await self._embed(scope, receive, request, [request.query, *request.documents])
        query, *documents = [_unit(_floats(answer.vector)) for answer in answers]
        scores = [_dot(query, document) for document in documents]
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[: request.top_n]
        results: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in best]
        if request.return_documents is not False:
            for result in results:
                result["document"] = {"text": request.documents[result["index"]]}
        await send_json(send, {**_head("rerank", request.model), "results": results, "usage": _usage(answers)})


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


def _usage(answers: list[Embedded]) -> dict[str, int]:
    tokens = sum(answer.prompt_tokens for answer in answers)
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _encoded(vector: bytes, request: EmbeddingRequest) -> str | list[float]:
    if request.dimensions is not None:
        vector = _little_endian(_unit(_floats(vector)[: request.dimensions])).tobytes()
    if request.encoding_format == "base64":
        return base64.b64encode(vector).decode()
    return _floats(vector).tolist()


def _floats(vector: bytes) -> "array.array[float]":
    return _little_endian(array.array("f", vector))


def _little_endian(values: "array.array[float]") -> "array.array[float]":
    """From or to the order of bytes in messages and base64."""
    if sys.byteorder == "big":
        values.byteswap()
    return values


def _unit(values: "array.array[float]") -> "array.array[float]":
    """Scaled to length 1; zeros stay."""
    length = math.hypot(*values) or 1.0
    return array.array("f", [value / length for value in values])


def _dot(left: "array.array[float]", right: "array.array[float]") -> float:
    return sum(map(float.__mul__, left, right))
