"""What chat completions and completions have in common in their responses: the usage, and the frame of a chunk."""

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
        # By choice, where reasoning is told apart.
        self.reasoning_tokens: dict[int, int] = {}

    def add(self, index: int, delta: TextDelta) -> None:
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
        if self.reasoning_tokens:
            usage["completion_tokens_details"] = {"reasoning_tokens": sum(self.reasoning_tokens.values())}
        return usage


class ChunkFrame:
    """What stands around the choice in every chunk of one response, encoded once, with the usage where it is asked."""

    def __init__(self, head: dict[str, Any], kind: str, request: GenerationRequest) -> None:
        self.start = b"data: " + msgspec.json.encode({**head, "object": kind})[:-1] + b',"choices":['
        self.usage = Usage(request.choices)
        self._include_usage = request.include_usage
        self._continuous_usage = request.continuous_usage

    def tail(self) -> bytes:
        """What follows the choice."""
        if self._continuous_usage:
            return b'],"usage":' + msgspec.json.encode(self.usage.as_dict()) + b"}\n\n"
        return b'],"usage":null}\n\n' if self._include_usage else b"]}\n\n"

    def last(self) -> bytes:
        """The chunk without choices that ends a stream whose usage was asked for."""
        if not self._include_usage:
            return b""
        return self.start + b'],"usage":' + msgspec.json.encode(self.usage.as_dict()) + b"}\n\n"
