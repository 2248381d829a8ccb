"""The schemas of `support.contract` say what the SDK's types say, which are generated from the specification."""

from typing import Any

import openai.types as sdk
import openai.types.chat as sdk_chat
import pydantic
import pytest
from openai.types.chat.chat_completion_chunk import ChoiceDelta, ChoiceDeltaToolCall
from support import contract

# What Ramet adds, as docs and `support.contract` say.
EXTRAS = {"matched_stop", "reasoning_content", "max_model_len", "root"}
PAIRS: list[tuple[dict[str, Any], type[pydantic.BaseModel]]] = [
    (contract.CHAT_COMPLETION, sdk_chat.ChatCompletion),
    (contract.MESSAGE, sdk_chat.ChatCompletionMessage),
    (contract.CHAT_CHUNK, sdk_chat.ChatCompletionChunk),
    (contract.DELTA, ChoiceDelta),
    (contract.TOOL_CALL_DELTA, ChoiceDeltaToolCall),
    (contract.TOOL_CALL, sdk_chat.ChatCompletionMessageToolCall),
    (contract.TOKEN_LOGPROB, sdk_chat.ChatCompletionTokenLogprob),
    (contract.COMPLETION, sdk.Completion),
    (contract.COMPLETION_CHUNK, sdk.Completion),
    (contract.USAGE, sdk.CompletionUsage),
    (contract.MODEL, sdk.Model),
    (contract.EMBEDDING_LIST, sdk.CreateEmbeddingResponse),
]


def _fields(schema: dict[str, Any], defs: dict[str, Any], place: str = "$") -> dict[str, set[str]]:
    """The names below each place of an object, for schemas of ours and of pydantic's alike."""
    found: dict[str, set[str]] = {}
    if ref := schema.get("$ref"):
        return _fields(defs[ref.rpartition("/")[2]], defs, place)
    for option in schema.get("anyOf", []) + schema.get("oneOf", []):
        for where, names in _fields(option, defs, place).items():
            merge = set.intersection if where.endswith(" required") else set.union
            found[where] = merge(found.get(where, names), names)
    if "items" in schema:
        found |= _fields(schema["items"], defs, f"{place}[]")
    if "properties" in schema:
        found[place] = set(schema["properties"])
        found[f"{place} required"] = set(schema.get("required", ()))
        for name, below in schema["properties"].items():
            found |= _fields(below, defs, f"{place}.{name}")
    return found


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda value: getattr(value, "__name__", ""))
def test_fields(ours: dict[str, Any], theirs: type[pydantic.BaseModel]) -> None:
    """None is made up, and none that is required is left out."""
    schema = theirs.model_json_schema()
    mine, known = _fields(ours, {}), _fields(schema, schema.get("$defs", {}))
    for place, names in mine.items():
        if place.endswith(" required"):
            assert known[place] <= names, place
        else:
            assert names - EXTRAS <= known[place], place


def test_the_check_can_fail() -> None:
    good: dict[str, Any] = {"id": "m", "object": "model", "created": 1, "owned_by": "ramet"}
    contract.check(good, contract.MODEL)
    for bad in ({**good, "zap": 1}, {**good, "created": "1"}, {**good, "object": "list"}, {"id": "m"}):
        with pytest.raises(AssertionError):
            contract.check(bad, contract.MODEL)
    events = b'data: {"id": "x"}\n\ndata: [DONE]\n\n'
    with pytest.raises(AssertionError, match="required"):
        contract.check_answer("/v1/completions", 200, "text/event-stream", events)
    with pytest.raises(AssertionError, match="ends with"):
        contract.check_answer("/v1/completions", 200, "text/event-stream", b"data: {}\n\n")
