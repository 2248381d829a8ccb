"""`benchmarks/gpu.py` itself, in small on a CPU."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import triton
from support import fake_kernels
from support.fake_cuda import FakeEvent, fake_cuda
from transformers import AutoConfig

from ramet.launch.bench.step import Case, step_work
from ramet.model_runner.models.registry import NATIVE, architecture_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks/gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_runs_in_small_and_writes_a_report(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--device", "cpu", "--tiny", "--json", str(path)]
    done = subprocess.run(
        [*command, "--only"],  # no model, attention alone
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    (result,) = report["results"]
    assert result["case"] == "decode attention, batch 2, context 128" and result["case"] in done.stdout
    assert result["value"] > 0 and result["roof"] > 0
    assert report["machine"]["bytes_per_s"] > 0 and report["torch"] == torch.__version__


@pytest.mark.parametrize(("name", "count"), [("llama-8b", 7), ("llama-1b", 1), ("qwen-0.6b", 3), ("qwen-8b", 2)])
def test_every_case_of_a_model_runs_in_small(benchmark: ModuleType, tmp_path: Path, name: str, count: int) -> None:
    torch.set_num_threads(1)
    told: list[dict] = []
    make = functools.partial(benchmark.Engine, name, benchmark.TINY, "cpu", benchmark.SMALL, tmp_path, ahead=1)
    benchmark.run_cases(name, benchmark.cases(name), benchmark.Machine(1e9, 1e9), make, told.append)
    assert len(told) == count
    assert all(result["value"] > 0 and result["roof"] > 0 for result in told)


def test_a_case_that_fails_is_reported_and_the_others_go_on(benchmark: ModuleType) -> None:
    engines, told = iter("abc"), []

    def fail(engine, machine):
        raise RuntimeError(f"engine {engine} is lost")

    def measure(engine, machine):
        return benchmark.Result(engine, 1.0, "tokens/s", 2.0, 0.5)

    cases = {"first": measure, "bad": fail, "last": measure}
    benchmark.run_cases("m", cases, None, lambda: next(engines), told.append)
    assert [line["case"] for line in told] == ["a", "m: bad", "b"]
    assert told[1]["error"] == "RuntimeError: engine a is lost"


def test_a_process_that_hangs_is_killed_and_reported(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    options = ["--device", "cpu", "--tiny", "--only", "qwen-0.6b", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    monkeypatch.setattr(benchmark, "_LIMIT_S", 0)  # nobody is done so soon
    with pytest.raises(SystemExit, match="1"):
        benchmark.main()
    results = json.loads(path.read_text())["results"]
    assert [result["case"] for result in results] == ["attention", "qwen-0.6b"]
    assert all("not done within" in result["error"] for result in results)


@pytest.mark.parametrize(
    ("name", "case", "tokens_per_s"),
    [("llama-8b", (1, 1, 256), 200), ("llama-8b", (128, 1, 1024), 11929), ("qwen-0.6b", (256, 1, 1024), 24571)],
)
def test_the_shapes_have_the_roofs_that_were_computed_by_hand(
    benchmark: ModuleType, tmp_path: Path, name: str, case: tuple[int, int, int], tokens_per_s: float
) -> None:
    """At 3.0 TB/s and 800 TFLOP/s, of an H100."""
    (tmp_path / "config.json").write_text(json.dumps(benchmark.MODELS[name]))
    config = AutoConfig.from_pretrained(tmp_path)
    spec = NATIVE[architecture_of(config)](config, 16384)
    work = step_work(spec, Case(*case), weight_bytes=2, kv_bytes=2)
    seconds = max(work.num_bytes / 3.0e12, work.flops / 800e12)
    assert case[0] / seconds == pytest.approx(tokens_per_s, rel=0.01)


def load_sweep() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_attention", ROOT / "benchmarks/gpu_attention.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(
    triton.__version__ < "3.7" and np.__version__ >= "2.4", reason="triton 3.6 cannot be interpreted with numpy 2.4"
)
def test_the_sweep_of_attention_runs_in_small(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    command = [sys.executable, str(ROOT / "benchmarks/gpu_attention.py"), "--device", "cpu", "--tiny"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, "--json", str(path)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    decode, chunk = json.loads(path.read_text())["cases"]
    assert (decode["unit"], chunk["unit"]) == ("bytes/s", "FLOP/s")
    for case in (decode, chunk):
        times = [result["us"] for result in case["results"]]
        assert times == sorted(times) and case["case"] in done.stdout
        (built_in,) = [result for result in case["results"] if "built_in" in result]
        assert built_in["gain"] == 1.0
        (skipped,) = case["skipped"]  # what is no power of 2 does not compile
        assert skipped["block_n"] == 24 and "power of 2" in skipped["reason"]


class TimedEvent(FakeEvent):
    def __init__(self, enable_timing: bool) -> None:
        super().__init__()

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1.0  # ms


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device")
def test_the_sweep_of_attention_runs_on_a_simulated_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its shapes and choices, but no values; what did not compile is not run."""
    sweep, path = load_sweep(), tmp_path / "sweep.json"
    monkeypatch.setattr(sweep, "tilings", lambda decode, tiny, full=sweep.tilings: full(decode, tiny)[::16])
    monkeypatch.setattr(sweep, "measure_machine", lambda device, dtype: sweep.Machine(3e12, 8e14))
    with fake_cuda(hollow=True, total_bytes=79 * 2**30) as device:
        fake_kernels.install(device, monkeypatch)
        monkeypatch.setattr(torch.cuda, "Event", type("Event", (TimedEvent,), {"_device": device}))
        sweep.run(torch.device("cuda"), False, path, {0: "it crashed"}, time.monotonic() + 600)
        sweep.compile_share(1, sweep.Gpu(132, 90), torch.device("cuda"), tmp_path / "compiled")
    assert [json.loads(line) for line in (tmp_path / "compiled").read_text().splitlines()] == [[1, None], [13, None]]
    report = json.loads(path.read_text())
    assert len(report["not_compiled"]) == 1 and len(report["cases"]) == 45
    assert not any("error" in case or case["skipped"] for case in report["cases"])
    assert all(result["us"] == 1000.0 for case in report["cases"] for result in case["results"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device")
def test_choices_whose_compiler_ends_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = load_sweep()
    monkeypatch.setattr(sweep, "_COMPILERS", 1)
    known = sweep.compile_all(tmp_path)  # it finds no device
    assert list(known) == list(range(len(sweep.jobs(False)))) and set(known.values()) == {"not compiled: exit status 2"}


def test_a_sweep_without_time_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = load_sweep()
    built_in, other = sweep.Tiling(16, 32, 4, 2), sweep.Tiling(16, 64, 4, 2)

    class NoKernel:
        out = torch.zeros(1)

        def run(self, choice) -> None:
            pass

    found = sweep.sweep(sweep.cases(True)[0], NoKernel(), built_in, [other], lambda run: 1.0, time.monotonic() - 1)
    assert found["results"] == [] and [skip["reason"] for skip in found["skipped"]] == ["no time is left"] * 2
