"""Chat completions through the real HTTP server, asked with the OpenAI SDK."""

from collections.abc import Iterator

import httpx
import openai
import pytest
from support.scripted_engine import MODEL, WAIT_S, ScriptedEngine, says, token

from ramet.ipc.messages import Chat, Finish, FinishReason, PromptInfo, TextDelta

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def running() -> Iterator[ScriptedEngine]:
    with ScriptedEngine() as engine:
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


def raw_stream(engine: ScriptedEngine, **fields: object) -> list[str]:
    body = {"model": MODEL, "messages": HELLO, "stream": True, **fields}
    response = httpx.post(f"{engine.url}/v1/chat/completions", json=body, timeout=WAIT_S)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [event.removeprefix("data: ") for event in events[:-2]]


def test_whole_answer(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = says("Par", "is", "!", matched="!")
    answer = client.chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.id.startswith("chatcmpl-")
    [choice] = answer.choices
    assert (choice.index, choice.message.role, choice.message.content) == (0, "assistant", "Paris!")
    assert (choice.finish_reason, choice.matched_stop, choice.logprobs) == ("stop", "!", None)
    assert choice.message.refusal is None
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 3, 8)
    assert usage.prompt_tokens_details.cached_tokens == 3


def test_stream_has_role_first_and_finish_last(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = says("Par", "is")
    with client.chat.completions.create(model="alias", messages=HELLO, stream=True) as stream:
        chunks = list(stream)
    assert {(chunk.id, chunk.created, chunk.object, chunk.model) for chunk in chunks} == {
        (chunks[0].id, chunks[0].created, "chat.completion.chunk", "alias")
    }
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert "".join(delta.content or "" for delta in deltas) == "Paris"
    assert all(delta.role is None for delta in deltas[1:])
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    last = chunks[-1].choices[0]
    assert (last.finish_reason, last.matched_stop, last.delta.content) == ("stop", 2, None)
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


def test_stream_usage(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = says("a", "b")
    options = {"include_usage": True}
    with client.chat.completions.create(model=MODEL, messages=HELLO, stream=True, stream_options=options) as stream:
        chunks = list(stream)
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (5, 2)
    events = raw_stream(engine, stream_options={"continuous_usage_stats": True})
    assert all('"usage":{"prompt_tokens":5' in event for event in events)


def test_choices_share_a_prompt_and_one_job(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = says("x", "y")
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 6)
    job = engine.job().job
    assert (len(set(job.rids)), job.stream) == (3, False)
    assert job.params.seed is not None


def test_a_choice_ends_on_its_own(engine: ScriptedEngine) -> None:
    def script(engine: ScriptedEngine, request: Chat) -> None:
        first, second = request.job.rids
        stop = Finish(FinishReason.STOP, 7)
        engine.deltas(TextDelta(second, "b", 1, PromptInfo(2, 2), finish=Finish(FinishReason.LENGTH)))
        engine.deltas(TextDelta(first, "a", 1, PromptInfo(2, 0)))
        engine.deltas(TextDelta(first, "", 2, finish=stop))

    engine.script = script
    with openai.OpenAI(base_url=f"{engine.url}/v1", api_key="any") as client:
        stream = client.chat.completions.create(model=MODEL, messages=HELLO, n=2, stream=True)
        seen = [(c.choices[0].index, c.choices[0].finish_reason) for c in stream]
    # Role, text and finish of the one; role, text and finish of the other.
    assert seen == [(1, None), (1, None), (1, "length"), (0, None), (0, None), (0, "stop")]


def test_logprobs(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    half = token("\ufffd")
    tokens = [token("Hé", -0.25, (token("Hé", -0.25), token("He", float("-inf")))), half]

    def script(engine: ScriptedEngine, request: Chat) -> None:
        [rid] = request.job.rids
        engine.deltas(TextDelta(rid, "Hé", 1, PromptInfo(2, 0), tokens[:1]))
        engine.deltas(TextDelta(rid, "", 2, None, tokens[1:], Finish(FinishReason.LENGTH)))

    engine.script = script
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert answer.choices[0].logprobs.refusal is None
    assert (content[0].token, content[0].bytes, content[0].logprob) == ("Hé", [72, 195, 169], -0.25)
    assert [(t.token, t.logprob) for t in content[0].top_logprobs] == [("Hé", -0.25), ("He", -9999.0)]
    assert engine.job().job.params.logprobs == 2
    with client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, stream=True) as stream:
        chunks = list(stream)
    streamed = [t.token for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert streamed == ["Hé", "\ufffd"]
    job = engine.job().job
    assert (job.params.logprobs, job.stream) == (0, True)


def test_what_reaches_the_engine(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = says("x")
    answer = client.chat.completions.create(
        model="/models/tiny",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ],
        max_completion_tokens=9,
        max_tokens=4,
        stop=["x", "y"],
        seed=11,
        logit_bias={"5": -100},
        user="me",
        store=True,
        extra_body={
            "top_k": 3,
            "stop_token_ids": [4],
            "no_stop_trim": True,
            "chat_template_kwargs": {"enable_thinking": False},
            "priority": -2,
            "rid": "mine",
            "min_tokens": None,
        },
    )
    assert answer.id == "mine"
    chat = engine.job()
    assert isinstance(chat, Chat)
    assert chat.messages == [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "ab"}]
    assert chat.template_kwargs == {"enable_thinking": False}
    assert (chat.add_generation_prompt, chat.continue_final_message, chat.tools) == (True, False, None)
    params = chat.job.params
    assert (params.max_tokens, params.stop, params.seed, params.logit_bias) == (9, ("x", "y"), 11, {5: -100.0})
    assert (params.top_k, params.stop_token_ids, params.include_stop_str_in_output) == (3, (4,), True)
    assert chat.job.priority == -2
    # A client's own id never names a request inside the engine: it might be used twice.
    assert chat.job.rids != ["mine"]
