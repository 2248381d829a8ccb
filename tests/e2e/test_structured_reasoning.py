"""Reasoning before what a grammar holds, and calls or a format, through every process of a real engine.

The model is random: a bias makes it begin and end its reasoning, whose tags are tokens of its vocabulary.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from support.server import RunningServer, tiny_flags
from support.tiny_models import replace_rarest_tokens

pytestmark = pytest.mark.e2e

# In the style of Qwen3, which closes the block where it is told not to think; others open it.
TEMPLATE = """{% for tool in tools or [] %}{{ tool | tojson }} in <tool_call></tool_call>
{% endfor %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
{% if opens %}<think>
{% elif enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}"""
QUESTION: Any = [{"role": "user", "content": "Who is it?"}]
PERSON: Any = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
TOOLS: Any = [{"type": "function", "function": {"name": "look_up", "parameters": PERSON}}]
EOS = 2


@pytest.fixture(scope="module")
def reasoning_model(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with two of its rarest tokens made into tags."""
    folder = tmp_path_factory.mktemp("reasoner")
    shutil.copytree(tiny_model("llama"), folder, dirs_exist_ok=True)
    replace_rarest_tokens(folder, "<think>", "</think>", special=False)
    return folder


@pytest.fixture
def reasoner(servers: Any, reasoning_model: Path) -> RunningServer:
    return servers.get(*tiny_flags(reasoning_model), "--chat-template", TEMPLATE)


def ids(server: RunningServer, *texts: str) -> list[int]:
    bodies = [{"prompt": text, "add_special_tokens": False} for text in texts]
    return [server.http.post("/tokenize", json=body).json()["tokens"][0] for body in bodies]


def ask(server: RunningServer, *, begin: float = 100.0, end: float = 4.0, **fields: Any) -> Any:
    """One that begins to think if it may, and then thinks for about ten tokens."""
    begin_id, end_id = ids(server, "<think>", "</think>")
    asked: dict[str, Any] = {
        "model": server.model,
        "messages": QUESTION,
        "max_tokens": 300,
        "temperature": 1,
        "logprobs": True,
        "logit_bias": {str(begin_id): begin, str(end_id): end, **fields.pop("bias", {})},
        "extra_body": {"chat_template_kwargs": fields.pop("template", {})},
        **fields,
    }
    return server.client.chat.completions.create(**asked)


def streamed(server: RunningServer, **fields: Any) -> tuple[str, str, list[Any], Any]:
    """Reasoning, content, deltas of calls, and the usage."""
    chunks = list(ask(server, stream=True, stream_options={"include_usage": True}, **fields))
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    reasoning = "".join(getattr(delta, "reasoning_content", "") for delta in deltas)
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    return reasoning, "".join(delta.content or "" for delta in deltas), calls, chunks[-1].usage


def check_reasoning(answer: Any) -> None:
    """Of an answer with one choice: what its tokens say of the reasoning, the message and the usage say too."""
    [choice] = answer.choices
    tokens = [item.token for item in choice.logprobs.content]
    count = tokens.index("</think>") + 1
    assert answer.usage.completion_tokens_details.reasoning_tokens == count
    text = "".join(tokens[: count - 1]).removeprefix("<think>").strip()
    if text.isascii():
        assert getattr(choice.message, "reasoning_content", "") == text
    assert "think>" not in (choice.message.content or "")


@pytest.mark.parametrize("template", [{}, {"opens": True}], ids=["free", "opened"])
@pytest.mark.parametrize("seed", range(3))
def test_a_schema_behind_reasoning(reasoner: RunningServer, template: dict[str, Any], seed: int) -> None:
    fields: Any = {"response_format": FORMAT, "template": template, "seed": seed}
    answer = ask(reasoner, **fields)
    [choice] = answer.choices
    jsonschema.validate(json.loads(choice.message.content), PERSON)
    assert (choice.finish_reason, bool(choice.message.reasoning_content)) == ("stop", True)
    check_reasoning(answer)
    reasoning, content, calls, usage = streamed(reasoner, **fields)
    assert (reasoning, content, calls) == (choice.message.reasoning_content, choice.message.content, [])
    assert usage.completion_tokens_details == answer.usage.completion_tokens_details


@pytest.mark.parametrize("template", [{}, {"opens": True}], ids=["free", "opened"])
def test_a_required_call_behind_reasoning(reasoner: RunningServer, template: dict[str, Any]) -> None:
    fields: Any = {"tools": TOOLS, "tool_choice": "required", "template": template, "seed": 1}
    fields["parallel_tool_calls"] = False
    answer = ask(reasoner, **fields)
    [choice] = answer.choices
    [call] = choice.message.tool_calls
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    jsonschema.validate(json.loads(call.function.arguments), PERSON)
    check_reasoning(answer)
    reasoning, content, calls, _ = streamed(reasoner, **fields)
    assert (reasoning, content) == (choice.message.reasoning_content, "")
    assert "".join(call.function.arguments for call in calls) == call.function.arguments


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [({"regex": "[0-9]{3}"}, "[0-9]{3}"), ({"ebnf": 'root ::= "yes" | "no"'}, "yes|no")],
    ids=["regex", "ebnf"],
)
def test_other_grammars_and_several_choices(reasoner: RunningServer, fields: Any, pattern: str) -> None:
    extra_body = {**fields, "chat_template_kwargs": {"opens": True}}
    choices = ask(reasoner, extra_body=extra_body, n=3, seed=7).choices
    for choice in choices:
        jsonschema.validate(choice.message.content, {"pattern": f"^({pattern})$"})
    assert len({choice.message.reasoning_content for choice in choices}) == 3


def test_a_block_that_the_template_has_closed_stays_closed(reasoner: RunningServer) -> None:
    answer = ask(reasoner, response_format=FORMAT, template={"enable_thinking": False}, seed=1)
    [choice] = answer.choices
    jsonschema.validate(json.loads(choice.message.content), PERSON)
    assert not hasattr(choice.message, "reasoning_content")
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def test_who_need_not_think_may_begin_at_once(reasoner: RunningServer) -> None:
    [choice] = ask(reasoner, response_format=FORMAT, begin=-100, seed=1).choices
    jsonschema.validate(json.loads(choice.message.content), PERSON)
    assert not hasattr(choice.message, "reasoning_content")


@pytest.mark.parametrize("template", [{}, {"opens": True}], ids=["free", "opened"])
def test_content_that_holds_everything_has_no_reasoning(reasoner: RunningServer, template: dict[str, Any]) -> None:
    extra_body = {"separate_reasoning": False, "chat_template_kwargs": template}
    [choice] = ask(reasoner, response_format=FORMAT, extra_body=extra_body, seed=1).choices
    jsonschema.validate(json.loads(choice.message.content), PERSON)


def test_the_answer_does_not_end_in_the_reasoning(reasoner: RunningServer) -> None:
    """Unless there is no more room: an end in it is no end."""
    fields: Any = {"response_format": FORMAT, "bias": {str(EOS): 100}, "seed": 3}
    answer = ask(reasoner, **fields)
    jsonschema.validate(json.loads(answer.choices[0].message.content), PERSON)
    check_reasoning(answer)
    [choice] = ask(reasoner, **fields, end=-100).choices
    assert (choice.message.content, choice.finish_reason) == ("", "length")
    assert choice.message.reasoning_content


def test_a_death_in_the_reasoning_changes_nothing(reasoner: RunningServer) -> None:
    fields: Any = {"response_format": FORMAT, "end": -100, "max_tokens": 1000, "seed": 5}
    [whole] = ask(reasoner, **fields).choices
    text, killed = "", False
    for chunk in ask(reasoner, stream=True, **fields):
        text += getattr(chunk.choices[0].delta, "reasoning_content", "")
        if len(text) > 60 and not killed:
            os.kill(reasoner.pids()["scheduler-0"], signal.SIGKILL)
            killed = True
    assert text == whole.message.reasoning_content
    assert reasoner.metrics()["ramet_requests_resumed_total"] == 1


def test_calls_or_a_format(reasoner: RunningServer) -> None:
    """Either comes, behind reasoning."""
    kinds = set()
    for seed in range(12):
        answer = ask(reasoner, response_format=FORMAT, tools=TOOLS, seed=seed, parallel_tool_calls=False)
        [choice] = answer.choices
        check_reasoning(answer)
        kinds.add(choice.finish_reason)
        if choice.finish_reason == "tool_calls":
            [call] = choice.message.tool_calls
            assert (choice.message.content, call.function.name) == (None, "look_up")
            jsonschema.validate(json.loads(call.function.arguments), PERSON)
        else:
            assert choice.message.tool_calls is None
            jsonschema.validate(json.loads(choice.message.content), PERSON)
    assert kinds == {"stop", "tool_calls"}


@pytest.mark.parametrize("banned", ["g", "r"])
def test_calls_and_answers_that_begin_alike(tiny: RunningServer, banned: str) -> None:
    """Where calls are plain JSON, and so is the answer: here they part in the middle of the second key."""
    tools: Any = [{"type": "function", "function": {"name": "llllllll"}}]
    letter, quote, *bans = ids(tiny, "l", '"', banned, f"a{banned}")
    [choice] = tiny.client.chat.completions.create(
        model=tiny.model,
        messages=QUESTION,
        tools=tools,
        response_format=FORMAT,
        logit_bias={str(letter): 100, str(quote): 50, **{str(ban): -100 for ban in bans if ban != ids(tiny, "a")[0]}},
        max_tokens=100,
        parallel_tool_calls=False,
    ).choices
    if banned == "g":
        assert [call.function.name for call in choice.message.tool_calls] == ["llllllll"]
        assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    else:
        jsonschema.validate(json.loads(choice.message.content), PERSON)
        assert json.loads(choice.message.content)["name"] == "llllllll"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]}, "tools"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}}, ""),
    ],
    ids=["tools", "response_format"],
)
def test_what_cannot_be_held_is_named(reasoner: RunningServer, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(reasoner, **{"tools": TOOLS, "response_format": FORMAT, **fields})
    assert caught.value.param == (param or "response_format")
    assert '"not"' in caught.value.message
