"""Tools and reasoning through every process of a real engine, by the OpenAI SDK; what a random model says is form."""

from typing import Any

import pytest
from support.server import RunningServer

pytestmark = pytest.mark.e2e

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: Any = [{"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": CITY}}]
USER: Any = {"role": "user", "content": "The quick brown fox jumps over the lazy dog"}


def ask(server: RunningServer, **fields: Any) -> Any:
    asked: dict[str, Any] = {"model": server.model, "messages": [USER], "max_tokens": 12, "temperature": 0, **fields}
    return server.client.chat.completions.create(**asked)


def test_tools_that_are_not_called(tiny: RunningServer) -> None:
    """The template of the tiny model knows no tools: they are put into its system message."""
    [choice] = ask(tiny, tools=TOOLS, extra_body={"ignore_eos": True}).choices
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)
    assert choice.message.content
    stream = list(ask(tiny, tools=TOOLS, stream=True, extra_body={"ignore_eos": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == choice.message.content
    with_tools, without = (ask(tiny, **fields).usage.prompt_tokens for fields in ({"tools": TOOLS}, {}))
    assert with_tools > without + 50
    assert ask(tiny, tools=TOOLS, tool_choice="none").usage.prompt_tokens == without
    assert "tool_call_parser: json (automatic)" in tiny.log()


def test_a_conversation_with_results(tiny: RunningServer) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
    ]
    answer = ask(tiny, messages=messages, tools=TOOLS)
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens > ask(tiny, tools=TOOLS).usage.prompt_tokens


def test_the_prompt_may_open_the_reasoning(thinker: RunningServer) -> None:
    answer = ask(thinker, extra_body={"ignore_eos": True})
    message = answer.choices[0].message
    assert message.content == ""
    assert message.reasoning_content
    assert answer.usage.completion_tokens_details.reasoning_tokens == answer.usage.completion_tokens == 12
    assert "tool_call_parser: hermes (automatic)" in thinker.log()
    assert "reasoning_parser: think (automatic)" in thinker.log()
    deltas = [chunk.choices[0].delta for chunk in ask(thinker, stream=True, extra_body={"ignore_eos": True})]
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == message.reasoning_content
    assert not any(delta.content for delta in deltas)


def test_reasoning_that_is_switched_off_is_content(thinker: RunningServer) -> None:
    for fields in ({"reasoning_effort": "none"}, {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}):
        answer = ask(thinker, tools=TOOLS, **fields)
        assert answer.choices[0].message.content
        assert not hasattr(answer.choices[0].message, "reasoning_content")
        assert answer.usage.completion_tokens_details.reasoning_tokens == 0
