"""Answers that must match a schema, a regular expression or a grammar, through every process of a real engine."""

import json
import re
import threading
from typing import Any

import httpx
import openai
import pydantic
import pytest
from support.json_schemas import TINY_SEEDS, try_schemas
from support.server import PATIENCE_S, RunningServer, until

pytestmark = pytest.mark.e2e

USER: Any = [{"role": "user", "content": "Describe a person as JSON, with a name and an age."}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
# Takes all the CPU time that a grammar may have.
# Half a minute of work: far more than the limit on a fast machine too.
SLOW = {"type": "integer", "multipleOf": 3000017}


def formatted(schema: dict[str, Any], name: str = "person") -> Any:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=12)
    age: int = pydantic.Field(ge=0, le=120)


def test_schemas_with_the_tiny_model(tiny: RunningServer) -> None:
    """`test_smollm2.py` has the others."""
    ended = try_schemas(tiny, TINY_SEEDS, 250)
    print(ended)
    assert ended["stop"] >= 0.6 * len(TINY_SEEDS) and not ended["refused"]


# ---- the API -----------------------------------------------------------------------------------------------------


def test_parse_n_and_seeds(tiny: RunningServer, client: openai.OpenAI) -> None:
    def parse(**fields: Any) -> list[Person | None]:
        completion = client.beta.chat.completions.parse(
            model=tiny.model, messages=USER, response_format=Person, temperature=1, max_tokens=80, **fields
        )
        assert {choice.finish_reason for choice in completion.choices} == {"stop"}
        assert {(choice.model_extra or {})["matched_stop"] for choice in completion.choices} == {None}
        return [choice.message.parsed for choice in completion.choices]

    four = parse(n=4, seed=7)
    assert len({person.name for person in four if person}) > 1
    assert parse(n=4, seed=7) == four
    assert parse(seed=9) == [four[2]]


def test_json_object_streamed_and_whole(tiny: RunningServer, client: openai.OpenAI) -> None:
    settings: Any = {"response_format": {"type": "json_object"}, "temperature": 1, "seed": 3, "max_tokens": 400}
    whole = client.chat.completions.create(model=tiny.model, messages=USER, **settings).choices[0]
    chunks = list(client.chat.completions.create(model=tiny.model, messages=USER, stream=True, **settings))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    assert (whole.message.content or "").startswith("{")
    if whole.finish_reason == "stop":
        assert isinstance(json.loads(whole.message.content or ""), dict)


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"regex": "(yes|no)!?[0-9]{3}"}, "(yes|no)!?[0-9]{3}"),
        ({"ebnf": 'root ::= greeting " " [A-Z] [a-z]{2,4}\ngreeting ::= "hi" | "hello"'}, "(hi|hello) [A-Z][a-z]{2,4}"),
        ({"ebnf": 'start: NAME ("," NAME){2}\nNAME: /[a-z]{1,4}/'}, "[a-z]{1,4}(,[a-z]{1,4}){2}"),
        ({"response_format": formatted({"enum": ["a", 1, None]})}, '"a"|1|null'),
    ],
    ids=["regex", "gbnf", "lark", "schema"],
)
def test_grammars_on_both_endpoints(
    tiny: RunningServer, client: openai.OpenAI, extra: dict[str, Any], pattern: str
) -> None:
    for seed in range(3):
        settings: Any = {"model": tiny.model, "temperature": 1, "seed": seed, "max_tokens": 40, "extra_body": extra}
        chat = client.chat.completions.create(messages=USER, **settings).choices[0]
        text = client.completions.create(prompt="Say", **settings).choices[0]
        for answer, reason in ((chat.message.content, chat.finish_reason), (text.text, text.finish_reason)):
            assert reason == "stop"
            assert re.fullmatch(pattern, answer or "")


def test_logprobs_are_the_models_own(tiny: RunningServer, client: openai.OpenAI) -> None:
    def first(**extra: Any) -> Any:
        completion = client.chat.completions.create(
            model=tiny.model, messages=USER, logprobs=True, top_logprobs=20, max_tokens=3, temperature=0, **extra
        )
        assert completion.choices[0].logprobs is not None
        return (completion.choices[0].logprobs.content or [])[0]

    free, bound = first(), first(extra_body={"regex": "[0-9]{3}"})
    assert bound.token.isdigit()
    assert bound.logprob < free.logprob
    assert [top.logprob for top in bound.top_logprobs] == [top.logprob for top in free.top_logprobs]


def test_a_bad_schema_fails_alone_while_another_runs(tiny: RunningServer, client: openai.OpenAI) -> None:
    endless = {"ignore_eos": True}
    stream = client.completions.create(model=tiny.model, prompt="a", max_tokens=600, stream=True, extra_body=endless)
    next(iter(stream))
    for bad in ({"not": {}}, {"type": "zap"}, {"$ref": "#/$defs/no"}, {"type": "string", "format": "regex"}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=tiny.model, messages=USER, response_format=formatted(bad), stream=True)
        assert caught.value.param == "response_format"
    for extra in ({"regex": "("}, {"ebnf": "root ::= nothing"}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=tiny.model, prompt="a", n=2, extra_body=extra)
        assert caught.value.param == next(iter(extra))
    assert list(stream)[-1].choices[0].finish_reason == "length"


def test_a_slow_grammar_stops_nobody_and_can_be_left(tiny: RunningServer, client: openai.OpenAI) -> None:
    """Others run meanwhile; who waits for it may go; it is refused in the end."""
    aborted = tiny.quiet_metrics().get("ramet_scheduler_aborted_total", 0)
    refused: list[openai.BadRequestError] = []

    def wait() -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=tiny.model, messages=USER, response_format=formatted(SLOW))
        refused.append(caught.value)

    waiting = threading.Thread(target=wait)
    waiting.start()
    body = {"model": tiny.model, "messages": USER, "response_format": formatted(SLOW)}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{tiny.url}/v1/chat/completions", json=body, timeout=httpx.Timeout(60, read=1))
    assert client.completions.create(model=tiny.model, prompt="a", max_tokens=8).choices[0].finish_reason
    until(lambda: tiny.counter("aborted") == aborted + 1, PATIENCE_S, lambda: "aborted while it is compiled")
    assert not refused
    waiting.join(300)
    assert "5 s of CPU time" in refused[0].message
    digit = client.completions.create(model=tiny.model, prompt="a", extra_body={"regex": "[0-9]"}).choices[0]
    assert digit.text.isdigit()
