"""Tools in prompts: templates that know them get them as the API has them, others get them in words."""

import json
from typing import Any

import pytest

from ramet.ipc.messages import Chat, Job
from ramet.ipc.sampling import SamplingParams
from ramet.tokenizer_worker.chat_template import ChatTemplate
from ramet.tokenizer_worker.tool_prompt import as_plain_messages

TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln"}}}
USER = {"role": "user", "content": "Weather?"}
TALK: list[dict[str, Any]] = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sun", "tool_call_id": "c1"},
]

# Each in the style of a family, and short.
HERMES = """{%- if tools %}<|im_start|>system
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools>
Put each call inside <tool_call></tool_call>.<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""
LLAMA3 = """{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- if tools is not none %}<|start_header_id|>system<|end_header_id|>
Answer as {"name": function name, "parameters": its arguments}.
{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}<|eot_id|>{% endif %}
{%- for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>
{% if 'tool_calls' in message %}{"name": "{{ message.tool_calls[0].function.name }}", "parameters": {{
message.tool_calls[0].function.arguments | tojson }}}{% else %}{{ message.content }}{% endif %}<|eot_id|>{% endfor %}"""
MISTRAL = """{%- if not tools is defined %}{% set tools = none %}{% endif %}{{ bos_token }}
{%- for message in messages %}{% if message.role == "user" %}
{%- if tools is not none and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif -%}
[INST]{{ message.content }}[/INST]
{%- elif message.tool_calls %}[TOOL_CALLS]{{ message.tool_calls | map(attribute="function") | list | tojson }}</s>
{%- elif message.role == "tool" %}[TOOL_RESULTS]{{ message.content }} {{ message.tool_call_id }}[/TOOL_RESULTS]
{%- endif %}{% endfor %}"""
CHATML = """{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""


def render(source: str, messages: list[dict[str, Any]], tools: Any = TOOLS) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(Chat(Job([], SamplingParams()), messages, tools))


@pytest.mark.parametrize("source", [HERMES, LLAMA3, MISTRAL])
def test_templates_that_know_tools_get_them_as_they_are(source: str) -> None:
    assert "tools" in ChatTemplate(source, {}).variables
    asked, told = render(source, [USER]), render(source, TALK)
    for part in ("get_weather", "Weather?"):
        assert part in asked
    assert '"object"' in asked
    for part in ("get_weather", '{"city": "Köln"}', "sun"):
        assert part in told
    assert "Result of" not in told
    assert "get_weather" not in render(source, [USER], None)


def test_a_template_without_tools_gets_them_in_words() -> None:
    assert "tools" not in ChatTemplate(CHATML, {}).variables
    text = render(CHATML, TALK)
    system, user, assistant, result, end = (
        text.removeprefix("<system>").replace("<assistant>", "<user>").split("<user>")
    )
    assert json.dumps(TOOLS[0]["function"]) in system
    assert user == "Weather?"
    assert json.loads(assistant) == {"name": "get_weather", "arguments": {"city": "Köln"}}
    assert (result, end) == ("Result of the call c1: sun", "")
    assert render(CHATML, [USER], None) == "<user>Weather?<assistant>"


def test_words_join_what_is_there() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "Wait.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "sun", "tool_call_id": "c1"},
        {"role": "tool", "content": "rain", "tool_call_id": "c2"},
        {"role": "assistant", "content": "Both."},
    ]
    before = json.dumps(messages)
    system, *others = as_plain_messages(messages, TOOLS)
    assert system["role"] == "system"
    assert system["content"].startswith("Be brief.\n\n")
    assert [message["role"] for message in others] == ["user", "assistant", "user", "assistant"]
    wait, _, calls = others[1]["content"].partition("\n")
    assert (wait, len(json.loads(calls))) == ("Wait.", 2)
    assert others[2]["content"] == "Result of the call c1: sun\nResult of the call c2: rain"
    assert json.dumps(messages) == before
    assert as_plain_messages(messages[:2], None) == messages[:2]
