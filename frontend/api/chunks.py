"""`OpenAIAnswer`: what stands around the choices of chat completions and completions, whole or in chunks.

How a choice looks is told by its endpoint, in a `Choice`.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
from msgspec.structs import replace

from ramet.frontend.api.base import head
from ramet.frontend.generation import Generation
from ramet.frontend.schemas.common import GenerationRequest, StreamOptions
from ramet.ipc.messages import TextDelta, TokenText

_LOWEST_LOGPROB = -9999.0
# Stands for the text where a chunk is made into a template.
_ANY_TEXT = "\0"


class Choice(Protocol):
    """One choice, which keeps what it must know of its past. `is_plain`: an event that brings nothing but text makes
    one entry, which differs only by that text. `reasoning_tokens`: None where reasoning is not told apart."""

    is_plain: bool

    @property
    def reasoning_tokens(self) -> int | None: ...

    def news(self, delta: TextDelta) -> list[dict[str, Any]]:
        """The entries of `choices` that show an event, each for a chunk of its own."""

    def whole(self, deltas: list[TextDelta]) -> dict[str, Any]:
        """The entry that shows all events of the choice."""


class OpenAIAnswer:
    """`prefix` begins the id; `kind` is the `object` of a whole answer, `chunk` that of a chunk."""

    def __init__(
        self,
        prefix: str,
        kind: str,
        chunk: str,
        request: GenerationRequest,
        generation: Generation,
        choices: Sequence[Choice],
    ) -> None:
        self._head = head(prefix, request.model, request.rid)
        self._kind, self._generation, self._choices = kind, generation, choices
        self._start = b"data: " + msgspec.json.encode({**self._head, "object": chunk})[:-1] + b',"choices":['
        options = request.stream_options or StreamOptions()
        self._include_usage, self._continuous_usage = options.include_usage, options.continuous_usage_stats
        self._templates: dict[int, list[bytes]] = {}

    def render(self, index: int, delta: TextDelta) -> bytes:
        choice = self._choices[index]
        is_text = choice.is_plain and delta.prompt is None and delta.logprobs is None and delta.finish is None
        if self._continuous_usage or not is_text:
            return b"".join(map(self._chunk, choice.news(delta)))
        if not delta.text:
            return b""
        if (template := self._templates.get(index)) is None:
            # Most of a stream: only the text is encoded anew each time.
            [entry] = choice.news(replace(delta, text=_ANY_TEXT))
            template = self._templates[index] = self._chunk(entry).rsplit(msgspec.json.encode(_ANY_TEXT), 1)
        return template[0] + msgspec.json.encode(delta.text) + template[1]

    def end(self) -> bytes:
        return self._chunk(None) if self._include_usage else b""

    def _chunk(self, choice: dict[str, Any] | None) -> bytes:
        """Without a choice it is the one that ends a stream whose usage was asked for."""
        tail = b"]}\n\n"
        if self._include_usage or self._continuous_usage:
            usage = self._usage() if choice is None or self._continuous_usage else None
            tail = b'],"usage":' + msgspec.json.encode(usage) + b"}\n\n"
        return self._start + (b"" if choice is None else msgspec.json.encode(choice)) + tail

    def whole(self, parts: list[list[TextDelta]]) -> dict[str, Any]:
        choices = [choice.whole(deltas) for choice, deltas in zip(self._choices, parts, strict=True)]
        return {**self._head, "object": self._kind, "choices": choices, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        counts = self._generation.usage()
        usage: dict[str, Any] = {
            "prompt_tokens": counts["prompt_tokens"],
            "completion_tokens": counts["completion_tokens"],
            "total_tokens": counts["prompt_tokens"] + counts["completion_tokens"],
            "prompt_tokens_details": {"cached_tokens": counts["cached_tokens"]},
        }
        if reasoning := [tokens for choice in self._choices if (tokens := choice.reasoning_tokens) is not None]:
            usage["completion_tokens_details"] = {"reasoning_tokens": sum(reasoning)}
        return usage


def shown_logprob(token: TokenText) -> float:
    """JSON has no infinity."""
    return max(token.logprob, _LOWEST_LOGPROB)
