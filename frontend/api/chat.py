"""`POST /v1/chat/completions`: a conversation in, a message out, whole or as a stream of chunks.

The stream of each choice: a delta with the role, deltas of what is certain, an empty delta with `finish_reason`.
Choices interleave by index and end on their own. A whole message is the sum of the same deltas, so both ways of
answering have one reading.
"""

import functools
import itertools
import operator
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from ramet.frontend.api.base import Api
from ramet.frontend.api.chunks import OpenAIAnswer, shown_logprob
from ramet.frontend.generation import merged
from ramet.frontend.reasoning import ReasoningParser
from ramet.frontend.schemas.chat import ChatRequest
from ramet.frontend.schemas.tools import ToolUse
from ramet.frontend.sse import respond
from ramet.frontend.tool_calls import Delta, ToolCallParser
from ramet.ipc.messages import Finish, FinishReason, TextDelta, TokenText

_REASONING = "reasoning_content"


class ChatCompletions(Api):
    async def create(self, http: Request, request: ChatRequest) -> ASGIApp:
        request.check()
        params = request.sampling(self._config)
        tools, reasons = request.tool_use, request.splits_reasoning(self._config)
        tags, form = self._config.reasoning_parser if reasons else None, self._config.tool_call_parser
        generation = self._client.submit(
            [request.prompt(self._config)],
            params,
            n=request.choices,
            priority=self._priority(http, request.priority),
            stream=bool(request.stream) or reasons,  # tokens of the reasoning are counted as they come
            names=[request.rid],
        )
        calls_lead = params.grammar is not None
        choices = [
            ChatChoice(index, bool(request.logprobs), tags, form, tools, calls_lead) for index in range(request.choices)
        ]
        answer = OpenAIAnswer("chatcmpl", "chat.completion", "chat.completion.chunk", request, generation, choices)
        return functools.partial(respond, generation, answer, request.stream)


class ChatChoice:
    """One choice, whose text is read as reasoning (between `tags`, unless that is None), content and calls of `tools`.
    Log-probabilities are those of all tokens, markup and reasoning included."""

    def __init__(
        self, index: int, with_logprobs: bool, tags: str | None, form: str, tools: ToolUse | None, calls_lead: bool
    ) -> None:
        self._index, self._with_logprobs = index, with_logprobs
        self._reasoning = ReasoningParser(tags) if tags is not None else None
        self._calls = ToolCallParser(form, tools.callable, tools.parallel, calls_lead) if tools is not None else None
        self._legacy = tools is not None and tools.legacy
        self.is_plain = tags is None and tools is None

    @property
    def reasoning_tokens(self) -> int | None:
        return self._reasoning.num_tokens if self._reasoning is not None else None

    def news(self, delta: TextDelta) -> list[dict[str, Any]]:
        """An entry for each thing that is certain now; log-probabilities go with the first, or alone."""
        found = self._read(delta) or ([{}] if delta.logprobs else [])
        if self._legacy:
            found = [{"function_call": it["tool_calls"][0]["function"]} if "tool_calls" in it else it for it in found]
        entries = [self._entry("delta", item) for item in found]
        if entries and delta.logprobs is not None:
            entries[0]["logprobs"] = _logprobs(delta.logprobs)
        if delta.prompt is not None:
            entries.insert(0, self._entry("delta", {"role": "assistant", "content": ""}))
        if delta.finish is not None:
            entries.append(self._entry("delta", {}, delta.finish))
        return entries

    def whole(self, deltas: list[TextDelta]) -> dict[str, Any]:
        message = whole_message([found for delta in deltas for found in self._read(delta)])
        if self._legacy and "tool_calls" in message:
            message["function_call"] = message.pop("tool_calls")[0]["function"]
        whole = merged(deltas)
        entry = self._entry("message", message, whole.finish)
        return {**entry, "logprobs": _logprobs(whole.logprobs or []) if self._with_logprobs else None}

    def _read(self, delta: TextDelta) -> list[Delta]:
        content, final = delta.text, delta.finish is not None
        deltas: list[Delta] = []
        if self._reasoning is not None:
            if delta.prompt is not None:
                self._reasoning.after_prompt(delta.prompt.tail)
            reasoning, content = self._reasoning.feed(content, delta.completion_tokens, final)
            if reasoning:
                deltas.append({_REASONING: reasoning})
        if self._calls is not None:
            deltas += self._calls.feed(content, final)
        elif content:
            deltas.append({"content": content})
        return deltas

    def _entry(self, kind: str, message: Delta, finish: Finish | None = None) -> dict[str, Any]:
        reason: str | None = None if finish is None else finish.reason
        if reason == FinishReason.STOP and self._calls is not None and self._calls.num_calls:
            reason = "function_call" if self._legacy else "tool_calls"
        return {
            "index": self._index,
            kind: message,
            "logprobs": None,
            "finish_reason": reason,
            "matched_stop": None if finish is None else finish.matched,
        }


def whole_message(deltas: list[Delta]) -> Delta:
    """The message that the deltas of a stream add up to; its content is null only beside calls."""
    content, reasoning = ("".join([delta.get(name, "") for delta in deltas]) for name in ("content", _REASONING))
    pieces = [piece for delta in deltas for piece in delta.get("tool_calls", ())]
    message: Delta = {"role": "assistant", "content": (content or None) if pieces else content, "refusal": None}
    if reasoning:
        message[_REASONING] = reasoning
    if pieces:
        by_call = itertools.groupby(pieces, key=operator.itemgetter("index"))
        message["tool_calls"] = [_whole_call(list(group)) for _, group in by_call]
    return message


def _whole_call(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    arguments = "".join([piece["function"]["arguments"] for piece in pieces])
    first = pieces[0]
    return {"id": first["id"], "type": first["type"], "function": {**first["function"], "arguments": arguments}}


def _logprobs(tokens: list[TokenText]) -> dict[str, Any]:
    content = [{**_token(token), "top_logprobs": [_token(other) for other in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _token(token: TokenText) -> dict[str, Any]:
    return {"token": token.token, "logprob": shown_logprob(token), "bytes": list(token.data)}
