"""`POST /v1/chat/completions`: a conversation in, a message out, whole or as a stream of chunks.

The stream of each choice: a delta with the role, deltas of text, an empty delta with `finish_reason`. Choices
interleave by index and end on their own.
"""

from typing import Any

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from ramet.frontend.answer import AnswerReader, whole_message
from ramet.frontend.api.base import Api, head
from ramet.frontend.api.chunks import OpenAIAnswer
from ramet.frontend.generation import merged
from ramet.frontend.schemas.chat import ChatRequest
from ramet.frontend.sse import respond
from ramet.frontend.tool_calls import Delta
from ramet.ipc.messages import TextDelta, TokenText

LOWEST_LOGPROB = -9999.0


class ChatCompletions(Api):
    """The endpoint, as an ASGI application."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = await self._read(Request(scope, receive), ChatRequest)
        request.check()
        limit_s = self._limit_s(scope)
        params = request.sampling(self._config)
        tools, reasons = request.tool_use(), request.splits_reasoning(self._config, params)
        family = self._config.reasoning_parser if reasons else None
        readers = [AnswerReader(family, self._config.tool_call_parser, tools) for _ in range(request.choices)]
        generation = self._client.submit(
            [request.prompt(self._config)],
            params,
            n=request.choices,
            priority=request.priority or 0,
            stream=bool(request.stream) or reasons,  # tokens of the reasoning are counted as they come
            names=[request.rid],
        )
        await respond(
            scope, receive, send, generation, ChatAnswer(request, readers), stream=request.stream, limit_s=limit_s
        )


class ChatAnswer(OpenAIAnswer):
    """`readers` has one for each choice."""

    def __init__(self, request: ChatRequest, readers: list[AnswerReader]) -> None:
        start = head("chatcmpl", request.model, request.rid)
        super().__init__(start, "chat.completion.chunk", request, request.choices)
        self._with_logprobs = bool(request.logprobs)
        self._begun: set[int] = set()
        self._readers = readers

    def render(self, index: int, delta: TextDelta) -> bytes:
        """A chunk for each thing that is certain now; log-probabilities go with the first, or alone."""
        reader = self._readers[index]
        if reader.is_plain and delta.finish is None and delta.logprobs is None and index in self._begun:
            self._usage.add(index, delta)  # most tokens of most answers: the same as below, sooner
            return self._text_chunk(index, delta.text, lambda text: self._choice(index, {"content": text}))
        found = reader.read(delta) or ([{}] if delta.logprobs else [])
        self._usage.add(index, delta, reader.reasoning_tokens)
        logprobs = [None if delta.logprobs is None else _logprobs(delta.logprobs)] + [None] * len(found)
        choices = [self._choice(index, item, logprobs[i]) for i, item in enumerate(found)]
        if index not in self._begun:
            self._begun.add(index)
            choices.insert(0, self._choice(index, {"role": "assistant", "content": ""}))
        if (finish := delta.finish) is not None:
            choices.append(self._choice(index, {}, None, reader.finish_reason(finish), finish.matched))
        return b"".join(map(self._chunk, choices))

    def _choice(
        self,
        index: int,
        delta: Delta,
        logprobs: Any = None,
        reason: str | None = None,
        matched: int | str | None = None,
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason, "matched_stop": matched}

    def whole(self, parts: list[list[TextDelta]]) -> dict[str, Any]:
        choices = []
        for index, (deltas, reader) in enumerate(zip(parts, self._readers, strict=True)):
            message = whole_message([found for delta in deltas for found in reader.read(delta)])
            whole = merged(deltas)
            assert whole.finish is not None
            self._usage.add(index, whole, reader.reasoning_tokens)
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": _logprobs(whole.logprobs or []) if self._with_logprobs else None,
                    "finish_reason": reader.finish_reason(whole.finish),
                    "matched_stop": whole.finish.matched,
                }
            )
        return self._body("chat.completion", choices)


def _logprobs(tokens: list[TokenText]) -> dict[str, Any]:
    content = [{**_token(token), "top_logprobs": [_token(other) for other in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _token(token: TokenText) -> dict[str, Any]:
    return {"token": token.token, "logprob": max(token.logprob, LOWEST_LOGPROB), "bytes": list(token.data)}
