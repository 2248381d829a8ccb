"""The body of `POST /v1/chat/completions`, and its conversation in the form chat templates expect.

No-ops, accepted because they cannot change the answer here: `store`, `metadata`, `service_tier`, `user`,
`safety_identifier`, the `prompt_cache_*` fields (the prefix cache is automatic), and without tools
`parallel_tool_calls`.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from ramet.frontend.config import FrontendConfig
from ramet.frontend.reasoning import THOUGHTS
from ramet.frontend.schemas.common import GenerationRequest, Int, refuse_unsupported
from ramet.frontend.schemas.tools import FunctionChoice, FunctionTool, Tool, ToolChoice, ToolUse, function_use, tool_use
from ramet.frontend.tool_grammar import tool_grammar
from ramet.ipc.errors import invalid
from ramet.ipc.messages import Chat, Job
from ramet.ipc.sampling import SamplingParams

Role = Literal["developer", "system", "user", "assistant", "tool", "function"]


class FunctionCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`arguments` is a JSON text, as the API gives it."""

    name: str
    arguments: str

    def for_template(self) -> dict[str, Any]:
        """Templates write the arguments as JSON themselves, so they want the object, not its text."""
        try:
            arguments = msgspec.json.decode(self.arguments)
        except (msgspec.DecodeError, RecursionError):
            arguments = self.arguments
        return {"name": self.name, "arguments": arguments if isinstance(arguments, dict) else self.arguments}


class ToolCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    index: Int | None = None


class ChatMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A message of any role. `annotations` comes back from answers that clients append, and says nothing to a model."""

    role: Role
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None
    audio: dict[str, Any] | None = None
    annotations: list[dict[str, Any]] | None = None

    def for_template(self, path: str) -> dict[str, Any]:
        """What the template sees: text content, and only the fields that were given. `path` names it in errors."""
        if self.audio is not None:
            raise invalid(f"{path}.audio: this model takes text only", f"{path}.audio", "unsupported_content")
        if self.content is None and (self.role != "assistant" or not self._says_something()):
            raise invalid(f"{path}.content is missing", f"{path}.content", "missing_required_parameter")
        content = self.content if self.content is not None else self.refusal
        if isinstance(content, list):
            content = "".join([_part_text(part, f"{path}.content[{i}]") for i, part in enumerate(content)])
        # Templates that print the content of a message that only calls tools would print "None".
        message: dict[str, Any] = {"role": self.role, "content": content or ""}
        for field in ("name", "reasoning_content", "tool_call_id"):
            if (value := getattr(self, field)) is not None:
                message[field] = value
        if self.tool_calls:
            calls = [(call.id, call.function.for_template()) for call in self.tool_calls]
            message["tool_calls"] = [{"id": rid, "type": "function", "function": call} for rid, call in calls]
        elif self.function_call is not None:
            message["tool_calls"] = [{"type": "function", "function": self.function_call.for_template()}]
        return message

    def _says_something(self) -> bool:
        return bool(self.tool_calls or self.function_call or self.refusal is not None or self.reasoning_content)


def _part_text(part: dict[str, Any], path: str) -> str:
    kind = part.get("type")
    if kind not in ("text", "refusal"):
        if isinstance(kind, str):
            raise invalid(f"{path}: this model takes text only, got {kind!r}", f"{path}.type", "unsupported_content")
        raise invalid(f"{path}.type must be a string", f"{path}.type", "invalid_type")
    if unknown := part.keys() - {"type", kind}:
        raise invalid(f"unknown parameter: {path}.{min(unknown)}", f"{path}.{min(unknown)}", "unknown_parameter")
    text = part.get(kind)
    if not isinstance(text, str):
        raise invalid(f"{path}.{kind} must be a string", f"{path}.{kind}", "invalid_type")
    return text


class _NotBuilt(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    """Fields that are known, and refused."""

    audio: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    verbosity: str | None = None
    web_search_options: dict[str, Any] | None = None


class ChatRequest(_NotBuilt, kw_only=True, forbid_unknown_fields=True, dict=True):
    """`check` must pass before the rest is used."""

    messages: list[ChatMessage]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: list[FunctionTool] | None = None
    function_call: FunctionChoice | None = None
    modalities: list[str] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    # No-ops.
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    # Extras of other engines.
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    separate_reasoning: bool | None = None

    def check(self) -> None:
        self.check_common()
        refuse_unsupported(self, _NotBuilt.__annotations__)
        _ = self.tool_use  # refuses what it cannot be made of
        if self.modalities is not None and self.modalities != ["text"]:
            raise invalid('modalities: this server supports only ["text"]', "modalities", "unsupported_parameter")
        if not self.messages:
            raise invalid("messages must not be empty", "messages")
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs is only allowed when logprobs is true", "top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise invalid("continue_final_message excludes add_generation_prompt", "continue_final_message")

    @functools.cached_property
    def tool_use(self) -> ToolUse | None:
        """The tools that the model is shown and may call; with the choice "none", none. Raises `RequestError`."""
        if self.functions or self.function_call not in (None, "none"):
            if self.tools or self.tool_choice is not None:
                raise invalid("functions and tools exclude each other", "functions")
            return function_use(self.functions or [], self.function_call)
        return tool_use(self.tools or [], self.tool_choice, self.parallel_tool_calls is not False)

    def prompt(self, config: FrontendConfig) -> Callable[[Job], Chat]:
        """What makes the message to a tokenizer. Raises `RequestError` for what no template can show."""
        tools = self.tool_use
        opens = self.add_generation_prompt
        return functools.partial(
            Chat,
            messages=[message.for_template(f"messages[{index}]") for index, message in enumerate(self.messages)],
            tools=tools.shown if tools is not None else None,
            template_kwargs=self.template_variables(config),
            add_generation_prompt=not self.continue_final_message if opens is None else opens,
            continue_final_message=bool(self.continue_final_message),
        )

    def template_variables(self, config: FrontendConfig) -> dict[str, Any]:
        """What the template gets beside messages and tools. An effort to reason is honoured if the template reads one;
        if it can only switch reasoning on and off, "none" and "medium" do that."""
        given = self.chat_template_kwargs or {}
        effort = self.reasoning_effort
        if effort is None:
            return given
        if "reasoning_effort" in config.template_variables:
            return {"reasoning_effort": effort, **given}
        if "enable_thinking" not in config.template_variables:
            raise invalid("reasoning_effort: this model's chat template knows no such thing", "reasoning_effort")
        if effort not in ("none", "medium"):
            raise invalid(f'reasoning_effort must be "none" or "medium" here, got "{effort}"', "reasoning_effort")
        return {"enable_thinking": effort == "medium", **given}

    def sampling(self, config: FrontendConfig) -> SamplingParams:
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if max_tokens is not None and max_tokens < 1:
            name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
            raise invalid(f"{name} must be at least 1, got {max_tokens}", name)
        params = self.to_sampling(config, max_tokens, (self.top_logprobs or 0) if self.logprobs else None)
        if (use := self.tool_use) is not None:
            params = _with_tools(params, use, config)
        splits = self.splits_reasoning(config)
        if splits and (grammar := params.grammar) is not None:
            grammar = msgspec.structs.replace(grammar, thought=THOUGHTS[config.reasoning_parser])
            params = msgspec.structs.replace(params, grammar=grammar)
        if config.markers_are_special and (use is not None or splits):
            params = msgspec.structs.replace(params, skip_special_tokens=False)
        return params

    def splits_reasoning(self, config: FrontendConfig) -> bool:
        """If not, a grammar leaves no room for reasoning: it would be in the content, which is to match."""
        return config.reasoning_parser != "none" and self.separate_reasoning is not False


def _with_tools(params: SamplingParams, use: ToolUse, config: FrontendConfig) -> SamplingParams:
    if config.tool_call_parser == "none":
        raise invalid("tools: this server was started with --tool-call-parser none", "tools", "unsupported_parameter")
    if use.required:
        return msgspec.structs.replace(params, grammar=tool_grammar(use, config))
    if (grammar := params.grammar) is None:
        return params
    grammar = msgspec.structs.replace(grammar, calls=tool_grammar(use, config))
    return msgspec.structs.replace(params, grammar=grammar)
