"""`POST /v1/completions`: texts or token ids in, their continuations out, whole or as a stream of chunks.

Choice `prompt_i * n + j` is the j-th continuation of prompt `prompt_i`, with `best_of` the j-th best. With `echo` a
choice begins with its prompt, in a stream in its first chunk; with log-probabilities too, those of the prompt's tokens
come first.
"""

import functools
import math
from typing import Any

from msgspec.structs import replace
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from ramet.frontend.api.base import Api, head
from ramet.frontend.api.chat import LOWEST_LOGPROB
from ramet.frontend.api.chunks import OpenAIAnswer
from ramet.frontend.generation import merged
from ramet.frontend.schemas.completions import CompletionRequest
from ramet.frontend.sse import respond
from ramet.ipc.messages import Completion, PromptInfo, TextDelta, TokenText


class Completions(Api):
    """The endpoint, as an ASGI application."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = await self._read(Request(scope, receive), CompletionRequest)
        request.check()
        limit_s = self._limit_s(scope)
        prompts = request.prompts(self._config.vocab_size)
        generation = self._client.submit(
            [functools.partial(Completion, prompt=prompt, suffix=request.suffix or None) for prompt in prompts],
            request.sampling(self._config),
            n=request.candidates,
            priority=request.priority or 0,
            stream=bool(request.stream),
            names=[request.rid] * len(prompts),
            # Offsets of log-probabilities count from the start of the prompt: of ids, only the engine knows the text.
            echo=bool(request.echo) or (request.logprobs is not None and not isinstance(prompts[0], str)),
        )
        await respond(
            scope, receive, send, generation, CompletionAnswer(request, prompts), stream=request.stream, limit_s=limit_s
        )


class Choice:
    """One choice's place in the response: its index, and how far its text has come."""

    def __init__(self, index: int, prompt: str | list[int], request: CompletionRequest) -> None:
        self.index = index
        self._prompt = prompt
        self._echo = bool(request.echo)
        self._with_logprobs = request.logprobs is not None
        self._offset = 0

    def news(self, delta: TextDelta) -> dict[str, Any]:
        """A delta as an entry of `choices`."""
        text = delta.text
        tokens = list(delta.logprobs or ())
        if delta.prompt is not None:
            prompt_text = self._prompt if isinstance(self._prompt, str) else delta.prompt.text or ""
            self._offset = len(prompt_text)
            if self._echo:
                text = prompt_text + text
                tokens = self._echoed(delta.prompt) + tokens
        return {
            "index": self.index,
            "text": text,
            "logprobs": self._logprobs(tokens) if self._with_logprobs else None,
            "finish_reason": delta.finish.reason if delta.finish else None,
            "matched_stop": delta.finish.matched if delta.finish else None,
        }

    def _echoed(self, prompt: PromptInfo) -> list[TokenText]:
        """The prompt's tokens. Their offsets are laid so that they end where the text does: a first token may stand
        for characters that the text has not (a BOS token, a space that only the tokenizer sees)."""
        tokens = prompt.tokens or []
        self._offset -= sum(_characters(token.data) for token in tokens)
        return tokens

    def _logprobs(self, tokens: list[TokenText]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(max(self._offset, 0))
            self._offset += _characters(token.data)
        return {
            "tokens": [token.token for token in tokens],
            "token_logprobs": [None if math.isnan(token.logprob) else _value(token) for token in tokens],
            "top_logprobs": [None if math.isnan(token.logprob) else _top(token) for token in tokens],
            "text_offset": offsets,
        }


class CompletionAnswer(OpenAIAnswer):
    def __init__(self, request: CompletionRequest, prompts: list[str | list[int]]) -> None:
        super().__init__(head("cmpl", request.model, request.rid), "text_completion", request, request.candidates)
        n = request.choices
        self._choices = [Choice(index, prompts[index // n], request) for index in range(len(prompts) * n)]
        self._candidates, self._n = request.candidates, n

    def render(self, index: int, delta: TextDelta) -> bytes:
        self._usage.add(index, delta)
        choice = self._choices[index]
        if delta.logprobs is None and delta.prompt is None and delta.finish is None:
            return self._text_chunk(index, delta.text, lambda text: choice.news(replace(delta, text=text)))
        news = choice.news(delta)
        return self._chunk(news) if news["text"] or delta.logprobs or delta.finish else b""

    def whole(self, parts: list[list[TextDelta]]) -> dict[str, Any]:
        deltas = list(map(merged, parts))
        for index, delta in enumerate(deltas):
            self._usage.add(index, delta)
        if self._candidates > self._n:
            deltas = _best(deltas, self._candidates, self._n)
        choices = [choice.news(delta) for choice, delta in zip(self._choices, deltas, strict=True)]
        return self._body("text_completion", choices)


def _best(deltas: list[TextDelta], candidates: int, n: int) -> list[TextDelta]:
    """Of each prompt's candidates the n of the highest mean log-probability per token, best first."""

    def mean(delta: TextDelta) -> float:
        tokens = delta.logprobs or ()
        return sum(map(_value, tokens)) / max(len(tokens), 1)

    groups = [deltas[first : first + candidates] for first in range(0, len(deltas), candidates)]
    return [delta for group in groups for delta in sorted(group, key=mean, reverse=True)[:n]]


def _top(token: TokenText) -> dict[str, float]:
    """The most likely tokens, and the token itself where it is not among them; of equal texts the likelier stays."""
    top: dict[str, float] = {}
    for other in [*token.top, token]:
        top.setdefault(other.token, _value(other))
    return top


def _value(token: TokenText) -> float:
    return max(token.logprob, LOWEST_LOGPROB)


def _characters(data: bytes) -> int:
    """How many UTF-8 characters begin in these bytes."""
    return sum(byte & 0xC0 != 0x80 for byte in data)
