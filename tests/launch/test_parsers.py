"""Which parsers a chat template calls for."""

import logging

import pytest

from ramet.launch.model_info import AddedToken
from ramet.launch.parsers import choose_parsers
from ramet.tokenizer_worker.chat_template import ChatTemplate

USES = "{% for tool in tools %}{{ tool }}{% endfor %}"


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {})


@pytest.mark.parametrize(
    ("source", "form"),
    [
        (USES + "<tool_call></tool_call>", "hermes"),
        (USES + "<tool_call><function=name></tool_call>", "json"),
        (USES + "[TOOL_CALLS]", "mistral"),
        (USES + "<|python_tag|>", "llama3"),
        (USES + '<|start_header_id|>{"name": "f", "parameters": {}}', "llama3"),
        (USES, "json"),
        ("{{ messages }}<tool_call>", "json"),
        (None, "json"),
    ],
)
def test_form_of_calls(source: str | None, form: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        chosen = choose_parsers("auto", "auto", template(source) if source is not None else None, ())
    assert (chosen["tool_call_parser"], chosen["reasoning_parser"]) == (form, "none")
    assert f"tool_call_parser: {form} (automatic)" in caplog.text


@pytest.mark.parametrize(
    ("source", "family"),
    [("{{ messages[0].content.split('</think>')[-1] }}", "think"), ("[THINK]", "mistral"), ("thinking", "none")],
)
def test_family_of_reasoning(source: str, family: str) -> None:
    assert choose_parsers("auto", "auto", template(source), ())["reasoning_parser"] == family
    assert choose_parsers("auto", "none", template(source), ())["reasoning_parser"] == "none"


def test_markers_that_are_tokens() -> None:
    tokens = (AddedToken(5, "<tool_call>"), AddedToken(6, "</think>"), AddedToken(7, "<|im_end|>", True))
    chosen = choose_parsers("hermes", "qwen3", template(USES), tokens)
    assert chosen["marker_ids"] == {"<tool_call>": 5, "</think>": 6}
    assert not chosen["markers_are_special"]
    chosen = choose_parsers("mistral", "none", template(USES), (AddedToken(9, "[TOOL_CALLS]", True), *tokens))
    assert (chosen["marker_ids"], chosen["markers_are_special"]) == ({"[TOOL_CALLS]": 9}, True)


def test_the_template_must_know_tools_for_a_form_of_its_own() -> None:
    for given in (None, template("{{ messages }}")):
        with pytest.raises(ValueError, match="tool_call_parser hermes"):
            choose_parsers("hermes", "none", given, ())
        for form in ("json", "none"):
            assert choose_parsers(form, "none", given, ())["tool_call_parser"] == form
    assert choose_parsers("hermes", "none", template(USES), ())["template_variables"] == ("tools",)
