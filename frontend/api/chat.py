"""`POST /v1/chat/completions`: a conversation in, a message out, whole or as a stream of chunks.

The stream of each choice: a delta with the role, deltas of text, an empty delta with `finish_reason`. Choices
interleave by index and end on their own.
"""

import functools
import time
import uuid
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from ramet.frontend import sse
from ramet.frontend.answer import AnswerReader, whole_message
from ramet.frontend.api.chunks import ChunkFrame, Usage
from ramet.frontend.api.models import Models
from ramet.frontend.config import FrontendConfig
from ramet.frontend.engine_client import EngineClient, Generation, merged
from ramet.frontend.exchange import read_json, send_json, time_limit, watching
from ramet.frontend.schemas.chat import ChatRequest
from ramet.frontend.schemas.tools import ToolUse
from ramet.ipc.messages import Chat, Finish, TextDelta, TokenText
from ramet.ipc.sampling import SamplingParams

LOWEST_LOGPROB = -9999.0


class ChatCompletions:
    """The endpoint, as an ASGI application."""

    def __init__(self, config: FrontendConfig, client: EngineClient, models: Models) -> None:
        self._config = config
        self._client = client
        self._models = models
        self._decoder = msgspec.json.Decoder(ChatRequest)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = await read_json(scope, receive, self._decoder, self._config.max_body_bytes)
        self._models.check(request.model)
        request.check()
        limit_s = time_limit(scope, self._config.request_timeout_s)
        head = {
            "id": request.rid or f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
        }
        params = request.sampling(self._config)
        tools, reasons = request.tool_use(), request.splits_reasoning(self._config, params)
        readers: list[AnswerReader] = []
        if tools is not None or reasons:
            family = self._config.reasoning_parser if reasons else None
            readers = [AnswerReader(family, self._config.tool_call_parser, tools) for _ in range(request.choices)]
        # Tokens of the reasoning are counted as they come.
        with self._submit(request, params, tools, bool(request.stream) or reasons) as generation:
            scope["ramet.generation"] = generation
            async with watching(receive, generation, limit_s):
                if request.stream:
                    await generation.started()
                    await sse.write_events(send, generation, ChatStream(head, request, readers))
                else:
                    await send_json(send, _response(head, request, await generation.parts(), readers))

    def _submit(self, request: ChatRequest, params: SamplingParams, tools: ToolUse | None, stream: bool) -> Generation:
        prompt = functools.partial(
            Chat,
            messages=request.template_messages(),
            tools=tools.shown if tools is not None else None,
            template_kwargs=request.template_variables(self._config),
            add_generation_prompt=request.opens_answer,
            continue_final_message=bool(request.continue_final_message),
        )
        return self._client.submit(
            [prompt],
            params,
            n=request.choices,
            priority=request.priority or 0,
            stream=stream,
            names=[request.rid],
        )


class ChatStream:
    """Renders the chunks of one response; `readers`, one a choice, are there if its text is not just content."""

    def __init__(self, head: dict[str, Any], request: ChatRequest, readers: list[AnswerReader]) -> None:
        self._frame = ChunkFrame(head, "chat.completion.chunk", request)
        self._begun: set[int] = set()
        self._readers = readers

    def render(self, index: int, delta: TextDelta) -> bytes:
        self._frame.usage.add(index, delta)
        events = b""
        if index not in self._begun:
            self._begun.add(index)
            events += self._chunk(index, b'{"role":"assistant","content":""}')
        if self._readers:
            return events + self._read(index, delta, self._readers[index])
        if delta.text or delta.logprobs:
            content = b'{"content":' + msgspec.json.encode(delta.text) + b"}"
            events += self._chunk(index, content, delta.logprobs)
        if delta.finish is not None:
            events += self._chunk(index, b"{}", finish=delta.finish)
        return events

    def _read(self, index: int, delta: TextDelta, reader: AnswerReader) -> bytes:
        """A chunk for each thing that is certain now; log-probabilities go with the first, or alone."""
        found = reader.read(delta)
        if reader.reasoning_tokens is not None:
            self._frame.usage.reasoning_tokens[index] = reader.reasoning_tokens
        if delta.logprobs and not found:
            found = [{}]
        logprobs = [delta.logprobs] + [None] * len(found)
        chunks = [self._chunk(index, msgspec.json.encode(item), logprobs[i]) for i, item in enumerate(found)]
        if delta.finish is not None:
            chunks.append(self._chunk(index, b"{}", finish=delta.finish, reason=reader.finish_reason(delta.finish)))
        return b"".join(chunks)

    def end(self) -> bytes:
        return self._frame.last()

    def _chunk(
        self,
        index: int,
        content: bytes,
        logprobs: list[TokenText] | None = None,
        finish: Finish | None = None,
        reason: str | None = None,
    ) -> bytes:
        """`reason` stands in place of that of `finish`."""
        return b'%b{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b,"matched_stop":%b}%b' % (
            self._frame.start,
            index,
            content,
            b"null" if logprobs is None else msgspec.json.encode(_logprobs(logprobs)),
            b"null" if finish is None else msgspec.json.encode(reason or finish.reason),
            b"null" if finish is None else msgspec.json.encode(finish.matched),
            self._frame.tail(),
        )


def _response(
    head: dict[str, Any], request: ChatRequest, parts: list[list[TextDelta]], readers: list[AnswerReader]
) -> dict[str, Any]:
    """`parts`: the deltas of each choice."""
    usage = Usage(request.choices)
    choices = []
    for index, deltas in enumerate(parts):
        whole = merged(deltas)
        assert whole.finish is not None
        usage.add(index, whole)
        message: dict[str, Any] = {"role": "assistant", "content": whole.text, "refusal": None}
        reason: str = whole.finish.reason
        if readers:
            reader = readers[index]
            message = whole_message([found for delta in deltas for found in reader.read(delta)])
            reason = reader.finish_reason(whole.finish)
            if reader.reasoning_tokens is not None:
                usage.reasoning_tokens[index] = reader.reasoning_tokens
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": _logprobs(whole.logprobs or []) if request.logprobs else None,
                "finish_reason": reason,
                "matched_stop": whole.finish.matched,
            }
        )
    return {**head, "object": "chat.completion", "choices": choices, "usage": usage.as_dict()}


def _logprobs(tokens: list[TokenText]) -> dict[str, Any]:
    content = [{**_token(token), "top_logprobs": [_token(other) for other in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _token(token: TokenText) -> dict[str, Any]:
    return {"token": token.token, "logprob": max(token.logprob, LOWEST_LOGPROB), "bytes": list(token.data)}
