"""How the model writes tool calls and reasoning: read from its chat template, unless the user said it.

The text of the template is only looked through for markers. Does not know how the parsers work
(`frontend/tool_calls.py`, `frontend/reasoning.py`).
"""

import logging
import re
from typing import Any

from ramet.frontend.reasoning import THOUGHTS
from ramet.launch.model_info import AddedToken
from ramet.launch.server_args import ConfigError
from ramet.tokenizer_worker.chat_template import ChatTemplate

logger = logging.getLogger(__name__)

# What each form marks its calls with.
_MARKERS = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama3": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
}


def choose_parsers(
    tool_calls: str, reasoning: str, template: ChatTemplate | None, added_tokens: tuple[AddedToken, ...]
) -> dict[str, Any]:
    """Fields of `FrontendConfig`. `tool_calls` and `reasoning` may be "auto". Raises ConfigError for a parser that
    would find no calls."""
    knows_tools = template is not None and "tools" in template.variables
    if tool_calls == "auto":
        tool_calls = _tool_call_form(template.source) if template is not None and knows_tools else "json"
        logger.info("tool_call_parser: %s (automatic)", tool_calls)
    elif not knows_tools and tool_calls not in ("json", "none"):
        raise ConfigError(
            f"tool_call_parser {tool_calls}: the chat template does not know tools, and would not ask the model for "
            "calls in this form; json is the form that works without the template"
        )
    if reasoning == "auto":
        reasoning = _reasoning_family(template.source) if template is not None else "none"
        logger.info("reasoning_parser: %s (automatic)", reasoning)
    wanted = {*_MARKERS.get(tool_calls, ())}
    if (thought := THOUGHTS.get(reasoning)) is not None:
        wanted |= {thought.begin, thought.end}
    markers = [token for token in added_tokens if token.content in wanted]
    return {
        "tool_call_parser": tool_calls,
        "reasoning_parser": reasoning,
        "marker_ids": {token.content: token.id for token in markers},
        "markers_are_special": any(token.special for token in markers),
        "template_variables": tuple(sorted(template.variables)) if template is not None else (),
    }


def _tool_call_form(source: str) -> str:
    if "<tool_call>" in source and "<function=" not in source:  # some write calls as XML in the same tag
        return "hermes"
    if "[TOOL_CALLS]" in source:
        return "mistral"
    if "<|python_tag|>" in source or (
        "<|start_header_id|>" in source and re.search(r"""["']parameters\\?["']""", source)
    ):
        return "llama3"
    return "json"


def _reasoning_family(source: str) -> str:
    if "[THINK]" in source:
        return "mistral"
    return "think" if "</think>" in source else "none"
