"""`benchmarks/gpu.py` itself, in small on a CPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def test_the_gpu_benchmark_runs_in_small(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--device", "cpu", "--tiny", "--json", str(path)]
    done = subprocess.run(
        [*command, "--only", "llama-8b"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    cases = [result["case"] for result in report["results"]]
    assert len(cases) == 8 and all(case in done.stdout for case in cases)
    assert all(result["value"] > 0 and result["roof"] > 0 for result in report["results"])
    assert report["machine"]["bytes_per_s"] > 0


@pytest.fixture
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks/gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
