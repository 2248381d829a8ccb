"""How `paged_attention` should be tiled and split on this GPU: every choice beside the built-in one.

For decodes and prompt chunks of the shapes below, sweeps `Tiling` at the built-in number of splits, then the number of
splits for the best few tilings. Times are medians of CUDA events around a launch, with keys and values out of the L2
cache, as they are in a step. Prints the best of each case and what is gained; the file has all, a failed choice with
its reason. Processes compile the choices first, side by side, into Triton's cache: what crashes or hangs the compiler
ends one of them and is left out. Knows nothing of the engine around the kernel.

    python benchmarks/gpu_attention.py [--json FILE] [--device cpu --tiny]

`--device cpu` needs TRITON_INTERPRET=1 and shows no speeds.
"""

import argparse
import functools
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ramet.kernels.triton.attention import Gpu, Tiling, choose_tiling, paged_attention
from ramet.launch.bench.step import Machine, measure_machine

PAGE_SIZE = 16
_FLUSH_BYTES = 512 * 2**20  # ten L2 caches, and long enough for the host to launch what is measured meanwhile
_LIMIT_S, _COMPILE_LIMIT_S = 230, 100
_COMPILERS = 12
_TOLERANCE = 2e-2  # of outputs, between two choices
_FINALISTS = 3


class Heads(NamedTuple):
    name: str
    heads: int
    kv_heads: int
    dim: int


class Case(NamedTuple):
    """`rows` of `new` tokens each, up to position `context`; the page table is as wide as for `width` tokens, which for
    decodes is the longest context, as in a captured step."""

    heads: Heads
    rows: int
    new: int
    context: int
    width: int

    @property
    def label(self) -> str:
        what = f"batch {self.rows}" if self.new == 1 else f"{self.new} tokens"
        return f"{self.heads.name}: {what}, context {self.context}"

    @property
    def work(self) -> float:
        """Bytes of keys and values for decodes, else floating point operations."""
        _, heads, kv_heads, dim = self.heads
        if self.new == 1:
            return self.rows * self.context * kv_heads * 2 * dim * 2.0
        return self.rows * sum(range(self.context - self.new + 1, self.context + 1)) * heads * 4.0 * dim


class Choice(NamedTuple):
    tiling: Tiling
    splits: int | None  # None: the built-in number


LLAMA, QWEN, GEMMA = Heads("GQA 4:1", 32, 8, 128), Heads("Qwen3 0.6B", 16, 8, 128), Heads("Gemma 3", 4, 1, 256)
SPLITS, MIN_SPLIT = (1, 2, 4, 8, 16, 32, 64), 128  # keys; below it a split has none


def cases(tiny: bool) -> list[Case]:
    """The most telling first: the time may not do for all."""
    if tiny:
        small = Heads("tiny", 2, 1, 16)
        return [Case(small, 1, 1, 40, 300), Case(small, 1, 20, 20, 20)]
    decodes = [
        Case(heads, rows, 1, context, 16384)
        for heads in (LLAMA, QWEN, GEMMA)
        for context, rows in itertools.product((1024, 4096, 16384), (1, 8, 64, 128))
    ]
    chunks = ((2048, 2048), (8192, 8192), (256, 2304))
    prompts = [Case(heads, 1, new, context, context) for heads in (LLAMA, QWEN, GEMMA) for new, context in chunks]
    return [case for heads in (LLAMA, QWEN, GEMMA) for case in decodes + prompts if case.heads == heads]


def tilings(decode: bool, tiny: bool) -> list[Tiling]:
    if tiny:
        return [Tiling(16, 16, 4, 2), Tiling(16, 32, 4, 2), Tiling(16, 24, 4, 2)]  # the last does not compile
    if decode:
        return list(itertools.starmap(Tiling, itertools.product((16,), (16, 32, 64, 128), (2, 4, 8), (2, 3, 4, 5))))
    return list(itertools.starmap(Tiling, itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))))


class Setup:
    """Tensors of a case; pages lie scattered."""

    def __init__(self, case: Case, device: torch.device, gpu: Gpu) -> None:
        heads = case.heads
        pages = -(-case.context // PAGE_SIZE)
        torch.manual_seed(0)
        shape = (case.rows * pages, PAGE_SIZE, heads.kv_heads, heads.dim)
        half = {"dtype": torch.bfloat16, "device": device}
        self.keys, self.values = torch.empty(shape, **half).normal_(), torch.empty(shape, **half).normal_()
        self.query = torch.empty(case.rows * case.new, heads.heads, heads.dim, **half).normal_()
        self.out = torch.empty_like(self.query)
        scattered = torch.randperm(case.rows * pages, device=device).view(case.rows, pages)
        self.table = torch.zeros(case.rows, -(-case.width // PAGE_SIZE), dtype=torch.int32, device=device)
        self.table[:, :pages] = scattered
        self.cu_q = torch.arange(case.rows + 1, dtype=torch.int32, device=device) * case.new
        self.lengths = torch.full((case.rows,), case.context, dtype=torch.int32, device=device)
        self._case, self._gpu = case, gpu

    def run(self, choice: Choice) -> None:
        paged_attention(
            *(self.out, self.query, self.keys, self.values, self.table, self.cu_q, self.lengths),
            max_query_len=self._case.new,
            scale=self._case.heads.dim**-0.5,
            gpu=self._gpu,
            tiling=choice.tiling,
            splits=choice.splits,
        )


class Stopwatch:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flushed = torch.zeros(_FLUSH_BYTES // 4 if device.type == "cuda" else 1, device=device)

    def __call__(self, run: Callable[[], None]) -> float:
        """Seconds of one run; it has run before."""
        if self._device.type == "cpu":
            started_s = time.perf_counter()
            run()
            return time.perf_counter() - started_s
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(10)]
        for start, end in pairs:
            self._flushed.sum()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


def sweep(
    case: Case, setup: Setup, built_in: Tiling, choices: list[Tiling], watch: Stopwatch, end_s: float
) -> dict[str, Any]:
    """Results, best first, and what failed; no more is begun after `end_s` on the monotonic clock."""
    setup.run(Choice(built_in, None))
    expected = setup.out.clone()
    skipped: list[dict[str, Any]] = []

    def measure(found: list[Choice]) -> Iterator[tuple[float, Choice]]:
        for choice in found:
            if time.monotonic() > end_s:
                skipped.append({**_described(choice), "reason": "no time is left"})
                continue
            try:
                setup.out.zero_()
                setup.run(choice)
                error = (setup.out.float() - expected.float()).abs().max().item()
                if not error <= _TOLERANCE:  # also NaN
                    raise ArithmeticError(f"differs from the built-in choice by {error:.3g}")
                yield watch(functools.partial(setup.run, choice)), choice
            except Exception as problem:  # noqa: BLE001 - whatever it is, the others go on
                words = str(problem).strip().splitlines() or [""]
                skipped.append({**_described(choice), "reason": f"{type(problem).__name__}: {words[-1][:200]}"})

    first = Choice(built_in, None)
    others = [Choice(tiling, None) for tiling in choices if tiling != built_in]
    timed = sorted(measure([first, *others]), key=_seconds)
    best = [choice.tiling for _, choice in timed[:_FINALISTS]]
    most = max(1, case.width // MIN_SPLIT)
    finals = [Choice(tiling, splits) for tiling in best for splits in SPLITS if splits <= most]
    timed = sorted([*timed, *measure(finals)], key=_seconds)
    reference_s = next((seconds for seconds, choice in timed if choice == first), float("nan"))
    return {
        "case": case.label,
        "unit": "bytes/s" if case.new == 1 else "FLOP/s",
        "results": [
            {**_described(choice), "us": 1e6 * seconds, "rate": case.work / seconds, "gain": reference_s / seconds}
            | ({"built_in": True} if choice == first else {})
            for seconds, choice in timed
        ],
        "skipped": skipped,
    }


def _seconds(entry: tuple[float, Choice]) -> float:
    return entry[0]


def _described(choice: Choice) -> dict[str, Any]:
    return {**choice.tiling._asdict(), "splits": choice.splits}


def show(found: dict[str, Any], machine: Machine) -> None:
    """The three best, and the built-in choice with its rank."""
    roof = machine.bytes_per_s if found["unit"] == "bytes/s" else machine.flops_per_s
    print(f"{found['case']}: {len(found['results'])} choices, {len(found['skipped'])} skipped")
    for rank, result in enumerate(found["results"], 1):
        if rank > _FINALISTS and "built_in" not in result:
            continue
        tiling = " x ".join(str(result[name]) for name in ("block_m", "block_n"))
        splits = "built-in" if result["splits"] is None else result["splits"]
        print(
            f"  {rank:>3}. {tiling:<9} warps {result['num_warps']} stages {result['num_stages']} splits {splits:<8} "
            f"{result['us']:>9.1f} us {result['rate'] / 1e9:>9.1f} G{found['unit']} {result['rate'] / roof:>5.0%} "
            f"x{result['gain']:.2f}{'  <- built in' if 'built_in' in result else ''}"
        )
    for reason, group in itertools.groupby(found["skipped"], key=lambda skip: skip["reason"]):
        print(f"       skipped {len(list(group))}: {reason}")
    sys.stdout.flush()


# ---- compiling, in processes of their own --------------------------------------------------------------------------


def jobs(tiny: bool) -> list[tuple[Heads, bool, Tiling]]:
    """What is compiled by itself, in an order that all processes agree on: heads, whether it is for decodes, tiling."""
    kinds = dict.fromkeys((case.heads, case.new == 1) for case in cases(tiny))
    return [(heads, decode, tiling) for heads, decode in kinds for tiling in tilings(decode, tiny)]


def compile_share(first: int, gpu: Gpu, device: torch.device, path: Path) -> None:
    """Every `_COMPILERS`-th job; a line of the file for each that compiles or fails."""
    for index, (heads, decode, tiling) in list(enumerate(jobs(False)))[first::_COMPILERS]:
        setup = Setup(Case(heads, 1, 1 if decode else 64, 64, 512), device, gpu)
        reason = None
        try:
            for splits in (1, 2):
                setup.run(Choice(tiling, splits))
        except Exception as problem:  # noqa: BLE001 - whatever it is, the sweep shall know
            reason = f"{type(problem).__name__}: {str(problem).strip()[-200:]}"
        with path.open("a") as file:
            file.write(json.dumps([index, reason]) + "\n")


def compile_all(folder: Path) -> dict[int, str | None]:
    """For each job the reason why it cannot be used; None for those that can."""
    paths = [folder / f"compiled-{first}" for first in range(_COMPILERS)]
    command = [sys.executable, __file__, "--compile"]
    processes = [
        subprocess.Popen([*command, str(first), "--json", str(path)], stdout=subprocess.DEVNULL)
        for first, path in enumerate(paths)
    ]
    end_s = time.monotonic() + _COMPILE_LIMIT_S
    known: dict[int, str | None] = {}
    for first, (process, path) in enumerate(zip(processes, paths, strict=True)):
        try:
            status = f"exit status {process.wait(max(0.1, end_s - time.monotonic()))}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = f"not done within {_COMPILE_LIMIT_S} s"
        known |= dict.fromkeys(range(first, len(jobs(False)), _COMPILERS), f"not compiled: {status}")
        known |= dict(map(json.loads, path.read_text().splitlines()) if path.exists() else ())
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes and few choices, to try the program itself")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; TRITON_INTERPRET=1 and --device cpu --tiny try the program")
    if args.compile is not None:
        compile_share(args.compile, gpu_of(device), device, args.json)
        return
    end_s = time.monotonic() + _LIMIT_S
    known: dict[int, str | None] = {}
    if args.device == "cuda" and not args.tiny:
        with tempfile.TemporaryDirectory() as folder:
            known = compile_all(Path(folder))
    run(device, args.tiny, args.json, known, end_s)


def gpu_of(device: torch.device) -> Gpu:
    if device.type == "cpu":
        return Gpu(1, 90)
    found = torch.cuda.get_device_properties(device)
    return Gpu(found.multi_processor_count, 10 * found.major + found.minor)


def run(device: torch.device, tiny: bool, path: Path | None, known: dict[int, str | None], end_s: float) -> None:
    """All cases. `known` as `compile_all` tells it; a choice that is not in it is tried."""
    gpu, machine = gpu_of(device), measure_machine(device, torch.bfloat16)
    report: dict[str, Any] = {"gpu": gpu._asdict(), "machine": machine._asdict(), "torch": torch.__version__}
    report |= {"not_compiled": [[*map(str, job), known[i]] for i, job in enumerate(jobs(tiny)) if known.get(i)]}
    report["cases"] = []
    usable = [job for i, job in enumerate(jobs(tiny)) if known.get(i) is None]
    watch = Stopwatch(device)
    print(f"{gpu}: {machine}; {len(usable)} of {len(jobs(tiny))} choices compiled", flush=True)
    for case in cases(tiny):
        decode = case.new == 1
        choices = [tiling for heads, of_decodes, tiling in usable if (heads, of_decodes) == (case.heads, decode)]
        heads = case.heads
        built_in = choose_tiling(case.new, heads.heads // heads.kv_heads, heads.dim, 2, gpu.capability)
        try:
            found = sweep(case, Setup(case, device, gpu), built_in, choices, watch, end_s)
        except Exception as problem:  # noqa: BLE001 - the built-in choice itself fails: the other cases go on
            print(f"{case.label}: {type(problem).__name__}: {problem}", flush=True)
            found = {"case": case.label, "error": f"{type(problem).__name__}: {problem}"}
        else:
            show(found, machine)
        report["cases"].append(found)
        if path is not None:
            path.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
