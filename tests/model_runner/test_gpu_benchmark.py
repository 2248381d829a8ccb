"""`benchmarks/gpu.py` itself, in small on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_gpu_benchmark_runs_in_small(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--device", "cpu", "--tiny", "--json", str(path)]
    done = subprocess.run(
        [*command, "--only", "llama-8b", "qwen-0.6b"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    cases = [result["case"] for result in report["results"]]
    assert len(cases) == 11 and all(case in done.stdout for case in cases)
    assert all(result["value"] > 0 and result["roof"] > 0 for result in report["results"])
    assert report["machine"]["bytes_per_s"] > 0
