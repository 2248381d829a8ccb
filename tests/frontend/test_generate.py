"""SGLang's native `/generate`: forms of prompts and answers, counts, streams, and errors in its own names."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.scripted_engine import WAIT_S, Request, ScriptedEngine, says

from ramet.ipc.messages import Completion, Finish, FinishReason, PromptInfo, TextDelta, TokenText
from ramet.ipc.sampling import Grammar, GrammarKind

# What sglang.bench_serving sends.
BENCHMARK: dict[str, Any] = {
    "text": "hi",
    "sampling_params": {"temperature": 0.0, "max_new_tokens": 2, "ignore_eos": True},
    "stream": True,
    "lora_path": None,
    "return_logprob": False,
    "return_routed_experts": False,
    "logprob_start_len": -1,
}


@pytest.fixture(scope="module")
def running() -> Iterator[ScriptedEngine]:
    with ScriptedEngine() as engine:
        yield engine


@pytest.fixture
def engine(running: ScriptedEngine) -> ScriptedEngine:
    running.script = says("Hel", "lo", matched=2)
    return running


def post(engine: ScriptedEngine, status: int = 200, **body: Any) -> Any:
    response = httpx.post(f"{engine.url}/generate", json=body, timeout=WAIT_S)
    assert response.status_code == status, response.text
    return response.json() if not body.get("stream") or status != 200 else events(response.text)


def events(text: str) -> list[Any]:
    parts = text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def jobs(engine: ScriptedEngine, count: int = 1) -> list[Completion]:
    found = [engine.job() for _ in range(count)]
    assert all(isinstance(job, Completion) for job in found)
    return found  # type: ignore[return-value]


def test_whole_answer(engine: ScriptedEngine) -> None:
    answer = post(engine, text="hi", rid="mine", sampling_params={"max_new_tokens": 7, "sampling_seed": 5, "top_k": 3})
    meta = answer.pop("meta_info")
    assert answer == {"text": "Hello", "output_ids": []}  # the script tells no ids
    assert meta.pop("e2e_latency") > 0
    assert meta == {
        "id": "mine",
        "finish_reason": {"type": "stop", "matched": 2},
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "cached_tokens": 3,
    }
    [job] = jobs(engine)
    params = job.job.params
    assert (job.prompt, params.max_tokens, params.seed, params.top_k, job.job.stream) == ("hi", 7, 5, 3, False)


def test_benchmark_stream(engine: ScriptedEngine) -> None:
    """Each event has all text so far; counts grow to those of the whole."""
    chunks = post(engine, **BENCHMARK)
    assert "Hello".startswith(chunks[0]["text"]) and chunks[-1]["text"] == "Hello"
    assert [chunk["meta_info"]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    last = chunks[-1]["meta_info"]
    assert (last["prompt_tokens"], last["completion_tokens"], last["finish_reason"]["type"]) == (5, 2, "stop")
    assert "index" not in chunks[0]
    [job] = jobs(engine)
    assert (job.job.params.ignore_eos, job.job.params.temperature, job.job.stream) == (True, 0.0, True)


def test_length_is_told(engine: ScriptedEngine) -> None:
    def script(engine: ScriptedEngine, request: Request) -> None:
        finish = Finish(FinishReason.LENGTH)
        engine.deltas(TextDelta(request.job.rids[0], "abc", 3, PromptInfo(1, 0), finish=finish, token_ids=[7, 8, 9]))

    engine.script = script
    answer = post(engine, input_ids=[1, 2])
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 3}
    assert answer["output_ids"] == [7, 8, 9]
    [job] = jobs(engine)
    assert (job.prompt, job.job.params.max_tokens) == ([1, 2], 128)


def test_batch_with_parameters_and_rids_of_each(engine: ScriptedEngine) -> None:
    each = [{"max_new_tokens": 1, "sampling_seed": 1}, {"max_new_tokens": 2}]
    answers = post(engine, text=["a", "b"], sampling_params=each, rid=["x", "y"])
    assert [answer["meta_info"]["id"] for answer in answers] == ["x", "y"]
    one, other = jobs(engine, 2)
    assert (one.prompt, one.job.params.max_tokens, one.job.params.seed) == ("a", 1, 1)
    assert (other.prompt, other.job.params.max_tokens) == ("b", 2)
    assert len(post(engine, input_ids=[[1], [2], [3]])) == 3
    jobs(engine, 3)
    assert [type(post(engine, text=["a"])), type(post(engine, text="a"))] == [list, dict]
    jobs(engine, 2)


def test_choices(engine: ScriptedEngine) -> None:
    assert len(post(engine, text="a", sampling_params={"n": 3})) == 3
    [job] = jobs(engine)
    assert len(job.job.rids) == 3
    chunks = post(engine, text=["a", "b"], sampling_params={"n": 2}, stream=True)
    ends = {chunk["index"]: chunk["text"] for chunk in chunks if chunk["meta_info"]["finish_reason"]}
    assert ends == dict.fromkeys(range(4), "Hello")
    jobs(engine, 2)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(engine: ScriptedEngine, stream: bool) -> None:
    def of(text: str, token_id: int, logprob: float, top: list[TokenText]) -> TokenText:
        return TokenText(text, text.encode(), logprob, top, token_id)

    def script(engine: ScriptedEngine, request: Request) -> None:
        [rid] = request.job.rids
        first, second = of("p", 1, float("nan"), []), of("q", 2, -2.0, [of("z", 9, -0.5, [])])
        prompt = PromptInfo(2, 0, None, [first, second])
        engine.deltas(TextDelta(rid, "a", 1, prompt, [of("a", 3, -1.0, [of("a", 3, -1.0, [])])], token_ids=[3]))
        end = Finish(FinishReason.LENGTH)
        engine.deltas(TextDelta(rid, "b", 2, None, [of("b", 4, -1e9, [])], end, token_ids=[4]))

    engine.script = script
    body = {"text": "pq", "return_logprob": True, "top_logprobs_num": 1, "logprob_start_len": 0, "stream": stream}
    answer = post(engine, **body, return_text_in_logprobs=True)
    meta = (answer[-1] if stream else answer)["meta_info"]
    assert meta["input_token_logprobs"] == [[None, 1, "p"], [-2.0, 2, "q"]]
    assert meta["input_top_logprobs"] == [None, [[-0.5, 9, "z"]]]
    assert meta["output_token_logprobs"] == [[-1.0, 3, "a"], [-9999.0, 4, "b"]]
    assert meta["output_top_logprobs"] == [[[-1.0, 3, "a"]], None]
    [job] = jobs(engine)
    assert (job.job.params.logprobs, job.job.params.prompt_logprobs) == (1, 1)
    answer = post(engine, **{**body, "logprob_start_len": 1})
    meta = (answer[-1] if stream else answer)["meta_info"]
    assert meta["input_token_logprobs"] == [[-2.0, 2, None]]
    jobs(engine)


@pytest.mark.parametrize(
    ("given", "kind", "source"),
    [
        ({"regex": "a+"}, GrammarKind.REGEX, "a+"),
        ({"ebnf": 'root ::= "a"'}, GrammarKind.EBNF, 'root ::= "a"'),
        ({"json_schema": '{"type": "null"}'}, GrammarKind.JSON_SCHEMA, '{"type":"null"}'),
        ({"json_schema": {"type": "null"}}, GrammarKind.JSON_SCHEMA, '{"type":"null"}'),
    ],
)
def test_grammars_reach_the_engine(
    engine: ScriptedEngine, given: dict[str, Any], kind: GrammarKind, source: str
) -> None:
    post(engine, text="a", sampling_params=given)
    [job] = jobs(engine)
    assert job.job.params.grammar == Grammar(kind, source, next(iter(given)))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": "a", "input_ids": [1]}, "text"),
        ({"text": ""}, "text"),
        ({"text": ["a", ""]}, "text"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [1000]}, "input_ids"),
        ({"input_ids": [[1], 2]}, "input_ids"),
        ({"text": "a", "sampling_params": {"max_new_tokens": -1}}, "sampling_params.max_new_tokens"),
        ({"text": "a", "sampling_params": {"min_new_tokens": 9999}}, "sampling_params.min_new_tokens"),
        ({"text": "a", "sampling_params": {"temperature": 3}}, "sampling_params.temperature"),
        ({"text": "a", "sampling_params": {"logit_bias": {"5": 101}}}, "sampling_params.logit_bias.5"),
        ({"text": "a", "sampling_params": {"n": 0}}, "sampling_params.n"),
        ({"text": "a", "sampling_params": {"n": 129}}, "sampling_params.n"),
        ({"text": "a", "sampling_params": {"max_tokens": 3}}, "sampling_params.max_tokens"),
        ({"text": "a", "sampling_params": {"sampling_seed": 2**64}}, "sampling_params.sampling_seed"),
        ({"text": "a", "sampling_params": {"regex": "a", "ebnf": "b"}}, "sampling_params.ebnf"),
        ({"text": "a", "sampling_params": {"json_schema": "{"}}, "sampling_params.json_schema"),
        ({"text": "a", "sampling_params": {"json_schema": "[]"}}, "sampling_params.json_schema"),
        ({"text": "a", "sampling_params": {"json_schema": '{"a":' * 5000}}, "sampling_params.json_schema"),
        ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
        ({"text": ["a", "b"], "sampling_params": [{"n": 2}, {}]}, "sampling_params.n"),
        ({"text": ["a", "b"], "rid": ["x"]}, "rid"),
        ({"text": "a", "rid": "x" * 257}, "rid"),
        ({"text": "a", "logprob_start_len": 0}, "logprob_start_len"),
        ({"text": "a", "logprob_start_len": -2, "return_logprob": True}, "logprob_start_len"),
        ({"text": "a", "top_logprobs_num": 2}, "top_logprobs_num"),
        ({"text": "a", "top_logprobs_num": 21, "return_logprob": True}, "top_logprobs_num"),
        ({"text": "a", "lora_path": "x"}, "lora_path"),
        ({"text": "a", "image_data": "x"}, "image_data"),
        ({"text": "a", "return_hidden_states": True}, "return_hidden_states"),
        ({"text": "a", "nonsense": None}, "nonsense"),
    ],
)
def test_refused(engine: ScriptedEngine, body: dict[str, Any], param: str) -> None:
    error = post(engine, 400, **body)["error"]
    assert error["param"] == param
    word = param.removeprefix("sampling_params.").removesuffix(".5")
    assert re.search(rf"\b{word}\b|\bprompt\b", error["message"]), error
    assert engine.jobs.empty()


def test_null_is_absent(engine: ScriptedEngine) -> None:
    names = ("input_ids", "sampling_params", "rid", "stream", "return_logprob", "logprob_start_len", "priority")
    post(engine, text="a", **dict.fromkeys(names))
    post(engine, text="a", sampling_params=dict.fromkeys(("max_new_tokens", "n", "stop", "json_schema")))
    assert [job.job.params.max_tokens for job in jobs(engine, 2)] == [128, 128]
