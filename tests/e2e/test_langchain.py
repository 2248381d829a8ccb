"""`langchain-openai`, unmodified, on top of the SDK: chat, streams and batches; tools and structured output by form."""

from typing import Any

import pydantic
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI
from support.server import RunningServer

pytestmark = pytest.mark.e2e

HELLO = "The quick brown fox"


class Person(pydantic.BaseModel):
    """Somebody."""

    name: str = pydantic.Field(max_length=12)
    age: int = pydantic.Field(ge=0, le=150)


def settings(server: RunningServer, **fields: Any) -> dict[str, Any]:
    settings = {"model": server.model, "base_url": f"{server.url}/v1", "api_key": "None", "max_retries": 0}
    return {**settings, "temperature": 0, "max_tokens": 8, **fields}


@pytest.fixture
def chat(tiny: RunningServer) -> ChatOpenAI:
    return ChatOpenAI(**settings(tiny))


def test_invoke(chat: ChatOpenAI) -> None:
    answer = chat.invoke([SystemMessage("Be brief."), HumanMessage(HELLO), AIMessage("Yes"), HumanMessage("More")])
    assert answer.text
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    usage = answer.usage_metadata
    assert usage and usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_stream(chat: ChatOpenAI) -> None:
    first, *rest = chat.stream(HELLO, stream_usage=True)
    whole = first
    for chunk in rest:
        whole = whole + chunk
    assert whole.text == chat.invoke(HELLO).text
    assert whole.usage_metadata and whole.usage_metadata["output_tokens"] <= 8


def test_batch(chat: ChatOpenAI) -> None:
    prompts = [f"{number} foxes" for number in range(6)]
    assert [answer.text for answer in chat.batch(prompts)] == [chat.invoke(prompt).text for prompt in prompts]


def test_logprobs_stop_and_seed(tiny: RunningServer, chat: ChatOpenAI) -> None:
    bound = chat.bind(logprobs=True, top_logprobs=2, seed=1, stop=["\x00\x00"])
    assert len(bound.invoke(HELLO).response_metadata["logprobs"]["content"]) == 8
    with pytest.raises(Exception, match="temperature must be between 0 and 2"):
        chat.bind(temperature=3).invoke(HELLO)


def test_completions(tiny: RunningServer) -> None:
    model = OpenAI(**settings(tiny, n=1, best_of=2))
    assert model.invoke(HELLO)
    assert len(model.generate([HELLO, "a"]).generations) == 2
    streaming = OpenAI(**settings(tiny))
    assert "".join(streaming.stream(HELLO)) == streaming.invoke(HELLO)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(tiny: RunningServer, method: Any) -> None:
    """Of a model of random weights: only the grammar makes it a person."""
    model = ChatOpenAI(**settings(tiny, max_tokens=400))
    person = model.with_structured_output(Person, method=method, strict=True).invoke("Who is it?")
    assert isinstance(person, Person)


def test_tools(tiny: RunningServer) -> None:
    model = ChatOpenAI(**settings(tiny, max_tokens=400))
    asked = model.bind_tools([Person], tool_choice="any")
    answer = asked.invoke("Who is it?")
    [call, *_] = answer.tool_calls
    assert call["name"] == "Person"
    Person.model_validate(call["args"])
    first, *rest = asked.stream("Who is it?")
    whole = first
    for chunk in rest:
        whole = whole + chunk
    assert whole.tool_calls[0]["args"] == call["args"]
    result = ToolMessage("noted", tool_call_id=call["id"])
    assert model.invoke([HumanMessage("Who is it?"), answer, result]).response_metadata["finish_reason"]
