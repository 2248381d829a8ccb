"""More than there is room for: a KV pool in which requests keep preempting each other, and two thousand clients."""

import asyncio
import collections
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support.server import PATIENCE_S, RunningServer, tiny_flags, until

pytestmark = pytest.mark.e2e

NUM_ASKED, NUM_CHOICES = 16, 20
PROMPT_TOKENS, NEW_TOKENS = 20, 160
# One fits, with two pages to spare: so the next one always comes in, and later has to give way.
POOL_TOKENS = 14 * 16

NUM_CLIENTS = 2000
# Of the frontend, for 2,000 connections with a request each: 45 MiB were seen.
GROWTH_BYTES = 96 * 1024 * 1024


def bodies(model: str) -> list[dict[str, Any]]:
    """Greedy and seeded ones by turns, every fourth with two choices; some prompts share a prefix."""
    made = []
    for number in range(NUM_ASKED):
        prompt = [(7 * (number % 5) + 3 * position) % 380 for position in range(PROMPT_TOKENS - number // 4)]
        sampling = {"temperature": 0} if number % 2 else {"temperature": 1, "seed": number}
        body = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "ignore_eos": True, "logprobs": 1}
        made.append({**body, **sampling, "n": 2 if number % 4 == 0 else 1})
    return made


def answers(server: RunningServer) -> list[Any]:
    async def ask() -> list[Any]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            posts = [http.post("/v1/completions", json=body) for body in bodies(server.model)]
            responses = await asyncio.gather(*posts)
        assert [response.status_code for response in responses] == [200] * NUM_ASKED
        return [response.json()["choices"] for response in responses]

    return asyncio.run(ask())


@pytest.fixture
def in_peace(tiny: RunningServer) -> list[Any]:
    """The answers where there is room for all."""
    before, preemptions = tiny.quiet_metrics(), "ramet_scheduler_preemptions_total"
    told = answers(tiny)
    finished = int(before.get("ramet_scheduler_finished_total", 0)) + NUM_CHOICES
    assert tiny.quiet_metrics(finished=finished)[preemptions] == before.get(preemptions, 0)
    return told


@pytest.fixture(scope="module")
def small(tiny_model: Callable[[str], Path]) -> Iterator[RunningServer]:
    """Started with the usual limit on open files: it must help itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
    try:
        with RunningServer(*tiny_flags(tiny_model("llama"))[:-1], str(POOL_TOKENS)) as server:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            yield server
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_answers_are_the_same_in_a_pool_that_is_too_small(small: RunningServer, in_peace: list[Any]) -> None:
    pressed = answers(small)
    metrics = small.quiet_metrics(finished=NUM_CHOICES)
    assert metrics["ramet_scheduler_preemptions_total"] >= NUM_CHOICES / 2, metrics
    assert metrics["ramet_scheduler_failed_total"] == 0
    assert metrics['ramet_kv_pages{state="in_use"}'] == 0
    assert pressed == in_peace


@pytest.fixture
def many_files() -> Iterator[None]:
    """This process may have a connection for each client."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < NUM_CLIENTS + 500:
        pytest.skip(f"only {hard} open files are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (NUM_CLIENTS + 500, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Crowd:
    """Clients that all connect, then all ask."""

    def __init__(self, server: RunningServer) -> None:
        self._port = server.port
        self._all_here = asyncio.Barrier(NUM_CLIENTS)
        body = {"model": server.model, "max_tokens": 3, "prompt": "The quick brown fox"}
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\nconnection: close\r\n"
        self._request = f"{head}content-type: application/json\r\n\r\n".encode() + content

    async def answers(self) -> list[bytes]:
        return await asyncio.gather(*(self._ask() for _ in range(NUM_CLIENTS)))

    async def _ask(self) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        await self._all_here.wait()
        writer.write(self._request)
        answer = await reader.read()
        writer.close()
        return answer


def test_two_thousand_clients_at_once(small: RunningServer, many_files: None) -> None:
    frontend = psutil.Process(small.pids()["frontend"])
    small.client.completions.create(model=small.model, prompt="a", max_tokens=1)
    before = frontend.memory_info().rss
    heads = [answer.partition(b"\r\n\r\n") for answer in asyncio.run(Crowd(small).answers())]
    growth = frontend.memory_info().rss - before
    counts = collections.Counter(int(head[9:12]) for head, _, _ in heads)
    print(counts, f"{growth / 2**20:.0f} MiB")
    assert counts.keys() <= {200, 429}
    assert counts.total() == NUM_CLIENTS
    assert counts[200] >= 1024  # as many as --max-queued-requests lets in
    for head, _, body in heads:
        answer = json.loads(body)
        assert answer["error"]["code"] == "queue_full" if b" 429 " in head else answer["choices"]
        if b" 429 " in head:
            [wait] = [line for line in head.split(b"\r\n") if line.startswith(b"retry-after: ")]
            assert 1 <= int(wait.removeprefix(b"retry-after: ")) <= 60
    assert growth < GROWTH_BYTES
    assert small.quiet_metrics()['ramet_kv_pages{state="in_use"}'] == 0
    until(lambda: frontend.num_fds() < 100, PATIENCE_S, lambda: f"few connections: {frontend.num_fds()}")
