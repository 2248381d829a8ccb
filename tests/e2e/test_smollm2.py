"""A real chat model served with default settings: sense, the prefix cache, seeds, idleness, the start, tools and
schemas."""

import concurrent.futures
import json
import random
import time
from typing import Any

import jsonschema
import openai
import psutil
import pydantic
import pytest
from support.json_schemas import SMOLLM2_SEEDS, try_schemas
from support.server import RunningServer

pytestmark = [pytest.mark.e2e, pytest.mark.smollm2]

PREFIX_TOKENS = 1024
PAGE_TOKENS = 16
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]


def new_prefix() -> list[int]:
    """Token ids that no earlier request can have left in the cache."""
    generator = random.SystemRandom()
    return [generator.randrange(100, 49000) for _ in range(PREFIX_TOKENS)]


def test_starts_within_reason(smollm2: RunningServer) -> None:
    """By CPU time, which others that hold the cores do not take. Ten seconds were seen."""
    print(f"from start to ready: {smollm2.start_cpu_s:.1f} s of CPU time")
    assert 1 < smollm2.start_cpu_s < 60


def test_the_capital_of_france(smollm2: RunningServer) -> None:
    client = smollm2.client
    asked: dict[str, Any] = {"model": smollm2.model, "messages": QUESTION, "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**asked)
    streamed = "".join(
        chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)
    )
    answer = whole.choices[0].message.content
    assert answer and "Paris" in answer
    assert whole.choices[0].finish_reason == "stop"
    assert streamed == answer


def first_token(client: openai.OpenAI, model: str, prompt: list[int]) -> tuple[float, int]:
    """Seconds until the first text, and the cached tokens that the usage tells."""
    options: Any = {"include_usage": True}
    began = time.monotonic()
    stream = client.completions.create(
        model=model, prompt=prompt, max_tokens=2, stream=True, stream_options=options, extra_body={"ignore_eos": True}
    )
    chunks = iter(stream)
    next(chunks)
    took_s = time.monotonic() - began
    *_, last = chunks
    assert last.usage and last.usage.prompt_tokens == len(prompt)
    assert last.usage.prompt_tokens_details
    return took_s, last.usage.prompt_tokens_details.cached_tokens or 0


def test_a_prefix_sent_twice(smollm2: RunningServer) -> None:
    prefix = new_prefix()
    cold_s, cold_cached = first_token(smollm2.client, smollm2.model, [*prefix, 1000, 1001])
    warm = [first_token(smollm2.client, smollm2.model, [*prefix, i, i + 1]) for i in (2000, 3000, 4000)]
    print(f"time to first token: {cold_s:.3f} s, then {[round(took_s, 3) for took_s, _ in warm]} s")
    assert cold_cached == 0
    assert all(PREFIX_TOKENS - PAGE_TOKENS <= cached <= PREFIX_TOKENS for _, cached in warm)
    assert min(warm)[0] < cold_s / 5  # others may have the machine for a moment


def test_eight_requests_with_one_cold_prefix_compute_it_once(smollm2: RunningServer) -> None:
    prefix, tail, new = new_prefix(), 4, 4
    before = smollm2.quiet_metrics()

    def ask(number: int) -> Any:
        prompt = [*prefix, *range(1000 + number, 1000 + number + tail)]
        return smollm2.client.completions.create(
            model=smollm2.model, prompt=prompt, max_tokens=new, extra_body={"ignore_eos": True}
        )

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    name = "ramet_scheduler_finished_total"
    after = smollm2.quiet_metrics(finished=int(before.get(name, 0)) + 8)
    computed, cached = (
        after[name] - before[name]
        for name in ("ramet_scheduler_computed_tokens_total", "ramet_prefix_cache_hits_total")
    )
    assert PREFIX_TOKENS <= computed <= PREFIX_TOKENS + 8 * (PAGE_TOKENS + tail + new)
    assert cached >= 7 * (PREFIX_TOKENS - PAGE_TOKENS)
    told = sorted(answer.usage.prompt_tokens_details.cached_tokens for answer in answers)
    assert told[0] == 0
    assert told[1] >= PREFIX_TOKENS - PAGE_TOKENS


SEEDED = {
    7: "Write a short story about a lighthouse keeper who finds a letter in a bottle on the beach one morning.",
    8: "Explain to a child of ten years why the sky is blue, and why the sunset is red instead.",
    9: "Describe a city that nobody has ever seen.",
}


def seeded(server: RunningServer, seed: int, system: str = "You are helpful.") -> str:
    messages: Any = [{"role": "system", "content": system}, {"role": "user", "content": SEEDED[seed]}]
    answer = server.client.chat.completions.create(
        model=server.model, messages=messages, seed=seed, temperature=1, max_tokens=48
    )
    assert answer.choices[0].message.content
    return answer.choices[0].message.content


@pytest.fixture(scope="module")
def known() -> dict[int, str]:
    return {}


@pytest.fixture
def alone(smollm2: RunningServer, known: dict[int, str]) -> dict[int, str]:
    """What each seed gives when nothing else runs; asked once."""
    for seed in SEEDED.keys() - known:
        known[seed] = seeded(smollm2, seed)
    assert len(set(known.values())) == len(SEEDED)
    return known


def test_a_seed_gives_the_same_text_from_the_prefix_cache(smollm2: RunningServer) -> None:
    system = f"You are the assistant of person number {random.SystemRandom().getrandbits(64)}, and you are helpful."
    cached = smollm2.quiet_metrics().get("ramet_prefix_cache_hits_total", 0)
    first = seeded(smollm2, 7, system)
    assert seeded(smollm2, 7, system) == first
    # Nothing was found the first time, and all but the last page the second.
    assert smollm2.quiet_metrics()["ramet_prefix_cache_hits_total"] - cached >= 4 * PAGE_TOKENS


def test_a_seed_gives_the_same_text_among_sixteen_others(smollm2: RunningServer, alone: dict[int, str]) -> None:
    def disturb(number: int) -> None:
        prompt = f"{number} things to know about the number {number}: " * (1 + number % 5)
        smollm2.client.completions.create(
            model=smollm2.model, prompt=prompt, max_tokens=1000, extra_body={"ignore_eos": True}
        )

    with concurrent.futures.ThreadPoolExecutor(16 + len(SEEDED)) as pool:
        others = [pool.submit(disturb, number) for number in range(16)]
        among_others = dict(zip(SEEDED, pool.map(lambda seed: seeded(smollm2, seed), SEEDED), strict=True))
        assert not any(other.done() for other in others)  # they were there to the end
        smollm2.http.post("/abort_request", json={"abort_all": True})
        for other in others:
            with pytest.raises(openai.APIStatusError, match="aborted"):
                other.result()
    assert among_others == alone


def test_a_seed_gives_the_same_text_after_a_restart(smollm2: RunningServer, alone: dict[int, str]) -> None:
    smollm2.restart()
    for seed in (7, 8):
        assert seeded(smollm2, seed) == alone[seed]


def test_an_idle_server_rests(smollm2: RunningServer) -> None:
    seeded(smollm2, 9)  # every process has worked
    smollm2.quiet_metrics()
    processes = {name: psutil.Process(pid) for name, pid in smollm2.pids().items()}

    def cpu_s() -> dict[str, float]:
        times = {name: process.cpu_times() for name, process in processes.items()}
        return {name: used.user + used.system for name, used in times.items()}

    window_s, before = 3.0, cpu_s()
    for _ in range(5):  # what there was to do may not be done yet
        time.sleep(window_s)
        now = cpu_s()
        used, before = {name: now[name] - before[name] for name in now}, now
        print(f"CPU seconds in {window_s:.0f} s: {used}")
        if sum(used.values()) / window_s < 0.02:
            return
    raise AssertionError(used)


# ---- tools and schemas -------------------------------------------------------------------------------------------

CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
TOOLS: Any = [{"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": CITY}}]


def ask_of_the_weather(server: RunningServer, **fields: Any) -> Any:
    question: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    asked = {"model": server.model, "messages": question, "tools": TOOLS, "temperature": 0, "max_tokens": 60, **fields}
    [choice] = server.client.chat.completions.create(**asked).choices
    return choice


def test_tools(smollm2: RunningServer) -> None:
    choice = ask_of_the_weather(smollm2)
    # It is a weak model: whether it calls is its own affair.
    assert choice.finish_reason in ("tool_calls", "stop", "length")
    assert bool(choice.message.tool_calls) or bool(choice.message.content)
    for call in choice.message.tool_calls or ():
        assert call.function.name == "get_weather"


@pytest.mark.parametrize("tool_choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_that_it_has_to_make_has_sense(smollm2: RunningServer, tool_choice: Any) -> None:
    [call] = ask_of_the_weather(smollm2, tool_choice=tool_choice).message.tool_calls
    assert call.function.name == "get_weather"
    jsonschema.validate(json.loads(call.function.arguments), CITY)
    assert "Paris" in call.function.arguments


def test_schemas(smollm2: RunningServer) -> None:
    ended = try_schemas(smollm2, SMOLLM2_SEEDS, 100)
    print(ended)
    assert ended["stop"] >= 0.6 * len(SMOLLM2_SEEDS) and not ended["refused"]


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=12)
    age: int = pydantic.Field(ge=0, le=120)


def test_it_fills_in_a_pydantic_model(smollm2: RunningServer) -> None:
    person: Any = [{"role": "user", "content": "Describe a person as JSON, with a name and an age."}]
    completion = smollm2.client.chat.completions.parse(
        model=smollm2.model, messages=person, response_format=Person, temperature=0, max_tokens=60
    )
    [choice] = completion.choices
    assert choice.finish_reason == "stop"
    assert choice.message.parsed is not None
    assert 0 <= choice.message.parsed.age <= 120


def test_calls_beside_a_format(smollm2: RunningServer) -> None:
    schema: Any = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    for words in ("Look up Tom, who is 30.", "Describe Tom, who is 30, as JSON."):
        [choice] = smollm2.client.chat.completions.create(
            model=smollm2.model,
            messages=[{"role": "user", "content": words}],
            tools=[{"type": "function", "function": {"name": "look_up", "parameters": schema}}],
            response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
            temperature=0,
            max_tokens=100,
        ).choices
        calls = choice.message.tool_calls or ()
        for text in [call.function.arguments for call in calls] or [choice.message.content]:
            jsonschema.validate(json.loads(text), schema)
