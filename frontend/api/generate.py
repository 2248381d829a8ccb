"""SGLang's native `POST /generate`: texts or token ids in, texts with counts out, whole or as a stream.

A stream's events carry all text so far, and of several choices the `index`. An aborted request ends with the finish
reason `abort` and what it had. Choice `prompt_i * n + j` is the j-th of prompt `prompt_i`.
"""

import functools
import math
import time
import uuid
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from ramet.frontend.api.base import Api
from ramet.frontend.api.chunks import shown_logprob
from ramet.frontend.generation import merged
from ramet.frontend.schemas.generate import GenerateRequest
from ramet.frontend.sse import event, respond
from ramet.ipc.errors import RequestError
from ramet.ipc.messages import Completion, Finish, FinishReason, TextDelta, TokenText


class NativeGenerate(Api):
    async def create(self, http: Request, request: GenerateRequest) -> ASGIApp:
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await self._answer(http, request)(scope, receive, send)
            except RequestError as error:
                raise request.renamed(error) from None

        return answer

    def _answer(self, http: Request, request: GenerateRequest) -> ASGIApp:
        prompts = request.prompts(self._config.vocab_size)
        rids = request.rids(len(prompts))
        n, params = request.sampling(self._config, len(prompts))
        many = request.is_batch or n > 1
        choices = [Choice(rids[index // n], request) for index in range(len(prompts) * n)]
        generation = self._client.submit(
            [functools.partial(Completion, prompt=prompt) for prompt in prompts],
            params,
            n=n,
            priority=self._priority(http, request.priority),
            stream=bool(request.stream),
            names=rids,
            keeps_aborted=True,
        )
        return functools.partial(respond, generation, NativeAnswer(choices, many), request.stream)


class NativeAnswer:
    """`many`: whether the body is a list, and events tell their choice."""

    def __init__(self, choices: list["Choice"], many: bool) -> None:
        self._choices, self._many = choices, many

    def render(self, index: int, delta: TextDelta) -> bytes:
        body = self._choices[index].add(delta)
        return event({**body, "index": index} if self._many else body)

    def end(self) -> bytes:
        return b""

    def whole(self, parts: list[list[TextDelta]]) -> Any:
        bodies = [choice.add(merged(deltas)) for choice, deltas in zip(self._choices, parts, strict=True)]
        return bodies if self._many else bodies[0]


class Choice:
    """One choice as far as it has come."""

    def __init__(self, rid: str | None, request: GenerateRequest) -> None:
        self._text = ""
        self._ids: list[int] = []
        self._started_s = time.monotonic()
        self._with_text = bool(request.return_text_in_logprobs)
        self._start = request.start
        self._meta: dict[str, Any] = {"id": rid or uuid.uuid4().hex, "finish_reason": None}
        self._meta |= dict.fromkeys(("prompt_tokens", "completion_tokens", "cached_tokens"), 0)
        if request.return_logprob:
            self._meta |= {"output_token_logprobs": [], "output_top_logprobs": []}

    def add(self, delta: TextDelta) -> dict[str, Any]:
        """All of the choice, with what is new."""
        self._text += delta.text
        self._ids += delta.token_ids
        meta = self._meta
        meta["completion_tokens"] = delta.completion_tokens
        if (prompt := delta.prompt) is not None:
            meta |= {"prompt_tokens": prompt.prompt_tokens, "cached_tokens": prompt.cached_tokens}
            if prompt.tokens is not None:
                tokens = prompt.tokens[self._start :]
                meta["input_token_logprobs"] = [self._entry(token) for token in tokens]
                meta["input_top_logprobs"] = [self._top(token) for token in tokens]
        for token in delta.logprobs or ():
            meta["output_token_logprobs"].append(self._entry(token))
            meta["output_top_logprobs"].append(self._top(token))
        if delta.finish is not None:
            meta["finish_reason"] = _finish_reason(delta.finish, delta.completion_tokens)
            meta["e2e_latency"] = time.monotonic() - self._started_s
        return {"text": self._text, "output_ids": self._ids, "meta_info": meta}

    def _entry(self, token: TokenText) -> tuple[float | None, int, str | None]:
        """Log-probability, id, and the text if it is wanted; nothing predicts a prompt's first token."""
        value = None if math.isnan(token.logprob) else shown_logprob(token)
        return value, token.token_id, token.token if self._with_text else None

    def _top(self, token: TokenText) -> list[tuple[float | None, int, str | None]] | None:
        return [self._entry(other) for other in token.top] or None


def _finish_reason(finish: Finish, completion_tokens: int) -> dict[str, Any]:
    match finish.reason:
        case FinishReason.STOP:
            return {"type": "stop", "matched": finish.matched}
        case FinishReason.LENGTH:
            return {"type": "length", "length": completion_tokens}
        case FinishReason.ABORT:
            return {"type": "abort", "message": "the request was aborted"}
