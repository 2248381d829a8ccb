"""The soak program runs, counts what it sends, and tells what is wrong; its ten minutes are not for a test."""

import argparse
import importlib.util
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.server import free_port, tiny_flags

pytestmark = pytest.mark.e2e

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "soak.py"


def test_a_short_soak(servers: Any, tiny_model: Callable[[str], Path]) -> None:
    servers.close()
    options = ["--minutes", "0.05", "--warm-up", "3", "--rounds", "2", "--clients", "6", "--max-growth", "50"]
    options += ["--port", str(free_port())]
    flags = [*tiny_flags(tiny_model("llama"))[:-1], "2048"]
    ended = subprocess.run(
        [sys.executable, str(PROGRAM), *options, "--", *flags],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    print(ended.stdout, ended.stderr)
    assert ended.returncode == 0
    assert re.search(r"\n\d+ preemptions, 0 errors, 0 leaks\n$", ended.stdout)
    counts = dict(re.findall(r"^(\w+) +(\d+) requests$", ended.stdout, re.MULTILINE))
    kinds = {"abandoned", "batch", "choices", "constrained", "deadline", "invalid", "long_stream", "short", "tokenized"}
    assert counts.keys() == kinds
    assert all(int(count) > 0 for count in counts.values())
    for process in ("launcher", "scheduler-0", "frontend", "detokenizer", "tokenizer-0", "grammar_checker"):
        assert re.search(rf"^{process} .*%  MiB after each round: \d", ended.stdout, re.MULTILINE)


@pytest.fixture
def program() -> Any:
    spec = importlib.util.spec_from_file_location("soak", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_memory_is_what_a_process_holds_and_not_the_files_that_it_maps(program: Any, tmp_path: Path) -> None:
    size = 32 * 2**20
    (tmp_path / "library").write_bytes(bytes(size))
    before = program.own_memory(os.getpid())
    with (tmp_path / "library").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped.find(b"\1") == -1  # all of it is read
        assert abs(program.own_memory(os.getpid()) - before) < size / 4
    with mmap.mmap(-1, size) as own:
        own.write(bytes(size))
        assert program.own_memory(os.getpid()) - before > size * 3 / 4


def test_what_is_wrong_is_told(program: Any) -> None:
    soak = program.Soak(argparse.Namespace(max_growth=1.0), psutil.Process())
    soak.memory |= {"frontend": [1000, 1002, 1001, 1009], "scheduler-0": [1000, 2000, 1011, 1022]}
    assert soak.failures() == ["scheduler-0 grew by 1.89%"]
    soak.errors.append("short: 500")
    soak.leaks.append("3 pages in use")
    assert soak.failures()[:2] == ["error: short: 500", "leak: 3 pages in use"]
    quiet = {f'ramet_scheduler_requests{{state="{state}"}}': 0.0 for state in ("running", "waiting")}
    metrics = {**quiet, "ramet_http_requests_in_flight": 1.0, 'ramet_kv_pages{state="in_use"}': 2.0}
    assert program.Soak._left(metrics) == ["2 pages in use"]
