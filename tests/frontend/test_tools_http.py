"""Tool calls and reasoning through the real HTTP server, with exact texts from a scripted engine, by the OpenAI SDK."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from support.scripted_engine import MODEL, WAIT_S, Request, Script, ScriptedEngine, says, token

from ramet.ipc.messages import Chat, Finish, FinishReason, PromptInfo, TextDelta
from ramet.ipc.sampling import GrammarKind, Thought

HELLO: Any = [{"role": "user", "content": "Hello"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": CITY}}
NOW: Any = {"type": "function", "function": {"name": "now"}}
CALL = ["<tool", "_call>\n", '{"name": "get_', 'weather", "argu', 'ments": {"ci', 'ty": "Paris"}', "}\n</tool_call>"]
TWO = [*CALL, "\n", '<tool_call>{"name": "now", "arguments": {}}</tool_call>']


@pytest.fixture(scope="module")
def running() -> Iterator[ScriptedEngine]:
    with ScriptedEngine(tool_call_parser="hermes", reasoning_parser="think") as engine:
        yield engine


@pytest.fixture
def engine(running: ScriptedEngine) -> Iterator[ScriptedEngine]:
    running.script = None
    yield running
    while not running.jobs.empty():
        running.jobs.get()
    assert running.aborts.empty()


@pytest.fixture
def client(engine: ScriptedEngine) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{engine.url}/v1", api_key="any", max_retries=0, timeout=WAIT_S) as client:
        yield client


def after(tail: str, *texts: str, finish: Finish | None = None, with_logprobs: bool = False) -> Script:
    """Every choice says these texts, one token each, after a prompt with this end."""

    def script(engine: ScriptedEngine, request: Request) -> None:
        for rid in request.job.rids:
            for count, text in enumerate(texts, 1):
                last = count == len(texts)
                engine.deltas(
                    TextDelta(
                        rid,
                        text,
                        count,
                        prompt=PromptInfo(5, 0, tail=tail) if count == 1 else None,
                        logprobs=[token(text)] if with_logprobs else None,
                        finish=(finish or Finish(FinishReason.STOP, 2)) if last else None,
                    )
                )

    return script


def test_a_whole_answer_with_calls(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = says("Let me", " see.\n", *TWO)
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER, NOW])
    [choice] = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
    calls = choice.message.tool_calls
    assert calls is not None
    functions = [call.function for call in calls if call.type == "function"]
    assert [(f.name, f.arguments) for f in functions] == [("get_weather", '{"city": "Paris"}'), ("now", "{}")]
    chat = engine.job()
    assert isinstance(chat, Chat)
    assert chat.tools == [WEATHER, NOW]
    assert chat.job.params.grammar is None


def test_content_is_null_beside_calls_alone(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = says(*CALL)
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER])
    assert answer.choices[0].message.content is None
    engine.script = says("No.")
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("No.", "stop")
    assert answer.choices[0].message.tool_calls is None


def test_a_stream_with_calls(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = says("Hm. ", *TWO)
    with client.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER, NOW], stream=True) as stream:
        choices = [chunk.choices[0] for chunk in stream]
    assert (choices[0].delta.role, choices[0].delta.content) == ("assistant", "")
    assert "".join(choice.delta.content or "" for choice in choices) == "Hm."
    calls = [call for choice in choices for call in choice.delta.tool_calls or ()]
    assert [(c.index, c.function.name) for c in calls if c.id] == [(0, "get_weather"), (1, "now")]
    assert all(call.type == "function" for call in calls if call.id)
    assert all(call.type is None and call.function.name is None for call in calls if not call.id)
    for index, arguments in enumerate(['{"city": "Paris"}', "{}"]):
        assert "".join(call.function.arguments for call in calls if call.index == index) == arguments
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["tool_calls"]
    assert choices[-1].matched_stop == 2


def test_the_sdk_collects_a_stream(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = says("Hm. ", *TWO)
    with client.chat.completions.stream(model=MODEL, messages=HELLO, tools=[WEATHER, NOW], n=2) as stream:
        final = stream.get_final_completion()
    for choice in final.choices:
        assert choice.finish_reason == "tool_calls"
        assert [call.function.name for call in choice.message.tool_calls or ()] == ["get_weather", "now"]
        assert choice.message.content == "Hm."


def test_a_call_that_is_cut_off(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = after("", *CALL[:5], finish=Finish(FinishReason.LENGTH))
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER])
    [call] = answer.choices[0].message.tool_calls
    assert (answer.choices[0].finish_reason, call.function.arguments) == ("length", '{"ci')
    engine.script = after("", *CALL[:3], finish=Finish(FinishReason.LENGTH))
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER])
    assert answer.choices[0].message.content == "".join(CALL[:3])


def test_one_call_if_not_parallel(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = says(*TWO)
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, tools=[WEATHER, NOW], parallel_tool_calls=False
    )
    assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["get_weather"]


def test_a_required_call_has_a_grammar(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = after("<think>\n", "Hm", "</think>", *CALL)
    choice: Any = {"type": "function", "function": {"name": "get_weather"}}
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER, NOW], tool_choice=choice)
    assert answer.choices[0].message.reasoning_content == "Hm"
    assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["get_weather"]
    assert answer.choices[0].finish_reason == "tool_calls"
    grammar = engine.job().job.params.grammar
    assert grammar is not None
    assert (grammar.kind, grammar.param) == (GrammarKind.LARK, "tool_choice")
    assert "get_weather" in grammar.source
    assert "now" not in grammar.source
    assert grammar.thought == Thought("<think>", "</think>")


PLAN = json.dumps({"plan": ["".join(CALL), {"name": "now", "arguments": {}}]})


@pytest.mark.parametrize("stream", [False, True])
def test_tools_beside_a_format(engine: ScriptedEngine, stream: bool) -> None:
    """Its text may hold what looks like a call; an answer that begins with one is one."""
    fields: Any = {"tools": [WEATHER, NOW], "response_format": {"type": "json_object"}}
    engine.script = after("<think>\n", "Hm", "</think>\n\n", *PLAN)
    message, _, finish = ask(engine, stream, **fields)
    assert (message["content"], message["reasoning_content"], finish) == (PLAN, "Hm", "stop")
    assert "tool_calls" not in message
    grammar = engine.job().job.params.grammar
    assert grammar is not None and grammar.calls is not None
    engine.script = after("", *CALL)
    message, _, finish = ask(engine, stream, **fields)
    assert (message["content"] or "", finish) == ("", "tool_calls")
    assert message["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    engine.script = after("", *PLAN)
    message, *_ = ask(engine, stream, **{**fields, "tool_choice": "none"})
    assert message["content"] == PLAN


def test_a_choice_of_none_is_plain_text(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = says(*CALL)
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER], tool_choice="none")
    assert answer.choices[0].message.content == "".join(CALL)
    assert answer.choices[0].finish_reason == "stop"
    chat = engine.job()
    assert isinstance(chat, Chat)
    assert chat.tools is None


def test_the_older_form(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = says(*TWO)
    functions: Any = [WEATHER["function"], NOW["function"]]
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, functions=functions)
    [choice] = answer.choices
    assert (choice.finish_reason, choice.message.tool_calls) == ("function_call", None)
    assert (choice.message.function_call.name, choice.message.function_call.arguments) == (
        "get_weather",
        '{"city": "Paris"}',
    )
    with client.chat.completions.create(model=MODEL, messages=HELLO, functions=functions, stream=True) as stream:
        choices = [chunk.choices[0] for chunk in stream]
    calls = [choice.delta.function_call for choice in choices if choice.delta.function_call]
    assert [call.name for call in calls if call.name] == ["get_weather"]
    assert "".join(call.arguments for call in calls) == '{"city": "Paris"}'
    assert choices[-1].finish_reason == "function_call"


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning(engine: ScriptedEngine, stream: bool) -> None:
    engine.script = after("<|assistant|>\n<think>\n", "Hm", ".\n", "</thi", "nk>", "\n\n", "Paris", ".")
    message, usage, finish = ask(engine, stream)
    assert message == {"role": "assistant", "content": "Paris.", "reasoning_content": "Hm."}
    assert finish == "stop"
    assert usage["completion_tokens"] == 7
    # Tokens that are read in one go are counted together.
    assert usage["completion_tokens_details"]["reasoning_tokens"] in ({4} if not stream else range(4, 8))


def test_reasoning_and_calls(engine: ScriptedEngine) -> None:
    engine.script = after("", "<think>", "Hm", "</think>", *CALL)
    for stream in (False, True):
        message, _, finish = ask(engine, stream, tools=[WEATHER])
        assert message["reasoning_content"] == "Hm"
        assert message["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
        assert (message["content"] or "", finish) == ("", "tool_calls")


def test_reasoning_is_left_in_on_request(engine: ScriptedEngine) -> None:
    engine.script = after("", "<think>", "Hm", "</think>", "Yes")
    message, usage, _ = ask(engine, False, separate_reasoning=False)
    assert message == {"role": "assistant", "content": "<think>Hm</think>Yes"}
    assert "completion_tokens_details" not in usage
    assert not engine.job().job.stream


def test_nothing_but_reasoning(engine: ScriptedEngine) -> None:
    engine.script = after("<think>", "Hm", " and", finish=Finish(FinishReason.LENGTH))
    message, usage, finish = ask(engine, False)
    assert message == {"role": "assistant", "content": "", "reasoning_content": "Hm and"}
    assert (usage["completion_tokens_details"]["reasoning_tokens"], finish) == (2, "length")


def test_logprobs_are_of_all_tokens(engine: ScriptedEngine) -> None:
    texts = ["<think>", "Hm", "</think>", *CALL]
    engine.script = after("", *texts, with_logprobs=True)
    for stream in (False, True):
        body = {"model": MODEL, "messages": HELLO, "tools": [WEATHER], "logprobs": True, "stream": stream}
        response = httpx.post(f"{engine.url}/v1/chat/completions", json=body, timeout=WAIT_S)
        choices = [item["choices"][0] for item in events(response)] if stream else response.json()["choices"]
        seen = [item["token"] for choice in choices if choice["logprobs"] for item in choice["logprobs"]["content"]]
        assert seen == texts


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def ask(engine: ScriptedEngine, stream: bool, **fields: Any) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Message, usage and finish reason; of a stream, collected."""
    body = {"model": MODEL, "messages": HELLO, "stream": stream, **fields}
    if stream:
        body["stream_options"] = {"include_usage": True}
    response = httpx.post(f"{engine.url}/v1/chat/completions", json=body, timeout=WAIT_S)
    assert response.status_code == 200, response.text
    if not stream:
        [choice] = response.json()["choices"]
        message = {name: value for name, value in choice["message"].items() if name != "refusal"}
        return message, response.json()["usage"], choice["finish_reason"]
    *chunks, last = events(response)
    message = {}
    for chunk in chunks:
        for name, value in chunk["choices"][0]["delta"].items():
            if name != "tool_calls":
                message[name] = message.get(name, "") + value
            elif "id" in value[0]:
                message[name] = value
            else:
                message[name][0]["function"]["arguments"] += value[0]["function"]["arguments"]
    return message, last["usage"], chunks[-1]["choices"][0]["finish_reason"]
