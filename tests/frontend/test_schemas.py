"""What the request bodies accept, refuse by name, and turn into sampling parameters. Pure: no process, no socket."""

import json
from typing import Any

import msgspec
import pytest

from ramet.frontend.config import FrontendConfig
from ramet.frontend.errors import error_body, invalid_json
from ramet.frontend.schemas.chat import ChatRequest
from ramet.frontend.schemas.completions import CompletionRequest
from ramet.ipc.errors import Failure, RequestError
from ramet.ipc.messages import Chat, Job
from ramet.ipc.sampling import Grammar, GrammarKind, SamplingParams

CONFIG = FrontendConfig(
    host="x", port=1, served_names=("m",), model_path="/m", context_length=100, vocab_size=50, file_storage_path="/s"
)
USER = {"role": "user", "content": "hi"}


def json_schema(name: str = "n", schema: Any = None) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}


def decode(kind: type, fields: dict[str, Any]) -> Any:
    try:
        request = msgspec.json.decode(json.dumps(fields), type=kind)
    except msgspec.MsgspecError as error:
        raise invalid_json(error) from None
    request.check()
    return request


def chat(**fields: Any) -> ChatRequest:
    return decode(ChatRequest, {"model": "m", "messages": [USER], **fields})


def prompt(**fields: Any) -> Chat:
    return chat(**fields).prompt(CONFIG)(Job([], SamplingParams()))


def completion(**fields: Any) -> CompletionRequest:
    return decode(CompletionRequest, {"model": "m", "prompt": "hi", **fields})


def to_engine(make: Any, fields: dict[str, Any]) -> None:
    request = make(**fields)
    request.sampling(CONFIG)
    if isinstance(request, ChatRequest):
        request.prompt(CONFIG)
    else:
        request.prompts(CONFIG.vocab_size)


def refused(make: Any, **fields: Any) -> Failure:
    """The failure that the whole path from body to engine gives."""
    with pytest.raises(RequestError) as caught:
        to_engine(make, fields)
    assert error_body(caught.value.failure)["error"]["type"] == "invalid_request_error"
    return caught.value.failure


def test_null_is_absent() -> None:
    names = [field for field in ChatRequest.__struct_fields__ if field not in ("model", "messages")]
    silent, explicit = chat(), chat(**dict.fromkeys(names))
    assert explicit == silent
    assert explicit.sampling(CONFIG) == SamplingParams()
    names = [field for field in CompletionRequest.__struct_fields__ if field not in ("model", "prompt")]
    assert completion(**dict.fromkeys(names)) == completion()
    assert completion().sampling(CONFIG) == SamplingParams(max_tokens=16)


def test_integers_are_good_floats() -> None:
    assert chat(temperature=0, top_p=1).sampling(CONFIG).temperature == 0.0


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"n": True}, "n", "invalid_type"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
        ({"temperature": "1"}, "temperature", "invalid_type"),
        ({"seed": 2**64}, "seed", "invalid_type"),
        ({"top_k": 10**30}, "top_k", "invalid_type"),
        ({"stop": [1]}, "stop[0]", "invalid_type"),
        ({"logit_bias": {"1": "x"}}, "logit_bias", "invalid_type"),
        ({"zap": 1}, "zap", "unknown_parameter"),
        ({"stream": True, "stream_options": {"zap": 1}}, "stream_options.zap", "unknown_parameter"),
        ({"temperature": 2.5}, "temperature", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 129}, "n", "invalid_value"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"logit_bias": {"50": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"١": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": -101}}, "logit_bias.5", "invalid_value"),
        ({"stop_token_ids": [50]}, "stop_token_ids", "invalid_value"),
        ({"rid": ""}, "rid", "invalid_type"),
        ({"rid": "x" * 257}, "rid", "invalid_type"),
        ({"regex": "a+", "ebnf": "a"}, "ebnf", "invalid_value"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "regex", "invalid_value"),
        ({"response_format": {"type": "structural_tag", "structures": []}}, "response_format", "unsupported_parameter"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "invalid_type"),
        ({"response_format": {"type": "text", "zap": 1}}, "response_format.zap", "unknown_parameter"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
            "missing_required_parameter",
        ),
        *(
            ({"response_format": json_schema(name=name)}, "response_format.json_schema.name", "invalid_value")
            for name in ("", "a b", "é", "x" * 65, "a\n")
        ),
    ],
)
@pytest.mark.parametrize("make", [chat, completion])
def test_refused_by_both(make: Any, fields: dict[str, Any], param: str, code: str) -> None:
    failure = refused(make, **fields)
    assert (failure.param, failure.code) == (param, code)
    # The message alone must tell what to mend.
    assert param.split("[")[0] in failure.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [USER, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
        ({"messages": [{**USER, "zap": 1}]}, "messages[0].zap"),
        ({"messages": [{**USER, "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0].type"),
        ({"messages": [{**USER, "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{**USER, "content": [{"text": "a"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{**USER, "content": [{"type": "text", "text": "a", "b": 1}]}]}, "messages[0].content[0].b"),
        ({"messages": [{"role": "assistant", "audio": {"id": "x"}}]}, "messages[0].audio"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"prediction": {"type": "content"}}, "prediction"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"verbosity": "low"}, "verbosity"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"best_of": 2}, "best_of"),
    ],
)
def test_refused_by_chat(fields: dict[str, Any], param: str) -> None:
    assert refused(chat, **fields).param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, True]}, "prompt[1]"),
        ({"prompt": [50]}, "prompt"),
        ({"prompt": [[1], [-1]]}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"suffix": "x", "echo": True}, "suffix"),
        ({"suffix": "x", "prompt": [1]}, "suffix"),
        ({"best_of": 21}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"messages": []}, "messages"),
    ],
)
def test_refused_by_completions(fields: dict[str, Any], param: str) -> None:
    assert refused(completion, **fields).param == param


def test_missing_fields_are_named() -> None:
    with pytest.raises(RequestError) as caught:
        decode(ChatRequest, {"model": "m"})
    assert (caught.value.failure.param, caught.value.failure.code) == ("messages", "missing_required_parameter")


def test_accepted_without_effect() -> None:
    request = chat(
        store=True,
        metadata={"a": "b"},
        service_tier="auto",
        user="u",
        safety_identifier="s",
        prompt_cache_key="k",
        prompt_cache_retention="24h",
        parallel_tool_calls=False,
        tools=[],
        tool_choice="none",
        functions=[],
        function_call="none",
        modalities=["text"],
        response_format={"type": "text"},
    )
    assert request.sampling(CONFIG) == chat().sampling(CONFIG)
    assert completion(best_of=2, n=2, suffix="").sampling(CONFIG) == completion().sampling(CONFIG)
    assert completion(best_of=1, stream=True).sampling(CONFIG) == completion().sampling(CONFIG)


@pytest.mark.parametrize(
    ("fields", "kind", "source", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type":"object"}', "response_format"),
        (
            {"response_format": json_schema("a-_9" * 16, {"enum": ["é"]})},
            "json_schema",
            '{"enum":["é"]}',
            "response_format",
        ),
        ({"response_format": json_schema()}, "json_schema", "{}", "response_format"),
        ({"regex": "a|b"}, "regex", "a|b", "regex"),
        ({"ebnf": 'root ::= "a"', "response_format": {"type": "text"}}, "ebnf", 'root ::= "a"', "ebnf"),
    ],
)
@pytest.mark.parametrize("make", [chat, completion])
def test_grammars(make: Any, fields: dict[str, Any], kind: str, source: str, param: str) -> None:
    assert make(**fields).sampling(CONFIG).grammar == Grammar(GrammarKind(kind), source, param)


def test_defaults_of_the_model_stand_where_the_request_is_silent() -> None:
    config = msgspec.structs.replace(CONFIG, default_sampling={"temperature": 0.6, "top_k": 20.0, "top_p": 0.9})
    params = chat(top_p=1).sampling(config)
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 20, 1.0)
    assert isinstance(params.top_k, int)


def test_every_extra_reaches_the_engine() -> None:
    params = chat(
        top_k=1,
        min_p=0.1,
        repetition_penalty=1.5,
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=[3],
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"7": 3},
        seed=-5,
        stop="z",
        max_tokens=4,
        logprobs=True,
    ).sampling(CONFIG)
    assert params == SamplingParams(
        top_k=1,
        min_p=0.1,
        repetition_penalty=1.5,
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=(3,),
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        logit_bias={7: 3.0},
        seed=-5,
        stop=("z",),
        max_tokens=4,
        logprobs=0,
    )


def test_prompts_in_four_forms() -> None:
    assert completion(prompt="a").prompts(50) == ["a"]
    assert completion(prompt=["a", "b"]).prompts(50) == ["a", "b"]
    assert completion(prompt=[1, 2]).prompts(50) == [[1, 2]]
    assert completion(prompt=[[1], [2, 3]]).prompts(50) == [[1], [2, 3]]


def test_echo_scores_the_prompt() -> None:
    params = completion(echo=True, max_tokens=0, logprobs=5).sampling(CONFIG)
    assert (params.max_tokens, params.logprobs, params.prompt_logprobs) == (0, 5, 5)
    assert completion(logprobs=5).sampling(CONFIG).prompt_logprobs is None


def test_conversation_with_tools_as_templates_want_it() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "s"}, {"type": "text", "text": "t"}], "name": "n"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
        {"role": "assistant", "function_call": {"name": "g", "arguments": "not json"}},
        {"role": "function", "name": "g", "content": "7"},
        {"role": "assistant", "content": None, "refusal": "no"},
    ]
    assert prompt(messages=messages).messages == [
        {"role": "system", "content": "st", "name": "n"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "g", "arguments": "not json"}}],
        },
        {"role": "function", "content": "7", "name": "g"},
        {"role": "assistant", "content": "no"},
    ]


def test_continuing_a_message_does_not_open_another() -> None:
    assert prompt().add_generation_prompt
    assert not prompt(continue_final_message=True).add_generation_prompt
    assert not prompt(add_generation_prompt=False).add_generation_prompt
