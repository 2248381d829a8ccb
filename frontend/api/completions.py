"""`POST /v1/completions`: texts or token ids in, their continuations out, whole or as a stream of chunks.

Choice `prompt_i * n + j` is the j-th continuation of prompt `prompt_i`, with `best_of` the j-th best. With `echo` a
choice begins with its prompt, in a stream in its first chunk; with log-probabilities too, those of the prompt's tokens
come first.
"""

import functools
import math
import time
import uuid
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from ramet.frontend import sse
from ramet.frontend.api.chat import LOWEST_LOGPROB
from ramet.frontend.api.chunks import ChunkFrame, Usage
from ramet.frontend.api.models import Models
from ramet.frontend.config import FrontendConfig
from ramet.frontend.engine_client import EngineClient, Generation
from ramet.frontend.exchange import read_json, send_json, time_limit, watching
from ramet.frontend.schemas.completions import CompletionRequest
from ramet.ipc.messages import Completion, PromptInfo, TextDelta, TokenText


class Completions:
    """The endpoint, as an ASGI application."""

    def __init__(self, config: FrontendConfig, client: EngineClient, models: Models) -> None:
        self._config = config
        self._client = client
        self._models = models
        self._decoder = msgspec.json.Decoder(CompletionRequest)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = await read_json(scope, receive, self._decoder, self._config.max_body_bytes)
        self._models.check(request.model)
        request.check()
        limit_s = time_limit(scope, self._config.request_timeout_s)
        prompts = request.prompts(self._config.vocab_size)
        head = {"id": request.rid or f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.model}
        choices = [
            Choice(index, prompts[index // request.choices], request) for index in range(len(prompts) * request.choices)
        ]
        with self._submit(request, prompts) as generation:
            scope["ramet.generation"] = generation
            async with watching(receive, generation, limit_s):
                if request.stream:
                    await generation.started()
                    await sse.write_events(send, generation, CompletionStream(head, request, choices))
                else:
                    await send_json(send, _response(head, request, choices, await generation.whole()))

    def _submit(self, request: CompletionRequest, prompts: list[str | list[int]]) -> Generation:
        return self._client.submit(
            [functools.partial(Completion, prompt=prompt, suffix=request.suffix or None) for prompt in prompts],
            request.sampling(self._config),
            n=request.candidates,
            priority=request.priority or 0,
            stream=bool(request.stream),
            names=[request.rid] * len(prompts),
            # Offsets of log-probabilities count from the start of the prompt: of ids, only the engine knows the text.
            echo=bool(request.echo) or (request.logprobs is not None and not isinstance(prompts[0], str)),
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


class CompletionStream:
    """Renders the chunks of one response."""

    def __init__(self, head: dict[str, Any], request: CompletionRequest, choices: list[Choice]) -> None:
        self._frame = ChunkFrame(head, "text_completion", request)
        self._choices = choices

    def render(self, index: int, delta: TextDelta) -> bytes:
        self._frame.usage.add(index, delta)
        choice = self._choices[index].news(delta)
        if not choice["text"] and not delta.logprobs and delta.finish is None:
            return b""
        return self._frame.start + msgspec.json.encode(choice) + self._frame.tail()

    def end(self) -> bytes:
        return self._frame.last()


def _response(
    head: dict[str, Any], request: CompletionRequest, choices: list[Choice], deltas: list[TextDelta]
) -> dict[str, Any]:
    usage = Usage(request.candidates)
    for index, delta in enumerate(deltas):
        usage.add(index, delta)
    if request.candidates > request.choices:
        deltas = _best(deltas, request.candidates, request.choices)
    return {
        **head,
        "object": "text_completion",
        "choices": [choice.news(delta) for choice, delta in zip(choices, deltas, strict=True)],
        "usage": usage.as_dict(),
    }


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
