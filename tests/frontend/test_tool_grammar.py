"""Grammars of required calls, tried with llguidance itself: what they accept parses and validates, by form."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import pytest
import tokenizers
from support.tiny_models import make_tiny_tokenizer

from ramet.frontend.api.chat import whole_message
from ramet.frontend.config import FrontendConfig
from ramet.frontend.schemas.tools import FunctionName, FunctionTool, NamedChoice, Tool, ToolUse, tool_use
from ramet.frontend.tool_calls import ToolCallParser
from ramet.frontend.tool_grammar import tool_grammar

WEATHER = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/place"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {'odd "key" ü': {"enum": ["Paris", "</tool_call>", 'a"]}']}, "tags": {"type": "array"}},
            "required": ['odd "key" ü'],
            "additionalProperties": False,
        }
    },
}
TOOLS = [("get_weather", WEATHER), ("now", None), ("get-weather_2", {"properties": {"x": {"type": "number"}}})]
ARGUMENTS = '{"city": {"odd \\"key\\" ü": "Paris"}, "days": 3}'
FORMS = ("hermes", "llama3", "mistral", "mistral-named", "json")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["[TOOL_CALLS]", "[ARGS]"])
    tokenizer.add_tokens(["<tool_call>"])  # and its end is spelled out
    return tokenizer


@pytest.fixture(scope="module")
def ll_tokenizer(tokenizer: tokenizers.Tokenizer) -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer(tokenizer.to_str(), eos_token=tokenizer.token_to_id("<|im_end|>"))


def use_of(choice: Any = "required", parallel: bool = True) -> ToolUse:
    tools = [Tool(type="function", function=FunctionTool(name=name, parameters=schema)) for name, schema in TOOLS]
    use = tool_use(tools, choice, parallel)
    assert use is not None
    return use


Match = Callable[..., llguidance.LLMatcher]


@pytest.fixture
def matcher(tokenizer: tokenizers.Tokenizer, ll_tokenizer: llguidance.LLTokenizer) -> Match:
    def make(form: str, use: ToolUse) -> llguidance.LLMatcher:
        names = ["<tool_call>", "[TOOL_CALLS]", *(["[ARGS]"] if form == "mistral-named" else [])]
        config = FrontendConfig(
            host="x",
            port=1,
            served_names=("m",),
            model_path="/m",
            context_length=100,
            vocab_size=50,
            tool_call_parser=form.removesuffix("-named"),
            marker_ids={name: tokenizer.token_to_id(name) for name in names},
        )
        grammar = llguidance.LLMatcher.grammar_from_lark(tool_grammar(use, config).source)
        found = llguidance.LLMatcher(ll_tokenizer, grammar)
        assert not found.is_error(), found.get_error()
        return found

    return make


def one(form: str, name: str = "get_weather", arguments: str = ARGUMENTS) -> str:
    if form == "mistral-named":
        return f"[TOOL_CALLS]{name}[ARGS]{arguments}"
    text = f'{{"name": "{name}", "{"parameters" if form == "llama3" else "arguments"}": {arguments}}}'
    return f"<tool_call>\n{text}\n</tool_call>" if form == "hermes" else text


def several(form: str, *calls: str) -> str:
    between = {"hermes": "\n", "llama3": "; ", "mistral-named": ""}
    if form in between:
        return between[form].join(calls)
    return f"{'[TOOL_CALLS]' if form == 'mistral' else ''}[{', '.join(calls)}]"


def whole(form: str, call: str) -> str:
    return several(form, call) if form == "mistral" else call


@pytest.fixture
def matches(tokenizer: tokenizers.Tokenizer, matcher: Match) -> Callable[..., bool]:
    def matches(form: str, use: ToolUse, text: str) -> bool:
        found = matcher(form, use)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return found.try_consume_tokens(ids) == len(ids) and found.is_accepting()

    return matches


@pytest.mark.parametrize("form", FORMS)
def test_what_matches(form: str, matches: Callable[..., bool]) -> None:
    use = use_of()
    assert matches(form, use, whole(form, one(form)))
    assert matches(form, use, whole(form, one(form, "now", "{}")))
    assert matches(form, use, whole(form, one(form, "get-weather_2", '{"x": 1.5}')))
    assert matches(form, use, several(form, one(form), one(form, "now", "{}"), one(form)))
    for name, arguments in [
        ("get_weather", "{}"),
        ("get_weather", '{"city": {"odd \\"key\\" ü": "Rome"}}'),
        ("get_weather", '{"city": {"odd \\"key\\" ü": "Paris"}, "days": 10}'),
        ("get_weather", '{"city":{"odd \\"key\\" ü": "Paris"}}'),
        ("now", '{"x": 1}'),
        ("get-weather_2", '{"x": "1"}'),
        ("other", "{}"),
        ("get", "{}"),
    ]:
        assert not matches(form, use, whole(form, one(form, name, arguments))), (name, arguments)
    assert not matches(form, use, "Paris is sunny.")
    assert not matches(form, use, "")


@pytest.mark.parametrize("form", FORMS)
def test_one_call(form: str, matches: Callable[..., bool]) -> None:
    for use in (use_of(parallel=False), use_of(NamedChoice(function=FunctionName(name="get_weather")))):
        assert matches(form, use, whole(form, one(form)))
        assert not matches(form, use, several(form, one(form), one(form)))
    assert not matches(form, use, whole(form, one(form, "now", "{}")))


@pytest.mark.parametrize("form", FORMS)
def test_random_answers_parse_and_validate(
    form: str, matcher: Match, tokenizer: tokenizers.Tokenizer, ll_tokenizer: llguidance.LLTokenizer
) -> None:
    """Tokens drawn at random from what the grammar allows: the parser of the form finds calls and nothing else."""
    use = use_of()
    eos = tokenizer.token_to_id("<|im_end|>")
    complete = 0
    for seed in range(30):
        draw, found, ids = random.Random(seed), matcher(form, use), list[int]()
        while not found.is_stopped() and len(ids) < 150:
            mask = found.compute_bitmask()
            allowed = [i for i in range(ll_tokenizer.vocab_size) if mask[i // 8] >> (i % 8) & 1]
            token = eos if eos in allowed else draw.choice(allowed)
            assert found.consume_token(token)
            ids += [token] if token != eos else []
        if not found.is_accepting():
            continue
        complete += 1
        text = tokenizer.decode(ids, skip_special_tokens=False)
        parser = ToolCallParser(form.removesuffix("-named"), use.callable, parallel=True)
        message = whole_message(parser.feed(text, final=True))
        assert message["content"] is None, text
        for call in message["tool_calls"]:
            arguments = json.loads(call["function"]["arguments"])
            jsonschema.validate(arguments, use.callable[call["function"]["name"]])
    assert complete >= 15
