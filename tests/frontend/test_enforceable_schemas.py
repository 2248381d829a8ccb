"""Schemas as zod, pydantic and their like write them: what llguidance then takes, and that answers stay valid."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import pytest
import tokenizers
from support.json_schemas import random_schema
from support.tiny_models import make_tiny_tokenizer

from ramet.frontend.schemas.grammar import enforceable, json_grammar
from ramet.ipc.errors import RequestError
from ramet.ipc.sampling import MAX_SOURCE_CHARS
from ramet.scheduler.grammar import compile_grammar

ANY: dict[str, Any] = {"type": "object", "properties": {"a": {}}}
NUMBERS = {"type": "object", "additionalProperties": {"type": "number"}}
TAGGED = {"type": "object", "properties": {"t": {"const": "x"}, "n": {"type": "integer"}}, "required": ["t"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def ll_tokenizer(tokenizer: tokenizers.Tokenizer) -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer(tokenizer.to_str(), eos_token=tokenizer.token_to_id("<|im_end|>"))


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        # zod's records; their titles as LangChain adds them.
        ({**NUMBERS, "propertyNames": {"type": "string"}}, ['{"a": 1, "b": 2}'], ['{"a": "x"}']),
        ({**NUMBERS, "propertyNames": {"type": "string", "title": "T"}}, ["{}"], ["1"]),
        (
            {**NUMBERS, "propertyNames": {"type": "string", "enum": ["a", "b"]}, "required": ["a"]},
            ['{"a": 1}', '{"a": 1, "b": 2}'],
            ["{}", '{"a": 1, "c": 2}', '{"a": "x"}'],
        ),
        # pydantic's dict with literals for keys.
        ({"type": "object", "propertyNames": {"enum": ["a"]}}, ["{}", '{"a": [null]}'], ['{"b": 1}']),
        # Formats that JSON Schema does not define: a pattern beside one holds.
        ({"type": "string", "format": "cuid", "pattern": "^c[0-9]+$"}, ['"c1"'], ['"x"']),
        ({"type": "string", "format": "password"}, ['"x"'], ["1"]),
        ({"type": "string", "format": "date"}, ['"2026-11-23"'], ['"today"']),
        # A name is no keyword.
        ({"type": "object", "properties": {"format": {"const": 1}}, "required": ["format"]}, ['{"format": 1}'], ["{}"]),
        # What lists its names gets no others …
        (ANY, ["{}", '{"a": 1}'], ['{"b": 1}', '{"a": 1, "b": 2}']),
        ({"type": "array", "items": {"$ref": "#/$defs/x"}, "$defs": {"x": ANY}}, ['[{"a": 1}]'], ['[{"b": 1}]']),
        ({"anyOf": [TAGGED, {"type": "null"}]}, ['{"t": "x"}', "null"], ['{"t": "x", "b": 1}']),
        # … unless the schema speaks of them,
        ({**ANY, "additionalProperties": True}, ['{"b": 1}'], ["1"]),
        ({**ANY, "additionalProperties": {"type": "null"}}, ['{"b": null}'], ['{"b": 1}']),
        ({**ANY, "patternProperties": {"^b": {"type": "null"}}}, ['{"b": null, "c": 1}'], ['{"b": 1}']),
        ({**ANY, "required": ["b"]}, ['{"b": 1}'], ["{}"]),
        ({**ANY, "required": ["a"], "minProperties": 2}, ['{"a": 1, "b": 2}'], ['{"a": 1}']),
        # … or describes one object in several places.
        ({"allOf": [ANY, {"properties": {"b": {"type": "null"}}}], "type": "object"}, ['{"a": 1, "b": null}'], ["1"]),
        ({"$ref": "#/$defs/x", "required": ["b"], "$defs": {"x": ANY}}, ['{"b": 1}'], ["{}"]),
        ({"oneOf": [TAGGED, {"type": "null"}]}, ['{"t": "x", "b": 1}', "null"], ["1"]),
        ({"type": "object"}, ['{"a": 1}'], ["1"]),
        ({"type": "object", "properties": {}}, ['{"a": 1}'], ["1"]),
    ],
    ids=lambda value: json.dumps(value)[:80],
)
def test_what_may_be_written(
    tokenizer: tokenizers.Tokenizer,
    ll_tokenizer: llguidance.LLTokenizer,
    schema: dict[str, Any],
    good: list[str],
    bad: list[str],
) -> None:
    def accepts(text: str) -> bool:
        [matcher] = compile_grammar(ll_tokenizer, json_grammar(schema, "response_format"))
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    before = json.dumps(schema)
    assert [accepts(text) for text in good] == [True] * len(good)
    assert [accepts(text) for text in bad] == [False] * len(bad)
    for text in good:
        jsonschema.validate(json.loads(text), schema)
    assert json.dumps(schema) == before  # the template shows it as it was


@pytest.mark.parametrize(
    "schema",
    [
        {"propertyNames": {"pattern": "^a"}},
        {"propertyNames": {"enum": ["a"]}, "properties": {"b": {}}},
        {"propertyNames": {"type": "integer", "enum": [1]}},
        {"propertyNames": False},
        {"propertyNames": {"$ref": "#/$defs/x"}, "$defs": {"x": 1}},
        {"format": ["date"], "properties": [1], "required": 5, "items": 1, "$defs": [], "enum": {"format": "x"}},
        {"properties": {"a": 1}, "required": 7},
        {"const": {"properties": {"a": 1}}, "enum": [{"format": "x"}], "examples": [{"properties": {"a": 1}}]},
        {"format": "iri"},
    ],
    ids=repr,
)
def test_what_is_left_to_llguidance_as_it_stands(schema: dict[str, Any]) -> None:
    assert enforceable(schema) == schema


def test_random_schemas_that_say_all_stay_as_they_are() -> None:
    """Their objects are closed or maps, and their formats are JSON Schema's own."""
    for seed in range(200):
        schema = random_schema(seed)
        assert enforceable(schema) == schema


def test_too_deep_and_too_long() -> None:
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"items": deep}
    with pytest.raises(RequestError, match="response_format: the schema nests too deep"):
        json_grammar(deep, "response_format")
    long = {"format": "x" * MAX_SOURCE_CHARS}
    assert enforceable(long) == long  # and is not walked through
