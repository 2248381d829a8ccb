"""What chat completions and completions have in common in their answers: usage, and what stands around choices."""

from collections.abc import Callable
from typing import Any

import msgspec

from ramet.frontend.schemas.common import GenerationRequest
from ramet.ipc.messages import PromptInfo, TextDelta


class Usage:
    """Each prompt counts once, however many choices it has; `n` is the number of choices per prompt."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._prompts: dict[int, PromptInfo] = {}
        self._completions: dict[int, int] = {}
        self._reasoning: dict[int, int] = {}

    def add(self, index: int, delta: TextDelta, reasoning_tokens: int | None = None) -> None:
        """`reasoning_tokens` of this choice so far, where reasoning is told apart."""
        if reasoning_tokens is not None:
            self._reasoning[index] = reasoning_tokens
        self._completions[index] = delta.completion_tokens
        if delta.prompt is not None:
            number = index // self._n
            known = self._prompts.get(number)
            # The choice that computed the prompt tells what was cached; the others found what that one computed.
            if known is None or delta.prompt.cached_tokens < known.cached_tokens:
                self._prompts[number] = delta.prompt

    def as_dict(self) -> dict[str, Any]:
        prompt = sum(info.prompt_tokens for info in self._prompts.values())
        completion = sum(self._completions.values())
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(info.cached_tokens for info in self._prompts.values())},
        }
        if self._reasoning:
            usage["completion_tokens_details"] = {"reasoning_tokens": sum(self._reasoning.values())}
        return usage


class OpenAIAnswer:
    """The base of an answer, whole or in chunks: what stands around the choices, and the usage where it is asked. `n`:
    how many choices are generated for each prompt."""

    def __init__(self, head: dict[str, Any], kind: str, request: GenerationRequest, n: int) -> None:
        self._head = head
        self._start = b"data: " + msgspec.json.encode({**head, "object": kind})[:-1] + b',"choices":['
        self._usage = Usage(n)
        self._include_usage = request.include_usage
        self._continuous_usage = request.continuous_usage
        self._templates: dict[int, list[bytes]] = {}

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        if self._continuous_usage:
            tail = b'],"usage":' + msgspec.json.encode(self._usage.as_dict()) + b"}\n\n"
        else:
            tail = b'],"usage":null}\n\n' if self._include_usage else b"]}\n\n"
        return self._start + msgspec.json.encode(choice) + tail

    def _text_chunk(self, index: int, text: str, choice: Callable[[str], dict[str, Any]]) -> bytes:
        """The chunk of a choice's text and nothing else. Most of a stream: only the text is encoded anew each time."""
        if not text or self._continuous_usage:
            return self._chunk(choice(text)) if text else b""
        if (template := self._templates.get(index)) is None:
            # No empty string follows that of the text.
            template = self._templates[index] = self._chunk(choice("")).rsplit(b'""', 1)
        return template[0] + msgspec.json.encode(text) + template[1]

    def end(self) -> bytes:
        """The chunk without choices that ends a stream whose usage was asked for."""
        if not self._include_usage:
            return b""
        return self._start + b'],"usage":' + msgspec.json.encode(self._usage.as_dict()) + b"}\n\n"

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage.as_dict()}
