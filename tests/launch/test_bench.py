"""`ramet bench`: workloads, the HTTP client and the reading of answers against awkward servers, figures, each command.

No test asserts how long something takes.
"""

import asyncio
import json
import random
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trustme

from ramet.launch import cli
from ramet.launch.bench.answer import Answer, EventParser, Record
from ramet.launch.bench.http_client import Client, RequestFailed
from ramet.launch.bench.load import LoadArgs, Outcome, run_load
from ramet.launch.bench.report import distribution, load_table, samples_of, summarize, table, write_html, write_json
from ramet.launch.bench.workload import WORDS, Scale, Workload, arrival_times, bounds, draw_items
from ramet.launch.config import resolve
from ramet.launch.model_source import resolve_model
from ramet.launch.server_args import ServerArgs

MAIN = "import ramet.launch.cli as c; c.main({!r})"


def command(*argv: str) -> list[str]:
    return [sys.executable, "-c", MAIN.format(["bench", *argv])]


def run_command(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*argv), capture_output=True, text=True, timeout=300, check=False)


# ---- workloads ------------------------------------------------------------------------------------------------------


def test_bounds() -> None:
    assert bounds("x", "64-256") == (64, 256)
    assert bounds("x", "64") == (64, 64)
    for text in ("", "0", "9-3", "-3", "3-", "a-b", "1.5"):
        with pytest.raises(ValueError, match="x '"):
            bounds("x", text)


def test_lengths_are_drawn_evenly_and_again_the_same() -> None:
    load = Workload(num_requests=2000, input_len="10-19", output_len="5", seed=3)
    items = draw_items(load, range(100), Scale(), "measured", 2000)
    assert items == draw_items(load, range(100), Scale(), "measured", 2000)
    assert items != draw_items(load, range(100), Scale(), "warm-up", 2000)
    counts = [sum(item.input_len == length for item in items) for length in range(10, 20)]
    assert sum(counts) == 2000 and min(counts) > 140 and max(counts) < 260
    assert all(len(item.units) == item.input_len and item.output_len == 5 for item in items)
    assert len({tuple(item.units) for item in items}) == 2000


def test_shared_prefixes_are_taken_in_turn() -> None:
    load = Workload(input_len="8", shared_prefix_len=32, num_prefixes=3)
    items = draw_items(load, range(1000), Scale(), "measured", 9)
    assert [item.input_len for item in items] == [40] * 9
    prefixes = [tuple(item.units[:32]) for item in items]
    assert prefixes[:3] * 3 == prefixes and len(set(prefixes)) == 3
    assert len({tuple(item.units[32:]) for item in items}) == 9


def test_a_scale_makes_texts_of_the_wanted_length() -> None:
    """An overhead of 20 tokens, and words of two and a half tokens."""
    load = Workload(input_len="100", shared_prefix_len=50)
    (item,) = draw_items(load, WORDS, Scale(20, 2.5), "measured", 1)
    assert item.input_len == 150
    assert 20 + 2.5 * len(item.units) == pytest.approx(150, abs=2.5)
    (short,) = draw_items(Workload(input_len="5"), WORDS, Scale(20, 2.5), "measured", 1)
    assert len(short.units) == 1


def test_arrivals_are_a_poisson_process() -> None:
    times = [at for at, _ in zip(arrival_times(1, 50.0), range(20_001), strict=False)]
    assert times == [at for at, _ in zip(arrival_times(1, 50.0), range(20_001), strict=False)]
    gaps = [later - sooner for sooner, later in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert times[0] == 0
    assert mean == pytest.approx(1 / 50, rel=0.03)
    assert variance**0.5 == pytest.approx(mean, rel=0.05)  # as an exponential distribution has it


# ---- the events of a stream -----------------------------------------------------------------------------------------

STREAM = (
    b": a comment\r\n\r\nevent: message\ndata: one\n\ndata:two\r\ndata:  lines\r\n\r\nid: 7\n\n"
    b"data: caf\xc3\xa9\n\ndata\n\ndata: [DONE]\n\n"
)
EVENTS = [b"one", b"two\n lines", "café".encode(), b"[DONE]"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_however_they_are_cut(size: int) -> None:
    parser = EventParser()
    found = [event for at in range(0, len(STREAM), size) for event in parser.feed(STREAM[at : at + size])]
    assert found == EVENTS


def test_an_event_without_its_end_is_none() -> None:
    assert EventParser().feed(b"data: half\n") == []


def chunk(text: str | None = None, **more: Any) -> bytes:
    choices = [] if text is None else [{"index": 0, "delta": {"content": text}, "finish_reason": None}]
    return b"data: " + json.dumps({"choices": choices, **more}).encode() + b"\n\n"


END = b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"
ROLE = b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'


def usage(prompt: int, completion: int) -> dict[str, Any]:
    details = {"cached_tokens": 3}
    return {"prompt_tokens": prompt, "completion_tokens": completion, "prompt_tokens_details": details}


def read(*pieces: tuple[float, bytes], status: int = 200, stream: bool = True) -> Record:
    record = Record(index=0, sent_s=0.0, input_len=8, output_len=8)
    answer = Answer(record, stream)
    for at, data in pieces:
        answer.feed(status, data, at)
    answer.finish(status)
    record.error = None
    return record


def test_one_token_a_chunk() -> None:
    record = read((1, ROLE + chunk("a")), (2, chunk("b")), (4, chunk("c")), (5, END + chunk(usage=usage(9, 3)) + DONE))
    assert (record.arrivals_s, record.arrival_tokens) == ([1, 2, 4], [1, 1, 1])
    assert (record.input_tokens, record.cached_tokens, record.output_tokens) == (9, 3, 3)
    assert (record.counted_by, record.finish_reason) == ("usage", "stop")
    assert samples_of([record])["itl_ms"] == [(1, 1), (2, 1)]


def test_chunks_of_several_tokens_share_their_gap() -> None:
    record = read((1, chunk("a b")), (3, chunk("c d")), (9, chunk("e f") + END + chunk(usage=usage(9, 6))))
    assert samples_of([record])["itl_ms"] == [(1, 2), (3, 2)]
    assert samples_of([record])["tpot_ms"] == [(8 / 5, 1)]


def test_running_counts_tell_what_each_chunk_carries() -> None:
    first, second, third = (chunk(text, usage=usage(9, n)) for text, n in (("a", 1), ("", 1), ("b c d", 4)))
    record = read((1, first), (2, second), (4, third + END))
    assert (record.arrivals_s, record.arrival_tokens, record.output_tokens) == ([1, 4], [1, 3], 4)


def test_a_sum_in_the_last_chunk_with_text_is_no_running_count() -> None:
    record = read((1, chunk("a")), (2, chunk("b")), (3, chunk("c", usage=usage(9, 3)) + END))
    assert record.arrival_tokens == [1, 1, 1]


def test_what_one_read_brings_has_one_arrival() -> None:
    record = read((1, chunk("a")), (2, chunk("b") + chunk("c") + END))
    assert (record.arrivals_s, record.arrival_tokens) == ([1, 2], [1, 2])


def test_without_usage_chunks_are_counted_and_marked() -> None:
    record = read((1, chunk("a")), (2, chunk("b") + DONE))
    assert (record.counted_by, record.output_tokens, record.input_tokens) == ("chunks", 2, None)
    assert "counted by chunks" in load_table(summarize(Outcome("m", [record], 1.0, 0.1)))


def test_a_count_of_zero_is_not_believed() -> None:
    record = read((1, chunk("a")), (2, chunk("b") + END + chunk(usage=usage(9, 0))))
    assert (record.counted_by, record.output_tokens, record.input_tokens) == ("chunks", 2, 9)
    assert samples_of([record])["itl_ms"] == [(1, 1)]


def test_reasoning_tools_and_completions_are_tokens_too() -> None:
    bodies = [
        {"choices": [{"delta": {"reasoning_content": "hm"}}]},
        {"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]},
        {"choices": [{"text": "x", "finish_reason": "length"}]},
    ]
    record = read(*((i, b"data: " + json.dumps(body).encode() + b"\n\n") for i, body in enumerate(bodies)))
    assert record.arrivals_s == [0, 1, 2]


def test_a_whole_answer() -> None:
    body = json.dumps({"choices": [{"text": "x y", "finish_reason": "length"}], "usage": usage(9, 2)}).encode()
    record = read((1, body[:20]), (2, body[20:]), stream=False)
    assert (record.output_tokens, record.arrivals_s) == (2, [])
    figures = samples_of([record])
    assert figures["e2e_ms"] and not figures["ttft_ms"] and not figures["itl_ms"]


@pytest.mark.parametrize(
    ("pieces", "status", "kind"),
    [
        ([b'{"error": {"message": "too long"}}'], 400, "status 400"),
        ([chunk("a"), b'data: {"error": {"message": "out of memory"}}\n\n' + DONE], 200, "error in the answer"),
        ([chunk("a")], 200, "cut short"),
        ([b"data: nonsense\n\n"], 200, "not OpenAI's form"),
        ([b'data: {"choices": 3}\n\n'], 200, "not OpenAI's form"),
    ],
)
def test_bad_answers_have_a_kind(pieces: list[bytes], status: int, kind: str) -> None:
    with pytest.raises(RequestFailed) as caught:
        read(*enumerate(pieces), status=status)
    assert caught.value.kind == kind


# ---- the HTTP client, against a server that answers as it is told ---------------------------------------------------

Answering = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def answering(answer: Answering, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A server that reads requests and has `answer` write to them; yields its URL."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client has left, or the test is over
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        scheme = "http" if context is None else "https"
        yield f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def take_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"Content-Length: (\d+)", head)
    assert length is not None
    return head, await reader.readexactly(int(length[1]))


def exchange(answer: Answering, times: int = 1, timeout_s: float = 10, keep_alive: bool = True) -> list[Any]:
    """What so many requests, one after the other, were answered: (status, body), or the kind of failure."""

    async def main() -> list[Any]:
        async with answering(answer) as url:
            client = Client(url, "key", keep_alive, timeout_s)
            results: list[Any] = []
            for i in range(times):
                parts: list[bytes] = []
                try:
                    request = client.request("POST", "/completions", b"body %d" % i)
                    status = await client.send(request, lambda _, data, parts=parts: parts.append(data))
                    results.append((status, b"".join(parts)))
                except RequestFailed as error:
                    results.append(error.kind)
            client.close()
            return results

    return asyncio.run(main())


def says(*pieces: bytes, close: bool = False, seen: list[Any] | None = None) -> Answering:
    """Writes these pieces to each request, each in a write of its own."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = object()
        while True:
            request = await take_request(reader)
            if seen is not None:
                seen.append((connection, *request))
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.001)
            if close:
                return

    return answer


def chunked(*parts: bytes) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 3, 17, 10_000])
def test_chunked_answers_split_in_odd_places(size: int) -> None:
    whole = chunked(STREAM[:30], STREAM[30:31], STREAM[31:])
    pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
    assert exchange(says(*pieces), times=2) == [(200, STREAM)] * 2


def test_requests_and_kept_connections() -> None:
    seen: list[Any] = []
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    assert exchange(says(whole, seen=seen), times=3) == [(200, b"ok")] * 3
    assert len({id(connection) for connection, _, _ in seen}) == 1
    assert [body for _, _, body in seen] == [b"body 0", b"body 1", b"body 2"]
    head = seen[0][1].decode()
    assert head.startswith("POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:")
    assert "Authorization: Bearer key\r\n" in head and "Connection" not in head


def test_no_keep_alive() -> None:
    seen: list[Any] = []
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    assert exchange(says(whole, seen=seen), times=2, keep_alive=False) == [(200, b"ok")] * 2
    assert len({id(connection) for connection, _, _ in seen}) == 2
    assert b"Connection: close\r\n" in seen[0][1]


def test_a_server_that_closes_after_each_answer_is_connected_to_again() -> None:
    assert exchange(says(chunked(b"ok"), close=True), times=3, keep_alive=False) == [(200, b"ok")] * 3
    kept = exchange(says(chunked(b"ok"), close=True), times=3)  # nothing is sent twice
    assert kept[0] == (200, b"ok") and set(kept[1:]) <= {(200, b"ok"), "connection lost"}


def test_interim_answers_and_bodies_that_end_with_the_connection() -> None:
    first = b"HTTP/1.1 100 Continue\r\n\r\n"
    assert exchange(says(first, b"HTTP/1.1 404 Not Found\r\n\r\nno ", b"such", close=True)) == [(404, b"no such")]


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [
        ([], "connection lost"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort"], "connection lost"),
        ([chunked(STREAM)[:-5]], "connection lost"),
        ([b"SSH-2.0-OpenSSH\r\n"], "not HTTP"),
    ],
)
def test_broken_answers_have_a_kind(pieces: list[bytes], kind: str) -> None:
    assert exchange(says(*pieces, close=True)) == [kind]


def test_timeouts_and_closed_ports() -> None:
    assert exchange(says(b"HTTP/1.1 200 OK\r\n"), timeout_s=0.2) == ["timeout"]
    client = Client("http://127.0.0.1:9", None, True, 5)
    with pytest.raises(RequestFailed) as caught:
        asyncio.run(client.send(client.request("GET", "/models"), lambda _, data: None))
    assert caught.value.kind == "no connection"


def test_https_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)

    async def main() -> int:
        async with answering(says(chunked(b"ok")), context) as url:
            client = Client(url, None, True, 5)
            status = await client.send(client.request("GET", "/models"), lambda _, data: None)
            client.close()
            return status

    with pytest.raises(RequestFailed, match="certificate") as caught:
        asyncio.run(main())
    assert caught.value.kind == "no connection"
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    assert asyncio.run(main()) == 200


def test_urls() -> None:
    client = Client("https://example.org/openai/v2/", None, True, 5)
    assert client.request("GET", "/models").startswith(b"GET /openai/v2/models HTTP/1.1\r\nHost: example.org\r\n")
    for url in ("localhost:8000", "ftp://host", "http://"):
        with pytest.raises(ValueError, match="base_url"):
            Client(url, None, True, 5)


# ---- a whole load, against a server that counts ---------------------------------------------------------------------


class FakeServer:
    """`/v1/completions` in a thread: a word has two tokens, a prompt seven more; answers are `max_tokens` long.

    Keeps the bodies. `delay_s` passes before each token; every `fail_every`-th request is answered 500, and after so
    many as `answers` none.
    """

    def __init__(self, delay_s: float = 0.0, fail_every: int = 10**9, last: bytes = DONE, answers: int = 10**9) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.most_open = self._open = 0
        self._delay_s, self._fail_every, self._last, self._answers = delay_s, fail_every, last, answers
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> "FakeServer":
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server = answering(self._answer)
        self.url = self._wait(self._server.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        self._wait(self._server.__aexit__(None, None, None))
        self._wait(self._cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    async def _cancel_all(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head, data = await take_request(reader)
            if head.startswith(b"GET /v1/models "):
                whole = b'{"data": [{"id": "fake"}]}'
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(whole), whole))
                continue
            body = json.loads(data)
            self.bodies.append(body)
            if len(self.bodies) % self._fail_every == 0:
                writer.write(b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\noops")
                continue
            if len(self.bodies) > self._answers:
                await asyncio.Event().wait()
            self._open += 1
            self.most_open = max(self.most_open, self._open)
            prompt = body["prompt"]
            events = [b'data: {"choices": [{"text": "x"}]}\n\n'] * body["max_tokens"]
            tokens = 7 + 2 * len(prompt.split()) if isinstance(prompt, str) else len(prompt)
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for event in [*events, chunk(usage=usage(tokens, len(events))) + self._last]:
                await asyncio.sleep(self._delay_s)
                writer.write(b"%x\r\n%s\r\n" % (len(event), event))
            writer.write(b"0\r\n\r\n")
            self._open -= 1


def test_a_closed_loop_keeps_its_concurrency() -> None:
    with FakeServer(delay_s=0.01) as server:
        load = Workload(num_requests=30, input_len="5-9", output_len="3", shared_prefix_len=4, ignore_eos=True)
        args = LoadArgs(base_url=server.url, prompts="token-ids", token_id_range="50-60", concurrency=6, warmup=3)
        outcome = run_load(load, args)
    summary = summarize(outcome)
    assert server.most_open == 6
    assert (summary["completed"], summary["failed"], summary["interrupted"]) == (30, 0, 0)
    assert outcome.model == "fake"
    measured = server.bodies[3:]
    assert len(measured) == 30
    assert summary["input_tokens"] == sum(len(body["prompt"]) for body in measured)
    assert (summary["output_tokens"], summary["cached_tokens"]) == (90, 90)
    assert all(9 <= len(body["prompt"]) <= 13 and set(body["prompt"]) <= set(range(50, 61)) for body in measured)
    assert len({tuple(body["prompt"][:4]) for body in measured}) == 1
    assert measured[0] == {
        "model": "fake",
        "prompt": measured[0]["prompt"],
        "max_tokens": 3,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert summary["client_cpu_us_per_token"] > 0


def test_an_open_loop_does_not_wait_for_answers() -> None:
    """At 200 a second, answers of a fifth of a second overlap by the dozen."""
    with FakeServer(delay_s=0.1) as server:
        load = Workload(num_requests=40, output_len="2", temperature=1.0, seed=5)
        extra = '{"max_tokens": null, "top_p": 0.5, "max_tokens": 2}'
        args = LoadArgs(base_url=server.url, prompts="token-ids", request_rate=200, warmup=0, extra_body=extra)
        outcome = run_load(load, args)
    assert summarize(outcome)["completed"] == 40
    assert server.most_open > 12
    assert sorted(body["seed"] for body in server.bodies) == list(range(5, 45))
    assert {body["top_p"] for body in server.bodies} == {0.5}
    planned = [at for at, _ in zip(arrival_times(5, 200), range(40), strict=False)]
    assert all(record.sent_s >= at - 0.005 for record, at in zip(outcome.records, planned, strict=True))


def test_texts_get_their_length_by_the_servers_own_count() -> None:
    with FakeServer() as server:
        outcome = run_load(Workload(num_requests=20, input_len="60-90", output_len="1"), LoadArgs(base_url=server.url))
    for record in outcome.records:
        assert record.input_tokens == pytest.approx(record.input_len, abs=1)
    assert isinstance(server.bodies[-1]["prompt"], str)


def test_failures_are_counted_by_kind() -> None:
    with FakeServer(fail_every=4) as server:
        load, args = Workload(num_requests=12), LoadArgs(base_url=server.url, prompts="token-ids", warmup=0)
        summary = summarize(run_load(load, args))
    assert (summary["completed"], summary["failed"]) == (9, 3)
    assert summary["errors"] == {"status 500": 3}
    assert "failed     3 x status 500: oops\n" in load_table(summary)


def test_what_is_wrong_in_a_stream_is_its_kind() -> None:
    """Not that the connection was given up for it."""
    error = b'data: {"error": {"message": "out of memory"}}\n\n'
    with FakeServer(last=error) as server:
        args = LoadArgs(base_url=server.url, prompts="token-ids", warmup=0)
        summary = summarize(run_load(Workload(num_requests=3), args))
    assert summary["errors"] == {"error in the answer": 3}
    assert "out of memory" in summary["error_examples"]["error in the answer"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"concurrency": 2, "request_rate": 1.0}, "exclude each other"),
        ({"prompts": "token-ids", "endpoint": "chat"}, "needs endpoint completions"),
        ({"extra_body": "[]"}, "extra_body is not a JSON object"),
        ({"token_id_range": "9-5"}, "token_id_range '9-5'"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LoadArgs(**settings)


def test_ctrl_c_prints_what_there_is(tmp_path: Path) -> None:
    with FakeServer(answers=10) as server:
        flags = ["--base-url", server.url, "--prompts", "token-ids", "--concurrency", "2", "--warmup", "0"]
        results = tmp_path / "results.json"
        child = subprocess.Popen(
            command("serve", *flags, "--num-requests", "1000", "--json", str(results)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 60
        while len(server.bodies) < 12:
            assert time.monotonic() < deadline and child.poll() is None
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        output, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in errors
    summary = json.loads(results.read_text())["summary"]
    assert (summary["completed"], summary["interrupted"], summary["failed"]) == (10, 2, 0)
    assert f"{summary['completed']} completed, 0 failed, {summary['interrupted']} interrupted" in output


# ---- figures --------------------------------------------------------------------------------------------------------


def test_percentiles_are_observed_values() -> None:
    found = distribution([(value, 1) for value in random.Random(1).sample(range(1, 101), 100)])
    assert found == {"mean": 50_500, "p50": 50_000, "p90": 90_000, "p99": 99_000, "max": 100_000}
    assert distribution([(2.0, 1)]) == dict.fromkeys(("mean", "p50", "p90", "p99", "max"), 2000.0)
    assert distribution([]) is None


def test_weights_count_like_repetitions() -> None:
    weighted = distribution([(3.0, 1), (1.0, 8.0), (2.0, 1)])
    assert weighted == distribution([(1.0, 1)] * 8 + [(2.0, 1), (3.0, 1)])
    assert weighted is not None and (weighted["p50"], weighted["p90"], weighted["p99"]) == (1000, 2000, 3000)
    thirds = distribution([(float(i), 1 / 3) for i in range(1, 301)])
    assert thirds is not None and (thirds["p50"], thirds["max"]) == (150_000, 300_000)


def test_tables_are_aligned() -> None:
    assert table([("a", "long name"), ("longer", "1")]) == "a       long name\nlonger          1\n"


def test_the_page_needs_nothing_else_and_keys_stay_out(tmp_path: Path) -> None:
    record = read((0.1, chunk("a")), (0.2, chunk("b")), (0.25, chunk("c") + END))
    page = tmp_path / "page.html"
    write_html(str(page), "<model>", "a < b", [record])
    text = page.read_text()
    assert text.count("<svg") == text.count("<polyline") == 2
    assert "&lt;model&gt;" in text and "a &lt; b" in text
    assert not re.search(r"https?:|src=|href=", text)
    points = [tuple(map(float, point.split(","))) for point in re.findall(r'points="([^"]+)"', text)[1].split()]
    assert points == sorted(points, key=lambda point: (point[0], -point[1]))  # a share never falls
    assert points[-1][1] == 20 and all(50 <= x <= 690 for x, _ in points)
    write_html(str(page), "nothing", "", [])
    assert "no samples" in page.read_text()
    results = tmp_path / "results.json"
    write_json(str(results), [LoadArgs(api_key="secret")], {})
    assert "secret" not in results.read_text()
    assert json.loads(results.read_text())["settings"]["endpoint"] == "completions"


# ---- the commands ---------------------------------------------------------------------------------------------------


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands own their process and its log; these tests do not."""
    monkeypatch.setattr("ramet.launch.bench.cli.set_up_logging", lambda name, level: None)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ([], 2, "the following arguments are required: COMMAND"),
        (["serve", "--input-len", "9-3"], 2, "input_len '9-3' is neither a number"),
        (["serve", "--concurrency", "0"], 2, "argument --concurrency: Expected `int` >= 1, got '0'"),
        (["serve", "--model-path", "x"], 2, "unrecognized arguments: --model-path x"),
        (["serve", "--base-url", "http://127.0.0.1:9"], 1, "error: cannot connect to 127.0.0.1:9"),
        (["step", "--batch-sizes", "1,x"], 2, "batch_sizes '1,x' is not a list of numbers"),
        (["offline", "--model-path", "/nowhere"], 1, "error: /nowhere does not exist"),
        # Known before anything is measured, or even looked for.
        (["serve", "--html", "/nowhere/x"], 1, "No such file or directory: '/nowhere/x'"),
        (["offline", "--model-path", "/nowhere", "--json", "/nowhere/x"], 1, "directory: '/nowhere/x'"),
        (["step", "--model-path", "/nowhere", "--json", "/nowhere/x"], 1, "directory: '/nowhere/x'"),
    ],
)
def test_wrong_usage(argv: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", *argv])
    # A message as the code is printed by the interpreter, which then exits with 1.
    found = caught.value.code
    assert words in (found if isinstance(found, str) else capsys.readouterr().err)
    assert isinstance(found, str) if code == 1 else found == code


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", ["offline", "step"])
def test_models_that_embed_are_refused(name: str, tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(SystemExit, match="error: only models that generate"):
        cli.main(["bench", name, "--model-path", str(tiny_model("llama")), "--is-embedding"])


def test_a_load_needs_no_torch() -> None:
    code = (
        "import sys, ramet.launch.bench.cli\nprint([n for n in ('torch', 'transformers', 'numpy') if n in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


ENGINE = ["--dtype", "float32", "--max-total-tokens", "2048", "--num-threads", "1", "--log-level", "warning"]


@pytest.mark.e2e
def test_offline(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    model = ["--model-path", str(tiny_model("llama")), "--json", str(results)]
    flags = "--num-requests 6 --input-len 20 --output-len 5 --ignore-eos --shared-prefix-len 32"
    done = run_command("offline", *model, *ENGINE, *flags.split())
    assert done.returncode == 0, done.stderr
    whole = json.loads(results.read_text())
    summary = whole["summary"]
    assert (summary["finished"], summary["failed"]) == (6, 0)
    assert (summary["prompt_tokens"], summary["generated_tokens"]) == (6 * 52, 30)
    assert summary["cached_tokens"] == 5 * 32
    assert summary["generated_tokens_per_s"] > 0 and "generated_tokens_per_s" in done.stdout
    assert whole["settings"]["device"] == "cpu"  # settled


@pytest.mark.e2e
def test_step(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    model = ["--model-path", str(tiny_model("llama")), "--json", str(results)]
    done = run_command("step", *model, *ENGINE, "--batch-sizes", "1,3", "--contexts", "16,600", "--repeats", "2")
    assert done.returncode == 0, done.stderr
    whole = json.loads(results.read_text())
    cases = [(step["rows"], step["length"], step["context"]) for step in whole["steps"]]
    assert cases == [(1, 1, 16), (3, 1, 16), (1, 1, 600), (3, 1, 600), (1, 16, 16), (1, 512, 600)]
    assert whole["threads"] == 1 and min(whole["machine"].values()) > 1e7
    for step in whole["steps"]:
        assert step["ratio"] == pytest.approx(step["p50_ms"] / step["floor_ms"])
    assert done.stdout.count("decode") == 4 and done.stdout.count("prompt") == 2


def test_what_the_engine_does_not_hold(tiny_model: Callable[[str], Path]) -> None:
    from ramet.launch.bench.offline import run_offline
    from ramet.launch.bench.step import run_steps

    model = resolve_model(ServerArgs(model_path=str(tiny_model("llama"))))
    config = resolve(ServerArgs(dtype="float32", max_total_tokens=1024, chunked_prefill_size=64), model)
    with pytest.raises(ValueError, match="2 requests of 600 tokens are beyond the KV cache of 1024 tokens"):
        run_steps(config, [2], [600], repeats=1)
    with pytest.raises(ValueError, match=r"65 requests of 16 tokens are beyond max_running_requests \(64\)"):
        run_steps(config, [65], [16], repeats=1)
    with pytest.raises(ValueError, match="request 0 failed: the prompt has 4000 tokens"):
        run_offline(config, Workload(input_len="4000"))


def test_the_work_of_a_step() -> None:
    """Two layers, the second with a window of 8 tokens; all sums by hand."""
    from ramet.launch.bench.step import Case, step_work
    from ramet.model_runner.layers.moe import MoESpec
    from ramet.model_runner.models.decoder import DecoderSpec, LayerSpec

    sizes: dict[str, Any] = {"vocab_size": 100, "hidden_size": 10, "intermediate_size": 20, "norm_eps": 1e-6}
    sizes |= {"num_heads": 4, "num_kv_heads": 2, "head_dim": 5, "ropes": {}}
    spec = DecoderSpec(**sizes, layers=(LayerSpec(), LayerSpec(sliding_window=8)))
    layer = 10 * 20 + 2 * 10 * 10 + 20 * 10 + 3 * 10 * 20  # query, key and value, output, gate and up and down
    decode = step_work(spec, Case(rows=3, length=1, context=30), weight_bytes=2, kv_bytes=4)
    assert decode.num_bytes == 2 * (2 * layer + 1000) + 4 * 3 * (30 + 8) * 2 * 2 * 5
    assert decode.flops == 2 * 3 * (2 * layer + 1000) + 2 * 3 * (30 + 8) * 2 * 4 * 5
    # Positions 8 and 9: the first layer sees 9 and 10 tokens, the second 8 and 8. Only the last one has logits.
    chunk = step_work(spec, Case(rows=1, length=2, context=10), weight_bytes=2, kv_bytes=4)
    assert chunk.num_bytes == 2 * (2 * layer + 1000) + 4 * (10 + 9) * 2 * 2 * 5
    assert chunk.flops == 2 * (2 * 2 * layer + 1000) + 2 * (9 + 10 + 8 + 8) * 2 * 4 * 5
    experts = DecoderSpec(**sizes, layers=(LayerSpec(moe=MoESpec(4, 2, 7, True)),))
    attention, expert = layer - 3 * 10 * 20, 3 * 10 * 7
    one = step_work(experts, Case(1, 1, 1), weight_bytes=1, kv_bytes=0)
    assert one.num_bytes == attention + 10 * 4 + 2 * expert + 1000
    many = step_work(experts, Case(64, 1, 1), weight_bytes=1, kv_bytes=0)
    assert many.num_bytes == pytest.approx(attention + 10 * 4 + 4 * expert + 1000)
