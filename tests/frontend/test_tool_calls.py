"""The parsers of tool calls, by form: what is found, that chunking changes nothing, and that no text is lost."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.frontend.api.chat import whole_message
from ramet.frontend.tool_calls import FORMS, Delta, ToolCallParser

NAMES = ("get_weather", "now")
PARIS = '{"city": "Paris"}'
Found = tuple[str | None, list[tuple[str, str]]]


def feed(form: str, texts: list[str], parallel: bool = True) -> list[Delta]:
    parser = ToolCallParser(form, NAMES, parallel)
    deltas = [delta for text in texts for delta in parser.feed(text, final=False)]
    return deltas + parser.feed("", final=True)


def found(form: str, *texts: str, parallel: bool = True) -> Found:
    message = whole_message(feed(form, list(texts), parallel))
    calls = [call["function"] for call in message.get("tool_calls", [])]
    return message["content"], [(call["name"], call["arguments"]) for call in calls]


def call(arguments: str = PARIS, name: str = "get_weather", key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


WEATHER = ("get_weather", PARIS)
ODD = '{"city": "a\\"}]{<tool_call>", "l": [{"x": []}, "\\\\"], "é": null}'
CASES: list[tuple[str, str, Found]] = [
    ("hermes", f"<tool_call>\n{call()}\n</tool_call>", (None, [WEATHER])),
    ("hermes", f"<tool_call>{call()}</tool_call>", (None, [WEATHER])),
    (
        "hermes",
        f"Let me see.\n\n<tool_call>\n{call()}\n</tool_call>\n<tool_call>\n{call(ODD)}\n</tool_call>\n",
        ("Let me see.", [WEATHER, ("get_weather", ODD)]),
    ),
    ("hermes", f"<tool_call>[{call()}, {call('{}', 'now')}]</tool_call>", (None, [WEATHER, ("now", "{}")])),
    ("hermes", f"<tool_call>{call()[:-1]}</tool_call> done", (" done", [WEATHER])),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', (None, [("now", "{}")])),
    ("hermes", f"no tag: {call()}", (f"no tag: {call()}", [])),
    ("hermes", f"<tool_call>{call(name='other')}</tool_call>", (f"<tool_call>{call(name='other')}</tool_call>", [])),
    ("hermes", "a <tool_call> is a tag\n", ("a <tool_call> is a tag\n", [])),
    (
        "hermes",
        "<tool_call><function=now></function></tool_call>",
        ("<tool_call><function=now></function></tool_call>", []),
    ),
    ("llama3", call(key="parameters"), (None, [WEATHER])),
    ("llama3", f"<|python_tag|>{call(key='parameters')}", (None, [WEATHER])),
    ("llama3", f'{{"type": "function", {call(key="parameters")[1:]}', (None, [WEATHER])),
    ("llama3", f"<|python_tag|>{call()}; {call('{}', 'now')}", (None, [WEATHER, ("now", "{}")])),
    ("llama3", f"{call()}; {call(name='other')}", (f"; {call(name='other')}", [WEATHER])),
    ("llama3", f"{call()}\n{call('{}', 'now')}", (None, [WEATHER, ("now", "{}")])),
    ("llama3", "<|python_tag|>print(1)", ("<|python_tag|>print(1)", [])),
    ("mistral", f"[TOOL_CALLS][{call()}, {call('{}', 'now')}]", (None, [WEATHER, ("now", "{}")])),
    ("mistral", f"[TOOL_CALLS] [{call()}] ok", (" ok", [WEATHER])),
    ("mistral", f"[TOOL_CALLS]{call()}", (None, [WEATHER])),
    ("mistral", f"[TOOL_CALLS]get_weather[ARGS]{PARIS}", (None, [WEATHER])),
    (
        "mistral",
        f"Now: [TOOL_CALLS]get_weather[CALL_ID]a1B2[ARGS]{ODD}[TOOL_CALLS]now[ARGS]{{}}",
        ("Now:", [("get_weather", ODD), ("now", "{}")]),
    ),
    ("mistral", f"[TOOL_CALLS]other[ARGS]{PARIS}", (f"[TOOL_CALLS]other[ARGS]{PARIS}", [])),
    ("json", call(), (None, [WEATHER])),
    ("json", call(key="parameters"), (None, [WEATHER])),
    ("json", f"[{call()}, {call('{}', 'now')}]", (None, [WEATHER, ("now", "{}")])),
    ("json", f"Here:\n```json\n{call()}\n```", ("Here:\n```json\n```", [WEATHER])),
    ("json", '{"name": "Bob", "arguments": {}}', ('{"name": "Bob", "arguments": {}}', [])),
    ("json", '{"answer": [1, {"a": 2}]}\n', ('{"answer": [1, {"a": 2}]}\n', [])),
    ("json", f"[{call()}, 3] x", (", 3] x", [WEATHER])),
    ("json", '{"name": "now", "arguments": "text"}', ('{"name": "now", "arguments": "text"}', [])),
]


@pytest.mark.parametrize(("form", "text", "expected"), CASES)
def test_what_is_found(form: str, text: str, expected: Found) -> None:
    assert found(form, text) == expected
    assert found(form, *text) == expected  # one character at a time


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        ("hermes", '<tool_call>\n{"name": "get_we', ('<tool_call>\n{"name": "get_we', [])),
        ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"ci', (None, [("get_weather", '{"ci')])),
        ("hermes", f"<tool_call>\n{call()}\n</tool", (None, [WEATHER])),
        ("hermes", "text <tool", ("text <tool", [])),
        ("llama3", f"{call()};", (None, [WEATHER])),
        ("mistral", f"[TOOL_CALLS][{call()}, ", (None, [WEATHER])),
        ("json", "  ", ("  ", [])),
    ],
)
def test_a_text_that_is_cut_off_gives_what_is_there(form: str, text: str, expected: Found) -> None:
    assert found(form, text) == expected
    assert found(form, *text) == expected


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        ("json", call(), (None, [WEATHER])),
        ("json", f"[{call()}, {call('{}', 'now')}]", (None, [WEATHER, ("now", "{}")])),
        ("llama3", f"{call()}; {call()}", (None, [WEATHER, WEATHER])),
        ("hermes", f"<tool_call>{call()}</tool_call>\n<tool_call>{call()}</tool_call>", (None, [WEATHER, WEATHER])),
        *(
            (form, text, (text, []))
            for form in ("json", "llama3", "hermes")
            for text in (
                f'{{"plan": [{call()}]}}',
                f'{{"said": "<tool_call>{call()}</tool_call>"}}',
                f" {call(name='other')} {call()}",
                '{"name": "get_we',
                "",
                " ",
            )
        ),
    ],
)
def test_where_calls_lead_they_are_found_nowhere_else(form: str, text: str, expected: Found) -> None:
    for texts in ([text], list(text)):
        parser = ToolCallParser(form, NAMES, True, lead=True)
        deltas = [delta for text in texts for delta in parser.feed(text, final=False)] + parser.feed("", final=True)
        message = whole_message(deltas)
        calls = [call["function"] for call in message.get("tool_calls", [])]
        assert (message["content"], [(call["name"], call["arguments"]) for call in calls]) == expected


def test_deltas_have_id_type_and_name_once() -> None:
    text = f"Hi <tool_call>\n{call(ODD)}\n</tool_call>\n<tool_call>{call('{}', 'now')}</tool_call>"
    deltas = feed("hermes", list(text))
    assert "".join(delta.get("content", "") for delta in deltas) == "Hi"
    calls = [item for delta in deltas for item in delta.get("tool_calls", [])]
    for index, (name, arguments) in enumerate([("get_weather", ODD), ("now", "{}")]):
        first, *others = [item for item in calls if item["index"] == index]
        assert re.fullmatch(r"call_[0-9a-f]{24}", first["id"])
        assert first["type"] == "function"
        assert first["function"] == {"name": name, "arguments": ""}
        assert all(item.keys() == {"index", "function"} and item["function"].keys() == {"arguments"} for item in others)
        assert "".join(item["function"]["arguments"] for item in others) == arguments
    assert len({item["id"] for item in calls if "id" in item}) == 2
    assert len(calls) > len(ODD)  # they came as they were written


def test_arguments_come_before_their_end() -> None:
    parser = ToolCallParser("hermes", NAMES, True)
    assert parser.feed('<tool_call>{"name": "get_weather"', final=False) == []
    [first] = parser.feed(', "arguments": ', final=False) + parser.feed("{", final=False)[:1]
    assert first["tool_calls"][0]["function"]["name"] == "get_weather"
    assert parser.feed('"city": "Pa', final=False) == [
        {"tool_calls": [{"index": 0, "function": {"arguments": '"city": "Pa'}}]}
    ]


@pytest.mark.parametrize("form", FORMS)
def test_without_parallel_calls_the_first_counts(form: str) -> None:
    text = {
        "hermes": f"a<tool_call>{call()}</tool_call><tool_call>{call()}</tool_call>z",
        "llama3": f"a{call()};{call()}z",
        "mistral": f"a[TOOL_CALLS][{call()},{call()}]z",
        "json": f"a[{call()},{call()}]z",
    }[form]
    assert found(form, text, parallel=False) == ("a", [WEATHER])
    assert found(form, *text, parallel=False) == ("a", [WEATHER])


def test_text_is_held_back_only_where_a_call_may_begin() -> None:
    parser = ToolCallParser("json", NAMES, True)
    assert parser.feed("if (a) ", final=False) == [{"content": "if (a)"}]
    assert parser.feed("{", final=False) == []
    assert parser.feed("b", final=False) == [{"content": " {b"}]
    parser = ToolCallParser("hermes", NAMES, True)
    assert parser.feed("1 < 2 <too", final=False) == [{"content": "1 < 2"}]
    assert parser.feed("n>", final=False) == [{"content": " <toon>"}]


PIECES = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "<|python_tag|>",
        call(),
        call(ODD),
        call("{}", "now", "parameters"),
        call(name="other"),
        '{"name": "now"}',
        "get_weather",
        PARIS,
        *'{}[],; \n"<',
        "text",
        "é\n\n",
    ]
)


@given(form=st.sampled_from(sorted(FORMS)), pieces=st.lists(PIECES, max_size=12), data=st.data())
def test_chunks_do_not_matter_and_nothing_is_lost(form: str, pieces: list[str], data: st.DataObject) -> None:
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    content, calls = found(form, *chunks)
    assert (content, calls) == found(form, text)
    if not calls:
        assert content == text
    # Every argument is in the text, and apart from markup and white space so is the rest, in order.
    rest = text
    for _, arguments in calls:
        assert arguments == "{}" or arguments in text
        rest = rest.replace(arguments, "", 1)
    letters = re.sub(r'\s|[{}\[\],;:"]', "", content or "")
    position = 0
    for letter in letters:
        position = text.index(letter, position) + 1
    for word in ("text", "é", "other"):
        if word not in "".join(arguments for _, arguments in calls):
            assert (content or "").count(word) == text.count(word)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    form=st.sampled_from(sorted(FORMS)),
    values=st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=4), min_size=1, max_size=3),
    size=st.integers(1, 9),
    ascii_only=st.booleans(),
)
def test_arguments_arrive_as_they_were_written(
    form: str, values: list[dict[str, Any]], size: int, ascii_only: bool
) -> None:
    arguments = [json.dumps(value, ensure_ascii=ascii_only) for value in values]
    calls = [call(item) for item in arguments]
    text = {
        "hermes": "\n".join(f"<tool_call>\n{item}\n</tool_call>" for item in calls),
        "llama3": "; ".join(calls),
        "mistral": "".join(f"[TOOL_CALLS]get_weather[ARGS]{item}" for item in arguments),
        "json": f"[{', '.join(calls)}]",
    }[form]
    chunks = [text[at : at + size] for at in range(0, len(text), size)]
    assert found(form, *chunks) == (None, [("get_weather", item) for item in arguments])
