"""Do streaming clients slow the step? Step times and throughput of one engine under quiet and under streaming clients.

On a small machine the processes of an engine share cores with its matrix products. The same requests are sent with
and without streaming, in turn (A B A B …), to one server; step times come from its own `/metrics`. Prints medians of
the rounds and the ratio.

    python benchmarks/streaming_load.py [--concurrency 16] [--rounds 5] [-- launch_server flags …]
"""

import argparse
import asyncio
import functools
import os
import statistics
import subprocess
import sys
import time

import httpx

from ramet.launch.child import die_with_parent

PORT = 30890
URL = f"http://127.0.0.1:{PORT}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96, help="output tokens per request")
    parser.add_argument("server_flags", nargs="*", help="after --: flags of launch_server")
    args = parser.parse_args()
    command = [sys.executable, "-m", "ramet.launch_server", "--port", str(PORT), "--log-level", "warning"]
    # Each bound a third above the one before: quantiles are read from them.
    bounds = ",".join(f"{0.001 * 1.33**i:.5f}" for i in range(30))
    command += ["--metrics-buckets", f"scheduler_step_seconds={bounds}"]
    dies = functools.partial(die_with_parent, os.getpid())
    server = subprocess.Popen([*command, *args.server_flags], stdout=subprocess.DEVNULL, preexec_fn=dies)
    # Clients are elsewhere in real life: this process takes what the engine leaves. After the server's start, which
    # would inherit it.
    os.nice(19)
    try:
        asyncio.run(compare(args))
    finally:
        server.terminate()
        server.wait(timeout=60)


async def compare(args: argparse.Namespace) -> None:
    async with httpx.AsyncClient(base_url=URL, timeout=600) as client:
        await wait_until_ready(client)
        await load(client, args, stream=True)
        rounds: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        for _ in range(args.rounds):
            for stream in (False, True):
                rounds[stream].append(await load(client, args, stream))
    print(f"{args.concurrency} clients, {args.tokens} tokens each, median of {args.rounds} rounds")
    print(f"{'':14}{'quiet':>10}{'streaming':>12}{'ratio':>8}")
    for name in rounds[True][0]:
        quiet, streaming = (statistics.median(r[name] for r in rounds[stream]) for stream in (False, True))
        print(f"{name:14}{quiet:10.2f}{streaming:12.2f}{streaming / quiet:8.2f}")


async def wait_until_ready(client: httpx.AsyncClient) -> None:
    for _ in range(600):
        try:
            if (await client.get("/ready")).status_code == 200:
                return
        except httpx.TransportError:
            pass  # nothing listens before the engine is ready
        await asyncio.sleep(0.2)
    raise SystemExit("the server did not become ready")


async def load(client: httpx.AsyncClient, args: argparse.Namespace, stream: bool) -> dict[str, float]:
    """One round: step times (ms) and tokens per second."""
    before, started = await step_histogram(client), time.perf_counter()
    await asyncio.gather(*(one_request(client, args.tokens, i, stream) for i in range(args.concurrency)))
    seconds = time.perf_counter() - started
    await asyncio.sleep(0.1)  # the last snapshot of the counters
    after = await step_histogram(client)
    counts = [b - a for a, b in zip(before["counts"], after["counts"], strict=True)]
    total = counts[-1]
    return {
        "step mean ms": 1e3 * (after["sum"] - before["sum"]) / total,
        "step p50 ms": 1e3 * quantile(after["bounds"], counts, 0.5),
        "step p99 ms": 1e3 * quantile(after["bounds"], counts, 0.99),
        "tokens/s": args.concurrency * args.tokens / seconds,
    }


async def one_request(client: httpx.AsyncClient, tokens: int, index: int, stream: bool) -> None:
    body = {
        "model": (await client.get("/v1/models")).json()["data"][0]["id"],
        "prompt": f"Story number {index}. Once upon a time",
        "max_tokens": tokens,
        "ignore_eos": True,
        "seed": index,
        "stream": stream,
    }
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for _ in response.aiter_bytes():
            pass


async def step_histogram(client: httpx.AsyncClient) -> dict:
    """Bounds, cumulative counts and sum of the times so far that the model took for a step."""
    bounds, counts, total = [], [], 0.0
    for line in (await client.get("/metrics")).text.splitlines():
        if line.startswith("ramet_scheduler_step_seconds_bucket") and 'phase="run"' in line:
            bounds.append(float(line.split('le="')[1].split('"')[0]))
            counts.append(float(line.rsplit(" ", 1)[1]))
        elif line.startswith("ramet_scheduler_step_seconds_sum") and 'phase="run"' in line:
            total = float(line.rsplit(" ", 1)[1])
    return {"bounds": bounds, "counts": counts, "sum": total}


def quantile(bounds: list[float], counts: list[float], share: float) -> float:
    """From cumulative counts, linear within a bucket, as Prometheus does."""
    target, lower_bound, lower_count = share * counts[-1], 0.0, 0.0
    for bound, count in zip(bounds, counts, strict=True):
        if count >= target:
            width = 0.0 if bound == float("inf") else bound - lower_bound
            return lower_bound + width * (target - lower_count) / max(count - lower_count, 1e-9)
        lower_bound, lower_count = bound, count
    return lower_bound


if __name__ == "__main__":
    main()
