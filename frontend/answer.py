"""`AnswerReader`: one choice's text, read as reasoning, content and tool calls, in deltas of the API.

A whole answer is the sum of its deltas (`whole_message`), so both ways of answering have one reading. A plain answer,
without tools or reasoning, passes as it is.

Log-probabilities are those of all tokens, markup and reasoning included.
"""

from typing import Any

from ramet.frontend.reasoning import ReasoningParser
from ramet.frontend.schemas.tools import ToolUse
from ramet.frontend.tool_calls import Delta, ToolCallParser
from ramet.ipc.messages import Finish, FinishReason, TextDelta


class AnswerReader:
    def __init__(self, reasoning_parser: str | None, tool_call_parser: str, tools: ToolUse | None) -> None:
        self._reasoning = ReasoningParser(reasoning_parser) if reasoning_parser is not None else None
        self._calls = ToolCallParser(tool_call_parser, tools.callable, tools.parallel) if tools is not None else None
        self._legacy = tools is not None and tools.legacy
        self.is_plain = reasoning_parser is None and tools is None  # all text is content

    @property
    def reasoning_tokens(self) -> int | None:
        """None where reasoning is not told apart."""
        return self._reasoning.num_tokens if self._reasoning is not None else None

    def read(self, delta: TextDelta) -> list[Delta]:
        content, final = delta.text, delta.finish is not None
        deltas: list[Delta] = []
        if self._reasoning is not None:
            if delta.prompt is not None:
                self._reasoning.after_prompt(delta.prompt.tail)
            reasoning, content = self._reasoning.feed(content, delta.completion_tokens, final)
            if reasoning:
                deltas.append({"reasoning_content": reasoning})
        if self._calls is not None:
            deltas += self._calls.feed(content, final)
        elif content:
            deltas.append({"content": content})
        return [_as_function_call(item) for item in deltas] if self._legacy else deltas

    def finish_reason(self, finish: Finish) -> str:
        if finish.reason is FinishReason.STOP and self._calls is not None and self._calls.num_calls:
            return "function_call" if self._legacy else "tool_calls"
        return finish.reason


def whole_message(deltas: list[Delta]) -> dict[str, Any]:
    """The message that the deltas of a stream add up to; its content is null only beside calls."""
    message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
    for delta in deltas:
        for name in ("content", "reasoning_content"):
            if name in delta:
                message[name] = (message.get(name) or "") + delta[name]
        if "function_call" in delta:
            _add_call(message.setdefault("function_call", {"arguments": ""}), delta["function_call"])
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                new = {"id": call["id"], "type": call["type"], "function": {"arguments": ""}}
                message.setdefault("tool_calls", []).append(new)
            _add_call(message["tool_calls"][call["index"]]["function"], call["function"])
    if not message.keys() & {"tool_calls", "function_call"}:
        message["content"] = message["content"] or ""
    return message


def _add_call(function: dict[str, str], delta: dict[str, str]) -> None:
    if "name" in delta:
        function["name"] = delta["name"]
    function["arguments"] += delta["arguments"]


def _as_function_call(delta: Delta) -> Delta:
    return {"function_call": delta["tool_calls"][0]["function"]} if "tool_calls" in delta else delta
