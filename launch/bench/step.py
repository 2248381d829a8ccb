"""`ramet bench step`: the time of single steps by batch size and context, beside what the machine allows.

The floor of a step is the longer of two times: reading its weights and its KV cache once at the memory bandwidth, and
its matrix products at the rate of large ones, both measured here in the same run. Norms, sampling and whatever stands
between the products are not in the floor. Loads torch: import it once the placement is settled.
"""

import functools
import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import tqdm

from ramet.ipc.sampling import SamplingParams
from ramet.ipc.step import Admission, PageGrant, Row, StepPlan
from ramet.launch.bench.report import distribution, table
from ramet.launch.config import EngineConfig
from ramet.model_runner.config import RunnerConfig
from ramet.model_runner.models.decoder import DecoderSpec
from ramet.model_runner.runner import ModelRunner

_READ_BYTES = {"cpu": 512 * 2**20, "cuda": 4 * 2**30}  # more than any cache holds, and long beside a launch
_MATRIX = {"cpu": 2048, "cuda": 8192}
_TRIES = 10
_WEIGHT_BYTES = {"int8": 1.0, "int4": 5 / 8, "fp8": 1.0}  # 4 bits, and two scales of 16 bits for each 32 weights
_SHOWN = ("p50_ms", "p90_ms", "p99_ms", "floor_ms", "ratio")


class Case(NamedTuple):
    """A step of `rows` requests that compute `length` tokens each, up to position `context`."""

    rows: int
    length: int
    context: int


class Work(NamedTuple):
    """What a step must read from memory, and the floating point operations of its products."""

    num_bytes: float
    flops: float


class Machine(NamedTuple):
    bytes_per_s: float
    flops_per_s: float


def run_steps(config: EngineConfig, batch_sizes: list[int], contexts: list[int], repeats: int) -> dict[str, Any]:
    """Decodes of each batch size and the last prompt chunk, at each context.

    Raises ValueError for sizes that this configuration does not hold, and for models without a native file.
    """
    cases = [Case(rows, 1, context) for context in contexts for rows in batch_sizes]
    cases += [Case(1, min(config.runner.max_step_tokens, context), context) for context in contexts]
    dtype = getattr(torch, config.runner.dtype)
    bench = _StepBench(config.runner, cases)
    quantization = config.runner.quantization
    weight_bytes = _WEIGHT_BYTES[quantization] if quantization else dtype.itemsize
    products = {None: dtype, "fp8": torch.float8_e4m3fn}.get(quantization, torch.int8)
    machine = measure_machine(bench.device, products)
    steps = []
    for case in tqdm.tqdm(cases, unit="case", disable=None):
        times = distribution([(seconds, 1) for seconds in bench.time(case, repeats)]) or {}
        work = step_work(bench.spec, case, weight_bytes=weight_bytes, kv_bytes=dtype.itemsize)
        read_ms, product_ms = 1e3 * work.num_bytes / machine.bytes_per_s, 1e3 * work.flops / machine.flops_per_s
        step = {**case._asdict(), **{f"{name}_ms": ms for name, ms in times.items()}, **work._asdict()}
        step |= {"floor_ms": max(read_ms, product_ms), "bound_by": "memory" if read_ms > product_ms else "products"}
        steps.append({**step, "ratio": times["p50"] / step["floor_ms"]})
    return {"threads": torch.get_num_threads(), "machine": machine._asdict(), "steps": steps}


def step_table(results: dict[str, Any]) -> str:
    """What `ramet bench step` prints."""
    figures = ("p50 ms", "p90 ms", "p99 ms", "floor ms", "p50/floor")
    rows = [("step", "requests", "tokens", "context", *figures, "bound by")]
    for step in results["steps"]:
        sizes = (str(step[name]) for name in Case._fields)
        kind = "decode" if step["length"] == 1 else "prompt"
        rows.append((kind, *sizes, *(f"{step[name]:.2f}" for name in _SHOWN), step["bound_by"]))
    machine = results["machine"]
    return (
        f"{results['threads']} threads: memory read at {machine['bytes_per_s'] / 1e9:.1f} GB/s, "
        f"matrix products at {machine['flops_per_s'] / 1e9:.0f} Gop/s\n\n{table(rows)}"
    )


def step_work(spec: DecoderSpec, case: Case, *, weight_bytes: float, kv_bytes: float) -> Work:
    """From the sizes of the model; biases and norms are left out. A weight is read once a step, the embedding only
    where it is the head. Of experts, those are read that evenly routed tokens would hit."""
    tokens = case.rows * case.length
    head = spec.vocab_size * spec.hidden_size
    weights, products, cached = float(head), float(case.rows * head), 0
    for layer in spec.layers:
        matrices = 2 * spec.hidden_size * spec.head_dim * (spec.num_heads + spec.num_kv_heads)
        if (moe := layer.moe) is None:
            matrices += 3 * spec.hidden_size * spec.intermediate_size
        else:
            matrices += spec.hidden_size * moe.num_experts
            expert = 3 * spec.hidden_size * moe.intermediate_size
            weights += expert * moe.num_experts * (1 - (1 - moe.top_k / moe.num_experts) ** tokens)
            products += expert * moe.top_k * tokens
        weights += matrices
        products += matrices * tokens
        window = layer.sliding_window or case.context
        attended = sum(min(end, window) for end in range(case.context - case.length + 1, case.context + 1))
        products += case.rows * attended * 2 * spec.num_heads * spec.head_dim  # scores, and the sum of values
        cached += case.rows * min(case.context, window + case.length - 1) * 2 * spec.num_kv_heads * spec.head_dim
    return Work(weights * weight_bytes + cached * kv_bytes, 2 * products)


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """The best of a few tries, with the threads that the model has. `dtype` is of the products' inputs."""
    size = _READ_BYTES[device.type]
    first, second = torch.ones(2, size // 8, device=device)
    side = _MATRIX[device.type]
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    read_s = min(_seconds(lambda: torch.dot(first, second).item()) for _ in range(_TRIES))
    product_s = min(_seconds(lambda: _multiply(left, right)[0, 0].item()) for _ in range(_TRIES))
    return Machine(size / read_s, 2 * side**3 / product_s)


def _multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if left.dtype is torch.int8:
        return torch._int_mm(left, right)
    if left.dtype is torch.float8_e4m3fn:
        scale = torch.ones((), device=left.device)
        return torch._scaled_mm(left, right.t(), scale, scale, out_dtype=torch.bfloat16)
    return F.linear(left, right)


def _seconds(function: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    function()
    return time.perf_counter() - started_s


class _StepBench(ModelRunner):
    """A runner that is given plans made by hand. It may look at its own pool, which plans do not show."""

    def __init__(self, config: RunnerConfig, cases: list[Case]) -> None:
        rows, context = max(case.rows for case in cases), max(case.context for case in cases)
        if rows > config.max_running or context > config.context_length:
            limits = f"max_running_requests ({config.max_running}) or the context length ({config.context_length})"
            raise ValueError(f"{rows} requests of {context} tokens are beyond {limits}")
        super().__init__(config, lambda text: None)
        self._pages_each = -(-context // config.page_size)
        if rows * self._pages_each > self.num_pages:
            held = f"the KV cache of {self.num_pages * config.page_size} tokens: raise --max-total-tokens"
            raise ValueError(f"{rows} requests of {context} tokens are beyond {held}")
        spec = getattr(self._model, "spec", None)
        if not isinstance(spec, DecoderSpec):
            raise ValueError(f"{type(self._model).__name__}: the work of a step is known of native models only")
        self.spec = spec
        self._random = random.Random(0)
        self._taken: list[int] = []  # slots
        # Memory that was never written is one page of zeros, which no cache misses.
        for pages in (*self._pool.keys, *self._pool.values):
            pages[: rows * self._pages_each].fill_(1)

    def time(self, case: Case, repeats: int) -> list[float]:
        """Seconds of each step, but for the first, in which the requests take their slots."""
        slots, params = list(range(case.rows)), SamplingParams(max_tokens=1, temperature=0.0, seed=0)
        rows = [Row(slot, case.context - case.length, case.length, sample=True) for slot in slots]
        first = StepPlan(
            step=0,
            rows=rows,
            token_ids=self._tokens(case),
            admissions=[Admission(slot, [0] * case.context, case.context, params, []) for slot in slots],
            grants=[PageGrant(s, 0, list(range(s * self._pages_each, (s + 1) * self._pages_each))) for s in slots],
            released=self._taken,
        )
        self._taken = slots
        self.execute(first)
        plans = [StepPlan(0, rows, self._tokens(case)) for _ in range(repeats)]
        return [_seconds(functools.partial(self.execute, plan)) for plan in plans]

    def _tokens(self, case: Case) -> list[int]:
        return self._random.choices(range(self.vocab_size), k=case.rows * case.length)
