"""Every process killed and stopped in turn under a steady load: nobody waits in vain, and nothing is left behind.

A request that is in flight ends well, with the text that it gets when nobody dies. One that comes while a process is
dead is refused with a 503. If it is the frontend that dies, connections break. Errors come within two seconds,
unless others hold the cores.
"""

import asyncio
import collections
import contextlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
from support.server import PATIENCE_S, START_S, RunningServer, tiny_flags, until

pytestmark = pytest.mark.e2e

# In full, by hand: RAMET_TEST_CHAOS_ROUNDS=20, which takes a quarter of an hour.
ROUNDS = int(os.environ.get("RAMET_TEST_CHAOS_ROUNDS", "1"))
# The frontend first: so it has to survive all the others' deaths. One tokenizer is like the other.
KILLED = ("frontend", "scheduler-0", "tokenizer-0", "detokenizer")
STOPPED = ("frontend", "scheduler-0", "tokenizer-1", "detokenizer")
STREAMS = 16
# So many of the requests that survive a death are sent again, to compare the texts: those that took longest.
CHECKED = 4
HEARD_S = 2.0
# Of single ones, since others may hold the cores: it is most of them that must be so soon.
AT_THE_LATEST_S = 20.0
WATCHDOG_S = 3.0
FLAGS = ("--watchdog-timeout", f"{WATCHDOG_S:g}", "--max-restarts", "1000", "--tokenizer-worker-num", "2")


class Ended(NamedTuple):
    """A request: when it began and ended, on the monotonic clock, how, and the text of each choice."""

    started_at: float
    ended_at: float
    how: str
    body: dict[str, Any]
    texts: dict[int, str]


class Load:
    """Sixteen clients in a thread with a loop of its own; each sends its next request when the last one has ended."""

    def __init__(self, server: RunningServer, seed: int) -> None:
        self._server = server
        self._random = random.Random(seed)
        self.ended: list[Ended] = []
        self._stopping = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self._stopping = True
        self._thread.join()

    def wait_for(self, count: int, how: str = "done") -> None:
        """Until so many more have ended this way."""
        seen = len(self.ended)
        until(
            lambda: sum(each.how == how for each in self.ended[seen:]) >= count,
            2 * PATIENCE_S,
            lambda: f"{count} {how}: {self.ended[seen:]}\n{self._server.log()}",
        )

    async def _run(self) -> None:
        async with httpx.AsyncClient(base_url=self._server.url, timeout=60) as http:
            await asyncio.gather(*(self._work(http) for _ in range(STREAMS)))

    async def _work(self, http: httpx.AsyncClient) -> None:
        while not self._stopping:
            started_at = time.monotonic()
            texts: dict[int, str] = collections.defaultdict(str)
            body, leaves = self._make()
            how = await self._request(http, body, leaves, texts)
            self.ended.append(Ended(started_at, time.monotonic(), how, body, texts))
            await asyncio.sleep(0.1 if how not in ("done", "left") else 0)

    def again(self, ended: Ended) -> dict[int, str]:
        """The texts of the same request, now."""

        async def ask() -> None:
            async with httpx.AsyncClient(base_url=self._server.url, timeout=60) as http:
                assert await self._request(http, ended.body, False, texts) == "done"

        texts: dict[int, str] = collections.defaultdict(str)
        asyncio.run(ask())
        return texts

    def _make(self) -> tuple[dict[str, Any], bool]:
        """A request, and whether its client leaves early."""
        prompt = [self._random.randrange(3, 384) for _ in range(self._random.randrange(1, 60))]
        body = {"model": self._server.model, "prompt": prompt, "stream": True, "ignore_eos": True}
        body |= {"seed": self._random.randrange(2**32)}
        body |= {"max_tokens": self._random.randrange(5, 60), "n": self._random.choice((1, 1, 2))}
        leaves = self._random.random() < 0.1
        if leaves:
            body["max_tokens"] = 1500
        elif self._random.random() < 0.1:  # for which the scheduler has a process of its own
            body |= {"regex": "[a-z]{3,9}", "ignore_eos": False}
        return body, leaves

    async def _request(self, http: httpx.AsyncClient, body: dict[str, Any], leaves: bool, texts: dict[int, str]) -> str:
        how = "cut off"
        try:
            async with http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code == 503:
                    error = json.loads(await response.aread())["error"]
                    return "refused" if error["code"] == "engine_down" and response.headers["retry-after"] else "?"
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        return "done" if how == "cut off" else how
                    if '"error"' in line:
                        how = json.loads(line.removeprefix("data: "))["error"]["code"]
                    elif line:
                        for choice in json.loads(line.removeprefix("data: "))["choices"]:
                            texts[choice["index"]] += choice["text"]
                    if leaves and line and self._random.random() < 0.1:
                        return "left"
        except httpx.TimeoutException:
            return "hung"
        except httpx.TransportError:
            return "broken"
        return how


@pytest.fixture
def server(servers: Any, tiny_model: Callable[[str], Path]) -> Iterator[RunningServer]:
    servers.close()
    with RunningServer(*tiny_flags(tiny_model("llama")), *FLAGS) as server:
        yield server


def test_every_process_killed_and_stopped_in_turn(server: RunningServer) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    with Load(server, seed) as load:
        load.wait_for(3 * STREAMS)
    descriptors = open_descriptors(server)
    with Load(server, seed + 1) as load:
        for number, roles in [(signal.SIGKILL, KILLED), (signal.SIGSTOP, STOPPED)] * ROUNDS:
            for role in roles:
                load.wait_for(STREAMS)
                hurt(server, load, role, number)
    print(collections.Counter(each.how for each in load.ended))
    pages = pages_of(server)
    assert pages["free"] + pages["cached"] == 6144 / 16
    assert pages["in_use"] == 0
    until(lambda: not orphans(server), PATIENCE_S, lambda: f"no orphans: {orphans(server)}")

    def more() -> dict[str, int]:
        now = open_descriptors(server)
        return {name: now[name] - count for name, count in descriptors.items() if now[name] > count}

    until(lambda: not more(), PATIENCE_S, lambda: f"no more descriptors than before: {more()}")
    assert "Traceback" not in server.log()


def hurt(server: RunningServer, load: Load, role: str, number: signal.Signals) -> None:
    """Kill or stop a process, wait until all is well, and look at what became of the requests."""
    before, restarts = server.pids(), restarts_of(server)
    seen = len(load.ended)
    hurt_at = time.monotonic()
    os.kill(before[role], number)
    until(lambda: restarts_of(server) > restarts, START_S, server.log)
    server.wait_until_ready()
    back_s = time.monotonic() - hurt_at
    load.wait_for(STREAMS)
    after = server.pids()
    assert {name for name in after if after[name] != before[name]} == {role}
    ended = load.ended[seen:]
    print(role, number.name, f"back after {back_s:.1f} s;", collections.Counter(each.how for each in ended))
    error = "broken" if role == "frontend" else "refused"
    assert {each.how for each in ended} <= {"done", "left", error}
    limit_s = HEARD_S + (WATCHDOG_S if number == signal.SIGSTOP else 0)
    heard = sorted(
        (each.ended_at - max(hurt_at, each.started_at), each.started_at) for each in ended if each.how == error
    )
    assert not heard or (heard[len(heard) // 2][0] < limit_s and heard[-1][0] < limit_s + AT_THE_LATEST_S), heard
    survivors = [each for each in ended if each.how == "done" and each.started_at < hurt_at < each.ended_at]
    # Some had been sent before the death, and were read after it.
    early = [started_at for _, started_at in heard if started_at <= hurt_at]
    assert error == "broken" or len(early) <= len(survivors), (early, survivors)
    for each in survivors[-CHECKED:]:
        assert each.texts == load.again(each), each


def restarts_of(server: RunningServer) -> int:
    return server.log().count("all processes are ready again")


def pages_of(server: RunningServer) -> dict[str, float]:
    metrics = server.quiet_metrics()
    return {state: metrics[f'ramet_kv_pages{{state="{state}"}}'] for state in ("free", "cached", "in_use")}


def open_descriptors(server: RunningServer) -> dict[str, int]:
    """By process, once the clients' connections are closed."""
    server.quiet_metrics()
    time.sleep(0.5)
    return {name: psutil.Process(pid).num_fds() for name, pid in server.pids().items()}


def orphans(server: RunningServer) -> list[str]:
    """All that runs of the server, but for its processes and the one that tries grammars for the scheduler."""
    pids = server.pids()
    known = {*pids.values(), *(child.pid for child in psutil.Process(pids["scheduler-0"]).children())}
    found = []
    for pid in server.alive():
        with contextlib.suppress(psutil.NoSuchProcess):  # it was about to end
            found += [str(psutil.Process(pid))] if pid not in known else []
    return found
