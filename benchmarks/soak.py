"""Minutes of mixed traffic against a server of its own: does anything fail, grow or stay behind?

Clients send short and long requests, whole and streamed, leave some of them, ask for grammars, several choices and
deadlines, send what is invalid, and run batches. Traffic pauses at the end of each round; then no request, page or
file may be in use, and the memory of each process is taken: what it has written itself, without the pages of programs
and libraries, which come and go with whoever else on the machine maps them. Growth is the trend over the rounds after
the warm-up, which fills what has a bound (the KV pool, the caches of grammars and of the database) and has twice the
clients, so that later peaks are no news. Exits with 1 for an error, a leak, or too much growth.

    python benchmarks/soak.py [--minutes 10] [--clients 12] [-- launch_server flags …]
"""

import argparse
import asyncio
import collections
import contextlib
import functools
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

from ramet.launch.child import die_with_parent

# Small, so that prefixes are evicted all the time, and requests preempted several times a minute.
FLAGS = ["--max-total-tokens", "2048", "--log-level", "warning"]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
WORDS = ["rain", "plain", "train", "Spain", "falls", "the", "on", "in", "and", "what", "who", "sings", "asks", "counts"]
CHILD = "ramet.launch.child"
# More than are kept compiled.
NUM_GRAMMARS = 70
# At 8 KiB each, more than the 256 KiB of its database that the frontend keeps in memory.
NUM_BATCHES = 40
# A file or two may be open at the wrong moment.
FILES_TOLERANCE = 3


class WrongAnswer(Exception):
    """An answer that is not what the request must get."""


class Traffic:
    """The kinds of requests; each raises `WrongAnswer`, or what httpx raises, if it is not answered as it must be."""

    def __init__(self, http: httpx.AsyncClient, model: str, seed: int) -> None:
        self._http = http
        self._model = model
        self._random = random.Random(seed)
        # By weight: a batch takes as long as many others.
        self.kinds: dict[Callable[[], Awaitable[None]], int] = {
            self.short: 6,
            self.long_stream: 4,
            self.abandoned: 4,
            self.constrained: 3,
            self.choices: 2,
            self.deadline: 1,
            self.invalid: 3,
            self.tokenized: 1,
            self.batch: 1,
        }

    def next(self) -> Callable[[], Awaitable[None]]:
        return self._random.choices(list(self.kinds), list(self.kinds.values()))[0]

    def _text(self, words: int) -> str:
        return " ".join(self._random.choices(WORDS, k=words))

    def _chat(self, words: int, **fields: Any) -> dict[str, Any]:
        return {"model": self._model, "messages": [{"role": "user", "content": self._text(words)}], **fields}

    async def _post(self, path: str, body: Any, expected: tuple[int, ...] = (200,), **options: Any) -> Any:
        response = await self._http.post(path, json=body, **options)
        if response.status_code not in expected:
            raise WrongAnswer(f"{path}: {response.status_code} {response.text[:300]}")
        return response.json()

    async def short(self) -> None:
        answer = await self._post("/v1/chat/completions", self._chat(8, max_tokens=8))
        if not answer["choices"][0]["finish_reason"]:
            raise WrongAnswer(f"no end: {answer}")

    async def long_stream(self) -> None:
        body = self._chat(self._random.randrange(50, 200), max_tokens=200, stream=True, ignore_eos=True)
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = [line async for line in response.aiter_lines() if line]
        if response.status_code != 200 or lines[-1] != "data: [DONE]" or '"finish_reason":"length"' not in lines[-2]:
            raise WrongAnswer(f"a stream ended with {response.status_code} {lines[-3:]}")

    async def abandoned(self) -> None:
        body = self._chat(30, max_tokens=1000, ignore_eos=True, stream=self._random.random() < 0.5)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._random.random() * 2):
                async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                    async for _ in response.aiter_bytes():
                        if response.status_code != 200:
                            raise WrongAnswer(f"a stream began with {response.status_code}")

    async def fill(self) -> None:
        """Use each page of the KV pool, each place among compiled grammars and each page that the database caches."""
        info, model = [(await self._http.get(path)).json() for path in ("/get_server_info", "/get_model_info")]
        length = min(info["context_length"], info["max_total_num_tokens"]) // 2
        for _ in range(info["max_total_num_tokens"] * 5 // 4 // length):
            prompt = self._random.choices(range(10, model["vocab_size"]), k=length)
            await self._post("/v1/completions", {"model": self._model, "prompt": prompt, "max_tokens": 1})
        for number in range(NUM_GRAMMARS):
            await self.constrained(f"number {number}", max_tokens=1)
        notes = {f"note {number}": "x" * 512 for number in range(16)}
        await asyncio.gather(*(self.batch(1, notes) for _ in range(NUM_BATCHES)))

    async def constrained(self, title: str | None = None, max_tokens: int = 100) -> None:
        # Not always the same: what is compiled is kept for a while.
        schema = {**SCHEMA, "title": title or self._text(2)}
        form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
        answer = await self._post("/v1/chat/completions", self._chat(10, max_tokens=max_tokens, response_format=form))
        choice = answer["choices"][0]
        if choice["finish_reason"] == "stop" and not isinstance(json.loads(choice["message"]["content"])["city"], str):
            raise WrongAnswer(f"it is not of the schema: {choice}")

    async def choices(self) -> None:
        body = {
            "model": self._model,
            "prompt": [self._text(20), self._text(5)],
            "n": 3,
            "max_tokens": 20,
            "logprobs": 2,
        }
        answer = await self._post("/v1/completions", body)
        if [choice["index"] for choice in answer["choices"]] != list(range(6)):
            raise WrongAnswer(f"six choices were asked: {answer}")

    async def deadline(self) -> None:
        body = self._chat(20, max_tokens=1000, ignore_eos=True)
        answer = await self._post("/v1/chat/completions", body, (200, 504), headers={"x-request-timeout": "0.5"})
        if "error" in answer and answer["error"]["code"] != "deadline_exceeded":
            raise WrongAnswer(f"another error than the deadline: {answer}")

    async def invalid(self) -> None:
        wrong: list[dict[str, Any]] = [
            {"temperature": 9},
            {"no_such_parameter": 1},
            {"messages": []},
            {"max_tokens": 10**6},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "zap"}}}},
            {"regex": "("},
        ]
        await self._post("/v1/chat/completions", self._chat(3, max_tokens=5) | self._random.choice(wrong), (400,))

    async def tokenized(self) -> None:
        answer = await self._post("/tokenize", {"prompt": self._text(100)})
        await self._post("/detokenize", {"tokens": answer["tokens"]})

    async def batch(self, num_lines: int = 10, metadata: dict[str, str] | None = None) -> None:
        """All of its life, and nothing left of it but its record."""
        lines = [
            json.dumps({"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": body})
            for i, body in enumerate(self._chat(10, max_tokens=12) for _ in range(num_lines))
        ]
        response = await self._http.post(
            "/v1/files", files={"file": "\n".join(lines).encode()}, data={"purpose": "batch"}
        )
        fields = {"endpoint": "/v1/chat/completions", "completion_window": "24h", "metadata": metadata}
        batch = await self._post("/v1/batches", {"input_file_id": response.json()["id"], **fields})
        while batch["status"] not in ("completed", "failed", "expired", "cancelled"):
            await asyncio.sleep(0.2)
            batch = (await self._http.get(f"/v1/batches/{batch['id']}")).json()
        if batch["request_counts"] != {"total": num_lines, "completed": num_lines, "failed": 0}:
            raise WrongAnswer(f"a batch ended as {batch}")
        for file_id in (batch["input_file_id"], batch["output_file_id"]):
            await self._http.delete(f"/v1/files/{file_id}")


class Soak:
    """`run` it; then `failures` says what was wrong, and `report` all that was counted."""

    def __init__(self, args: argparse.Namespace, launcher: psutil.Process) -> None:
        self._args = args
        self._launcher = launcher
        self.answered: collections.Counter[str] = collections.Counter()
        self.errors: list[str] = []
        self.leaks: list[str] = []
        self.preemptions = 0
        self.memory: dict[str, list[int]] = collections.defaultdict(list)  # bytes by process, after each round
        self._pids: dict[str, int] = {}
        self._files: dict[str, int] = {}

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{self._args.port}", timeout=300, limits=limits
        ) as http:
            model = await self._wait_until_ready(http)
            traffic = Traffic(http, model, self._args.seed)
            for kind in traffic.kinds:  # each at least once
                await self._one(kind)
            await traffic.fill()
            await self._round(traffic, self._args.warm_up, 2 * self._args.clients)
            await self._settle(http)
            for _ in range(self._args.rounds):
                await self._round(traffic, self._args.minutes * 60 / self._args.rounds, self._args.clients)
                await self._settle(http)

    def processes(self) -> dict[str, psutil.Process]:
        """The launcher and its children, by their names, and what these have started, by the module."""
        children = {}
        for child in self._launcher.children(recursive=True):
            argv = child.cmdline()
            children[argv[-1] if CHILD in argv else argv[argv.index("-m") + 1].rpartition(".")[2]] = child
        return {"launcher": self._launcher, **children}

    async def _wait_until_ready(self, http: httpx.AsyncClient) -> str:
        while True:
            if not self._launcher.is_running() or self._launcher.status() == psutil.STATUS_ZOMBIE:
                raise SystemExit("the server did not start")
            with contextlib.suppress(httpx.TransportError):
                if (await http.get("/ready")).status_code == 200:
                    return str((await http.get("/v1/models")).json()["data"][0]["id"])
            await asyncio.sleep(0.2)

    async def _round(self, traffic: Traffic, length_s: float, clients: int) -> None:
        until = time.monotonic() + length_s

        async def client() -> None:
            while time.monotonic() < until:
                await self._one(traffic.next())

        await asyncio.gather(*(client() for _ in range(clients)))

    async def _one(self, kind: Callable[[], Awaitable[None]]) -> None:
        name = kind.__name__
        try:
            await kind()
        except (WrongAnswer, httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            self.errors.append(f"{name}: {type(error).__name__}: {error}")
        self.answered[name] += 1

    async def _settle(self, http: httpx.AsyncClient) -> None:
        """Wait until all is quiet, and take what there is."""
        deadline = time.monotonic() + 30
        while (left := self._left(metrics := await self._metrics(http))) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        self.leaks += left
        await http.post("/flush_cache")
        processes = self.processes()
        pids = {name: process.pid for name, process in processes.items()}
        files = {name: process.num_fds() for name, process in processes.items()}
        if self._pids and pids != self._pids:
            self.errors.append(f"processes were {self._pids} and are {pids}")
        grown = {name: count for name, count in files.items() if count > self._files.get(name, count) + FILES_TOLERANCE}
        self.leaks += [f"{name} has {count} open files, after {self._files[name]}" for name, count in grown.items()]
        self._pids, self._files = pids, self._files or files
        for name, process in processes.items():
            self.memory[name].append(own_memory(process.pid))
        self.preemptions = int(metrics["ramet_scheduler_preemptions_total"])
        counts = f"{sum(self.answered.values())} requests, {len(self.errors)} errors, {self.preemptions} preemptions"
        print(counts, flush=True)

    @staticmethod
    def _left(metrics: dict[str, float]) -> list[str]:
        left = {
            "requests in the frontend": metrics["ramet_http_requests_in_flight"] - 1,  # the one that asks
            "requests running": metrics['ramet_scheduler_requests{state="running"}'],
            "requests waiting": metrics['ramet_scheduler_requests{state="waiting"}'],
            "pages in use": metrics['ramet_kv_pages{state="in_use"}'],
        }
        return [f"{count:.0f} {what}" for what, count in left.items() if count]

    async def _metrics(self, http: httpx.AsyncClient) -> dict[str, float]:
        page = (await http.get("/metrics")).text
        lines = [line.rpartition(" ") for line in page.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def growth(self) -> dict[str, float]:
        """By process, as a share of its memory, over all rounds: the slope of Theil and Sen (the median of the slopes
        between any two rounds), which single rounds cannot move."""
        shares = {}
        for name, sizes in self.memory.items():
            pairs = itertools.combinations(enumerate(sizes), 2)
            slopes = [(later - sooner) / (j - i) for (i, sooner), (j, later) in pairs]
            shares[name] = statistics.median(slopes or [0.0]) * (len(sizes) - 1) / statistics.median(sizes)
        return shares

    def failures(self) -> list[str]:
        limit = self._args.max_growth / 100
        grown = [f"{name} grew by {share:.2%}" for name, share in self.growth().items() if share >= limit]
        return [*(f"error: {error}" for error in self.errors), *(f"leak: {leak}" for leak in self.leaks), *grown]

    def report(self) -> str:
        lines = [f"{name:16}{count:8} requests" for name, count in sorted(self.answered.items())]
        for name, share in self.growth().items():
            sizes = " ".join(f"{size / 2**20:.1f}" for size in self.memory[name])
            lines.append(f"{name:16}{share:+8.2%}  MiB after each round: {sizes}")
        ends = f"{self.preemptions} preemptions, {len(self.errors)} errors, {len(self.leaks)} leaks"
        return "\n".join([*lines, ends])


def own_memory(pid: int) -> int:
    """Bytes that the process holds and no file backs. Its unique set size also has the pages of libraries that no
    other process maps at the moment, and that the kernel has not dropped: tens of MiB for torch."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return 1024 * sum(map(int, re.findall(r"^(?:RssAnon|RssShmem|VmSwap):\s+(\d+) kB$", status, re.MULTILINE)))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of traffic after the warm-up")
    parser.add_argument("--warm-up", type=float, default=120.0, help="seconds of traffic before memory counts")
    parser.add_argument("--rounds", type=int, default=12, help="how often memory is taken")
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--max-growth", type=float, default=1.0, help="percent, for each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=30891, help="of the server")
    parser.add_argument("server_flags", nargs="*", help="after --: flags of launch_server")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        flags = [*FLAGS, "--port", str(args.port), "--file-storage-path", f"{folder}/files", *args.server_flags]
        server = subprocess.Popen(
            [sys.executable, "-m", "ramet.launch_server", *flags],
            stdout=subprocess.DEVNULL,
            preexec_fn=functools.partial(die_with_parent, os.getpid()),
        )
        try:
            soak = Soak(args, psutil.Process(server.pid))
            asyncio.run(soak.run())
        finally:
            server.terminate()
            code = server.wait(timeout=60)
    if code != 0:
        soak.errors.append(f"the server ended with {code}")
    print(soak.report())
    for failure in soak.failures():
        print(failure)
    sys.exit(1 if soak.failures() else 0)


if __name__ == "__main__":
    main()
