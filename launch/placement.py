"""Where each process computes: threads, CPUs and priority.

OpenMP barriers spin: when another process takes one of the scheduler's cores, the thread that waits for the other's
share burns the core which that one needs, and a matrix product of 0.15 ms takes several milliseconds. So only the
scheduler computes with many threads, and they sleep after a short spin; the others get one thread each and a lower
priority. Environment variables must be there when the process starts, affinity and priority before torch is imported.
"""

import os
from collections.abc import Mapping

import msgspec

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
_LIGHT_NICE = 10
# Turns of libgomp's waiting loop before a thread sleeps: about 0.1 ms, longer than the usual gap between two parallel
# regions of a step. The default is milliseconds, which a busy neighbour turns into a stalled step: docs/performance.md.
_SPIN_COUNT = "5000"


class Placement(msgspec.Struct, frozen=True):
    """`env` is added to the launcher's own; `nice` to its niceness; `cpus` None leaves the affinity as it is."""

    env: dict[str, str]
    nice: int = 0
    cpus: tuple[int, ...] | None = None

    def apply(self) -> None:
        """Bind and lower the calling process (not its environment, which is set when it is started)."""
        if self.cpus is not None:
            os.sched_setaffinity(0, self.cpus)
        if self.nice:
            os.nice(self.nice)


def light() -> Placement:
    """For the processes that must not disturb the scheduler."""
    return Placement({**dict.fromkeys(_THREAD_VARIABLES, "1"), "TOKENIZERS_PARALLELISM": "false"}, nice=_LIGHT_NICE)


def computing(
    cpus: tuple[int, ...] | None, num_threads: int | None, environ: Mapping[str, str], num_ranks: int = 1
) -> Placement:
    """For the scheduler: a thread for each of its CPUs, unless `--num-threads` or OMP_NUM_THREADS say otherwise.
    Several ranks on this machine share the threads."""
    threads = str(num_threads or environ.get("OMP_NUM_THREADS") or len(cpus or os.sched_getaffinity(0)))
    if num_ranks > 1:
        threads = str(max(1, int(threads.partition(",")[0]) // num_ranks))
    env = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    if "OMP_WAIT_POLICY" not in environ:  # which the spin count would overrule
        env["GOMP_SPINCOUNT"] = environ.get("GOMP_SPINCOUNT", _SPIN_COUNT)
    return Placement(env=env, cpus=cpus)


def parse_cpus(text: str) -> tuple[int, ...]:
    """`0-2,5` is (0, 1, 2, 5). Raises ValueError for a malformed list, or CPUs this process may not use."""
    spans: list[range] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"cpu_bind {text!r} is not a list of CPUs like 0-3,8")
        spans.append(range(int(first), int(last or first) + 1))
    allowed = os.sched_getaffinity(0)
    if not all(spans) or not all(cpu in allowed for span in spans for cpu in span):  # which ends early
        raise ValueError(f"cpu_bind {text!r} names CPUs outside those this process may use: {sorted(allowed)}")
    return tuple(sorted({cpu for span in spans for cpu in span}))
