"""Completions through the real HTTP server: prompt forms, indices, echo and the four arrays of log-probabilities."""

import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from support.scripted_engine import MODEL, WAIT_S, Request, ScriptedEngine, says, token

from ramet.ipc.messages import Completion, Finish, FinishReason, PromptInfo, TextDelta, TokenText

LENGTH = Finish(FinishReason.LENGTH)


@pytest.fixture(scope="module")
def engine() -> Iterator[ScriptedEngine]:
    with ScriptedEngine() as engine:
        yield engine


@pytest.fixture
def client(engine: ScriptedEngine) -> Iterator[openai.OpenAI]:
    while not engine.jobs.empty():
        engine.jobs.get()
    with openai.OpenAI(base_url=f"{engine.url}/v1", api_key="any", max_retries=0, timeout=WAIT_S) as client:
        yield client


def test_whole_answer(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = says(" Par", "is")
    answer = client.completions.create(model=MODEL, prompt="The capital is")
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason, choice.matched_stop, choice.logprobs) == (" Paris", "stop", 2, None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 2)
    job = engine.job()
    assert job == Completion(job.job, "The capital is")
    assert job.job.params.max_tokens == 16


def test_indices_over_prompts_and_choices(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    def script(engine: ScriptedEngine, request: Request) -> None:
        for j, rid in enumerate(request.job.rids):
            engine.deltas(TextDelta(rid, f"{request.prompt}{j}", 1, PromptInfo(4, j), finish=LENGTH))

    engine.script = script
    answer = client.completions.create(model=MODEL, prompt=["a", "b"], n=2)
    assert [(c.index, c.text) for c in answer.choices] == [(0, "a0"), (1, "a1"), (2, "b0"), (3, "b1")]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (8, 4)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    seeds = {engine.job().job.params.seed for _ in range(2)}
    assert len(seeds) == 2
    answer = client.completions.create(model=MODEL, prompt=[[1, 2], [3]], n=1)
    assert [c.text for c in answer.choices] == ["[1, 2]0", "[3]0"]


def test_the_best_of_several(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    """Ranked by the mean, so that a long answer is as good as a short one."""
    values = [[-1.0], [-0.5, -0.3], [-2.0], [-0.2, -0.3, -0.4, -0.3]]

    def script(engine: ScriptedEngine, request: Request) -> None:
        for rid, own in zip(request.job.rids, values, strict=True):
            tokens = [token("x", value) for value in own]
            engine.deltas(TextDelta(rid, f"{request.prompt}{own}", len(own), PromptInfo(4, 0), tokens, LENGTH))

    engine.script = script
    answer = client.completions.create(model=MODEL, prompt=["a", "b"], n=2, best_of=4)
    best = [values[3], values[1]]
    assert [(c.index, c.text) for c in answer.choices] == list(enumerate(f"{p}{own}" for p in "ab" for own in best))
    assert all(choice.logprobs is None for choice in answer.choices)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (8, 16)
    assert engine.job().job.params.logprobs == 0
    answer = client.completions.create(model=MODEL, prompt="a", best_of=4, logprobs=1)
    assert answer.choices[0].logprobs.token_logprobs == values[3]


def test_suffix(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = says("mid")
    assert client.completions.create(model=MODEL, prompt="a", suffix="z").choices[0].text == "mid"
    client.completions.create(model=MODEL, prompt="", suffix="z")
    client.completions.create(model=MODEL, prompt="a", suffix="")
    assert [(job.prompt, job.suffix) for job in (engine.job(), engine.job(), engine.job())] == [
        ("a", "z"),
        ("", "z"),
        ("a", None),
    ]


def test_stream(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = says("a", "", "b")
    options = {"include_usage": True}
    with client.completions.create(model=MODEL, prompt=[1, 2], stream=True, stream_options=options) as stream:
        chunks = list(stream)
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    # Held-back text makes an empty delta, which is not worth a chunk; what came close together may share one.
    assert all(c.choices[0].text for c in chunks[:-1])
    assert "".join(c.choices[0].text for c in chunks[:-1]) == "ab"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 3)


@pytest.mark.parametrize(("prompt", "text"), [("Hé you", "Hé you"), ([1, 2], "told")])
def test_echo(engine: ScriptedEngine, client: openai.OpenAI, prompt: Any, text: str) -> None:
    engine.script = says("!", "?")
    answer = client.completions.create(model=MODEL, prompt=prompt, echo=True)
    assert answer.choices[0].text == f"{text}!?"
    assert engine.job().job.echo
    with client.completions.create(model=MODEL, prompt=prompt, echo=True, stream=True, n=2) as stream:
        chunks = [(c.choices[0].index, c.choices[0].text) for c in stream]
    for index in range(2):
        texts = [chunk for number, chunk in chunks if number == index]
        assert texts[0].startswith(f"{text}!")
        assert "".join(texts) == f"{text}!?"


def scoring(engine: ScriptedEngine, request: Request) -> None:
    """A prompt of BOS, `H`, both halves of `é`, then two tokens of completion."""
    [rid] = request.job.rids
    first = token("<s>", math.nan)
    halves = [part_of("\ufffd", b"\xc3"), part_of("\ufffd", b"\xa9")]
    prompt = [first, token("H", -0.25, (token("J", -0.125),)), *halves]
    if request.job.params.prompt_logprobs is None:
        prompt = []
    engine.deltas(TextDelta(rid, "a", 1, PromptInfo(4, 0, "Hé", prompt), [token("a", float("-inf"))]))
    engine.deltas(TextDelta(rid, "bc", 2, None, [token("bc", -0.5, (token("bc", -0.5), token("x", -1.0)))], LENGTH))


def part_of(text: str, data: bytes) -> TokenText:
    return TokenText(text, data, -1.0)


@pytest.mark.parametrize("stream", [False, True])
def test_echoed_logprobs(engine: ScriptedEngine, stream: bool) -> None:
    engine.script = scoring
    body = {"model": MODEL, "prompt": "Hé", "echo": True, "logprobs": 1, "stream": stream}
    response = httpx.post(f"{engine.url}/v1/completions", json=body, timeout=WAIT_S)
    if stream:
        events = [event.removeprefix("data: ") for event in response.text.split("\n\n")[:-2]]
        choices = [json.loads(event)["choices"][0] for event in events]
    else:
        choices = response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == "Héabc"
    joined = {key: [x for c in choices for x in c["logprobs"][key]] for key in choices[0]["logprobs"]}
    assert joined == {
        "tokens": ["<s>", "H", "\ufffd", "\ufffd", "a", "bc"],
        "token_logprobs": [None, -0.25, -1.0, -1.0, -9999.0, -0.5],
        "top_logprobs": [None, {"J": -0.125, "H": -0.25}, {"\ufffd": -1.0}, {"\ufffd": -1.0}, {"a": -9999.0},
                         {"bc": -0.5, "x": -1.0}],
        "text_offset": [0, 0, 1, 2, 2, 3],
    }  # fmt: skip


def test_offsets_count_from_the_start_of_the_prompt(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = scoring
    for prompt in ("Hé", [7, 8]):
        answer = client.completions.create(model=MODEL, prompt=prompt, logprobs=0)
        assert answer.choices[0].text == "abc"
        assert answer.choices[0].logprobs.text_offset == [2, 3]


def test_scoring_without_generation(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    def script(engine: ScriptedEngine, request: Request) -> None:
        [rid] = request.job.rids
        assert request.job.params.max_tokens == 0
        tokens = [token("a", math.nan), token("b", -2.0)]
        engine.deltas(TextDelta(rid, "", 0, PromptInfo(2, 0, "ab", tokens), finish=LENGTH))

    engine.script = script
    answer = client.completions.create(model=MODEL, prompt=[1, 2], echo=True, max_tokens=0, logprobs=0)
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == ("ab", "length")
    assert choice.logprobs.token_logprobs == [None, -2.0]
    assert answer.usage.completion_tokens == 0
