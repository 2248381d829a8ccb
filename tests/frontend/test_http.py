"""Everything about HTTP that is not an answer: errors, keys, headers, models, health and metrics."""

import concurrent.futures
import http.client
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from support.scripted_engine import MODEL, WAIT_S, ScriptedEngine, says

from ramet.ipc.messages import Counters, Stats, Step

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def engine() -> Iterator[ScriptedEngine]:
    with ScriptedEngine(max_body_bytes=20_000, api_keys=("s3cret", "öther"), log_requests="summary") as engine:
        engine.script = says("x")
        yield engine


@pytest.fixture(scope="module")
def client(engine: ScriptedEngine) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=engine.url, timeout=WAIT_S, headers={"authorization": "Bearer s3cret"}) as client:
        yield client


def check_error(response: httpx.Response, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert set(response.json()) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)
    return error


def post(client: httpx.Client, content: Any, content_type: str | None = "application/json") -> httpx.Response:
    headers = {} if content_type is None else {"content-type": content_type}
    return client.post("/v1/chat/completions", content=content, headers=headers)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{]",
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b'{"temperature": NaN}',
        json.dumps(CHAT).encode() + b" x",
    ],
)
def test_malformed_json(client: httpx.Client, body: bytes) -> None:
    check_error(post(client, body), 400, "invalid_json")


def test_json_of_another_shape(client: httpx.Client) -> None:
    for body in (b"[]", b"null", b'"x"'):
        check_error(post(client, body), 400, "invalid_type")
    check_error(post(client, b'{"model": "m", "zap": 1}'), 400, "unknown_parameter", "zap")


def test_what_json_can_hold_and_msgpack_cannot(client: httpx.Client) -> None:
    deep = b'{"model": "%b", "messages": [], "chat_template_kwargs": {"a": %b%b}}' % (
        MODEL.encode(),
        b"[" * 5000,
        b"]" * 5000,
    )
    check_error(post(client, deep), 400, "invalid_json")
    huge = {**CHAT, "chat_template_kwargs": {"a": 2**70}}
    check_error(client.post("/v1/chat/completions", json=huge), 400, "invalid_json")


def test_body_limit(client: httpx.Client) -> None:
    body = b" " * 20_001
    error = check_error(post(client, body), 413, "request_too_large")
    assert "20000" in error["message"]
    assert "20001" in error["message"]
    check_error(post(client, iter([body[:15_000], body[15_000:]])), 413, "request_too_large")


def test_content_type(client: httpx.Client) -> None:
    for content_type in ("text/plain", "application/x-www-form-urlencoded", None):
        check_error(post(client, b"{}", content_type), 415, "unsupported_media_type")
    assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
    response = post(client, httpx.Request("POST", "http://x", json=CHAT).content, "Application/JSON; charset=utf-8")
    assert response.status_code == 200


def test_unknown_paths_methods_and_models(client: httpx.Client) -> None:
    check_error(client.get("/v1/nothing"), 404, "not_found")
    for method, path in (("POST", "/chat/completions"), ("GET", "/models"), ("DELETE", "/files/file-1")):
        message = check_error(client.request(method, path), 404, "not_found")["message"]
        assert message == f"Not Found: {method} {path}; it is /v1{path} here"
    for path in ("/v1/responses", "/v1/messages", "/api/chat"):
        message = check_error(client.post(path, json={}), 404, "not_found")["message"]
        assert message == f"Not Found: POST {path}; the nearest that this server has is /v1/chat/completions"
    assert check_error(client.get("/nothing"), 404, "not_found")["message"] == "Not Found: GET /nothing"
    response = client.get("/v1/chat/completions")
    check_error(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    error = check_error(
        client.post("/v1/chat/completions", json={**CHAT, "model": "gpt"}), 404, "model_not_found", "model"
    )
    assert "'gpt'" in error["message"]
    body = {"model": "gpt", "prompt": "x"}
    check_error(client.post("/v1/completions", json=body), 404, "model_not_found", "model")
    check_error(client.get("/v1/models/gpt"), 404, "model_not_found", "model")
    assert client.get("/v1/models/").json() == client.get("/v1/models").json()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("POST", path) for path in ("/v1/chat/completions", "/v1/files", "/tokenize", "/flush_cache", "/v1/batches")),
        *(
            ("GET", path)
            for path in ("/v1/models", "/v1/models/x", "/version", "/health_generate", "/v1/files/x/content")
        ),
        ("DELETE", "/v1/files/x"),
    ],
)
def test_a_query_where_none_is_read(client: httpx.Client, method: str, path: str) -> None:
    """Somebody who puts `stream=true` there would wait for a stream."""
    check_error(client.request(method, f"{path}?stream=true"), 400, "unknown_parameter", "stream")
    check_error(client.request(method, f"{path}?api-version=1&stream="), 400, "unknown_parameter", "stream")


def test_the_query_of_azures_clients_and_of_probes(client: httpx.Client) -> None:
    assert client.post("/v1/chat/completions?api-version=2024-06-01", json=CHAT).status_code == 200
    assert client.get("/v1/files?api-version=2024-06-01&limit=3").status_code == 200
    for path in ("/health", "/ready", "/metrics", "/openapi.json"):
        assert client.get(f"{path}?format=prometheus&format=x").status_code == 200


def test_parameters_of_other_servers(client: httpx.Client) -> None:
    for name, hint in {"guided_json": "is response_format", "guided_choice": "is regex", "n_predict": "max_to"}.items():
        response = client.post("/v1/chat/completions", json={**CHAT, name: 1})
        assert hint in check_error(response, 400, "unknown_parameter", name)["message"]


def test_models(engine: ScriptedEngine) -> None:
    with openai.OpenAI(base_url=f"{engine.url}/v1", api_key="s3cret") as client:
        assert [model.id for model in client.models.list()] == [MODEL, "alias"]
        model = client.models.retrieve(MODEL)
    assert (model.id, model.object, model.max_model_len) == (MODEL, "model", 512)


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Basic s3cret", "s3cret", "Bearer s3cre"])
def test_api_keys(engine: ScriptedEngine, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    response = httpx.post(f"{engine.url}/v1/chat/completions", json=CHAT, headers=headers)
    check_error(response, 401, "invalid_api_key")
    assert httpx.get(f"{engine.url}/v1/models", headers=headers).status_code == 401
    for path in ("/health", "/ready", "/metrics"):
        assert httpx.get(engine.url + path, headers=headers).status_code == 200


def test_each_api_key_is_accepted(engine: ScriptedEngine) -> None:
    for key in ("s3cret", "öther"):
        headers = {"authorization": b"bearer " + key.encode()}
        assert httpx.get(f"{engine.url}/v1/models", headers=headers).status_code == 200


def test_request_id(client: httpx.Client) -> None:
    assert client.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = [client.get("/health").headers["x-request-id"] for _ in range(2)]
    assert len(set(made)) == 2
    assert client.get("/health", headers={"x-request-id": "a" * 300}).headers["x-request-id"] != "a" * 300


def test_connections_are_kept(engine: ScriptedEngine) -> None:
    host, port = engine.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=WAIT_S)
    for path in ("/health", "/v1/models", "/ready"):
        connection.request("GET", path)
        connection.getresponse().read()
        assert connection.sock is not None
    connection.close()


def test_metrics(engine: ScriptedEngine, client: httpx.Client) -> None:
    numbers = dict.fromkeys(Stats.__struct_fields__, 7) | {"news": Counters(*[7] * len(Counters.__struct_fields__))}
    steps = [Step(0.001, 0.02, 0.003, 5), Step(0.001, 0.2, 0.003, 300)]
    for _ in range(2):  # what is told is added up
        engine.send(Stats(**{**numbers, "pages_total": 20, "running": 2, "steps": steps}))
    for _ in range(2):
        client.post("/v1/chat/completions", json=CHAT)
    client.get("/v1/models/" + MODEL)
    client.get("/made/up")
    page = client.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in page.text.splitlines() if not line.startswith("#"))
    assert float(lines['ramet_http_requests_total{code="200",route="/v1/chat/completions"}']) >= 2
    assert lines['ramet_http_requests_total{code="200",route="/v1/models/{model:path}"}'] >= "1.0"
    assert float(lines['ramet_http_requests_total{code="404",route="unmatched"}']) >= 1
    assert "made/up" not in page.text
    # This very request is open while it is answered.
    assert lines["ramet_http_requests_in_flight"] == "1.0"
    assert lines['ramet_scheduler_requests{state="running"}'] == "2.0"
    assert lines['ramet_kv_pages{state="in_use"}'] == "6.0"
    assert lines["ramet_kv_usage_ratio"] == "0.3"
    assert lines["ramet_scheduler_preemptions_total"] == "14.0"
    assert lines["ramet_engine_restarts_total"] == "0.0"
    assert lines['ramet_scheduler_step_seconds_bucket{le="0.0256",phase="run"}'] == "2.0"
    assert float(lines['ramet_scheduler_step_seconds_sum{phase="run"}']) == pytest.approx(0.44)
    assert lines['ramet_scheduler_step_seconds_count{phase="commit"}'] == "4.0"
    assert lines['ramet_scheduler_step_rows_bucket{le="8.0"}'] == "2.0"
    answered = float(lines["ramet_time_to_first_token_seconds_count"])
    assert float(lines["ramet_prompt_tokens_total"]) == 5 * answered
    assert float(lines["ramet_generation_tokens_total"]) == answered
    assert lines["ramet_request_duration_seconds_count"] == lines["ramet_time_to_first_token_seconds_count"]


def test_many_at_once(engine: ScriptedEngine, client: httpx.Client) -> None:
    def ask(number: int) -> str:
        body = {"model": MODEL, "prompt": f"{number}", "echo": True}
        return client.post("/v1/completions", json=body).json()["choices"][0]["text"]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(64))) == [f"{number}x" for number in range(64)]
