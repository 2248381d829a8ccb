"""Ramet beside llama.cpp's server and vLLM's CPU build: the same weights, the same text, one server after the other.

    python -m benchmarks.peers.compare WORK [--model smollm2|qwen3] [--only ramet,vllm] [--rounds 3] [--report]

One round starts each configuration once (A B C, A B C, …), sends it the workloads below with `ramet bench serve`, and
adds the results to WORK/results-MODEL.jsonl; so a comparison may be run in parts. `--report` measures nothing. The
medians of all that is there and the ratios are printed, and go into docs/performance.md; the plot is docs/peers.svg.
The load generator runs at nice 10, because it shares the cores with the server.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers.models import MODELS
from benchmarks.peers.report import report
from benchmarks.peers.servers import CONFIGURATIONS, URL, Server

# Prompts are common words, made from the round's number: none is asked twice, so only the third finds cached prefixes.
WORKLOADS: dict[str, dict[str, Any]] = {
    "W1": {"num-requests": 3, "concurrency": 1, "input-len": 128, "output-len": 128},
    "W2 c8": {"num-requests": 32, "concurrency": 8, "input-len": "64-256", "output-len": 64},
    "W2 c32": {"num-requests": 32, "concurrency": 32, "input-len": "64-256", "output-len": 64},
    "W3": {"num-requests": 32, "concurrency": 8, "input-len": 64, "output-len": 32, "shared-prefix-len": 1024},
    "W4": {"num-requests": 2, "concurrency": 1, "input-len": 2048, "output-len": 1},
    "W5": {"num-requests": 192, "concurrency": 32, "input-len": 8, "output-len": 1},
}
_BENCH = [
    "nice",
    "-n",
    "10",
    sys.executable,
    "-c",
    "from ramet.launch.cli import main; main()",
    "bench",
    "serve",
    "--base-url",
    URL,
]


def measure(workload: str, round_number: int, bench_flags: tuple[str, ...]) -> dict[str, float]:
    """What the table shows of one workload."""
    flags = [f"--{name}={value}" for name, value in WORKLOADS[workload].items()]
    seed = 100 * round_number + list(WORKLOADS).index(workload)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [*_BENCH, *flags, "--ignore-eos", f"--seed={seed}", f"--json={file.name}", *bench_flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = json.loads(Path(file.name).read_text())["summary"]
    expected = WORKLOADS[workload]["num-requests"] * WORKLOADS[workload]["output-len"]
    if found["output_tokens"] != expected:
        raise SystemExit(f"{workload}: {found['output_tokens']} output tokens instead of {expected}")
    return {
        "input_tokens": found["input_tokens"],
        "wall_s": found["wall_s"],
        "output_tokens_per_s": found["output_tokens_per_s"],
        "requests_per_s": found["requests_per_s"],
        "ttft_ms": found["ttft_ms"]["p50"],
        "input_tokens_per_s": found["input_tokens"] / found["completed"] / found["ttft_ms"]["p50"] * 1e3,
        **({"itl_p99_ms": found["itl_ms"]["p99"], "tpot_ms": found["tpot_ms"]["p50"]} if found["itl_ms"] else {}),
    }


def run_round(args: argparse.Namespace, results: Path, number: int) -> None:
    model = MODELS[args.model](args.work)
    for name in args.only.split(",") if args.only else CONFIGURATIONS:
        configuration = CONFIGURATIONS[name]
        if configuration.weights == "quantized" and model.quantized is None:
            continue
        row: dict[str, Any] = {"configuration": name, "at": datetime.datetime.now(datetime.UTC).isoformat()}
        with Server(configuration, args.work, model, args.work / f"{name}.log") as server:
            row |= {"ready_s": server.ready_s, "memory_mib": server.memory_mib()}
            asked = args.workloads.split(",") if args.workloads else list(WORKLOADS)
            for workload in [name for name in asked if name in (configuration.workloads or WORKLOADS)]:
                row[workload] = measure(workload, number, configuration.bench_flags)
                print(name, workload, json.dumps(row[workload]), flush=True)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of servers, weights and results; made by what is missing")
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2")
    parser.add_argument("--only", help=f"configurations, of {','.join(CONFIGURATIONS)}")
    parser.add_argument("--workloads", help=f"of {','.join(WORKLOADS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="only write what the results say")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    results = args.work / f"results-{args.model}.jsonl"
    if not args.report:
        done = len(results.read_text().splitlines()) if results.exists() else 0
        for number in range(done + 1, done + 1 + args.rounds):
            run_round(args, results, number)
    report(results, args.model)


if __name__ == "__main__":
    main()
