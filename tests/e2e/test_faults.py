"""Faults inside a step of a real scheduler process: who fails, who does not, and that nothing is left of it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.faulty_server import KERNEL_ERROR, NOT_A_NUMBER, OUT_OF_MEMORY
from support.server import RunningServer, tiny_flags

pytestmark = pytest.mark.e2e

PROMPT = list(range(10, 60))
LONG = {"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True, "temperature": 0}
SHORT = {**LONG, "max_tokens": 100}


@pytest.fixture(scope="module")
def server(servers: Any, tiny_model: Callable[[str], Path]) -> Iterator[RunningServer]:
    servers.close()
    with RunningServer(*tiny_flags(tiny_model("llama")), module="support.faulty_server") as server:
        yield server


def ask(server: RunningServer, **body: Any) -> httpx.Response:
    return server.http.post("/v1/completions", json={"model": server.model, **body})


def beside_a_long_one(server: RunningServer, token: int) -> tuple[httpx.Response, str]:
    """The answer to a request that holds the token, and the stream of one that was under way before it."""
    body = {"model": server.model, **LONG, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as stream:
        pieces = stream.iter_text()
        with server.dawdling():
            text = next(pieces)
            faulty = ask(server, prompt=[5, 6, token, 7], max_tokens=3)
        return faulty, text + "".join(pieces)


def check_nothing_left(server: RunningServer, scheduler: int, answer: dict[str, Any]) -> None:
    metrics = server.quiet_metrics()
    assert metrics['ramet_kv_pages{state="in_use"}'] == 0
    again = ask(server, **SHORT)
    assert again.json()["choices"] == answer["choices"]
    assert server.pids()["scheduler-0"] == scheduler


@pytest.mark.parametrize(
    ("token", "words"), [(OUT_OF_MEMORY, "out of memory: tried to allocate 80 GiB"), (KERNEL_ERROR, "a kernel failed")]
)
def test_a_step_that_raises_fails_its_batch_and_nothing_else(server: RunningServer, token: int, words: str) -> None:
    scheduler, answer = server.pids()["scheduler-0"], ask(server, **SHORT).json()
    faulty, under_way = beside_a_long_one(server, token)
    assert (faulty.status_code, faulty.json()["error"]["code"]) == (500, "internal_error")
    assert words in faulty.json()["error"]["message"]
    assert words in under_way and under_way.endswith("data: [DONE]\n\n")
    check_nothing_left(server, scheduler, answer)


def test_logits_that_are_no_numbers_fail_their_request_alone(server: RunningServer) -> None:
    scheduler, answer = server.pids()["scheduler-0"], ask(server, **SHORT).json()
    faulty, under_way = beside_a_long_one(server, NOT_A_NUMBER)
    assert faulty.status_code == 500
    assert "NaN" in faulty.json()["error"]["message"]
    assert "error" not in under_way and '"finish_reason":"length"' in under_way
    check_nothing_left(server, scheduler, answer)
