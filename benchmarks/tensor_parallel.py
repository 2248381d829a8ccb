"""What does tensor parallelism cost a step? Measured here over gloo, and computed for GPUs from bytes and link speeds.

Measured, in two processes on this machine's CPU: sending a plan to another rank, the collectives by their size, and
decode steps of a model of 100 million random weights, beside the same steps in one process with as many threads in all.
Computed: steps of two Llama models on 1, 2, 4 and 8 GPUs, by the formula in `expected_step_s`.

    python benchmarks/tensor_parallel.py [measured | computed] [--ranks 2] [--steps 50]
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ramet.ipc.step import StepPlan
    from ramet.model_runner.parallel import TpGroup

ROWS = (1, 8, 64)
WARM_STEPS = 5
CONTEXT = 128
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["measured", "computed"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)  # in a process that this one starts
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        run_rank(args.rank, args.ranks, args.folder, args.steps)
        return
    if args.part != "computed":
        measure(args.ranks, args.steps)
    if args.part != "measured":
        compute()


# ---- measured ---------------------------------------------------------------------------------------------------


def measure(ranks: int, steps: int) -> None:
    with tempfile.TemporaryDirectory(prefix="tp-") as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(MODEL))
        alone = start_ranks(1, ranks, folder, steps)
        together = start_ranks(ranks, 1, folder, steps)
    print(f"\nbetween {ranks} processes, microseconds (median of {steps}):\n")
    for what, seconds in together["parts"].items():
        print(f"  {what:<50}{seconds * 1e6:>9.0f}")
    print("\na decode step, milliseconds (median):\n")
    print(f"  {'rows':<6}{f'1 rank of {ranks} threads':>24}{f'{ranks} ranks of 1 thread':>24}")
    for rows in map(str, ROWS):
        print(f"  {rows:<6}{alone['steps'][rows] * 1e3:>24.2f}{together['steps'][rows] * 1e3:>24.2f}")


def start_ranks(count: int, threads: int, folder: Path, steps: int) -> dict[str, dict[str, float]]:
    command = [sys.executable, __file__, "--ranks", str(count), "--folder", str(folder), "--steps", str(steps)]
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "5000"}
    processes = [subprocess.Popen([*command, "--rank", str(rank)], env=environ) for rank in range(count)]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit("a rank failed")
    return json.loads((folder / "result.json").read_text())


def run_rank(rank: int, size: int, folder: Path, steps: int) -> None:
    from ramet.ipc.sampling import SamplingParams
    from ramet.ipc.step import Admission, PageGrant, Row, StepPlan
    from ramet.model_runner.config import LoadFormat, RunnerConfig
    from ramet.model_runner.runner import ModelRunner
    from ramet.scheduler.config import TpConfig
    from ramet.scheduler.ranks import join, lead

    pages = -(-(CONTEXT + 1) // 16)
    runner_config = RunnerConfig(
        model_dir=str(folder),
        weights=str(folder),
        load_format=LoadFormat.DUMMY,
        dtype="float32",
        device="cpu",
        page_size=16,
        max_running=max(ROWS),
        max_step_tokens=512,
        context_length=2048,
        memory_fraction=0.1,
        max_total_tokens=max(ROWS) * pages * 16,
    )
    config = TpConfig(rank=rank, size=size, address=f"ipc://{folder}/ranks")
    slots = range(max(ROWS))
    decodes = [Row(slot, CONTEXT, 1, sample=True) for slot in slots]
    plans = {rows: StepPlan(1, decodes[:rows], [7] * rows) for rows in ROWS}
    if rank:
        link, group = join(config, runner_config, quiet)
        time_parts(group, plans, lambda plan: link.receive(), steps)
        runner = ModelRunner(runner_config, quiet, group)
        for _ in range(1 + len(ROWS) * (steps + WARM_STEPS)):
            message = link.receive()
            assert isinstance(message, StepPlan)
            runner.execute(message)
        return
    ranks = lead(config, runner_config, quiet)
    parts = time_parts(ranks.group, plans, ranks.send, steps) if size > 1 else {}
    runner = ModelRunner(runner_config, quiet, ranks.group)

    def step(plan: StepPlan) -> None:
        ranks.send(plan)
        runner.execute(plan)

    params = SamplingParams(max_tokens=2, temperature=0.0, seed=0)
    admissions = [Admission(slot, [7] * CONTEXT, CONTEXT, params, []) for slot in slots]
    grants = [PageGrant(slot, 0, list(range(slot * pages, (slot + 1) * pages))) for slot in slots]
    step(StepPlan(0, [Row(0, 0, 1, sample=True)], [7], admissions, grants))
    times = {rows: median_s(functools.partial(step, plan), steps) for rows, plan in plans.items()}
    (folder / "result.json").write_text(json.dumps({"parts": parts, "steps": times}))


def time_parts(
    group: "TpGroup", plans: dict[int, "StepPlan"], pass_on: Callable[["StepPlan"], object], steps: int
) -> dict[str, float]:
    """Seconds of what the ranks do together, by its name. `pass_on` sends a plan, or receives one."""
    import torch

    def collective(call: Callable[..., object], *shape: int) -> Callable[[], object]:
        return functools.partial(call, torch.zeros(*shape))

    meet = collective(group.all_reduce, 1)
    parts: dict[str, Callable[[], object]] = {"all-reduce of 1 number": meet}
    for rows, plan in plans.items():
        parts[f"a plan of {rows} rows, then all-reduce of 1 number"] = lambda plan=plan: (pass_on(plan), meet())
    width, vocab = MODEL["hidden_size"], MODEL["vocab_size"]
    for rows in plans:
        parts[f"all-reduce of {rows} x {width} float32"] = collective(group.all_reduce, rows, width)
        parts[f"all-gather of {rows} x {vocab} logits"] = collective(group.all_gather, rows, vocab // group.size)
    return {what: median_s(work, steps) for what, work in parts.items()}


def median_s(work: Callable[[], object], count: int) -> float:
    seconds = []
    for _ in range(count + WARM_STEPS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_STEPS:])


def quiet(_text: str) -> None:
    pass


# ---- computed ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    name: str
    parameters: float
    layers: int
    hidden: int
    vocab: int
    kv_bytes: int  # of one token, in bfloat16


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Datasheet figures, and shares of them that kernels reach; latencies are those of one collective of no size."""

    name: str = "H100 SXM, NVLink"
    memory_bytes_s: float = 3.35e12 * 0.8
    flops: float = 989e12 * 0.6
    link_bytes_s: float = 450e9 * 0.8  # in each direction
    one_shot_s: float = 6e-6
    ring_hop_s: float = 2.5e-6


MODELS = (
    Model("Llama 3.1 8B", 8.0e9, 32, 4096, 128_256, 32 * 2 * 8 * 128 * 2),
    Model("Llama 3.3 70B", 70.6e9, 80, 8192, 128_256, 80 * 2 * 8 * 128 * 2),
)
# Rows of a step, tokens of each, and tokens of context that each reads.
STEPS = (("decode, 1 x 2,048", 1, 1, 2048), ("decode, 64 x 2,048", 64, 1, 2048), ("prompt of 8,192", 1, 8192, 4096))


def all_reduce_s(num_bytes: float, ranks: int, gpu: Gpu) -> float:
    """Whichever is faster: every rank reads the whole of all others, or two times around a ring in pieces."""
    if ranks == 1:
        return 0.0
    one_shot = gpu.one_shot_s + (ranks - 1) * num_bytes / gpu.link_bytes_s
    ring = 2 * (ranks - 1) * (gpu.ring_hop_s + num_bytes / ranks / gpu.link_bytes_s)
    return min(one_shot, ring)


def expected_step_s(model: Model, gpu: Gpu, ranks: int, rows: int, length: int, context: int) -> float:
    """Weights and KV are read, and products computed, in `ranks` shares; activations are summed twice in each layer,
    and the logits of each row gathered. What the host does is not in it."""
    tokens = rows * length
    read = (2 * model.parameters + rows * context * model.kv_bytes) / ranks / gpu.memory_bytes_s
    products = 2 * model.parameters * tokens / ranks / gpu.flops
    sums = (2 * model.layers + 1) * all_reduce_s(2 * tokens * model.hidden, ranks, gpu)
    gather = 0.0 if ranks == 1 else gpu.one_shot_s + 2 * rows * model.vocab * (ranks - 1) / ranks / gpu.link_bytes_s
    return max(read, products) + sums + gather


def compute() -> None:
    gpu = Gpu()
    counts = (1, 2, 4, 8)
    print(f"\ncomputed, not measured: milliseconds of a step in bfloat16 on {gpu.name}, and the gain over one\n")
    print(f"  {'':<36}" + "".join(f"{count:>16}" for count in counts))
    for model in MODELS:
        for what, *sizes in STEPS:
            times = [expected_step_s(model, gpu, count, *sizes) for count in counts]
            cells = "".join(f"{f'{t * 1e3:.2f} ({times[0] / t:.1f}x)':>16}" for t in times)
            print(f"  {f'{model.name}, {what}':<36}{cells}")


if __name__ == "__main__":
    main()
