"""The calls of a public notebook on an OpenAI-compatible API (chat and completions), as a user would copy them."""

from collections.abc import Iterator

import openai
import pytest
from support.server import RunningServer

pytestmark = pytest.mark.e2e


@pytest.fixture
def notebook(tiny: RunningServer) -> Iterator[openai.Client]:
    with openai.Client(base_url=f"{tiny.url}/v1", api_key="None") as client:
        yield client


def test_chat(tiny: RunningServer, notebook: openai.Client) -> None:
    response = notebook.chat.completions.create(
        model=tiny.model,
        messages=[
            {"role": "system", "content": "You are a helpful AI assistant"},
            {"role": "user", "content": "List 3 countries and their capitals."},
        ],
        temperature=0,
        max_tokens=64,
    )
    [choice] = response.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert choice.model_extra is not None
    assert "matched_stop" in choice.model_extra
    assert response.object == "chat.completion"
    assert response.model == tiny.model
    assert response.usage
    assert response.usage.total_tokens == response.usage.prompt_tokens + response.usage.completion_tokens


def test_chat_with_parameters_streamed(tiny: RunningServer, notebook: openai.Client) -> None:
    response = notebook.chat.completions.create(
        model=tiny.model,
        messages=[
            {"role": "system", "content": "You are a knowledgeable historian who provides concise responses."},
            {"role": "user", "content": "Tell me about ancient Rome"},
            {"role": "assistant", "content": "Ancient Rome was a civilization centered in Italy."},
            {"role": "user", "content": "What were their major achievements?"},
        ],
        temperature=0.3,
        max_tokens=100,
        top_p=0.95,
        stop=["\n\n"],
        presence_penalty=0.2,
        frequency_penalty=0.2,
        n=1,
        seed=42,
        stream=True,
    )
    text = ""
    for chunk in response:
        text += chunk.choices[0].delta.content or ""
    assert text
    assert chunk.choices[0].finish_reason in ("stop", "length")


def test_completion(tiny: RunningServer, notebook: openai.Client) -> None:
    response = notebook.completions.create(
        model=tiny.model,
        prompt="List 3 countries and their capitals.",
        temperature=0,
        max_tokens=64,
        n=1,
        stop=None,
    )
    [choice] = response.choices
    assert choice.text
    assert choice.finish_reason in ("stop", "length")
    assert response.object == "text_completion"
    assert response.usage
    assert 0 < response.usage.completion_tokens <= 64


def test_completion_with_parameters_streamed(tiny: RunningServer, notebook: openai.Client) -> None:
    response = notebook.completions.create(
        model=tiny.model,
        prompt="Write a short story about a space explorer.",
        temperature=0.7,
        max_tokens=150,
        top_p=0.9,
        stop=["\n\n", "THE END"],
        presence_penalty=0.3,
        frequency_penalty=0.3,
        n=1,
        seed=123,
        stream=True,
    )
    text = ""
    for chunk in response:
        text += chunk.choices[0].text or ""
    assert text
    assert chunk.choices[0].finish_reason in ("stop", "length")
