"""`POST /v1/completions`: texts or token ids in, their continuations out, whole or as a stream of chunks.

Choice `prompt_i * n + j` is the j-th continuation of prompt `prompt_i`, with `best_of` the j-th best. With `echo` a
choice begins with its prompt, in a stream in its first chunk; with log-probabilities too, those of the prompt's tokens
come first.
"""

import functools
import math
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from ramet.frontend.api.base import Api
from ramet.frontend.api.chunks import OpenAIAnswer, shown_logprob
from ramet.frontend.generation import Generation, merged
from ramet.frontend.schemas.completions import CompletionRequest
from ramet.frontend.sse import respond
from ramet.ipc.messages import Completion, PromptInfo, TextDelta, TokenText


class Completions(Api):
    async def create(self, http: Request, request: CompletionRequest) -> ASGIApp:
        request.check()
        prompts = request.prompts(self._config.vocab_size)
        generation = self._client.submit(
            [functools.partial(Completion, prompt=prompt, suffix=request.suffix or None) for prompt in prompts],
            request.sampling(self._config),
            n=request.candidates,
            priority=self._priority(http, request.priority),
            stream=bool(request.stream),
            names=[request.rid] * len(prompts),
            # Offsets of log-probabilities count from the start of the prompt: of ids, only the engine knows the text.
            echo=bool(request.echo) or (request.logprobs is not None and not isinstance(prompts[0], str)),
        )
        answer = CompletionAnswer(request, prompts, generation)
        return functools.partial(respond, generation, answer, request.stream)


class CompletionChoice:
    """One choice's place in the response, and how far its text has come."""

    is_plain = True
    reasoning_tokens = None

    def __init__(self, index: int, prompt: str | list[int], request: CompletionRequest) -> None:
        self._index, self._prompt = index, prompt
        self._echo = bool(request.echo)
        self._with_logprobs = request.logprobs is not None
        self._offset = 0

    def news(self, delta: TextDelta) -> list[dict[str, Any]]:
        entry = self.whole([delta])
        return [entry] if entry["text"] or delta.logprobs or delta.finish else []

    def whole(self, deltas: list[TextDelta]) -> dict[str, Any]:
        delta = merged(deltas)
        text = delta.text
        tokens = list(delta.logprobs or ())
        if delta.prompt is not None:
            prompt_text = self._prompt if isinstance(self._prompt, str) else delta.prompt.text or ""
            self._offset = len(prompt_text)
            if self._echo:
                text = prompt_text + text
                tokens = self._echoed(delta.prompt) + tokens
        return {
            "index": self._index,
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
            "token_logprobs": [None if math.isnan(token.logprob) else shown_logprob(token) for token in tokens],
            "top_logprobs": [None if math.isnan(token.logprob) else _top(token) for token in tokens],
            "text_offset": offsets,
        }


class CompletionAnswer(OpenAIAnswer):
    """With `best_of` there are fewer choices than the generation has."""

    def __init__(self, request: CompletionRequest, prompts: list[str | list[int]], generation: Generation) -> None:
        self._candidates, self._n = request.candidates, request.choices
        choices = [CompletionChoice(i, prompts[i // self._n], request) for i in range(len(prompts) * self._n)]
        super().__init__("cmpl", "text_completion", "text_completion", request, generation, choices)

    def whole(self, parts: list[list[TextDelta]]) -> dict[str, Any]:
        return super().whole(_best(parts, self._candidates, self._n) if self._candidates > self._n else parts)


def _best(parts: list[list[TextDelta]], candidates: int, n: int) -> list[list[TextDelta]]:
    """Of each prompt's candidates the n of the highest mean log-probability per token, best first."""

    def mean(deltas: list[TextDelta]) -> float:
        tokens = merged(deltas).logprobs or ()
        return sum(map(shown_logprob, tokens)) / max(len(tokens), 1)

    groups = [parts[first : first + candidates] for first in range(0, len(parts), candidates)]
    return [deltas for group in groups for deltas in sorted(group, key=mean, reverse=True)[:n]]


def _top(token: TokenText) -> dict[str, float]:
    """The most likely tokens, and the token itself where it is not among them; of equal texts the likelier stays."""
    top: dict[str, float] = {}
    for other in [*token.top, token]:
        top.setdefault(other.token, shown_logprob(other))
    return top


def _characters(data: bytes) -> int:
    """How many UTF-8 characters begin in these bytes."""
    return sum(byte & 0xC0 != 0x80 for byte in data)
