"""What an operator sees of a known load: metrics, JSON logs and traces of a real server. Its API key shows nowhere."""

import concurrent.futures
import contextlib
import functools
import http.server
import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from support.scripted_engine import ScriptedEngine
from support.server import PATIENCE_S, RunningServer, until

from ramet.ipc.messages import Embedded

pytestmark = pytest.mark.e2e

KEY = "sk-4f1c9d-the-key"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


class Collector:
    """Takes OTLP over HTTP, as a collector does. `spans` are those that have come, as protobuf messages."""

    def __init__(self) -> None:
        decode = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
        self.spans: list[Any] = []
        self.resources: list[dict[str, str]] = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                for part in decode.ExportTraceServiceRequest.FromString(body).resource_spans:
                    collector.resources.append({it.key: it.value.string_value for it in part.resource.attributes})
                    collector.spans += [span for scope in part.scope_spans for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector | None]:
    try:
        collector = Collector()
    except pytest.skip.Exception:  # only the tests of traces are skipped
        yield None
        return
    with contextlib.closing(collector):
        yield collector


@pytest.fixture(scope="module")
def server(servers: Any, tiny_model: Callable[[str], Path], collector: Collector | None) -> Iterator[RunningServer]:
    servers.close()
    flags = ["--model-path", str(tiny_model("llama")), "--dtype", "float32", "--max-total-tokens", "6144"]
    flags += ["--api-key", KEY, "--log-level", "debug", "--log-format", "json", "--log-requests", "content"]
    flags += ["--metrics-buckets", "request_generation_tokens=7,100"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        if collector is not None:
            flags += ["--otlp-traces-endpoint", collector.url]
        with RunningServer(*flags, api_key=KEY) as server:
            yield server


def lines(server: RunningServer) -> list[dict[str, Any]]:
    """Of the log, without one that is just being written; the greeting for the user is no log line."""
    log = server.log().rpartition("\n")[0]
    greeting = log.index("\nServing ")
    return [json.loads(line) for line in log[:greeting].splitlines() if line] + [
        json.loads(line) for line in log[greeting:].splitlines() if line.startswith("{")
    ]


def stream(server: RunningServer, **body: Any) -> tuple[Counter[str], int, int, int]:
    """Finish reasons, and the usage: prompt tokens, cached ones, completion tokens."""
    reasons, usage = Counter[str](), None
    body = {"model": server.model, "stream_options": {"include_usage": True}, **body}
    for chunk in server.client.completions.create(stream=True, **body):
        reasons.update(choice.finish_reason for choice in chunk.choices if choice.finish_reason)
        usage = chunk.usage or usage
    assert usage is not None
    details = usage.prompt_tokens_details
    return reasons, usage.prompt_tokens, (details.cached_tokens or 0) if details else 0, usage.completion_tokens


def test_the_counters_equal_what_the_clients_counted(server: RunningServer) -> None:
    before = server.quiet_metrics()
    endless = {"ignore_eos": True}
    asks: list[dict[str, Any]] = [
        {"prompt": [5 + i] * 70, "max_tokens": 5 + i, "extra_body": endless} for i in range(6)
    ]
    asks += [{"prompt": "a", "n": 3, "max_tokens": 6, "extra_body": endless}]
    asks += [{"prompt": "b", "logit_bias": {"9": 100}, "max_tokens": 9, "extra_body": {"stop_token_ids": [9]}}]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        told = list(pool.map(lambda body: stream(server, **body), asks))
    for prompt, error in (([5] * 600, openai.BadRequestError), ([5] * 7000, openai.BadRequestError)):
        with pytest.raises(error):
            server.client.completions.create(model=server.model, prompt=prompt, n=2, max_tokens=4000)
    with pytest.raises(openai.NotFoundError):
        server.client.completions.create(model="other", prompt="x")
    seen = server.quiet_metrics()

    def new(name: str) -> float:
        return seen.get(name, 0) - before.get(name, 0)

    reasons = sum((it[0] for it in told), Counter[str]())
    assert reasons == {"length": 9, "stop": 1}
    for reason, count in {**reasons, "error": 4, "abort": 0}.items():
        assert new(f'ramet_requests_finished_total{{reason="{reason}"}}') == count, reason
    completion_tokens = sum(it[3] for it in told)
    assert new("ramet_generation_tokens_total") == completion_tokens
    assert new("ramet_scheduler_generated_tokens_total") == completion_tokens
    assert new("ramet_prompt_tokens_total") == sum(it[1] for it in told)
    assert new("ramet_request_prompt_tokens_count") == 8
    assert new("ramet_request_prompt_tokens_sum") == sum(it[1] for it in told)
    assert new("ramet_prefix_cache_queries_total") == sum(it[1] * (3 if it[0]["length"] == 3 else 1) for it in told)
    for name in ("time_to_first_token_seconds", "request_duration_seconds", "request_queue_seconds"):
        assert new(f"ramet_{name}_count") == 10, name
    assert new("ramet_inter_token_latency_seconds_count") == completion_tokens - 10
    assert new('ramet_request_generation_tokens_bucket{le="7.0"}') == 3 + 3 + 1
    assert new("ramet_request_generation_tokens_sum") == completion_tokens
    for code, count in ((200, 8), (400, 2), (404, 1)):
        assert new(f'ramet_http_requests_total{{code="{code}",route="/v1/completions"}}') == count, code
    steps = new("ramet_scheduler_step_rows_count")
    assert steps >= 10  # of the longest answer
    for phase in ("schedule", "run", "commit"):
        assert new(f'ramet_scheduler_step_seconds_count{{phase="{phase}"}}') == steps
    # Whoever samples is a row; prompts are rows of steps that need not sample.
    assert completion_tokens <= new("ramet_scheduler_step_rows_sum") <= completion_tokens + 10


def test_aborted_requests_are_counted(server: RunningServer) -> None:
    before = server.quiet_metrics()
    for _ in range(2):
        with server.client.completions.create(
            model=server.model, prompt="a", n=2, max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
        ) as chunks:
            next(iter(chunks))
    body = {"model": server.model, "prompt": "a", "max_tokens": 1500, "ignore_eos": True, "rid": "mine"}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.http.post, "/v1/completions", json=body)
        abort = functools.partial(server.http.post, "/abort_request", json={"rid": "mine"})
        until(lambda: abort().json()["aborted"], PATIENCE_S, lambda: "not live")
        assert asked.result().status_code == 499
    after = server.quiet_metrics()
    name = 'ramet_requests_finished_total{reason="abort"}'
    assert after[name] - before[name] == 5
    assert after["ramet_scheduler_aborted_total"] - before["ramet_scheduler_aborted_total"] == 5


def test_the_page_has_each_process(server: RunningServer) -> None:
    page = server.http.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    families = {family.name: family for family in text_string_to_metric_families(page.text)}
    pids = server.pids()
    for name in ("process_cpu_seconds", "process_resident_memory_bytes", "process_open_fds", "process_threads"):
        values = {sample.labels["process"]: sample.value for sample in families[name].samples}
        assert values.keys() == pids.keys(), name
        assert all(value > 0 for value in values.values())
    for sample in families["process_resident_memory_bytes"].samples:
        rss = psutil.Process(pids[sample.labels["process"]]).memory_info().rss
        assert sample.value == pytest.approx(rss, rel=0.1)
    [info] = families["ramet_build"].samples
    assert info.labels["model"] == server.model


def test_every_log_line_is_an_object_and_tells_of_the_request(server: RunningServer) -> None:
    answer = server.http.post(
        "/v1/chat/completions",
        json={"model": server.model, "messages": [{"role": "user", "content": "äpfel\n"}], "max_tokens": 3, "top_k": 1},
        headers={"x-request-id": "told-1"},
    )
    assert answer.status_code == 200

    def found() -> list[dict[str, Any]]:
        return [line for line in lines(server) if line.get("id") == "told-1"]

    until(lambda: len(found()) == 1, PATIENCE_S, lambda: server.log())
    [line] = found()
    usage = answer.json()["usage"]
    assert (line["level"], line["process"], line["message"]) == ("info", "frontend", "request")
    assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/chat/completions", 200)
    assert line["prompt_tokens"] == usage["prompt_tokens"]
    assert line["completion_tokens"] == usage["completion_tokens"]
    assert 0 < line["first_token_seconds"] <= line["seconds"] < 60
    assert 0 <= line["queue_seconds"] <= line["first_token_seconds"]
    assert line["request"]["top_k"] == 1
    assert line["request"]["messages"] == [{"role": "user", "content": "äpfel\n"}]
    assert json.loads(line["response"]) == answer.json()
    assert {"launcher", "frontend"} <= {it["process"] for it in lines(server)}
    assert all({"time", "level", "process", "logger", "message"} <= it.keys() for it in lines(server))


def test_no_key_is_logged(server: RunningServer) -> None:
    wrong = "sk-someone-elses-key"
    body = {"model": server.model, "prompt": "a", "max_tokens": 1}
    for key, status in ((wrong, 401), (KEY, 200)):
        headers = {"authorization": f"Bearer {key}"}
        assert httpx.post(f"{server.url}/v1/completions", json=body, headers=headers).status_code == status
        httpx.post(f"{server.url}/v1/completions", content=b"{", headers=headers)
        httpx.get(f"{server.url}/get_server_info", headers=headers)
    until(lambda: sum(line.get("status") == 401 for line in lines(server)) >= 3, PATIENCE_S, lambda: server.log())
    for secret in (KEY, wrong, "Bearer", "uthorization"):
        assert secret not in json.dumps(lines(server))
    assert KEY not in server.log()


def test_a_trace_has_a_span_for_each_hop(server: RunningServer, collector: Collector | None) -> None:
    if collector is None:
        pytest.skip("the packages of ramet[otel] are not installed")
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "traced-1"}
    body = {"model": server.model, "prompt": [5] * 40, "n": 2, "max_tokens": 4, "ignore_eos": True}
    assert server.http.post("/v1/completions", json=body, headers=headers).status_code == 200

    def spans() -> list[Any]:
        return [span for span in collector.spans if span.trace_id.hex() == TRACE]

    until(lambda: len(spans()) >= 9, PATIENCE_S, lambda: f"nine spans: {collector.spans}")
    [root] = [span for span in spans() if span.name == "POST /v1/completions"]
    assert root.parent_span_id.hex() == PARENT
    attributes = {it.key: it.value for it in root.attributes}
    assert attributes["ramet.request_id"].string_value == "traced-1"
    assert attributes["http.response.status_code"].int_value == 200
    assert attributes["gen_ai.usage.input_tokens"].int_value == 40
    assert attributes["gen_ai.usage.output_tokens"].int_value == 8
    hops = [span for span in spans() if span is not root]
    assert Counter(span.name for span in hops) == dict.fromkeys(("tokenize", "queue", "prefill", "decode"), 2)
    for index in (0, 1):
        mine = [span for span in hops if span.attributes[0].value.int_value == index]
        assert [span.name for span in mine] == ["tokenize", "queue", "prefill", "decode"]
        assert all(span.parent_span_id == root.span_id for span in mine)
        assert root.start_time_unix_nano <= mine[0].start_time_unix_nano
        for earlier, later in itertools.pairwise(mine):
            assert earlier.start_time_unix_nano <= earlier.end_time_unix_nano == later.start_time_unix_nano
        assert mine[-1].end_time_unix_nano <= root.end_time_unix_nano
    assert collector.resources[0]["service.name"] == "ramet"


def test_the_span_of_embeddings_has_their_tokens(collector: Collector | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if collector is None:
        pytest.skip("the packages of ramet[otel] are not installed")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    with (
        ScriptedEngine(is_embedding=True, embedding_size=1, otlp_traces_endpoint=collector.url) as engine,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(
            httpx.post,
            f"{engine.url}/v1/embeddings",
            json={"model": "alias", "input": ["a", "b"]},
            headers={"traceparent": f"00-{'d' * 32}-{PARENT}-01"},
        )
        for tokens in (3, 4):
            engine.send(Embedded(engine.question().rid, tokens, bytes(4)))
        assert answer.result().status_code == 200

        def spans() -> list[Any]:
            return [span for span in collector.spans if span.trace_id.hex() == "d" * 32]

        until(spans, PATIENCE_S, lambda: "a span")
        attributes = {it.key: it.value for it in spans()[0].attributes}
    assert attributes["gen_ai.usage.input_tokens"].int_value == 7
    assert "gen_ai.usage.output_tokens" not in attributes


def test_what_is_not_sampled_is_not_traced_and_the_last_spans_are_sent_at_the_end(
    server: RunningServer, collector: Collector | None
) -> None:
    """Ends the server: the last test of this file."""
    if collector is None:
        pytest.skip("the packages of ramet[otel] are not installed")
    body = {"model": server.model, "prompt": "a", "max_tokens": 1}
    for name, flags in (("f" * 32, "00"), ("e" * 32, "01")):
        headers = {"traceparent": f"00-{name}-{PARENT}-{flags}"}
        assert server.http.post("/v1/completions", json=body, headers=headers).status_code == 200
    assert server.stop() == 0
    traces = {span.trace_id.hex() for span in collector.spans}
    assert "e" * 32 in traces
    assert "f" * 32 not in traces
    assert not [span for span in collector.spans if "/metrics" in span.name]
