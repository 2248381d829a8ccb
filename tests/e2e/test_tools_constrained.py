"""Required and named calls through every process: whatever the model, they parse, validate and are all there is.

A random model would not end its reasoning: here it has none. `tests/e2e/test_structured_reasoning.py` has both.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import langchain_openai
import openai
import pytest
from support.server import RunningServer, tiny_flags
from support.tiny_models import replace_rarest_tokens

pytestmark = pytest.mark.e2e

EXAMPLE = Path(__file__).parents[2] / "examples" / "tools.py"
SCHEMAS: dict[str, Any] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 12},
            "unit": {"enum": ["celsius", "fahrenheit"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
    "set-lamp_2": {
        "type": "object",
        "properties": {"place": {"$ref": "#/$defs/place"}, "on": {"type": "boolean"}},
        "required": ["place", "on"],
        "additionalProperties": False,
        "$defs": {"place": {"type": "array", "items": {"enum": ["hall", "up stairs"]}, "minItems": 1, "maxItems": 2}},
    },
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, **({"parameters": schema} if name != "now" else {})}}
    for name, schema in SCHEMAS.items()
]
QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris?"}]


AT_ONCE = {"separate_reasoning": False}


def ask(server: RunningServer, extra_body: dict[str, Any] | None = None, **fields: Any) -> Any:
    asked: dict[str, Any] = {"model": server.model, "messages": QUESTION, "tools": TOOLS, "max_tokens": 200, **fields}
    asked["extra_body"] = {**AT_ONCE, **(extra_body or {})}
    return server.client.chat.completions.create(**asked)


def named(name: str) -> Any:
    return {"type": "function", "function": {"name": name}}


def check(calls: Any) -> list[str]:
    """The names; arguments must parse and validate."""
    for call in calls:
        assert re.fullmatch(r"call_[0-9a-f]{24}", call.id)
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    return [call.function.name for call in calls]


def check_one_call(server: RunningServer, choice: Any, seed: int) -> None:
    answer = ask(server, tool_choice=choice, parallel_tool_calls=False, temperature=1, seed=seed)
    [chosen] = answer.choices
    assert (chosen.message.content, chosen.finish_reason) == (None, "tool_calls")
    [name] = check(chosen.message.tool_calls)
    assert choice == "required" or choice["function"]["name"] == name


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("choice", ["required", *map(named, SCHEMAS)], ids=["required", *SCHEMAS])
def test_one_call_in_the_form_of_hermes(thinker: RunningServer, choice: Any, seed: int) -> None:
    check_one_call(thinker, choice, seed)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (
            {"properties": {"a": False}, "required": ["a"]},
            "Unsatisfiable schema: required property 'a' is unsatisfiable",
        ),
        (
            {"properties": {"a": {"pattern": "(", "type": "string"}}},
            "regex parse error:\n    (\n    ^\nerror: unclosed group",
        ),
        (
            {"$schema": "http://x/y"},
            "Resource 'http://x/y': $schema must be a known draft, and $ref point into",
        ),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_with_the_name_of_its_tool(
    tiny: RunningServer, parameters: dict[str, Any], words: str
) -> None:
    odd = {"type": "function", "function": {"name": "odd-1", "parameters": {"title": "a // b", **parameters}}}
    with pytest.raises(openai.BadRequestError) as caught:
        ask(tiny, tools=[*TOOLS, odd], tool_choice="required")
    assert caught.value.param == "tool_choice"
    message = caught.value.body["message"]
    assert message.startswith(f"tool_choice: the parameters of 'odd-1': {words}") and "x-guidance" not in message


def test_several_calls(thinker: RunningServer) -> None:
    asked: Any = {"tool_choice": "required", "temperature": 1, "seed": 1, "max_tokens": 400}
    # It may not end before, so it calls again and again.
    [choice] = ask(thinker, **asked, extra_body={"min_tokens": 150}).choices
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    assert len(check(choice.message.tool_calls)) > 1


def test_a_stream_of_a_required_call(thinker: RunningServer) -> None:
    asked: Any = {"tool_choice": named("get_weather"), "temperature": 1, "seed": 5}
    [whole] = ask(thinker, **asked).choices[0].message.tool_calls
    choices = [chunk.choices[0] for chunk in ask(thinker, **asked, stream=True)]
    deltas = [call for choice in choices for call in choice.delta.tool_calls or ()]
    assert [call.function.name for call in deltas if call.id] == ["get_weather"]
    assert "".join(call.function.arguments for call in deltas) == whole.function.arguments
    assert len(deltas) > 3
    assert choices[-1].finish_reason == "tool_calls"
    assert not any(choice.delta.content for choice in choices)


def test_the_older_form(thinker: RunningServer) -> None:
    function = {"name": "f", "parameters": SCHEMAS["get_weather"]}
    answer = thinker.client.chat.completions.create(
        model=thinker.model,
        messages=QUESTION,
        functions=[function],
        function_call={"name": "f"},
        max_tokens=200,
        extra_body=AT_ONCE,
    )
    [choice] = answer.choices
    assert choice.finish_reason == "function_call"
    assert choice.message.function_call is not None
    jsonschema.validate(json.loads(choice.message.function_call.arguments), function["parameters"])


def test_a_schema_that_is_none_is_refused(thinker: RunningServer) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": 7}}}]
    body = {"model": thinker.model, "messages": QUESTION, "tools": tools, "tool_choice": "required"}
    response = thinker.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tool_choice"


def test_a_client_library_on_top_of_the_sdk(thinker: RunningServer) -> None:
    chat = langchain_openai.ChatOpenAI(
        base_url=f"{thinker.url}/v1",
        api_key="none",
        model=thinker.model,
        temperature=1,
        seed=3,
        max_tokens=200,
        extra_body=AT_ONCE,
    )
    answer = chat.bind_tools(TOOLS, tool_choice="get_weather").invoke("What is the weather in Paris?")
    [call] = answer.tool_calls
    assert call["name"] == "get_weather"
    jsonschema.validate(call["args"], SCHEMAS["get_weather"])


def test_the_example_with_a_required_call(tiny: RunningServer) -> None:
    command = [sys.executable, str(EXAMPLE), "--base-url", f"{tiny.url}/v1", "--tool-choice", "required"]
    done = subprocess.run([*command, "--max-tokens", "100"], capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert re.search(rb"^get_(weather|time)\(\{", done.stdout, re.MULTILINE)


MISTRAL = "{% for tool in tools or [] %}{{ tool }}{% endfor %}{{ messages[-1].content }} use [TOOL_CALLS]"


@pytest.fixture(scope="module")
def mistral_model(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with two of its rarest tokens made into special ones."""
    folder = tmp_path_factory.mktemp("mistral")
    shutil.copytree(tiny_model("llama"), folder, dirs_exist_ok=True)
    replace_rarest_tokens(folder, "[TOOL_CALLS]", "[ARGS]", special=True)
    return folder


@pytest.fixture
def mistral(servers: Any, mistral_model: Path) -> RunningServer:
    return servers.get(*tiny_flags(mistral_model), "--chat-template", MISTRAL)


@pytest.mark.parametrize("choice", ["required", named("get_weather")], ids=["required", "named"])
def test_markers_that_are_special_tokens(mistral: RunningServer, choice: Any) -> None:
    assert "tool_call_parser: mistral (automatic)" in mistral.log()
    for seed in range(3):
        check_one_call(mistral, choice, seed)
    asked: Any = {"tool_choice": choice, "temperature": 1, "logprobs": True}
    tokens = [item.token for item in ask(mistral, **asked).choices[0].logprobs.content]
    assert (tokens[0], "[ARGS]" in tokens) == ("[TOOL_CALLS]", True)


@pytest.mark.parametrize("choice", ["required", *map(named, SCHEMAS)], ids=["required", *SCHEMAS])
def test_one_call_in_json(tiny: RunningServer, choice: Any) -> None:
    check_one_call(tiny, choice, seed=1)
