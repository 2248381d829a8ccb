"""`POST /v1/embeddings`, and `/v1/score` and `/v1/rerank` by the cosine similarity of embeddings.

All inputs of a request are asked of the engine at once, which batches them with those of others.
"""

import array
import base64
import functools
import math
from typing import Any

from starlette.requests import Request

from ramet.frontend.api.base import Api, head
from ramet.frontend.schemas.embeddings import EmbeddingFields, EmbeddingRequest, RerankRequest, ScoreRequest
from ramet.ipc.messages import Embedded, Embedding


class Embeddings(Api):
    async def _embed(self, http: Request, request: EmbeddingFields, inputs: list[Any]) -> list[Embedded]:
        """In the order of the inputs. Raises `RequestError`, also if the time is up, and `ClientDisconnectedError` if
        the client leaves."""
        priority = self._priority(http, request.priority)
        questions = [functools.partial(Embedding, prompt=prompt, priority=priority) for prompt in inputs]
        embedded = await self._ask(http, questions)
        http.scope["ramet.usage"] = _usage(embedded)
        return embedded

    async def embed(self, http: Request, request: EmbeddingRequest) -> dict[str, Any]:
        request.check_dimensions(self._config)
        answers = await self._embed(http, request, request.inputs(self._config.vocab_size))
        data = [
            {"object": "embedding", "index": index, "embedding": _encoded(answer.vector, request)}
            for index, answer in enumerate(answers)
        ]
        return {"object": "list", "data": data, "model": request.model, "usage": _usage(answers)}

    async def score(self, http: Request, request: ScoreRequest) -> dict[str, Any]:
        first, second = request.pairs()
        answers = await self._embed(http, request, first + second)
        vectors = [_unit(_floats(answer.vector)) for answer in answers]
        left, right = vectors[: len(first)], vectors[len(first) :]
        scores = map(_dot, left * (len(right) // len(left)), right)
        data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)]
        return {**head("score", request.model), "object": "list", "data": data, "usage": _usage(answers)}

    async def rerank(self, http: Request, request: RerankRequest) -> dict[str, Any]:
        request.check()
        answers = await self._embed(http, request, [request.query, *request.documents])
        query, *documents = [_unit(_floats(answer.vector)) for answer in answers]
        scores = [_dot(query, document) for document in documents]
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[: request.top_n]
        results: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in best]
        if request.return_documents is not False:
            for result in results:
                result["document"] = {"text": request.documents[result["index"]]}
        return {**head("rerank", request.model), "results": results, "usage": _usage(answers)}


def _usage(answers: list[Embedded]) -> dict[str, int]:
    tokens = sum(answer.prompt_tokens for answer in answers)
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _encoded(vector: bytes, request: EmbeddingRequest) -> str | list[float]:
    if request.dimensions is not None:
        vector = _unit(_floats(vector)[: request.dimensions]).tobytes()
    if request.encoding_format == "base64":
        return base64.b64encode(vector).decode()
    return _floats(vector).tolist()


def _floats(vector: bytes) -> "array.array[float]":
    """Of a message, whose order of bytes is little-endian, as that of all machines that torch is made for."""
    return array.array("f", vector)


def _unit(values: "array.array[float]") -> "array.array[float]":
    """Scaled to length 1; zeros stay."""
    length = math.hypot(*values) or 1.0
    return array.array("f", [value / length for value in values])


def _dot(left: "array.array[float]", right: "array.array[float]") -> float:
    return sum(map(float.__mul__, left, right))
