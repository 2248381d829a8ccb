"""Bodies as other people's programs send them, each caught from the program itself.

The model's weights are random: only form is checked.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from support.server import RunningServer

pytestmark = pytest.mark.e2e

# What `ai` with `@ai-sdk/openai-compatible` makes of z.record(), and `@langchain/openai`, which adds titles.
RECORD = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "d": {
            "type": "object",
            "propertyNames": {"type": "string", "title": "person"},
            "additionalProperties": {"type": "number", "title": "person"},
            "maxProperties": 0,
        },
    },
    "required": ["name", "d"],
    "additionalProperties": False,
}
# What `instructor` makes of a pydantic model: it says nothing of other names.
PERSON = {
    "$defs": {"K": {"enum": ["a", "b"], "title": "K", "type": "string"}},
    "properties": {
        "name": {"maxLength": 10, "title": "Name", "type": "string"},
        "age": {"maximum": 150, "minimum": 0, "title": "Age", "type": "integer"},
        "kind": {"$ref": "#/$defs/K"},
        "opt": {"anyOf": [{"type": "boolean"}, {"type": "null"}], "default": None, "title": "Opt"},
    },
    "required": ["age", "kind", "name"],
    "type": "object",
}


def answer(http: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def chat(server: RunningServer, **fields: Any) -> Any:
    body = {"model": server.model, "messages": [{"role": "user", "content": "Bob is 30, kind a."}], **fields}
    [choice] = answer(server.http, "/v1/chat/completions", {"max_tokens": 300, "temperature": 1, "seed": 5, **body})[
        "choices"
    ]
    assert choice["finish_reason"] == "stop" or fields.get("tools")
    return choice["message"]


def test_a_schema_of_the_ai_sdk(tiny: RunningServer) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": RECORD, "strict": True, "name": "response"}}
    jsonschema.validate(json.loads(chat(tiny, response_format=form)["content"]), RECORD)


def test_a_schema_of_instructor_as_a_format_and_as_a_tool(tiny: RunningServer) -> None:
    """Random weights would write other names for ever."""
    form = {"type": "json_schema", "json_schema": {"name": "P", "schema": {**PERSON, "description": "A person"}}}
    tool = {"type": "function", "function": {"name": "P", "description": "A person", "parameters": PERSON}}
    choice = {"type": "function", "function": {"name": "P"}}
    [call] = chat(tiny, tools=[tool], tool_choice=choice)["tool_calls"]
    for text in (chat(tiny, response_format=form)["content"], call["function"]["arguments"]):
        made = json.loads(text)
        jsonschema.validate(made, PERSON)
        assert made.keys() <= PERSON["properties"].keys()  # type: ignore[attr-defined]


def test_scores_of_lm_eval(tiny: RunningServer) -> None:
    """`local-completions` reads the log-probabilities of a continuation by index, and the best token of each place."""
    prompts = [[5, 6, 7, 8], [5, 6, 9]]
    fields = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    choices = answer(tiny.http, "/v1/completions", {"model": tiny.model, "prompt": prompts, **fields})["choices"]
    for prompt, choice in zip(prompts, sorted(choices, key=lambda choice: choice["index"]), strict=True):
        scores, best = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
        assert len(scores) == len(best) == len(prompt) + 1  # one was generated, and is left out there
        assert scores[0] is None and all(score < 0 for score in scores[1:])
        assert all(max(place.values()) >= score for place, score in zip(best[1:], scores[1:], strict=True))


def test_the_remote_tokenizer_of_lm_eval(tiny: RunningServer, tiny_model: Callable[[str], Path]) -> None:
    """What its class reads, which looks for these paths in place of /v1/completions."""
    info = tiny.http.get("/tokenizer_info").json()
    settings = json.loads((tiny_model("llama") / "tokenizer_config.json").read_text())
    assert {name: info[name] for name in ("eos_token", "pad_token", "chat_template")} == {
        name: settings[name] for name in ("eos_token", "pad_token", "chat_template")
    }
    assert "bos_token" not in info
    [eos] = answer(tiny.http, "/tokenize", {"prompt": info["eos_token"], "add_special_tokens": False})["tokens"]
    assert answer(tiny.http, "/detokenize", {"tokens": [eos]})["prompt"] == info["eos_token"]


def test_streams_of_vllm_bench(tiny: RunningServer) -> None:
    body = {
        "model": tiny.model,
        "prompt": "The quick brown fox",
        "repetition_penalty": 1.1,
        "max_tokens": 12,
        "logprobs": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "temperature": 0.0,
        "min_tokens": 12,
    }
    response = tiny.http.post("/v1/completions", json=body)
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert events.pop() == "[DONE]"
    assert json.loads(events[-1])["usage"]["completion_tokens"] == 12


def test_the_context_is_told_in_the_words_by_which_litellm_knows_it(tiny: RunningServer) -> None:
    body = {"model": tiny.model, "prompt": [1] * 5000, "max_tokens": 5}
    error = tiny.http.post("/v1/completions", json=body).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "this model's maximum context length is" in error["message"]
