"""What does a batch cost others, and how fast is it? Three comparisons on one server, all from the same run.

1. Time to first token of interactive requests, one after another: on an idle server, and while a batch runs. The
   goal is less than 30 % over idle plus one step.
2. Throughput of a batch, beside the same requests from an ideal client at each of some concurrencies.
3. The same for prompts that share long prefixes and are out of order.

Each measure of 2 and 3 has prompts of its own, so that none finds another's in the prefix cache.

    python benchmarks/batch_interference.py [--lines 400] [--requests 20] [-- launch_server flags …]
"""

import argparse
import asyncio
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import httpx

from ramet.launch.child import die_with_parent

PORT = 30891
URL = f"http://127.0.0.1:{PORT}"
SENTENCE = "The ship went round the island and came back with salt, rope and news. "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=400, help="lines of a batch")
    parser.add_argument("--tokens", type=int, default=32, help="output tokens of a line")
    parser.add_argument("--requests", type=int, default=20, help="interactive requests of a measure")
    parser.add_argument("--concurrencies", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("server_flags", nargs="*", help="after --: flags of launch_server")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as store:
        command = [sys.executable, "-m", "ramet.launch_server", "--port", str(PORT), "--log-level", "warning"]
        command += ["--file-storage-path", store, *args.server_flags]
        dies = functools.partial(die_with_parent, os.getpid())
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=dies)
        os.nice(19)  # clients are elsewhere in real life
        try:
            asyncio.run(measure(args))
        finally:
            server.terminate()
            server.wait(timeout=60)


async def measure(args: argparse.Namespace) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=URL, timeout=3600, limits=limits) as client:
        await wait_until_ready(client)
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        await run_batch(client, bodies(args, model, "warm", share=False)[:32])
        await interference(client, args, model)
        for name, share in (("prompts of their own", False), ("shared prefixes, out of order", True)):
            print(f"\n{name}: {args.lines} lines, {args.tokens} tokens each")
            seconds = await run_batch(client, bodies(args, model, f"{name} batch", share))
            print(f"  batch                {args.lines / seconds:8.2f} lines/s")
            for concurrency in args.concurrencies:
                requests = bodies(args, model, f"{name} {concurrency}", share)
                seconds = await ideal_client(client, requests, concurrency)
                print(f"  client, {concurrency:4} at once {args.lines / seconds:8.2f} lines/s")


async def interference(client: httpx.AsyncClient, args: argparse.Namespace, model: str) -> None:
    idle = await first_tokens(client, args.requests, model)
    running = asyncio.create_task(run_batch(client, bodies(args, model, "interference", share=False)))
    await asyncio.sleep(2)
    before = await step_time(client)
    busy = await first_tokens(client, args.requests, model)
    after = await step_time(client)
    if running.done():
        print("the batch ended too soon: give more --lines")
    await running
    step_ms = 1e3 * (after[0] - before[0]) / max(1, after[1] - before[1])
    idle_ms, busy_ms = 1e3 * statistics.median(idle), 1e3 * statistics.median(busy)
    print(f"time to first token, median of {args.requests}: idle {idle_ms:.1f} ms, with a batch {busy_ms:.1f} ms")
    ratio = busy_ms / (idle_ms + step_ms)
    print(f"mean step with a batch {step_ms:.1f} ms; with a batch over idle plus a step: {ratio:.2f}")


def bodies(args: argparse.Namespace, model: str, name: str, share: bool) -> list[dict[str, Any]]:
    """Shared: one of ten long texts, then a question. Else: texts of the same length that differ from the start."""
    rng = random.Random(name)
    numbers = list(range(args.lines))
    rng.shuffle(numbers)
    made = []
    for number in numbers:
        stem = f"{name}, part {number % 10 if share else number}. {SENTENCE * 20}"
        made.append(
            {
                "model": model,
                "messages": [{"role": "user", "content": f"{stem}Question {number}: what came back?"}],
                "max_tokens": args.tokens,
                "ignore_eos": True,
                "seed": number,
            }
        )
    return made


async def run_batch(client: httpx.AsyncClient, requests: list[dict[str, Any]]) -> float:
    """Seconds from its creation to its end."""
    url = "/v1/chat/completions"
    lines = [{"custom_id": f"{i}", "method": "POST", "url": url, "body": body} for i, body in enumerate(requests)]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = (await client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", data)})).json()
    started = time.perf_counter()
    body = {"input_file_id": file["id"], "endpoint": url, "completion_window": "24h"}
    batch = (await client.post("/v1/batches", json=body)).json()
    while batch["status"] not in ("completed", "failed", "expired", "cancelled"):
        await asyncio.sleep(0.05)
        batch = (await client.get(f"/v1/batches/{batch['id']}")).json()
    if batch["request_counts"]["completed"] != len(requests):
        raise SystemExit(f"the batch did not complete: {batch}")
    return time.perf_counter() - started


async def ideal_client(client: httpx.AsyncClient, requests: list[dict[str, Any]], concurrency: int) -> float:
    left = iter(requests)

    async def worker() -> None:
        for body in left:
            (await client.post("/v1/chat/completions", json=body)).raise_for_status()

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return time.perf_counter() - started


async def first_tokens(client: httpx.AsyncClient, count: int, model: str) -> list[float]:
    """Seconds to the first text of each of some streams, one after another."""
    seconds = []
    for number in range(count):
        content = f"{time.time()} {number}: name a colour."
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 8,
            "ignore_eos": True,
            "stream": True,
        }
        started = time.perf_counter()
        first = None
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            async for _ in response.aiter_bytes():
                first = first or time.perf_counter() - started
        seconds.append(first or 0.0)
        await asyncio.sleep(0.1)
    return seconds


async def step_time(client: httpx.AsyncClient) -> tuple[float, float]:
    """Sum of the scheduler's step times so far, in seconds, and their number."""
    found = {}
    for line in (await client.get("/metrics")).text.splitlines():
        name, _, value = line.rpartition(" ")
        found[name] = value
    return (
        float(found['ramet_scheduler_step_seconds_sum{phase="run"}']),
        float(found['ramet_scheduler_step_seconds_count{phase="run"}']),
    )


async def wait_until_ready(client: httpx.AsyncClient) -> None:
    for _ in range(600):
        try:
            if (await client.get("/ready")).status_code == 200:
                return
        except httpx.TransportError:
            pass  # nothing listens before the engine is ready
        await asyncio.sleep(0.2)
    raise SystemExit("the server did not become ready")


if __name__ == "__main__":
    main()
