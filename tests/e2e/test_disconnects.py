"""Clients that leave at random moments, and what they must not leave behind."""

import asyncio
import collections
import random
from collections.abc import Iterator

import httpx
import psutil
import pytest
from support.server import RunningServer

pytestmark = pytest.mark.e2e

NUM_WARM_UP, NUM_REQUESTS = 500, 500
AT_ONCE = 24
# Eight kilobytes a request: above what an allocator keeps for itself (2 MiB were seen), below what a request holds.
GROWTH_BYTES = 4 * 1024 * 1024


class Clients:
    """Sends requests, a third of which it leaves, and counts how they ended."""

    def __init__(self, server: RunningServer, seed: int) -> None:
        self._server = server
        self._random = random.Random(seed)
        self.ends: collections.Counter[str] = collections.Counter()

    async def send(self, count: int) -> None:
        # Each request has a connection of its own: to leave is to close it.
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=self._server.url, timeout=60, limits=limits) as http:
            plans = iter([self._plan(number) for number in range(count)])
            await asyncio.gather(*(self._work(http, plans) for _ in range(AT_ONCE)))

    def _plan(self, number: int) -> tuple[dict, str]:
        """A body, and when to leave: `never`, or at a random moment."""
        prompt = [self._random.randrange(3, 384) for _ in range(self._random.randrange(1, 80))]
        body = {"model": self._server.model, "prompt": prompt, "max_tokens": self._random.randrange(1, 40)}
        body |= {"stream": self._random.random() < 0.5, "n": self._random.choice((1, 1, 1, 3))}
        if number % 3:
            return body, "never"
        # What ends before the client can leave it would not be a disconnect.
        body |= {"max_tokens": 1000, "ignore_eos": True}
        return body, "stream" if body["stream"] and self._random.random() < 0.6 else "wait"

    async def _work(self, http: httpx.AsyncClient, plans: Iterator[tuple[dict, str]]) -> None:
        for body, leave in plans:
            self.ends[await self._request(http, body, leave)] += 1

    async def _request(self, http: httpx.AsyncClient, body: dict, leave: str) -> str:
        if leave == "stream":
            chunks = self._random.randrange(1, 20)
            async with http.stream("POST", "/v1/completions", json=body) as response:
                async for _ in response.aiter_lines():
                    chunks -= 1
                    if chunks == 0:
                        return "left its stream"
        try:
            # At times so soon that not even the request is read.
            patience_s = self._random.choice((0.0, 0.003, 0.03, 0.3)) * self._random.random()
            async with asyncio.timeout(patience_s if leave == "wait" else None):
                response = await http.post("/v1/completions", json=body)
        except TimeoutError:
            return "left while waiting"
        assert response.status_code == 200, response.text
        assert "error" not in response.text
        return "answered"


def resident_bytes(server: RunningServer) -> dict[str, int]:
    return {name: psutil.Process(pid).memory_info().rss for name, pid in server.pids().items()}


def test_nothing_is_left_of_clients_that_leave(tiny: RunningServer) -> None:
    clients = Clients(tiny, seed=1)
    asyncio.run(clients.send(NUM_WARM_UP))
    before, memory = tiny.quiet_metrics(), resident_bytes(tiny)
    clients = Clients(tiny, seed=2)
    asyncio.run(clients.send(NUM_REQUESTS))
    after = tiny.quiet_metrics()

    print(clients.ends)
    assert clients.ends.total() == NUM_REQUESTS
    assert clients.ends["answered"] <= NUM_REQUESTS * 0.7
    assert min(clients.ends["left its stream"], clients.ends["left while waiting"]) >= NUM_REQUESTS / 12
    assert after['ramet_kv_pages{state="in_use"}'] == 0
    for state in ("free", "cached"):
        assert after[f'ramet_kv_pages{{state="{state}"}}'] >= 0
    aborted = after["ramet_scheduler_aborted_total"] - before["ramet_scheduler_aborted_total"]
    assert aborted >= NUM_REQUESTS / 12
    assert after["ramet_scheduler_failed_total"] == before["ramet_scheduler_failed_total"]

    # What is kept of each client is kept of the next ones too; a peak, on a busy machine, is not reached again.
    for attempt in range(3):
        memory, before_that = resident_bytes(tiny), memory
        growth = {name: size - before_that[name] for name, size in memory.items()}
        print(f"growth: { ({name: f'{size / 1024:.0f} KiB' for name, size in growth.items()}) }")
        if max(growth.values()) < GROWTH_BYTES:
            return
        asyncio.run(Clients(tiny, seed=3 + attempt).send(NUM_REQUESTS))
        tiny.quiet_metrics()
    raise AssertionError(growth)
