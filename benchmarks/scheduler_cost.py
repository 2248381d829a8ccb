"""What planning and committing a step costs the scheduler's process, by the pure core alone: no model, no sockets.

Each shape is a crowd of requests that could make a step slow: a burst with one long prefix, thousands that wait, a
cache that evicts. A step must not take longer for what merely waits. Steps are planned one ahead, as on CUDA.

    python -m benchmarks.scheduler_cost [SHAPE …]
"""

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable

from ramet.ipc.messages import Generate
from ramet.ipc.sampling import SamplingParams
from ramet.ipc.step import RowResult, StepPlan, StepResult
from ramet.scheduler.config import SchedulerConfig
from ramet.scheduler.core import SchedulerCore

_TOKEN, _NO_TOKEN = RowResult(1), RowResult()


class Rig:
    """A core of 100,000 pages and 256 slots, and the seconds that its steps have taken since `begin`."""

    def __init__(self) -> None:
        config = SchedulerConfig(
            page_size=16,
            max_running=256,
            max_step_tokens=8192,
            max_prefill_tokens=2048,
            context_length=131_072,
            eos_ids=(0,),
        )
        self.core = SchedulerCore(config, 100_000)
        self._flying: list[tuple[StepPlan, StepResult]] = []
        self._added = 0
        self.begin()

    def begin(self) -> None:
        # As in the scheduler's process: what is there at the start is no business of the garbage collector.
        gc.collect()
        gc.freeze()
        self.seconds: list[float] = []

    def add(self, prompt: list[int], max_tokens: int, priority: int = 0, count: int = 1) -> None:
        for _ in range(count):
            self._added += 1
            params = SamplingParams(max_tokens=max_tokens, seed=0)
            self.core.add(Generate(f"r{self._added}", prompt, params, True, priority))

    def run(self, steps: int = 1_000_000) -> None:
        while steps and self._step():
            steps -= 1

    def _step(self) -> bool:
        begun = time.perf_counter()
        plan = self.core.schedule()
        planned = time.perf_counter()
        if plan is not None:
            rows = [_TOKEN if row.sample else _NO_TOKEN for row in plan.rows]
            self._flying.append((plan, StepResult(plan.step, rows)))
        ran = time.perf_counter()
        if ended := bool(self._flying) and (plan is None or len(self._flying) > 1):
            self.core.commit(*self._flying.pop(0))
        self.core.take_outputs()
        self.seconds.append(planned - begun + time.perf_counter() - ran)
        return ended or plan is not None


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(1_000, 50_000), k=length)


def decoding(count: int, length: int = 200) -> Rig:
    """So many requests that decode for the next 250 steps."""
    rig = Rig()
    for i in range(count):
        rig.add(prompt(i, length), 400)
    rig.run(60)
    rig.begin()
    return rig


def decode(count: int, waiting: int = 0, priority: int = 0) -> Rig:
    rig = decoding(count)
    for i in range(waiting):
        rig.add(prompt(1_000 + i, 100), 100, priority)
    rig.run(150)
    return rig


def burst(hot: bool) -> Rig:
    """512 requests with 20,000 tokens in common beside 32 that decode."""
    rig, shared = decoding(32), prompt(1, 20_000)
    if hot:
        rig.add(shared, 1)
        rig.run(20)
        rig.begin()
    for i in range(512):
        rig.add(shared + prompt(1_000 + i, 16), 16)
    rig.run(100)
    return rig


def choices() -> Rig:
    rig = Rig()
    rig.add(prompt(1, 60_000), 64, count=128)
    rig.run()
    return rig


def awaiting(count: int) -> Rig:
    """So many that wait for a prefix of 30,000 tokens, which takes some 15 steps beside 200 that decode."""
    rig, shared = decoding(200), prompt(1, 30_000)
    for i in range(count):
        rig.add(shared + prompt(1_000 + i, 16), 16)
    rig.run(14)
    return rig


def evicting() -> Rig:
    """Prompts of 1,776 tokens into a full cache."""
    rig = Rig()
    for i in range(900):
        rig.add(prompt(i, 1_776), 2)
    rig.run()
    rig.begin()
    for i in range(400):
        rig.add(prompt(5_000 + i, 1_776), 16)
    rig.run()
    return rig


_SHAPES: dict[str, Callable[[], Rig]] = {
    "1 decodes": lambda: decode(1),
    "32 decode": lambda: decode(32),
    "256 decode": lambda: decode(256),
    "256 decode, 4,096 wait for a slot": lambda: decode(256, 4096),
    "200 decode, 1 awaits a prefix": lambda: awaiting(1),
    "200 decode, 512 await it": lambda: awaiting(512),
    "200 decode, 4,096 await it": lambda: awaiting(4096),
    "burst of 512, 20,000 tokens in common, cold": lambda: burst(False),
    "burst of 512, 20,000 tokens in common, hot": lambda: burst(True),
    "n of 128, 60,000 tokens": choices,
    "a full cache evicts": evicting,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help="parts of names of shapes (all)")
    wanted = parser.parse_args().shapes
    print(f"{'host us of a step':<46}{'median':>8}{'p99':>8}{'longest':>9}")
    for name, shape in _SHAPES.items():
        if not wanted or any(part in name for part in wanted):
            taken = shape().seconds
            p99 = statistics.quantiles(taken, n=100)[-1]
            print(f"{name:<46}{1e6 * statistics.median(taken):8.0f}{1e6 * p99:8.0f}{1e6 * max(taken):9.0f}", flush=True)


if __name__ == "__main__":
    main()
