"""What one GPU gives, beside what its memory and its matrix products allow: dummy weights of the real shapes.

Prints measured / floor for each case: decoding at several batch sizes, an offline mix of requests, prompts, the time to
a first token after a prefix hit, and decode attention alone. The floor is computed from the sizes of the model and the
bandwidth and product rate measured in the same run (`launch/bench/step.py`). Needs no network and no checkpoint.

Each model has a process and a time limit of its own. A case that fails is reported as such, and the others go on; the
file has what is known at any time.

    python benchmarks/gpu.py [--only llama-8b …] [--json FILE] [--device cpu --tiny]
"""

import argparse
import functools
import gc
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ramet.ipc.messages import Generate
from ramet.ipc.sampling import SamplingParams
from ramet.launch.bench.step import Case, Machine, measure_machine, step_work
from ramet.model_runner.attention.registry import make_backend
from ramet.model_runner.config import LoadFormat, RunnerConfig
from ramet.model_runner.context import AttentionSpec, ForwardContext
from ramet.model_runner.kv_pool import KVPool, KVSpec
from ramet.model_runner.runner import ModelRunner
from ramet.scheduler.config import SchedulerConfig
from ramet.scheduler.core import SchedulerCore
from ramet.scheduler.pipeline import Pipeline

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
_QWEN = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "head_dim": 128,
}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 16384,
        "torch_dtype": "bfloat16",
    }


MODELS = {
    "llama-8b": _LLAMA | _sizes(4096, 14336, 32, 32, 8, False),
    "llama-1b": _LLAMA | _sizes(2048, 8192, 16, 32, 8, True) | {"head_dim": 64},
    "qwen-0.6b": _QWEN | _sizes(1024, 3072, 28, 16, 8, True),
    "qwen-8b": _QWEN | _sizes(4096, 12288, 36, 32, 8, False),
}
TINY = _QWEN | _sizes(64, 96, 2, 4, 2, True) | {"vocab_size": 512, "head_dim": 16}


class Limits(NamedTuple):
    """Sizes of a run: tokens of a context, of a step and of a prompt's longest case, rows, and how often."""

    context: int
    step_tokens: int
    max_running: int
    scale: int  # lengths and batches are divided by it
    repeats: int


FULL = Limits(context=16384, step_tokens=8192, max_running=256, scale=1, repeats=64)
SMALL = Limits(context=512, step_tokens=64, max_running=8, scale=32, repeats=2)


class Result(NamedTuple):
    """`reached`: which part of the roof, 1 being all of it."""

    case: str
    value: float
    unit: str
    roof: float
    reached: float


class Engine:
    """A scheduler core and a runner with dummy weights of a shape."""

    def __init__(self, name: str, shape: dict[str, Any], device: str, limits: Limits, folder: Path, ahead: int) -> None:
        (folder / "config.json").write_text(json.dumps(shape))
        self.name, self.limits = name, limits
        graphs = limits.max_running if device == "cuda" else 0
        sizes = {"page_size": 16, "max_running": limits.max_running, "context_length": limits.context}
        self.config = RunnerConfig(
            model_dir=str(folder),
            weights=str(folder),
            load_format=LoadFormat.DUMMY,
            dtype="bfloat16",
            device=device,
            max_step_tokens=limits.step_tokens,
            memory_fraction=0.95,
            max_total_tokens=None if device == "cuda" else 16 * limits.context,
            cuda_graph_max_bs=graphs,
            **sizes,
        )
        self.runner = ModelRunner(self.config, lambda text: None)
        scheduler = SchedulerConfig(
            max_step_tokens=limits.step_tokens,
            max_prefill_tokens=limits.step_tokens,
            eos_ids=(),
            steps_ahead=ahead,
            **sizes,
        )
        self.spec = self.runner._model.spec
        self._core = SchedulerCore(scheduler, self.runner.num_pages)
        self._pipeline = Pipeline(self._core, self.runner, ahead)
        self._random = random.Random(0)
        self._count = 0

    def tokens(self, count: int) -> list[int]:
        return self._random.choices(range(self.runner.vocab_size), k=count)

    def run(self, requests: list[tuple[list[int], int]]) -> "Run":
        """Requests of these prompts and lengths of the output, all there from the start."""
        for prompt, tokens_out in requests:
            params = SamplingParams(max_tokens=tokens_out, temperature=0.0, seed=0, ignore_eos=True)
            self._core.add(Generate(str(self._count), prompt, params))
            self._count += 1
        times_s: dict[str, list[float]] = {}
        started_s = time.perf_counter()
        while self._core.has_work:
            self._pipeline.turn()
            now_s = time.perf_counter() - started_s
            for out in self._core.take_outputs():
                assert out.failure is None, out.failure
                times_s.setdefault(out.rid, []).extend([now_s] * len(out.token_ids))
        return Run(list(times_s.values()))

    def floor_s(self, case: Case, machine: Machine) -> float:
        work = step_work(self.spec, case, weight_bytes=2, kv_bytes=2)
        return max(work.num_bytes / machine.bytes_per_s, work.flops / machine.flops_per_s)


class Run(NamedTuple):
    """When each token of each request came, in seconds from the start."""

    times_s: list[list[float]]

    @property
    def wall_s(self) -> float:
        return max(times[-1] for times in self.times_s)

    @property
    def first_token_s(self) -> float:
        return min(times[0] for times in self.times_s)

    @property
    def step_s(self) -> float:
        """The median time between two tokens of the last request that started, while all were decoding."""
        last = max(self.times_s, key=lambda times: times[0])
        first_end_s = min(times[-1] for times in self.times_s)
        return statistics.median(b - a for a, b in itertools.pairwise(last) if b <= first_end_s)


def decode(engine: Engine, machine: Machine, rows: int, context: int) -> Result:
    """Tokens a second of `rows` requests that decode at about this context."""
    rows, context = max(1, rows // engine.limits.scale), max(8, context // engine.limits.scale)
    # The first request must not end before the last has started.
    steps = engine.limits.repeats + 2 + 2 * rows * context // engine.limits.step_tokens
    run = engine.run([(engine.tokens(context), steps) for _ in range(rows)])
    roof = rows / engine.floor_s(Case(rows, 1, context + steps // 2), machine)
    value = rows / run.step_s
    return Result(f"{engine.name}: decode, batch {rows}, context {context}", value, "tokens/s", roof, value / roof)


def prompt(engine: Engine, machine: Machine, length: int) -> Result:
    """Time to the first token of one prompt."""
    length = max(8, length // engine.limits.scale)
    times = [engine.run([(engine.tokens(length), 1)]).first_token_s for _ in range(3)]
    step = engine.limits.step_tokens
    floor = sum(
        engine.floor_s(Case(1, min(step, length - at), min(at + step, length)), machine)
        for at in range(0, length, step)
    )
    value = min(times)
    return Result(f"{engine.name}: a prompt of {length}", value * 1e3, "ms", floor * 1e3, floor / value)


def prefix_hit(engine: Engine, machine: Machine) -> Result:
    """Time to the first token behind a cached prefix."""
    length, new = max(16, 2048 // engine.limits.scale), 16
    prefix = engine.tokens(length)
    times = [engine.run([(prefix + engine.tokens(new), 1)]).first_token_s for _ in range(6)]
    value, floor = statistics.median(times[1:]), engine.floor_s(Case(1, new, length + new), machine)
    return Result(f"{engine.name}: {new} tokens after a hit of {length}", value * 1e3, "ms", floor * 1e3, floor / value)


def offline(engine: Engine, machine: Machine, count: int, bounds: tuple[int, int]) -> Result:
    """Output tokens a second of a mix that is there from the start. The roof computes each prompt by itself and decodes
    all that fit at their mean context."""
    rng = random.Random(0)
    count, low, high = (max(2, n // engine.limits.scale) for n in (count, *bounds))
    lengths = [(rng.randint(low, high), rng.randint(low, high)) for _ in range(count)]
    run = engine.run([(engine.tokens(tokens_in), out) for tokens_in, out in lengths])
    tokens_out = sum(out for _, out in lengths)
    rows = min(count, engine.limits.max_running)
    mean = round(statistics.fmean(tokens_in + out / 2 for tokens_in, out in lengths))
    batched = min(engine.limits.step_tokens, sum(tokens_in for tokens_in, _ in lengths))
    prompts_s = engine.floor_s(Case(1, batched, batched), machine) * sum(n for n, _ in lengths) / batched
    floor_s = prompts_s + tokens_out / rows * engine.floor_s(Case(rows, 1, mean), machine)
    value, roof = tokens_out / run.wall_s, tokens_out / floor_s
    return Result(f"{engine.name}: {count} requests, {low}-{high} in and out", value, "tokens/s", roof, value / roof)


def attention(device: torch.device, machine: Machine, limits: Limits) -> Result:
    """Decode attention of one layer alone: bytes of keys and values a second."""
    rows, context = max(1, 64 // limits.scale), max(32, 4096 // limits.scale)
    pages = -(-context // 16)
    spec = KVSpec(8, 128, 128)
    pool = KVPool([spec], rows * pages, 16, torch.bfloat16, device)
    for tensor in (*pool.keys, *pool.values):
        tensor.normal_()
    query = torch.randn(rows, 32, 128, device=device, dtype=torch.bfloat16)
    backend = make_backend("auto", device, torch.bfloat16)
    positions = torch.full((rows,), context - 1, device=device)
    ctx = ForwardContext(
        positions=positions,
        slot_mapping=positions,
        cu_q=torch.arange(rows + 1, dtype=torch.int32, device=device),
        seq_lens=torch.full((rows,), context, dtype=torch.int32, device=device),
        block_table=torch.arange(rows * pages, dtype=torch.int32, device=device).view(rows, pages),
        query_lens=[1] * rows,
        context_lens=[context] * rows,
        num_decodes=rows,
        kv_pool=pool,
        backend=backend,
    )
    seconds = timed(lambda: backend.forward(AttentionSpec(0, 128**-0.5), query, ctx), device)
    rate = rows * context * spec.bytes_per_token(torch.bfloat16) / seconds
    name = f"decode attention, batch {rows}, context {context}"
    return Result(name, rate / 1e9, "GB/s", machine.bytes_per_s / 1e9, rate / machine.bytes_per_s)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run, of many launched together."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(3):
        run()
    wait()
    started_s = time.perf_counter()
    for _ in range(20):
        run()
    wait()
    return (time.perf_counter() - started_s) / 20


CaseOf = Callable[[Engine, Machine], Result]


def cases(name: str) -> dict[str, CaseOf]:
    """The cases of one model, by what they are called where they fail."""
    found: dict[str, CaseOf] = {"decode 1": functools.partial(decode, rows=1, context=384)}
    if name == "llama-8b":
        found |= {f"decode {rows}": functools.partial(decode, rows=rows, context=1024) for rows in (32, 128)}
        found |= {f"prompt {length}": functools.partial(prompt, length=length) for length in (2048, 8192)}
        found |= {"prefix hit": prefix_hit, "offline": functools.partial(offline, count=256, bounds=(1024, 1024))}
    if name == "qwen-0.6b":
        found["decode 256"] = functools.partial(decode, rows=256, context=1024)
    if name.startswith("qwen"):
        found["offline"] = functools.partial(offline, count=256, bounds=(100, 1024))
    return found


def run_cases(
    name: str, found: dict[str, CaseOf], machine: Machine, make: Callable[[], Engine], tell: Callable[[dict], None]
) -> None:
    """`tell` hears of each result, or of the error. What a failed case leaves behind is thrown away with its engine."""
    engine = None
    for label, case in found.items():
        try:
            engine = engine or make()
            result = case(engine, machine)
        except Exception as error:  # noqa: BLE001 - whatever it is, the file must say so
            traceback.print_exc()
            engine = None
            tell({"case": f"{name}: {label}", "error": f"{type(error).__name__}: {error}"})
            continue
        finally:
            gc.collect()
        tell(show(result)._asdict())


def run_part(part: str, args: argparse.Namespace) -> None:
    """In a process of its own: measure, and write a line of JSON for each thing known."""
    device, limits = torch.device(args.device), SMALL if args.tiny else FULL

    def tell(line: dict) -> None:
        with args.json.open("a") as file:
            file.write(json.dumps(line) + "\n")

    machine = measure_machine(device, torch.bfloat16)
    tell({"device": _device_name(device), "torch": torch.__version__, "machine": machine._asdict()})
    with tempfile.TemporaryDirectory() as folder:
        if part == ATTENTION:
            tell(show(attention(device, machine, limits))._asdict())
            return
        shape = TINY if args.tiny else MODELS[part]
        make = functools.partial(Engine, part, shape, args.device, limits, Path(folder), ahead=int(not args.lock_step))
        run_cases(part, cases(part), machine, make, tell)


ATTENTION = "attention"
_PART_LIMIT_S, _LIMIT_S = 240, 570


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", choices=MODELS, default=list(MODELS), help="models, beside attention alone"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="one tiny shape in place of all, to try the program itself")
    parser.add_argument("--lock-step", action="store_true", help="plan a step only when the one before has ended")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--part", choices=[ATTENTION, *MODELS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --tiny tries the program")
    if args.part is not None:
        run_part(args.part, args)
        return
    deadline_s = time.monotonic() + _LIMIT_S
    report: dict[str, Any] = {"results": []}
    for part in (ATTENTION, *args.only):
        report["results"] += in_process(part, report, min(_PART_LIMIT_S, deadline_s - time.monotonic()))
        if args.json is not None:
            args.json.write_text(json.dumps(report, indent=1))
    if any("error" in result for result in report["results"]):
        sys.exit(1)


def in_process(part: str, report: dict[str, Any], limit_s: float) -> list[dict[str, Any]]:
    """The results of `run_part`; what it says of the machine goes into the report."""
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines"
        lines.touch()
        command = [sys.executable, __file__, *sys.argv[1:], "--part", part, "--json", str(lines)]
        try:
            status = f"exit status {subprocess.run(command, timeout=max(limit_s, 1)).returncode}"
        except subprocess.TimeoutExpired:
            status = f"not done within {limit_s:.0f} s"
        machine, *results = [json.loads(line) for line in lines.read_text().splitlines()] or [{}]
    if machine and "machine" not in report:
        print(f"{machine['device']}: {machine['machine']}", flush=True)
    report.update(machine)
    return results if status == "exit status 0" else [*results, {"case": part, "error": status}]


def show(result: Result) -> Result:
    print(
        f"{result.case:<58} {result.value:>10.1f} of {result.roof:>10.1f} {result.unit:<9} {result.reached:>5.0%}",
        flush=True,
    )
    return result


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
