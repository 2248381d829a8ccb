"""What is wrong with a request, and the whole answer to it, from a real engine."""

import http.client as http_client
import json
from typing import Any

import httpx
import openai
import pytest
from support.server import RunningServer

pytestmark = pytest.mark.e2e

CONTEXT, VOCABULARY = 2048, 384
HI = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
DEEP = b'{"response_format": {"a": ' + b"[" * 100_000
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(autouse=True)
def _still_answers(tiny: RunningServer) -> Any:
    yield
    answer = tiny.client.completions.create(model=tiny.model, prompt="a", max_tokens=1)
    assert answer.usage and answer.usage.completion_tokens == 1


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error, once the response has its whole form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        (CHAT, {"messages": []}, "messages", "invalid_value"),
        (CHAT, {"messages": None}, "messages", "invalid_type"),
        (CHAT, {"messages": "hi"}, "messages", "invalid_type"),
        (CHAT, {**HI, "messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role", "invalid_type"),
        (CHAT, {**HI, "messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        (
            CHAT,
            {**HI, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "unsupported_content",
        ),
        (CHAT, {**HI, "temperature": "warm"}, "temperature", "invalid_type"),
        (CHAT, {**HI, "temperature": 2.1}, "temperature", "invalid_value"),
        (CHAT, {**HI, "top_p": -0.1}, "top_p", "invalid_value"),
        (CHAT, {**HI, "presence_penalty": 3}, "presence_penalty", "invalid_value"),
        (CHAT, {**HI, "max_tokens": 0}, "max_tokens", "invalid_value"),
        (CHAT, {**HI, "max_completion_tokens": -1}, "max_completion_tokens", "invalid_value"),
        (CHAT, {**HI, "n": 0}, "n", "invalid_value"),
        (CHAT, {**HI, "n": 129}, "n", "invalid_value"),
        (CHAT, {**HI, "top_logprobs": 2}, "top_logprobs", "invalid_value"),
        (CHAT, {**HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        (CHAT, {**HI, "stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        (CHAT, {**HI, "logit_bias": {str(VOCABULARY): 1}}, "logit_bias", "invalid_value"),
        (CHAT, {**HI, "logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
        (CHAT, {**HI, "stop": ["x"] * 17}, "stop", "invalid_value"),
        (CHAT, {**HI, "stop": ""}, "stop", "invalid_value"),
        (CHAT, {**HI, "seed": 2**64}, "seed", "invalid_type"),
        (CHAT, {**HI, "temprature": 1}, "temprature", "unknown_parameter"),
        (CHAT, {**HI, "stream_options": {"usage": True}, "stream": True}, "stream_options.usage", "unknown_parameter"),
        (COMPLETIONS, {}, "prompt", "missing_required_parameter"),
        (COMPLETIONS, {"prompt": ""}, "prompt", "invalid_value"),
        (COMPLETIONS, {"prompt": []}, "prompt", "invalid_value"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt", "invalid_value"),
        (COMPLETIONS, {"prompt": ["a", 1]}, "prompt", "invalid_value"),
        (COMPLETIONS, {"prompt": [1, VOCABULARY]}, "prompt", "invalid_value"),
        (COMPLETIONS, {"prompt": {"a": 1}}, "prompt", "invalid_type"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens", "invalid_value"),
        (COMPLETIONS, {"prompt": "a", "n": 2, "best_of": 1}, "best_of", "invalid_value"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs", "invalid_value"),
        (COMPLETIONS, {"prompt": "a", "messages": []}, "messages", "unknown_parameter"),
    ],
)
def test_parameters(
    tiny: RunningServer, http: httpx.Client, path: str, body: dict[str, Any], param: str, code: str
) -> None:
    error = error_of(http.post(path, json={"model": tiny.model, **body}), 400)
    assert (error["param"], error["code"]) == (param, code)
    assert param.partition("[")[0] in error["message"]


def test_out_of_range_says_the_limit_and_the_value(tiny: RunningServer, http: httpx.Client) -> None:
    error = error_of(http.post(CHAT, json={"model": tiny.model, **HI, "temperature": 2.5}), 400)
    assert error["message"] == "temperature must be between 0 and 2, got 2.5"


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_longer_than_the_context(tiny: RunningServer, http: httpx.Client, stream: bool) -> None:
    """Found by the tokenizer process, yet before the stream begins."""
    body = {"model": tiny.model, "prompt": [5] * (CONTEXT + 1), "stream": stream}
    error = error_of(http.post(COMPLETIONS, json=body), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", None)
    assert str(CONTEXT) in error["message"]
    assert str(CONTEXT + 1) in error["message"]


def test_chat_longer_than_the_context(tiny: RunningServer, http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "hi " * 2 * CONTEXT}]
    error = error_of(http.post(CHAT, json={"model": tiny.model, "messages": messages}), 400)
    assert error["code"] == "context_length_exceeded"


def test_prompt_and_answer_longer_than_the_context(tiny: RunningServer, http: httpx.Client) -> None:
    body = {"model": tiny.model, "prompt": [5] * 100, "max_tokens": CONTEXT}
    error = error_of(http.post(COMPLETIONS, json=body), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    for number in (100, CONTEXT):
        assert str(number) in error["message"]


def test_the_rest_of_the_context_is_what_a_chat_may_use(tiny: RunningServer) -> None:
    prompt = [5] * (CONTEXT - 3)
    answer = tiny.client.completions.create(
        model=tiny.model, prompt=prompt, max_tokens=3, extra_body={"ignore_eos": True}
    )
    assert answer.usage and answer.usage.total_tokens == CONTEXT


def test_unknown_model(http: httpx.Client, client: openai.OpenAI) -> None:
    error = error_of(http.post(CHAT, json={"model": "gpt-99", **HI}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "gpt-99" in error["message"]
    assert error_of(http.get("/v1/models/gpt-99"), 404)["code"] == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-99", prompt="a")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"model" 1}', b'{"model": "\xff"}', b'{"model": NaN}', b'{"metadata": {"a": "b"}', DEEP],
    ids=["empty", "cut", "no colon", "not UTF-8", "NaN", "open", "deep"],
)
def test_malformed_json(http: httpx.Client, content: bytes) -> None:
    error = error_of(http.post(CHAT, content=content, headers={"content-type": "application/json"}), 400)
    assert (error["param"], error["code"]) == (None, "invalid_json")


@pytest.mark.parametrize("content", [b"[]", b"null", b"1", b'"text"'])
def test_json_that_is_no_object(http: httpx.Client, content: bytes) -> None:
    error = error_of(http.post(CHAT, content=content, headers={"content-type": "application/json"}), 400)
    assert (error["param"], error["code"]) == (None, "invalid_type")


@pytest.mark.parametrize("content_type", ["text/plain", "multipart/form-data; boundary=x", ""])
def test_wrong_content_type(http: httpx.Client, content_type: str) -> None:
    response = http.post(CHAT, content=json.dumps(HI).encode(), headers={"content-type": content_type})
    assert error_of(response, 415)["code"] == "unsupported_media_type"


def test_body_too_large(tiny: RunningServer) -> None:
    """Refused by what the client announces, before it has sent it."""
    size = 32 * 1024 * 1024 + 1
    connection = http_client.HTTPConnection("127.0.0.1", tiny.port, timeout=60)
    connection.putrequest("POST", CHAT)
    connection.putheader("content-type", "application/json")
    connection.putheader("content-length", str(size))
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413
    error = json.loads(response.read())["error"]
    connection.close()
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "request_too_large")
    assert str(size) in error["message"]
    assert str(size - 1) in error["message"]


def test_wrong_method_and_route(http: httpx.Client) -> None:
    response = http.get(CHAT)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
    assert error_of(http.post("/v1/chat", json=HI), 404)["code"] == "not_found"
    assert error_of(http.get("/"), 404)["code"] == "not_found"


def test_null_is_the_same_as_absent(tiny: RunningServer, http: httpx.Client) -> None:
    names = ("temperature", "top_p", "n", "stop", "seed", "logit_bias", "stream", "stream_options", "tools", "user")
    response = http.post(CHAT, json={"model": tiny.model, **HI, **dict.fromkeys(names)})
    assert response.status_code == 200, response.text
