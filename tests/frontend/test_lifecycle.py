"""Odd orders of events: failures before and in a stream, clients that leave, a full queue, death and shutdown."""

import concurrent.futures
import json
import re
import signal
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support import scripted_engine
from support.scripted_engine import MODEL, WAIT_S, Request, ScriptedEngine
from support.server import until

from ramet.ipc.errors import Failure, FailureKind
from ramet.ipc.messages import EngineDown, EngineUp, Fatal, Finish, FinishReason, PromptInfo, TextDelta

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
STREAM = {**CHAT, "stream": True}
STOP = Finish(FinishReason.STOP, 2)
# Within which clients hear of a death, at the worst: others may hold the cores.
HEARD_S = 20.0


@pytest.fixture(scope="module")
def running() -> Iterator[ScriptedEngine]:
    with ScriptedEngine(tokenizers=2, max_queued_requests=4) as engine:
        yield engine


@pytest.fixture
def engine(running: ScriptedEngine) -> Iterator[ScriptedEngine]:
    """One frontend for all tests that leave it alive; each must leave nothing behind."""
    yield running
    assert running.jobs.empty()
    assert running.aborts.empty()
    assert httpx.get(f"{running.url}/ready").status_code == 200


class Caller:
    """Posts in threads, so that the test's own thread can play the engine."""

    def __init__(self) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(8)

    def post(self, engine: ScriptedEngine, body: dict[str, Any], path: str = "chat/completions") -> Any:
        return self._pool.submit(httpx.post, f"{engine.url}/v1/{path}", json=body, timeout=WAIT_S)

    def get(self, engine: ScriptedEngine, path: str) -> Any:
        return self._pool.submit(httpx.get, engine.url + path, timeout=WAIT_S)

    def close(self) -> None:
        self._pool.shutdown()


@pytest.fixture
def caller() -> Iterator[Caller]:
    caller = Caller()
    yield caller
    caller.close()


def first(request: Request, text: str = "a") -> TextDelta:
    return TextDelta(request.job.rids[0], text, 1, PromptInfo(3, 0))


def last(request: Request, text: str = "z") -> TextDelta:
    return TextDelta(request.job.rids[0], text, 2, finish=STOP)


def told(request: Request, number: int, text: str, finish: Finish | None = None) -> TextDelta:
    """A token, counted from 1, with its id."""
    prompt = PromptInfo(3, 0) if number == 1 else None
    return TextDelta(request.job.rids[0], text, number, prompt, finish=finish, token_ids=[number])


def events(text: str) -> list[Any]:
    parts = text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def connect(engine: ScriptedEngine, body: dict[str, Any]) -> socket.socket:
    """Send a request over a socket that the test holds in its hand."""
    host, port = engine.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=WAIT_S)
    content = json.dumps(body).encode()
    headers = f"host: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{headers}\r\n\r\n".encode() + content)
    return connection


def read_until(connection: socket.socket, text: bytes) -> bytes:
    data = b""
    while text not in data:
        part = connection.recv(65536)
        assert part, data
        data += part
    return data


def wait_for_end(engine: ScriptedEngine) -> None:
    """Until no HTTP request but the one that asks is open."""
    deadline = time.monotonic() + WAIT_S
    while "ramet_http_requests_in_flight 1.0" not in httpx.get(f"{engine.url}/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- failures ---------------------------------------------------------------------------------------------------

FAILURES = [
    (Failure(FailureKind.INVALID_REQUEST, "no", "messages", "bad_template"), 400, "bad_template", None),
    (Failure(FailureKind.CONTEXT_LENGTH_EXCEEDED, "9 > 8", "messages"), 400, "context_length_exceeded", None),
    (Failure(FailureKind.QUEUE_FULL, "full"), 429, "queue_full", "1"),
    (Failure(FailureKind.ENGINE_DOWN, "down"), 503, "engine_down", "5"),
    (Failure(FailureKind.INTERNAL, "broke"), 500, "internal_error", None),
]


@pytest.mark.parametrize(("failure", "status", "code", "retry_after"), FAILURES)
@pytest.mark.parametrize("body", [CHAT, STREAM])
def test_failed_before_the_first_token(
    engine: ScriptedEngine, caller: Caller, body: Any, failure: Failure, status: int, code: str, retry_after: str | None
) -> None:
    answer = caller.post(engine, body)
    engine.fail(engine.job(), failure)
    response = answer.result()
    assert response.status_code == status
    assert response.headers.get("retry-after") == retry_after
    error = response.json()["error"]
    assert (error["message"], error["param"], error["code"]) == (failure.message, failure.param, code)


def test_every_prompt_of_a_stream_is_checked_before_200(engine: ScriptedEngine, caller: Caller) -> None:
    answer = caller.post(engine, {"model": MODEL, "prompt": ["a", "b"], "stream": True}, "completions")
    one, other = engine.job(), engine.job()
    engine.deltas(first(one))
    engine.fail(other, Failure(FailureKind.CONTEXT_LENGTH_EXCEEDED, "too long"))
    assert answer.result().status_code == 400
    assert engine.aborted() == one.job.rids


def test_failed_after_some_tokens(engine: ScriptedEngine, caller: Caller) -> None:
    answer = caller.post(engine, STREAM)
    job = engine.job()
    engine.deltas(first(job, "some"))
    engine.fail(job, Failure(FailureKind.INTERNAL, "NaN in the logits"))
    response = answer.result()
    if response.status_code == 200:
        *chunks, error = events(response.text)
        assert "some" in json.dumps(chunks)
    else:  # Both came before the handler woke: still an honest status.
        assert response.status_code == 500
        error = response.json()
    assert error["error"]["message"] == "NaN in the logits"


def test_failed_in_a_stream_that_is_being_read(engine: ScriptedEngine) -> None:
    with connect(engine, STREAM) as connection:
        job = engine.job()
        engine.deltas(first(job, "some"))
        assert b"200 OK" in read_until(connection, b"some")
        engine.fail(job, Failure(FailureKind.INTERNAL, "NaN in the logits"))
        tail = read_until(connection, b"[DONE]")
    assert b'data: {"error":{"message":"NaN in the logits","type":"server_error"' in tail
    assert tail.index(b"error") < tail.index(b"[DONE]")


def test_failed_after_tokens_of_a_whole_answer(engine: ScriptedEngine, caller: Caller) -> None:
    answer = caller.post(engine, {**CHAT, "n": 2})
    job = engine.job()
    engine.deltas(first(job))
    engine.fail(job, Failure(FailureKind.INTERNAL, "broke"))
    assert answer.result().status_code == 500


def test_aborted_by_another(engine: ScriptedEngine, caller: Caller) -> None:
    answer = caller.post(engine, CHAT)
    [rid] = engine.job().job.rids
    engine.deltas(TextDelta(rid, "", 0, PromptInfo(3, 0), finish=Finish(FinishReason.ABORT)))
    response = answer.result()
    assert (response.status_code, response.json()["error"]["code"]) == (499, "aborted")


def test_one_end_only(engine: ScriptedEngine, caller: Caller) -> None:
    answer = caller.post(engine, CHAT)
    job = engine.job()
    engine.deltas(TextDelta("unknown", "?", 1, finish=STOP), first(job, "a"), last(job, "b"), last(job, "c"))
    engine.fail(job, Failure(FailureKind.INTERNAL, "late"))
    assert answer.result().json()["choices"][0]["message"]["content"] == "ab"


# ---- clients ----------------------------------------------------------------------------------------------------


def test_leaving_a_stream_aborts(engine: ScriptedEngine) -> None:
    connection = connect(engine, {**STREAM, "n": 2})
    job = engine.job()
    one, other = job.job.rids
    engine.deltas(
        TextDelta(one, "all", 1, PromptInfo(3, 0), finish=STOP), TextDelta(other, "some", 1, PromptInfo(3, 0))
    )
    read_until(connection, b"some")
    connection.close()
    assert engine.aborted() == [other]
    wait_for_end(engine)


@pytest.mark.parametrize("body", [CHAT, STREAM])
def test_leaving_before_the_first_token_aborts(engine: ScriptedEngine, body: dict[str, Any]) -> None:
    for _ in range(2):  # Twice: each goes to another tokenizer worker, and so does its abort.
        connection = connect(engine, body)
        job = engine.job()
        connection.close()
        number, abort = engine.aborts.get(timeout=WAIT_S)
        assert abort.rids == job.job.rids
        assert number == engine.tokenizer_of(job)
    wait_for_end(engine)


def test_slow_reader_gets_all(engine: ScriptedEngine) -> None:
    """More text than all buffers between hold; a merged backlog arrives in order."""
    with connect(engine, STREAM) as connection:
        job = engine.job()
        [rid] = job.job.rids
        engine.deltas(first(job, ""))
        texts = [f"<{number}>" + "x" * 5000 for number in range(2000)]
        for step in range(0, 2000, 20):
            engine.deltas(*(TextDelta(rid, text, 2 + step) for text in texts[step : step + 20]))
        engine.deltas(last(job, ""))
        time.sleep(0.2)
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            data += connection.recv(1 << 20)
    body = "".join(
        choice["delta"].get("content", "") for event in events(_dechunked(data)) for choice in event["choices"]
    )
    assert body == "".join(texts)


def _dechunked(data: bytes) -> str:
    _, _, rest = data.partition(b"\r\n\r\n")
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return body.decode()


def test_full_queue(engine: ScriptedEngine, caller: Caller) -> None:
    waiting = [caller.post(engine, {**CHAT, "n": 2}) for _ in range(2)]
    jobs = [engine.job(), engine.job()]
    response = caller.post(engine, STREAM).result()
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "queue_full"
    assert "at most 4" in response.json()["error"]["message"]
    for job in jobs:
        engine.deltas(*(TextDelta(rid, "x", 1, PromptInfo(3, 0), finish=STOP) for rid in job.job.rids))
    assert [answer.result().status_code for answer in waiting] == [200, 200]
    # What can never fit is not a matter of waiting.
    response = caller.post(engine, {**CHAT, "n": 5}).result()
    assert (response.status_code, response.json()["error"]["param"]) == (400, "n")


# ---- the process ------------------------------------------------------------------------------------------------


def test_engine_down(caller: Caller) -> None:
    with ScriptedEngine() as engine:
        whole = caller.post(engine, CHAT)
        before = engine.job()
        with connect(engine, STREAM) as connection:
            streamed = engine.job()
            engine.deltas(told(streamed, 1, "some"))
            read_until(connection, b"some")
            asked = caller.get(engine, "/health_generate")
            engine.job()
            engine.send(EngineDown("scheduler died"))
            assert asked.result().status_code == 503  # it was about now
            while httpx.get(f"{engine.url}/health").status_code != 503:  # until it has heard of it
                time.sleep(0.01)
            for path, status in (("/ready", 503), ("/metrics", 200)):
                assert httpx.get(engine.url + path).status_code == status
            response = caller.post(engine, CHAT).result()
            assert (response.status_code, response.headers["retry-after"]) == (503, "5")
            assert "scheduler died" in response.json()["error"]["message"]
            engine.send(EngineUp())
            assert engine.job().messages == before.messages
            again = engine.job()
            assert again.job.rids != streamed.job.rids
            engine.deltas(told(again, 1, "some"), told(again, 2, "thing", STOP))
            tail = read_until(connection, b"[DONE]")
        assert b"thing" in tail and b"some" not in tail and b"error" not in tail
        started = time.monotonic()
        engine.send(EngineDown("scheduler died again"))
        response = whole.result()
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_down")
        assert time.monotonic() - started < HEARD_S
        engine.send(EngineUp())
        while httpx.get(f"{engine.url}/health").status_code != 200:
            time.sleep(0.01)
        answer = caller.post(engine, CHAT)
        job = engine.job()
        engine.deltas(first(job), last(job))
        assert answer.result().status_code == 200
        engine.terminate()
        assert engine.exit_code() == 0


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_drain_while_the_engine_is_down(caller: Caller, comes_back: bool) -> None:
    with ScriptedEngine() as engine:
        answer = caller.post(engine, CHAT)
        engine.job()
        engine.send(EngineDown("scheduler died"))
        engine.terminate()
        if comes_back:
            engine.send(EngineUp())
            job = engine.job()
            engine.deltas(first(job), last(job))
            assert answer.result().status_code == 200
        else:
            engine.send(EngineDown("it is being stopped", final=True))
            response = answer.result()
            assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_down")
        assert engine.exit_code() == 0


def test_a_process_whose_pulse_is_old_hangs_and_one_whose_pulse_was_removed_may_not() -> None:
    with ScriptedEngine(watchdog_timeout_s=3.0) as engine:
        pulse = engine.pulse("scheduler-0")
        pulse.write_bytes(struct.pack("d", time.monotonic() - 100))
        engine.send(EngineUp(pids={"scheduler-0": 1}))
        words = re.compile(r'"scheduler-0 hangs, silent for more than \d+\.\d s"')
        until(lambda: words.search(httpx.get(f"{engine.url}/health").text) is not None, WAIT_S, lambda: "healthy")
        pulse.unlink()
        assert httpx.get(f"{engine.url}/health").status_code == 200


def test_time_in_which_nobody_ran_is_nobodys_silence() -> None:
    """As when the machine sleeps: the frontend was stopped as well, and hears of others when they had time to beat."""
    with ScriptedEngine(watchdog_timeout_s=3.0) as engine:
        pulse = engine.pulse("scheduler-0")
        pulse.write_bytes(struct.pack("d", time.monotonic()))
        engine.send(EngineUp(pids={"scheduler-0": 1}))
        time.sleep(1.5)
        engine.process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        engine.process.send_signal(signal.SIGCONT)
        assert httpx.get(f"{engine.url}/health").status_code == 200

        def is_unhealthy() -> bool:
            time.sleep(2)  # who asks so rarely hears of it too
            return httpx.get(f"{engine.url}/health").status_code == 503

        until(is_unhealthy, WAIT_S, lambda: "healthy")


def test_the_time_of_a_request_runs_on_while_the_engine_is_down(caller: Caller) -> None:
    with ScriptedEngine(request_timeout_s=1.0) as engine:
        asked_at = time.monotonic()
        answer = caller.post(engine, CHAT)
        engine.job()
        engine.send(EngineDown("scheduler died"))
        assert answer.result().status_code == 504
        assert time.monotonic() - asked_at < 1 + HEARD_S
        engine.send(EngineUp())
        while httpx.get(f"{engine.url}/health").status_code != 200:
            time.sleep(0.01)
        assert engine.jobs.empty()


def test_drain_lets_requests_end(caller: Caller) -> None:
    with ScriptedEngine() as engine:
        answer = caller.post(engine, CHAT)
        job = engine.job()
        engine.terminate()
        deadline = time.monotonic() + WAIT_S
        while httpx.get(f"{engine.url}/ready").status_code != 503:
            assert time.monotonic() < deadline
        response = caller.post(engine, CHAT).result()
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "server_shutting_down"
        assert response.headers["retry-after"] == "5"
        assert httpx.get(f"{engine.url}/health").status_code == 200
        engine.deltas(first(job), last(job))
        assert answer.result().json()["choices"][0]["message"]["content"] == "az"
        assert engine.exit_code() == 0


def test_drain_has_an_end(caller: Caller) -> None:
    with ScriptedEngine(drain_timeout_s=0.2) as engine:
        with connect(engine, STREAM) as connection:
            job = engine.job()
            engine.deltas(first(job, "some"))
            read_until(connection, b"some")
            engine.terminate()
            assert b"server_shutting_down" in read_until(connection, b"[DONE]")
        assert engine.aborted() == job.job.rids
        assert engine.exit_code() == 0


def test_sigterm_before_the_engine_is_ready() -> None:
    with ScriptedEngine(start=False) as engine:
        while not engine.listens_for_messages():
            time.sleep(0.01)
        engine.terminate()
        assert engine.exit_code() == 0


@pytest.mark.parametrize("serves", [False, True])
def test_a_pulse_that_breaks_is_a_failure(monkeypatch: pytest.MonkeyPatch, serves: bool) -> None:
    """A process that ends with 0 has been asked to."""
    broken = """
import os
from ramet.frontend import main
class Pulse(main.Pulse):
    _sign = "/nowhere"
    def __init__(self, addresses, name):
        super().__init__(addresses, name)
        self._sign = addresses.pulse("stop")
    def beat(self):
        if os.path.exists(self._sign):
            raise ZeroDivisionError("no beat")
main.Pulse = Pulse
"""
    monkeypatch.setattr(scripted_engine, "_PROCESS", broken + scripted_engine._PROCESS)
    with ScriptedEngine(start=serves) as engine:
        engine.pulse("stop").touch()
        assert engine.exit_code() == 1
        assert "no beat" in engine.errors()


def test_ready_carries_the_context_length() -> None:
    with ScriptedEngine(start=False) as engine:
        engine.start(context_length=77)
        assert httpx.get(f"{engine.url}/v1/models").json()["data"][0]["max_model_len"] == 77


def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with ScriptedEngine(start=False, port=port) as engine:
            news = engine.news.get(timeout=WAIT_S)
            assert isinstance(news, Fatal)
            assert (news.process, str(port) in news.message, "in use" in news.message) == ("frontend", True, True)
            assert engine.exit_code() == 1
            assert engine.errors() == ""
