"""Tools of a chat request, and what of them counts: `ToolUse`, made by `tool_use` after everything was checked.

The older `functions` and `function_call` are the same in other words, with one call at most. Does not know how a model
writes calls (`frontend/tool_calls.py`, `frontend/tool_grammar.py`).
"""

import re
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from ramet.ipc.errors import invalid

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
Mode = Literal["none", "auto", "required"]


class FunctionTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`parameters` is a JSON schema of an object; without it the function takes none. `strict` adds nothing: where a
    call is required its arguments follow the schema anyway, with the choice "auto" they are the model's own."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def schema(self) -> dict[str, Any]:
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object", **self.parameters}

    def for_template(self) -> dict[str, Any]:
        fields = (("description", self.description), ("parameters", self.parameters))
        given = {name: value for name, value in fields if value is not None}
        return {"type": "function", "function": {"name": self.name, **given}}


class Tool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Only functions: `custom` tools, which take free text, are refused."""

    type: str
    function: FunctionTool | None = None
    custom: dict[str, Any] | None = None


class FunctionName(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: str


class NamedChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="function"):
    function: FunctionName


class AllowedTools(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    mode: Literal["auto", "required"]
    tools: list[NamedChoice]


class AllowedChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="allowed_tools"):
    """All tools are shown to the model, these may be called."""

    allowed_tools: AllowedTools


ToolChoice = Mode | NamedChoice | AllowedChoice
FunctionChoice = Literal["none", "auto"] | FunctionName


class ToolUse(msgspec.Struct, frozen=True, kw_only=True):
    """`shown`: the tools as templates want them. `callable`: the schemas of those that may be called, by name.
    `required`: the answer must be a call. `legacy`: it is told as a `function_call`."""

    shown: list[dict[str, Any]]
    callable: dict[str, dict[str, Any]]
    required: bool
    parallel: bool
    legacy: bool


def tool_use(tools: list[Tool], choice: ToolChoice | None, parallel: bool) -> ToolUse | None:
    """None if no tool is to be called. Raises `RequestError`."""
    functions = [_function(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    return _use(functions, "tools", choice, "tool_choice", parallel)


def function_use(functions: list[FunctionTool], choice: FunctionChoice | None) -> ToolUse | None:
    """The same of the older fields."""
    named = NamedChoice(function=choice) if isinstance(choice, FunctionName) else choice
    return _use(functions, "functions", named, "function_call", False)


def _use(
    functions: Sequence[FunctionTool], param: str, choice: ToolChoice | None, choice_param: str, parallel: bool
) -> ToolUse | None:
    _check(functions, param)
    if not functions and choice not in (None, "none"):
        raise invalid(f"{choice_param} is only allowed when {param} are given", choice_param)
    if not functions or choice == "none":
        return None
    callable_ = {function.name: function.schema() for function in functions}
    required = choice == "required"
    if isinstance(choice, NamedChoice):
        callable_ = _only(callable_, [choice.function.name], choice_param)
        required, parallel = True, False
    elif isinstance(choice, AllowedChoice):
        allowed = choice.allowed_tools
        callable_ = _only(callable_, [tool.function.name for tool in allowed.tools], choice_param)
        required = allowed.mode == "required"
    shown = [function.for_template() for function in functions]
    legacy = param == "functions"
    return ToolUse(shown=shown, callable=callable_, required=required, parallel=parallel, legacy=legacy)


def _function(tool: Tool, path: str) -> FunctionTool:
    if tool.type != "function":
        raise invalid(f"{path}.type: this server has only 'function' tools, got {tool.type!r}", f"{path}.type")
    if tool.custom is not None:
        raise invalid(f"{path}.custom is only for tools of type 'custom'", f"{path}.custom")
    if tool.function is None:
        raise invalid(f"{path}.function is missing", f"{path}.function", "missing_required_parameter")
    return tool.function


def _check(functions: Sequence[FunctionTool], param: str) -> None:
    if len(functions) > MAX_TOOLS:
        raise invalid(f"{param}: at most {MAX_TOOLS}, got {len(functions)}", param)
    seen = set()
    for i, function in enumerate(functions):
        path = f"{param}[{i}].function" if param == "tools" else f"{param}[{i}]"
        name = function.name
        if not _NAME.fullmatch(name):
            raise invalid(f"{path}.name must be 1 to 64 letters, digits, _ or -, got {name[:80]!r}", f"{path}.name")
        if name in seen:
            raise invalid(f"{path}.name: {name!r} is given twice", f"{path}.name")
        seen.add(name)
        if (kind := function.schema()["type"]) != "object":
            raise invalid(f"{path}.parameters.type must be 'object', got {kind!r}", f"{path}.parameters")


def _only(callable_: dict[str, dict[str, Any]], names: list[str], param: str) -> dict[str, dict[str, Any]]:
    if not names:
        raise invalid(f"{param} names no tool", param)
    if unknown := [name for name in names if name not in callable_]:
        raise invalid(f"{param}: {unknown[0]!r} is not among the tools", param)
    return {name: callable_[name] for name in names}
