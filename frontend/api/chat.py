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
from ramet.frontend.api.chunks import ChunkFrame, Usage
from ramet.frontend.api.models import Models
from ramet.frontend.config import FrontendConfig
from ramet.frontend.engine_client import EngineClient, Generation
from ramet.frontend.exchange import read_json, send_json, watching
from ramet.frontend.schemas.chat import ChatRequest
from ramet.ipc.messages import Chat, Finish, TextDelta, TokenText

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
        head = {
            "id": request.rid or f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
        }
        with self._submit(request) as generation:
            async with watching(receive, generation):
                if request.stream:
                    await generation.started()
                    await sse.write_events(send, generation, ChatStream(head, request))
                else:
                    await send_json(send, _response(head, request, await generation.whole()))

    def _submit(self, request: ChatRequest) -> Generation:
        prompt = functools.partial(
            Chat,
            messages=request.template_messages(),
            template_kwargs=request.chat_template_kwargs or {},
            add_generation_prompt=request.opens_answer,
            continue_final_message=bool(request.continue_final_message),
        )
        params = request.sampling(self._config)
        return self._client.submit(
            [prompt],
            params,
            n=request.choices,
            priority=request.priority or 0,
            stream=bool(request.stream),
            names=[request.rid],
        )


class ChatStream:
    """Renders the chunks of one response."""

    def __init__(self, head: dict[str, Any], request: ChatRequest) -> None:
        self._frame = ChunkFrame(head, "chat.completion.chunk", request)
        self._begun: set[int] = set()

    def render(self, index: int, delta: TextDelta) -> bytes:
        self._frame.usage.add(index, delta)
        events = b""
        if index not in self._begun:
            self._begun.add(index)
            events += self._chunk(index, b'{"role":"assistant","content":""}')
        if delta.text or delta.logprobs:
            content = b'{"content":' + msgspec.json.encode(delta.text) + b"}"
            events += self._chunk(index, content, delta.logprobs)
        if delta.finish is not None:
            events += self._chunk(index, b"{}", finish=delta.finish)
        return events

    def end(self) -> bytes:
        return self._frame.last()

    def _chunk(
        self, index: int, content: bytes, logprobs: list[TokenText] | None = None, finish: Finish | None = None
    ) -> bytes:
        return b'%b{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b,"matched_stop":%b}%b' % (
            self._frame.start,
            index,
            content,
            b"null" if logprobs is None else msgspec.json.encode(_logprobs(logprobs)),
            b"null" if finish is None else msgspec.json.encode(finish.reason),
            b"null" if finish is None else msgspec.json.encode(finish.matched),
            self._frame.tail(),
        )


def _response(head: dict[str, Any], request: ChatRequest, choices: list[TextDelta]) -> dict[str, Any]:
    usage = Usage(request.choices)
    for index, choice in enumerate(choices):
        usage.add(index, choice)
    return {
        **head,
        "object": "chat.completion",
        "choices": [_choice(index, choice, bool(request.logprobs)) for index, choice in enumerate(choices)],
        "usage": usage.as_dict(),
    }


def _choice(index: int, choice: TextDelta, with_logprobs: bool) -> dict[str, Any]:
    assert choice.finish is not None
    return {
        "index": index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": _logprobs(choice.logprobs or []) if with_logprobs else None,
        "finish_reason": choice.finish.reason,
        "matched_stop": choice.finish.matched,
    }


def _logprobs(tokens: list[TokenText]) -> dict[str, Any]:
    content = [{**_token(token), "top_logprobs": [_token(other) for other in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _token(token: TokenText) -> dict[str, Any]:
    return {"token": token.token, "logprob": max(token.logprob, LOWEST_LOGPROB), "bytes": list(token.data)}
