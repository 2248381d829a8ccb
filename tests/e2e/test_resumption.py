"""Requests outlive the death of a process of the engine: their clients get what they would have got, once."""

import concurrent.futures
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from support.server import PATIENCE_S, RunningServer, tiny_flags, until

pytestmark = pytest.mark.e2e

LONG = {"prompt": "The quick brown", "max_tokens": 600, "ignore_eos": True}
GREEDY = {**LONG, "temperature": 0}
SEEDED = {**LONG, "temperature": 1.0, "seed": 7}
# What differs between two lives, or any two answers: ids, times, what the cache happened to hold.
ASKED: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "seeded": {**SEEDED, "n": 2, "logprobs": 1, "echo": True},
    "greedy stream": {**GREEDY, "stream": True, "logprobs": 2, "stream_options": {"include_usage": True}},
    "seeded stream": {**SEEDED, "stream": True, "n": 3, "echo": True, "stream_options": {"include_usage": True}},
    # One choice ends long before the other.
    "uneven": {**SEEDED, "n": 2, "ignore_eos": False, "stop": ["e"]},
}


@pytest.fixture(scope="module")
def started(servers: Any, tiny_model: Callable[[str], Path]) -> Iterator[RunningServer]:
    servers.close()
    flags = (*tiny_flags(tiny_model("llama")), "--max-restarts", "100")
    with RunningServer(*flags, module="support.faulty_server") as server:
        yield server


@pytest.fixture
def server(started: RunningServer) -> Iterator[RunningServer]:
    seen = len(started.log())
    yield started
    news = started.log()[seen:]
    print(news)
    assert "Traceback" not in news
    assert started.quiet_metrics().get('ramet_kv_pages{state="in_use"}', 0) == 0


class Asked:
    """A completion, asked for in a thread of its own: what came of it, and how far it is."""

    def __init__(self, server: RunningServer, **body: Any) -> None:
        self._server = server
        self.begun = False
        self._body = {"model": server.model, **body}
        pool = concurrent.futures.ThreadPoolExecutor(1)
        self._done = pool.submit(self._stream if body.get("stream") else self._whole)
        pool.shutdown(wait=False)

    def _whole(self) -> Any:
        # The SDK's form of it, without what differs.
        answer = self._server.client.completions.create(**_sdk(self._body)).to_dict()
        return answer["choices"], _counts(answer["usage"])

    def _stream(self) -> Any:
        texts: dict[int, str] = {}
        logprobs: dict[int, list[float]] = {}
        ends: list[tuple[int, str]] = []
        counts = None
        for chunk in self._server.client.completions.create(**_sdk(self._body)):
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
                if choice.logprobs is not None:
                    logprobs.setdefault(choice.index, []).extend(choice.logprobs.token_logprobs or ())
                if choice.finish_reason is not None:
                    ends.append((choice.index, choice.finish_reason))
            if chunk.usage is not None:
                counts = _counts(chunk.usage.to_dict())
            self.begun = self.begun or any(len(text) > 60 for text in texts.values())
        return texts, logprobs, sorted(ends), counts

    @property
    def busy(self) -> bool:
        return not self._done.done()

    def result(self) -> Any:
        return self._done.result(PATIENCE_S)


def _sdk(body: dict[str, Any]) -> dict[str, Any]:
    ours = {name: body[name] for name in ("ignore_eos",) if name in body}
    return {**{name: value for name, value in body.items() if name not in ours}, "extra_body": ours}


def _counts(usage: dict[str, Any]) -> tuple[int, int]:
    return usage["prompt_tokens"], usage["completion_tokens"]


def kill(server: RunningServer, role: str) -> None:
    os.kill(server.pids()[role], signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(started: RunningServer) -> dict[str, Any]:
    return {name: Asked(started, **body).result() for name, body in ASKED.items()}


@pytest.mark.parametrize("role", ["scheduler-0", "tokenizer-0", "detokenizer"])
def test_the_same_answers_as_without_a_death(server: RunningServer, undisturbed: dict[str, Any], role: str) -> None:
    before = server.quiet_metrics()
    with server.dawdling():
        asked = {name: Asked(server, **body) for name, body in ASKED.items()}
        streams = [each for name, each in asked.items() if "stream" in name]
        until(lambda: all(each.begun for each in streams), PATIENCE_S, server.log)
        assert all(each.busy for each in streams)
        kill(server, role)
    answers = {name: each.result() for name, each in asked.items()}
    assert answers == undisturbed
    after = server.quiet_metrics()

    def more(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    assert more("ramet_engine_restarts_total") == 1
    assert 0 < more("ramet_requests_resumed_total") <= 1 + 2 + 1 + 3 + 2
    assert more('ramet_requests_finished_total{reason="error"}') == 0
    ended = sum(more(f'ramet_requests_finished_total{{reason="{reason}"}}') for reason in ("stop", "length"))
    assert ended == more("ramet_request_duration_seconds_count") == 1 + 2 + 1 + 3 + 2
    tokens = 600 * (1 + 2 + 1 + 3) + undisturbed["uneven"][1][1]
    assert more("ramet_generation_tokens_total") == tokens
    assert more("ramet_request_generation_tokens_sum") == tokens
    assert more("ramet_time_to_first_token_seconds_count") == ended


def test_a_question_that_had_no_answer(server: RunningServer) -> None:
    def ask() -> httpx.Response:
        return server.http.post("/tokenize", json={"model": server.model, "prompt": "still there?"})

    os.kill(server.pids()["tokenizer-0"], signal.SIGSTOP)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        until(lambda: server.metrics()["ramet_http_requests_in_flight"] == 2, PATIENCE_S, server.log)
        kill(server, "tokenizer-0")
        answer = asked.result(PATIENCE_S)
    server.wait_until_ready()
    assert (answer.status_code, answer.json()) == (200, ask().json())


def test_a_request_under_two_deaths_fails(server: RunningServer) -> None:
    with server.dawdling():
        whole = Asked(server, **{**GREEDY, "max_tokens": 1900})
        stream = Asked(server, **{**SEEDED, "max_tokens": 1900, "stream": True})
        until(lambda: stream.begun, PATIENCE_S, server.log)
        restarts = server.metrics()["ramet_engine_restarts_total"]
        kill(server, "detokenizer")
        until(lambda: server.metrics()["ramet_engine_restarts_total"] > restarts, PATIENCE_S, server.log)
        server.wait_until_ready()
        assert whole.busy and stream.busy
        kill(server, "tokenizer-0")
    error = {
        "message": "the engine is down: tokenizer-0 was killed by SIGKILL (is the machine out of memory?)",
        "type": "server_error",
        "param": None,
        "code": "engine_down",
    }
    for each in (whole, stream):
        with pytest.raises(openai.APIError) as raised:
            each.result()
        assert raised.value.body == error
        if each is whole:
            assert isinstance(raised.value, openai.InternalServerError)
            assert (raised.value.status_code, raised.value.response.headers["retry-after"]) == (503, "5")
    server.wait_until_ready()


def test_a_client_that_leaves_while_the_engine_is_down(server: RunningServer) -> None:
    before = server.quiet_metrics()
    body = {"model": server.model, **SEEDED, "n": 2, "stream": True}
    with server.dawdling(), server.http.stream("POST", "/v1/completions", json=body) as stream:
        next(stream.iter_text())
        kill(server, "scheduler-0")  # which takes longest to come back
        until(lambda: not server.is_ready(), PATIENCE_S, server.log)
    server.wait_until_ready()
    after = server.quiet_metrics()
    assert after["ramet_requests_resumed_total"] == before["ramet_requests_resumed_total"]
    aborted = 'ramet_requests_finished_total{reason="abort"}'
    assert after[aborted] - before[aborted] == 2
