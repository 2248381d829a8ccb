"""What holds for the whole surface and for the endpoints beside OpenAI's, on a real engine.

Where each rule is tested (files of `tests/`; no name: here):

- error body, 400 with a dotted `param`: e2e/test_errors.py, frontend/test_schemas.py; 401: frontend/test_http.py;
  404 of a model: e2e/test_errors.py; 405, 413, 415: e2e/test_errors.py; 429 with `retry-after`:
  frontend/test_lifecycle.py `test_full_queue`; a client that leaves: e2e/test_disconnects.py; 503 with `retry-after`:
  frontend/test_lifecycle.py `test_engine_down`, `test_drain_lets_requests_end`
- null is absent: e2e/test_errors.py, frontend/test_schemas.py, frontend/test_generate.py
- an unknown field is a 400, OpenAI's no-ops are accepted: frontend/test_schemas.py `test_accepted_without_effect`
- served names and the model path are accepted, the response echoes the name: `test_names_of_the_model`
- `x-request-id` on every response: `test_every_response_has_a_request_id`, frontend/test_http.py `test_request_id`
- several API keys, none needed for health and metrics: frontend/test_http.py `test_api_keys`
- an error in a stream, then `[DONE]`: frontend/test_lifecycle.py; everything checkable before 200: the same file
- prompt and `max_tokens` against the context: e2e/test_errors.py
- `/v1/models` and `/v1/models/{id}` with `max_model_len`: frontend/test_http.py `test_models`
- `/health`, `/ready`: e2e/test_processes.py, frontend/test_lifecycle.py; `/health_generate`: `test_health_generate`
- `/metrics`: frontend/test_http.py `test_metrics`
- `/get_model_info`, `/get_server_info`, `/version`: `test_what_the_server_tells_of_itself`
- `/flush_cache`: `test_flush_cache`; `/abort_request`: `test_abort_*`
- `/tokenize`, `/detokenize`: `test_tokenize*`; `/generate`: `test_generate*`, frontend/test_generate.py
- the flags: `test_flags_typed_by_habit`, launch/test_cli.py; CORS and TLS: frontend/test_cors_tls.py,
  launch/test_frontend_settings.py
"""

import concurrent.futures
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tokenizers
from support.server import PATIENCE_S, RunningServer, until

import ramet
from ramet.launch.cli import parse_args

pytestmark = pytest.mark.e2e

CONTEXT = 2048
# Enough to be running still when it is aborted.
LONG = 1900


@pytest.fixture
def tokenizer(tiny_model: Callable[[str], Path]) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(tiny_model("llama") / "tokenizer.json"))


def ok(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


def events(text: str) -> list[Any]:
    parts = text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


# ---- everywhere -------------------------------------------------------------------------------------------------


def test_names_of_the_model(tiny: RunningServer, http: httpx.Client) -> None:
    for name in {tiny.model, ok(http.get("/get_model_info"))["model_path"]}:
        answer = ok(http.post("/v1/completions", json={"model": name, "prompt": "a", "max_tokens": 1}))
        assert answer["model"] == name


def test_every_response_has_a_request_id(http: httpx.Client) -> None:
    document = ok(http.get("/openapi.json"))
    for path, item in document["paths"].items():
        for method in item:
            headers = {"x-request-id": "mine", "content-type": "application/json"}
            response = http.request(method, path, content=b"{}" if method == "post" else None, headers=headers)
            assert response.headers["x-request-id"] == "mine", path
    assert http.get("/nowhere").headers["x-request-id"]


# ---- the server -------------------------------------------------------------------------------------------------


def test_what_the_server_tells_of_itself(tiny: RunningServer, http: httpx.Client) -> None:
    model = ok(http.get("/get_model_info"))
    assert (model["max_model_len"], model["is_generation"], model["vocab_size"]) == (CONTEXT, True, 384)
    server = ok(http.get("/get_server_info"))
    assert (server["version"], server["model_path"]) == (ramet.__version__, model["model_path"])
    assert (server["max_total_num_tokens"], server["context_length"], server["dtype"]) == (6144, CONTEXT, "float32")
    assert server["max_running_requests"] >= 1
    assert server["port"] == tiny.port
    assert isinstance(server["internal_states"][0], dict)
    assert not {"api_key", "ssl_keyfile_password"} & set(server)
    assert ok(http.get("/version")) == {"version": ramet.__version__}


def test_health_generate(http: httpx.Client) -> None:
    assert ok(http.get("/health_generate")) == {"status": "ok"}


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_flush_cache(tiny: RunningServer, http: httpx.Client, method: str) -> None:
    body = {"model": tiny.model, "prompt": [7] * 100, "max_tokens": 1}

    def cached() -> int:
        usage = ok(http.post("/v1/completions", json=body))["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    cached()
    assert cached() == 96
    flushed = ok(http.request(method, "/flush_cache"))
    assert flushed["success"] is True
    assert flushed["pages"] >= 6
    assert cached() == 0


# ---- tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
def test_tokenize(tiny: RunningServer, http: httpx.Client, tokenizer: tokenizers.Tokenizer, path: str) -> None:
    text = "A fox, é🦊"
    answer = ok(http.post(path, json={"model": tiny.model, "prompt": text, "return_token_strs": True}))
    expected = tokenizer.encode(text)
    assert answer == {
        "tokens": expected.ids,
        "count": len(expected.ids),
        "max_model_len": CONTEXT,
        "token_strs": expected.tokens,
    }
    plain = ok(http.post(path, json={"prompt": text, "add_special_tokens": False}))
    assert plain["tokens"] == tokenizer.encode(text, add_special_tokens=False).ids
    assert "token_strs" not in plain
    assert ok(http.post(path, json={"prompt": "", "add_special_tokens": False}))["count"] == 0
    back = ok(http.post(path.replace("tok", "detok"), json={"tokens": plain["tokens"]}))
    assert back == {"prompt": text, "text": text}
    assert ok(http.post("/detokenize", json={"tokens": []}))["prompt"] == ""


def test_tokenize_a_chat_as_it_is_answered(tiny: RunningServer, http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "hi"}]
    count = ok(http.post("/tokenize", json={"messages": messages}))["count"]
    body = {"model": tiny.model, "messages": messages, "max_tokens": 1}
    assert ok(http.post("/v1/chat/completions", json=body))["usage"]["prompt_tokens"] == count
    closed = ok(http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}))
    assert closed["count"] < count


def test_tokenize_special_tokens(http: httpx.Client, tokenizer: tokenizers.Tokenizer) -> None:
    special = next(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
    name = tokenizer.id_to_token(special)
    assert ok(http.post("/detokenize", json={"tokens": [special]}))["prompt"] == name
    assert ok(http.post("/detokenize", json={"tokens": [special], "skip_special_tokens": True}))["prompt"] == ""


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "a", "tools": []}, 400, "tools"),
        ("/tokenize", {"prompt": "a", "zap": 1}, 400, "zap"),
        ("/tokenize", {"prompt": "a" * (128 * CONTEXT + 1)}, 400, None),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True},
            400,
            "add_special_tokens",
        ),
        ("/tokenize", {"messages": [{"role": "user"}]}, 400, "messages[0].content"),
        ("/tokenize", {"model": "gpt", "prompt": "a"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [384]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens[]"),
        ("/detokenize", {"tokens": [1], "model": "gpt"}, 404, "model"),
        ("/abort_request", {}, 400, "rid"),
        ("/abort_request", {"rid": 5}, 400, "rid"),
    ],
)
def test_refused(http: httpx.Client, path: str, body: Any, status: int, param: str | None) -> None:
    response = http.post(path, json=body)
    assert response.status_code == status, response.text
    found = response.json()["error"]["param"]
    assert found == param or (param == "tokens[]" and found.startswith("tokens"))


# ---- generate ---------------------------------------------------------------------------------------------------


def test_generate_is_the_same_as_completions(tiny: RunningServer, http: httpx.Client) -> None:
    body = {"model": tiny.model, "prompt": "A fox", "max_tokens": 12, "seed": 5, "ignore_eos": True}
    expected = ok(http.post("/v1/completions", json=body))
    sampling = {"max_new_tokens": 12, "sampling_seed": 5, "ignore_eos": True}
    answer = ok(http.post("/generate", json={"text": "A fox", "sampling_params": sampling}))
    assert answer["text"] == expected["choices"][0]["text"]
    meta = answer["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": 12}
    assert meta["prompt_tokens"] == expected["usage"]["prompt_tokens"]
    assert meta["completion_tokens"] == len(answer["output_ids"]) == 12
    back = ok(http.post("/detokenize", json={"tokens": answer["output_ids"], "skip_special_tokens": True}))
    assert back["text"] == answer["text"]
    stream = http.post("/generate", json={"text": "A fox", "sampling_params": sampling, "stream": True})
    *parts, last = events(stream.text)
    assert (last["text"], last["output_ids"]) == (answer["text"], answer["output_ids"])
    assert all(last["text"].startswith(part["text"]) for part in parts)
    counts = [part["meta_info"]["completion_tokens"] for part in [*parts, last]]
    assert counts == sorted(counts)


def test_generate_token_ids_and_logprobs(http: httpx.Client) -> None:
    body = {
        "input_ids": [[5, 6, 7], [8, 9]],
        "sampling_params": {"max_new_tokens": 3, "temperature": 0, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
    }
    answers = ok(http.post("/generate", json=body))
    for answer, ids in zip(answers, body["input_ids"], strict=True):
        meta = answer["meta_info"]
        assert [entry[1] for entry in meta["input_token_logprobs"]] == ids
        assert meta["input_token_logprobs"][0][0] is None
        assert [entry[1] for entry in meta["output_token_logprobs"]] == answer["output_ids"]
        # Greedy: the token is the likeliest of its place.
        firsts = [top[0] for top in meta["output_top_logprobs"]]
        assert [first[:2] for first in firsts] == [entry[:2] for entry in meta["output_token_logprobs"]]
    ids = body["input_ids"]
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 0}, "return_logprob": True, "logprob_start_len": 0}
    scored = ok(http.post("/generate", json=body))
    assert [len(answer["meta_info"]["input_token_logprobs"]) for answer in scored] == [3, 2]
    assert [answer["meta_info"]["completion_tokens"] for answer in scored] == [0, 0]


def test_generate_longer_than_the_context(http: httpx.Client) -> None:
    body = {"input_ids": [5] * 100, "sampling_params": {"max_new_tokens": CONTEXT}, "stream": True}
    response = http.post("/generate", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "sampling_params.max_new_tokens")
    assert "max_new_tokens is 2048" in error["message"]


# ---- abort ------------------------------------------------------------------------------------------------------


Answer = concurrent.futures.Future[Any]


def abort_until_done(http: httpx.Client, answers: list[Answer], **body: Any) -> None:
    """A request that has not come yet is not there to be aborted."""

    def done() -> bool:
        ok(http.post("/abort_request", json=body))
        return all(answer.done() for answer in answers)

    until(done, PATIENCE_S, lambda: "an end")


@pytest.mark.parametrize("stream", [False, True])
def test_abort_of_generate_keeps_the_text(tiny: RunningServer, http: httpx.Client, stream: bool) -> None:
    sampling = {"max_new_tokens": LONG, "ignore_eos": True, "n": 2}
    body = {"text": "a", "sampling_params": sampling, "rid": "mine", "stream": stream}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{tiny.url}/generate", json=body, timeout=60)
        time.sleep(0.2)  # to let it have some text; if it does not, there is less to see
        assert ok(http.post("/abort_request", json={"rid": "other"}))["aborted"] == 0
        abort_until_done(http, [answer], rid="mine")
    response = answer.result()
    assert response.status_code == 200
    found = events(response.text) if stream else response.json()
    ends = [choice["meta_info"] for choice in found if choice["meta_info"]["finish_reason"]]
    assert [end["finish_reason"]["type"] for end in ends] == ["abort", "abort"]
    assert all(end["completion_tokens"] < LONG for end in ends)
    until(lambda: tiny.counter("aborted") >= 2, PATIENCE_S, lambda: "two aborted")


def test_abort_is_an_error_to_openai_clients(tiny: RunningServer, http: httpx.Client, client: openai.OpenAI) -> None:
    """Not one after which the SDK tries again by itself."""
    body: dict[str, Any] = {"model": tiny.model, "prompt": "a", "max_tokens": LONG}
    extra = {"ignore_eos": True, "rid": "mine"}
    patient = client.with_options(max_retries=3)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(patient.completions.create, **body, extra_body=extra) for _ in range(2)]
        abort_until_done(http, answers, rid="mine")
    for answer in answers:
        with pytest.raises(openai.APIStatusError) as caught:
            answer.result()
        assert (caught.value.status_code, caught.value.code) == (499, "aborted")


def test_abort_of_a_stream_is_an_event(tiny: RunningServer, http: httpx.Client, client: openai.OpenAI) -> None:
    extra = {"ignore_eos": True}
    stream = client.completions.create(model=tiny.model, prompt="a", max_tokens=LONG, extra_body=extra, stream=True)
    next(iter(stream))
    assert ok(http.post("/abort_request", json={"abort_all": True}))["aborted"] == 1
    with pytest.raises(openai.APIError, match="aborted"):
        list(stream)


# ---- flags ------------------------------------------------------------------------------------------------------

HABITS = (
    "model-path host port api-key served-model-name tokenizer-path chat-template dtype device context-length "
    "load-format trust-remote-code revision is-embedding mem-fraction-static max-running-requests max-queued-requests "
    "max-total-tokens chunked-prefill-size page-size schedule-policy disable-radix-cache disable-cuda-graph "
    "cuda-graph-max-bs disable-overlap-schedule attention-backend tp-size tp dp-size nnodes node-rank dist-init-addr "
    "base-gpu-id log-level log-requests enable-metrics file-storage-path tokenizer-worker-num stream-interval "
    "random-seed watchdog-timeout config tool-call-parser reasoning-parser"
)


@pytest.mark.parametrize("flag", [f"--{name}" for name in HABITS.split()])
def test_flags_typed_by_habit(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    assert flag in capsys.readouterr().out
