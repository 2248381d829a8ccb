"""What of tools and choices is accepted, refused by name, and handed on. Pure: no process, no socket."""

import json
from typing import Any

import msgspec
import pytest

from ramet.frontend.config import FrontendConfig
from ramet.frontend.errors import invalid_json
from ramet.frontend.schemas.chat import ChatRequest
from ramet.ipc.errors import RequestError
from ramet.ipc.sampling import GrammarKind, Thought

CONFIG = FrontendConfig(host="x", port=1, served_names=("m",), model_path="/m", context_length=100, vocab_size=50)
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def function(name: str = "f", **fields: Any) -> dict[str, Any]:
    return {"name": name, **fields}


def tool(name: str = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": function(name, **fields)}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]}}


def chat(config: FrontendConfig = CONFIG, **fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    try:
        request = msgspec.json.decode(json.dumps(body), type=ChatRequest)
    except msgspec.MsgspecError as error:
        raise invalid_json(error) from None
    request.check()
    request.sampling(config)
    request.template_variables(config)
    return request


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{**tool(), "custom": {}}]}, "tools[0].custom"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [tool("")]}, "tools[0].function.name"),
        ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tools": [tool("é")]}, "tools[0].function.name"),
        ({"tools": [tool("f\n")]}, "tools[0].function.name"),
        ({"tools": [tool("x" * 65)]}, "tools[0].function.name"),
        ({"tools": [tool("f"), tool("g"), tool("f")]}, "tools[2].function.name"),
        ({"tools": [tool(zap=1)]}, "tools[0].function.zap"),
        ({"tools": [tool(description=1)]}, "tools[0].function.description"),
        ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters"),
        ({"tools": [tool(parameters={"type": "string"})]}, "tools[0].function.parameters"),
        ({"tools": [tool(strict="yes")]}, "tools[0].function.strict"),
        ({"tools": [tool(f"f{i}") for i in range(129)]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tool_choice": named("f")}, "tool_choice"),
        ({"tool_choice": "any", "tools": [tool()]}, "tool_choice"),
        ({"tool_choice": named("g"), "tools": [tool()]}, "tool_choice"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "f"}}, "tools": [tool()]}, "tool_choice.type"),
        ({"tool_choice": {"type": "function"}, "tools": [tool()]}, "tool_choice.function"),
        ({"tool_choice": allowed("auto", "g"), "tools": [tool()]}, "tool_choice"),
        ({"tool_choice": allowed("auto"), "tools": [tool()]}, "tool_choice"),
        ({"tool_choice": allowed("none", "f"), "tools": [tool()]}, "tool_choice.allowed_tools.mode"),
        ({"functions": [function("a b")]}, "functions[0].name"),
        ({"function_call": "auto"}, "function_call"),
        ({"function_call": {"name": "g"}, "functions": [function()]}, "function_call"),
        ({"function_call": "required", "functions": [function()]}, "function_call"),
        ({"functions": [function()], "tools": [tool()]}, "functions"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
    ],
)
def test_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert caught.value.failure.param == param
    assert param.split("[")[0].split(".")[0] in caught.value.failure.message


def test_what_the_model_is_shown() -> None:
    tools = [tool("f", description="d", parameters=CITY, strict=True), tool("g")]
    use = chat(tools=tools).tool_use
    assert use is not None
    assert use.shown == [tool("f", description="d", parameters=CITY), tool("g")]
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    assert use.callable == {"f": CITY, "g": nothing}
    assert (use.required, use.parallel, use.legacy) == (False, True, False)


def test_no_use() -> None:
    assert chat().tool_use is None
    assert chat(tools=[]).tool_use is None
    assert chat(tools=[tool()], tool_choice="none").tool_use is None
    assert chat(functions=[function()], function_call="none").tool_use is None


@pytest.mark.parametrize(
    ("fields", "names", "required", "parallel"),
    [
        ({}, "fg", False, True),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, "fg", False, False),
        ({"tool_choice": "required"}, "fg", True, True),
        ({"tool_choice": "required", "parallel_tool_calls": False}, "fg", True, False),
        ({"tool_choice": named("g")}, "g", True, False),
        ({"tool_choice": allowed("auto", "f")}, "f", False, True),
        ({"tool_choice": allowed("required", "f")}, "f", True, True),
    ],
)
def test_choices(fields: dict[str, Any], names: str, required: bool, parallel: bool) -> None:
    request = chat(tools=[tool("f"), tool("g")], **fields)
    use = request.tool_use
    assert use is not None
    assert (list(use.callable), use.required, use.parallel) == (list(names), required, parallel)
    assert len(use.shown) == 2  # what may be called changes nothing of the prompt
    grammar = request.sampling(CONFIG).grammar
    if required:
        assert grammar is not None
        assert (grammar.kind, grammar.param) == (GrammarKind.LARK, "tool_choice")
    else:
        assert grammar is None


def test_the_older_fields() -> None:
    use = chat(functions=[function("f"), function("g")]).tool_use
    assert use is not None
    assert (use.required, use.parallel, use.legacy, list(use.callable)) == (False, False, True, ["f", "g"])
    request = chat(functions=[function("f"), function("g")], function_call={"name": "g"})
    use, grammar = request.tool_use, request.sampling(CONFIG).grammar
    assert use is not None and grammar is not None
    assert (use.required, list(use.callable), grammar.param) == (True, ["g"], "function_call")


FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": FORMAT}, "response_format"),
        ({"response_format": {"type": "json_object"}, "tool_choice": "auto"}, "response_format"),
        ({"regex": "a", "tool_choice": allowed("auto", "g")}, "regex"),
        ({"ebnf": 'root ::= "a"', "parallel_tool_calls": False}, "ebnf"),
    ],
)
def test_calls_or_a_format(fields: dict[str, Any], param: str) -> None:
    asked = {"tools": [tool("f"), tool("g")], **fields}
    grammar = chat(**asked).sampling(CONFIG).grammar
    assert grammar is not None and grammar.calls is not None
    assert (grammar.param, grammar.calls.param) == (param, "tools")
    assert "call_0" in grammar.calls.source
    forced = chat(**{**asked, "tool_choice": "required"}).sampling(CONFIG).grammar
    assert forced is not None
    assert (forced.param, forced.calls) == ("tool_choice", None), "the format has no part in a call"
    without = chat(**{**asked, "tool_choice": "none"}).sampling(CONFIG).grammar
    assert without == msgspec.structs.replace(grammar, calls=None)


def test_functions_or_a_format() -> None:
    grammar = chat(functions=[function("f")], response_format=FORMAT).sampling(CONFIG).grammar
    assert grammar is not None and grammar.calls is not None
    assert (grammar.param, grammar.calls.param) == ("response_format", "functions")


def test_a_grammar_leaves_room_for_reasoning_that_is_told_apart() -> None:
    thinker = msgspec.structs.replace(CONFIG, reasoning_parser="mistral")
    for fields in ({"regex": "a"}, {"tools": [tool()], "tool_choice": "required"}):
        grammar = chat(thinker, **fields).sampling(thinker).grammar
        assert grammar is not None and grammar.thought == Thought("[THINK]", "[/THINK]")
        within = chat(thinker, **fields, separate_reasoning=False).sampling(thinker).grammar
        assert within is not None and within.thought is None
        none = chat(**fields).sampling(CONFIG).grammar
        assert none is not None and none.thought is None


def test_special_tokens_are_shown_where_markers_are_special() -> None:
    special = msgspec.structs.replace(CONFIG, tool_call_parser="mistral", markers_are_special=True)
    assert chat(special).sampling(special).skip_special_tokens
    assert not chat(special, tools=[tool()], skip_special_tokens=True).sampling(special).skip_special_tokens
    assert chat(tools=[tool()]).sampling(CONFIG).skip_special_tokens
    reasoning = msgspec.structs.replace(special, reasoning_parser="mistral")
    assert not chat(reasoning).sampling(reasoning).skip_special_tokens
    assert chat(reasoning, separate_reasoning=False).sampling(reasoning).skip_special_tokens


def test_a_server_without_a_parser_refuses_tools() -> None:
    none = msgspec.structs.replace(CONFIG, tool_call_parser="none")
    with pytest.raises(RequestError) as caught:
        chat(none, tools=[tool()])
    assert caught.value.failure.param == "tools"
    assert chat(none, tools=[tool()], tool_choice="none").tool_use is None


def test_effort_to_reason() -> None:
    graded = msgspec.structs.replace(CONFIG, template_variables=("messages", "reasoning_effort", "enable_thinking"))
    assert chat(graded, reasoning_effort="low").template_variables(graded) == {"reasoning_effort": "low"}
    own = {"reasoning_effort": "mine"}
    assert chat(graded, reasoning_effort="low", chat_template_kwargs=own).template_variables(graded) == own
    switch = msgspec.structs.replace(CONFIG, template_variables=("enable_thinking",))
    assert chat(switch, reasoning_effort="none").template_variables(switch) == {"enable_thinking": False}
    assert chat(switch, reasoning_effort="medium").template_variables(switch) == {"enable_thinking": True}
    with pytest.raises(RequestError) as caught:
        chat(switch, reasoning_effort="high")
    assert caught.value.failure.param == "reasoning_effort"
