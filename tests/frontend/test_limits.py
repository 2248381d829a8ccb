"""What load and clients may ask of one frontend: tokens in the queue, deadlines, heads, and clients that stall."""

import concurrent.futures
import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest
from support.batches import checked_results, create, line, wait
from support.scripted_engine import MODEL, WAIT_S, ScriptedEngine, says

from ramet.frontend.connection import MAX_HEAD_BYTES, MAX_HEADERS
from ramet.ipc.messages import Embedded, Embedding, Finish, FinishReason, PromptInfo, TextDelta

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
CLIENT_TIMEOUT_S = 1.0
# Within which the frontend must have acted on what is due; the machine may be busy.
SOON_S = 20.0


@pytest.fixture(scope="module")
def engine() -> Iterator[ScriptedEngine]:
    with ScriptedEngine(max_queued_requests=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def strict() -> Iterator[ScriptedEngine]:
    """Does not wait long for a client; so only for tests of that, for a test may be held up too."""
    with ScriptedEngine(client_timeout_s=CLIENT_TIMEOUT_S) as engine:
        yield engine


class Callers:
    """Posts in threads, so that the test's own thread can play the engine."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self.url = engine.url
        self._pool = concurrent.futures.ThreadPoolExecutor(8)

    def post(self, body: dict[str, Any], path: str = "chat/completions", **headers: str) -> Any:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return self._pool.submit(httpx.post, f"{self.url}/v1/{path}", json=body, headers=headers, timeout=WAIT_S)


@pytest.fixture
def callers(engine: ScriptedEngine) -> Callers:
    return Callers(engine)


def connect(engine: ScriptedEngine) -> socket.socket:
    host, port = engine.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=WAIT_S)


def post_bytes(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    return POST + f"content-length: {len(content)}\r\n\r\n".encode() + content


def read_all(connection: socket.socket) -> bytes:
    """Until the other side closes."""
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            answer += part
    return answer


# ---- the queue ------------------------------------------------------------------------------------------------------


def test_tokens_in_the_queue() -> None:
    with ScriptedEngine(max_queued_tokens=1000) as engine:
        callers = Callers(engine)
        # 400 characters of text are 100 tokens, each of two choices has its own answer: 100 + 2 * 350.
        large = {"model": MODEL, "messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 350, "n": 2}
        running = callers.post(large)
        job = engine.job()
        small = {"model": MODEL, "prompt": [5] * 100, "max_tokens": 100}
        fits = callers.post(small, "completions")
        other = engine.job()
        refused = httpx.post(f"{engine.url}/v1/completions", json={**small, "max_tokens": 1})
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        for number in ("about 1000 of at most 1000 tokens", "about 101"):
            assert number in refused.json()["error"]["message"]
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        for waiting in (job, other):
            says("x")(engine, waiting)
        assert running.result().status_code == fits.result().status_code == 200
        # What has ended counts no more; and alone a request may be as large as it likes.
        for body in (small, {**small, "prompt": [5] * 5000}):
            answer = callers.post(body, "completions")
            says("x")(engine, engine.job())
            assert answer.result().status_code == 200


def test_bodies_under_way_share_a_room() -> None:
    """Of bodies of at most 200,000 bytes, eight fit; small ones always do."""
    with ScriptedEngine(max_body_bytes=200_000) as engine, contextlib.ExitStack() as slow:
        engine.script = says("x")

        def post(characters: int, expected: int = 200) -> httpx.Response:
            """Again and again until it is answered so: what the others send or leave takes a moment to be seen."""
            body = {**CHAT, "messages": [{"role": "user", "content": "x" * characters}]}
            deadline = time.monotonic() + WAIT_S
            while (answer := httpx.post(f"{engine.url}/v1/chat/completions", json=body)).status_code != expected:
                assert time.monotonic() < deadline, answer.text
            return answer

        for _ in range(8):
            connection = slow.enter_context(connect(engine))
            connection.sendall(POST + b"content-length: 199999\r\n\r\n" + b" " * 199_998)
        refused = post(100_000, expected=429).json()["error"]
        assert refused["code"] == "queue_full"
        assert re.search(r"1[67]\d{5} bytes, at most 1600000$", refused["message"])
        post(50_000)
        slow.close()
        post(100_000)


def test_embeddings_count_as_well() -> None:
    with ScriptedEngine(max_queued_tokens=10, is_embedding=True, embedding_size=1) as engine:
        callers = Callers(engine)
        running = callers.post({"model": MODEL, "input": ["y" * 20, "x" * 16]}, "embeddings")
        asked = [engine.question(), engine.question()]
        refused = httpx.post(f"{engine.url}/v1/embeddings", json={"model": MODEL, "input": [1, 2]})
        assert refused.status_code == 429
        assert "about 9 of at most 10 tokens" in refused.json()["error"]["message"]
        for question in asked:
            assert isinstance(question, Embedding)
            engine.send(Embedded(question.rid, 1, bytes(4)))
        assert running.result().status_code == 200


def test_retry_after_follows_the_rate(engine: ScriptedEngine, callers: Callers) -> None:
    """Eight requests of which none has ended for a second: half of them takes four seconds, if one ended now."""
    began = time.monotonic()
    answers = [callers.post(CHAT) for _ in range(8)]
    jobs = [engine.job() for _ in answers]
    time.sleep(1)
    slow = httpx.post(f"{engine.url}/v1/chat/completions", json=CHAT)
    assert slow.status_code == 429
    assert "8 of at most 8 requests" in slow.json()["error"]["message"]
    assert 4 <= int(slow.headers["retry-after"]) <= 4 * (time.monotonic() - began) + 1
    for job in jobs:
        says("x")(engine, job)
    assert [answer.result().status_code for answer in answers] == [200] * 8


# ---- deadlines ------------------------------------------------------------------------------------------------------


def test_a_deadline_ends_what_waits(engine: ScriptedEngine, callers: Callers) -> None:
    started = time.monotonic()
    answer = callers.post({**CHAT, "n": 2}, x_request_timeout="0.5")
    job = engine.job()
    assert sorted(engine.aborted()) == sorted(job.job.rids)
    response = answer.result()
    assert 0.5 <= time.monotonic() - started < SOON_S
    assert response.status_code == 504
    assert response.json()["error"] == {
        "message": "the request did not end within its limit of 0.5 seconds",
        "type": "server_error",
        "param": None,
        "code": "deadline_exceeded",
    }


def test_a_deadline_in_a_stream(engine: ScriptedEngine, callers: Callers) -> None:
    answer = callers.post({**CHAT, "stream": True}, x_request_timeout="3")
    [rid] = engine.job().job.rids
    engine.deltas(TextDelta(rid, "so far", 1, PromptInfo(3, 0)))
    assert engine.aborted() == [rid]
    response = answer.result()
    assert response.status_code == 200
    assert '"content":"so far"' in response.text
    *_, error, done, rest = response.text.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert (done, rest) == ("data: [DONE]", "")


@pytest.mark.parametrize(
    ("path", "body"),
    [("completions", {"model": MODEL, "prompt": "a"}), ("../generate", {"text": "a"}), ("tokenize", {"prompt": "a"})],
)
def test_the_other_endpoints_keep_it(engine: ScriptedEngine, path: str, body: dict[str, Any]) -> None:
    response = httpx.post(f"{engine.url}/v1/{path}", json=body, headers={"x-request-timeout": "0.5"})
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert engine.aborted()
    if path == "tokenize":
        engine.question()
    else:
        engine.job()


def test_in_time_is_in_time(engine: ScriptedEngine, callers: Callers) -> None:
    answer = callers.post(CHAT, x_request_timeout="30")
    says("x")(engine, engine.job())
    assert answer.result().status_code == 200


@pytest.mark.parametrize("given", ["0", "-1", "soon", "nan", "inf", ""])
def test_what_is_no_time(engine: ScriptedEngine, given: str) -> None:
    for path in ("chat/completions", "tokenize"):
        body = CHAT if path != "tokenize" else {"prompt": "a"}
        response = httpx.post(f"{engine.url}/v1/{path}", json=body, headers={"x-request-timeout": given})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "x-request-timeout")
        assert repr(given) in error["message"]
    assert engine.jobs.empty()


def test_the_servers_own_limit() -> None:
    """A client may ask for less, not for more; a line of a batch has the batch's window instead."""
    with ScriptedEngine(request_timeout_s=0.6) as engine:
        callers = Callers(engine)
        for given, least_s in ((None, 0.6), ("100", 0.6), ("0.3", 0.3)):
            started = time.monotonic()
            response = callers.post(CHAT, **({} if given is None else {"x_request_timeout": given})).result()
            assert least_s <= time.monotonic() - started < least_s + SOON_S
            assert response.status_code == 504
            assert f"limit of {least_s:g} seconds" in response.json()["error"]["message"]
            assert engine.aborted() == engine.job().job.rids
        client = openai.OpenAI(base_url=f"{engine.url}/v1", api_key="-", max_retries=0, timeout=WAIT_S)
        with client:
            batch = create(client, [line("a", MODEL)])
            job = engine.job()
            time.sleep(1.0)
            says("x")(engine, job)
            output, errors = checked_results(client, wait(client, batch.id))
        assert (list(output), list(errors)) == (["a"], [])


# ---- connections ----------------------------------------------------------------------------------------------------


def test_a_client_that_reads_nothing_is_cut_off(strict: ScriptedEngine) -> None:
    engine = strict
    process = psutil.Process(engine.process.pid)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = engine.url.removeprefix("http://").split(":")
        connection.connect((host, int(port)))
        connection.sendall(post_bytes({**CHAT, "stream": True}))
        [rid] = engine.job().job.rids
        # Far more than the buffers of the two sockets hold.
        size, chunks, before = 2**20, 16, process.memory_info().rss
        for number in range(1, chunks + 1):
            engine.deltas(TextDelta(rid, "x" * size, number, PromptInfo(3, 0) if number == 1 else None))
        started = time.monotonic()
        assert engine.aborted() == [rid]
        assert time.monotonic() - started < CLIENT_TIMEOUT_S * 2 + SOON_S
        # At most the text itself and what is being written of it.
        assert process.memory_info().rss - before < 6 * size * chunks
        assert len(read_all(connection)) < size * chunks


def test_a_slow_reader_gets_all(strict: ScriptedEngine) -> None:
    """It is not the pace that counts, but standing still."""
    engine = strict
    with connect(engine) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.sendall(post_bytes({**CHAT, "stream": True}))
        [rid] = engine.job().job.rids
        for number in range(1, 5):
            engine.deltas(TextDelta(rid, "x" * 2**20, number, PromptInfo(3, 0) if number == 1 else None))
        engine.deltas(TextDelta(rid, "", 4, finish=Finish(FinishReason.STOP, 2)))
        started, answer = time.monotonic(), b""
        while not answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            part = connection.recv(2**19)
            assert part, answer[-1000:]
            answer += part
            if time.monotonic() - started < 2.5 * CLIENT_TIMEOUT_S:
                time.sleep(0.3 * CLIENT_TIMEOUT_S)
        assert answer.count(b"x") >= 4 * 2**20
        assert time.monotonic() - started > 2 * CLIENT_TIMEOUT_S


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * (MAX_HEADERS + 1) + b"\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\na: " + b"b" * MAX_HEAD_BYTES + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\na: " + b"b" * 5 * MAX_HEAD_BYTES,
        b"GET /health?" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
    ids=["count", "size", "endless", "path"],
)
def test_heads_are_limited(engine: ScriptedEngine, head: bytes) -> None:
    with connect(engine) as connection:
        for at in range(0, len(head), 10_000):
            with contextlib.suppress(ConnectionError):  # it may have been closed already
                connection.sendall(head[at : at + 10_000])
        answer = read_all(connection)
    status, _, rest = answer.partition(b"\r\n")
    assert status.startswith(b"HTTP/1.1 431 "), answer[:200]
    error = json.loads(rest.partition(b"\r\n\r\n")[2])["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "headers_too_large")
    for limit in (MAX_HEADERS, MAX_HEAD_BYTES):
        assert str(limit) in error["message"]


def test_as_many_headers_as_are_allowed(engine: ScriptedEngine) -> None:
    with connect(engine) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * (MAX_HEADERS - 1) + b"connection: close\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


def test_endless_trailers_and_extensions(engine: ScriptedEngine) -> None:
    """What comes beside the body of a chunked request is limited too."""
    start = POST + b"transfer-encoding: chunked\r\n\r\n"
    for endless in (start + b"0\r\n" + b"a: b\r\n" * 2 * MAX_HEAD_BYTES, start + b"5;" + b"x" * 8 * MAX_HEAD_BYTES):
        with connect(engine) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(endless)
            assert b" 200 " not in read_all(connection)


def test_what_is_not_http(engine: ScriptedEngine) -> None:
    with connect(engine) as connection:
        connection.sendall(b"NONSENSE\r\n\r\n")
        status, _, rest = read_all(connection).partition(b"\r\n")
    assert status.startswith(b"HTTP/1.1 400 ")
    assert json.loads(rest.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_body_without_an_end(engine: ScriptedEngine, version: bytes) -> None:
    """Which HTTP takes for no body and the start of another request."""
    with connect(engine) as connection:
        connection.sendall(POST.replace(b"1.1", version) + b"\r\n" + json.dumps(CHAT).encode())
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 411 ")
    error = json.loads(body)["error"]
    assert (error["code"], "content-length" in error["message"]) == ("length_required", True)


def test_nonsense_behind_a_request_does_not_take_its_answer(engine: ScriptedEngine) -> None:
    with connect(engine) as connection:
        connection.sendall(post_bytes(CHAT) + b"NONSENSE\r\n\r\n")
        job = engine.job()
        time.sleep(0.1)
        connection.sendall(post_bytes(CHAT))  # not read any more
        says("x")(engine, job)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert (answer.count(b"HTTP/1.1"), answer.count(b'"finish_reason":"stop"')) == (1, 1)
    assert engine.jobs.empty()


@pytest.mark.parametrize("size", [1, 1000], ids=["trickling", "at once"])
@pytest.mark.parametrize("offer", [b"h2c", b"websocket"])
def test_an_offer_of_another_protocol_is_declined(engine: ScriptedEngine, offer: bytes, size: int) -> None:
    """With a body behind it, which is read, as is what follows."""
    offers = b"connection: Upgrade, HTTP2-Settings\r\nhttp2-settings: AAMAAABkAAQC\r\nupgrade: " + offer + b"\r\n"
    data = post_bytes(CHAT).replace(b"host: x\r\n", b"host: x\r\n" + offers)
    with connect(engine) as connection:
        for at in range(0, len(data), size):
            connection.sendall(data[at : at + size])
        says("x")(engine, engine.job())
        connection.sendall(data.replace(b"connection: ", b"connection: close, ") + b"rest")
        says("x")(engine, engine.job())
        answers = read_all(connection)
        assert (answers.count(b"HTTP/1.1 200 "), answers.count(b'"finish_reason":"stop"')) == (2, 2)
        with connect(engine) as other:
            other.sendall(b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n\r\n")
            assert read_all(other).startswith(b"HTTP/1.1 405 ")
    assert "WebSocket" not in engine.errors()


def test_clients_that_stop_in_the_middle(strict: ScriptedEngine) -> None:
    """Of nothing, a line, a head, a body: all at the same time."""
    begun = [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nhost: x\r\n", post_bytes(CHAT)[:-5]]
    with contextlib.ExitStack() as stack:
        started = time.monotonic()
        connections = [stack.enter_context(connect(strict)) for _ in begun]
        for connection, part in zip(connections, begun, strict=True):
            connection.sendall(part)
        answers = []
        for connection in connections:
            answers.append(read_all(connection))
            assert CLIENT_TIMEOUT_S * 0.9 <= time.monotonic() - started < CLIENT_TIMEOUT_S + SOON_S
    assert [answer[:13] for answer in answers] == [b"", *[b"HTTP/1.1 408 "] * 3]
    assert strict.jobs.empty()


def test_a_head_that_trickles(strict: ScriptedEngine) -> None:
    """Each byte comes in time, the head does not."""
    with connect(strict) as connection:
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for byte in b"GET /health HTTP/1.1\r\n" + b"a" * 400:
                connection.sendall(bytes([byte]))
                time.sleep(0.1)
        assert time.monotonic() - started < CLIENT_TIMEOUT_S + SOON_S
        assert read_all(connection).startswith(b"HTTP/1.1 408 ") or time.monotonic() - started > CLIENT_TIMEOUT_S


def test_clients_that_are_slow_but_go_on(strict: ScriptedEngine) -> None:
    """A long upload, a long wait for the answer, and a kept connection are none of these."""
    engine = strict
    with connect(engine) as connection:
        data = post_bytes({**CHAT, "messages": [{"role": "user", "content": "x" * 800}]})
        head, _, body = data.partition(b"\r\n\r\n")
        connection.sendall(head + b"\r\n\r\n")
        for at in range(0, len(body), 200):
            time.sleep(CLIENT_TIMEOUT_S * 0.3)
            connection.sendall(body[at : at + 200])
        for number in range(2):
            job = engine.job()
            time.sleep(CLIENT_TIMEOUT_S * 1.3)
            says("x")(engine, job)
            answer = b""
            while b'"finish_reason":"stop"' not in answer:
                part = connection.recv(65536)
                assert part, answer
                answer += part
            assert answer.startswith(b"HTTP/1.1 200 ")
            if number == 0:
                time.sleep(CLIENT_TIMEOUT_S * 1.3)
                connection.sendall(data)


def test_two_requests_at_once_on_a_connection(strict: ScriptedEngine) -> None:
    """The second is read while the first is answered, for longer than a client may stall."""
    engine = strict
    with connect(engine) as connection:
        connection.sendall(post_bytes(CHAT) * 2)
        for _ in range(2):
            job = engine.job()
            time.sleep(CLIENT_TIMEOUT_S * 1.3)
            says("x")(engine, job)
        answer = b""
        while answer.count(b'"finish_reason":"stop"') < 2:
            part = connection.recv(65536)
            assert part, answer
            answer += part
