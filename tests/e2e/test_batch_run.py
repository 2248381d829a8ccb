"""`ramet batch run`, as a user would run it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.batches import line
from support.server import PATIENCE_S, tiny_flags, until

from ramet.frontend.batch_store import read_batch

pytestmark = pytest.mark.e2e

MODEL = "m"


@pytest.fixture
def command(servers: Any, tiny_model: Callable[[str], Path], tmp_path: Path) -> list[str]:
    servers.close()
    code = "import sys; from ramet.launch.cli import main; main()"
    flags = (*tiny_flags(tiny_model("llama")), "--served-model-name", MODEL)
    files = [str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    return [sys.executable, "-c", code, "batch", "run", *files, *flags]


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def write(folder: Path, entries: list[dict[str, Any]]) -> None:
    (folder / "in.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_stopped_and_gone_on_with(command: list[str], tmp_path: Path) -> None:
    entries = [line(f"{i}", MODEL, max_tokens=100, ignore_eos=True) for i in range(400)]
    write(tmp_path, [line("bad", MODEL, temperature=9), *entries])
    store = tmp_path / ".out.jsonl.ramet"
    process = start(command)
    until(lambda: any(store.glob("batches/*/output")), PATIENCE_S, lambda: "a start")
    [batch_id] = os.listdir(store / "batches")
    until(lambda: read_batch(store, batch_id).request_counts.completed > 20, PATIENCE_S, lambda: "some lines")
    process.send_signal(signal.SIGINT)
    code, errors = end(process)
    assert code == 130
    assert "the same command goes on from there" in errors
    batch = read_batch(store, batch_id)
    assert (batch.status, batch.request_counts.failed) == ("in_progress", 1)

    write(tmp_path, entries)
    code, errors = end(start(command))
    assert code == 1 and "is not the input that" in errors

    write(tmp_path, [line("bad", MODEL, temperature=9), *entries])
    code, errors = end(start(command))
    assert code == 0, errors
    assert f"going on after {batch.request_counts.completed + 1} of 401 lines" in errors
    assert "completed lines: 400, in" in errors and "failed lines: 1, in" in errors and "401/401" in errors
    results = [json.loads(entry) for entry in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(int(result["custom_id"]) for result in results) == list(range(400))
    [failed] = [json.loads(entry) for entry in (tmp_path / "out.jsonl.errors").read_text().splitlines()]
    assert failed["response"]["status_code"] == 400
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl", "out.jsonl.errors"]

    code, errors = end(start(command))
    assert code == 1 and "exists already" in errors


def test_wrong_input(command: list[str], tmp_path: Path) -> None:
    write(tmp_path, [line("a", MODEL), line("a", MODEL), line("b", "other")])
    code, errors = end(start(command))
    assert code == 1
    assert "line 2: custom_id 'a' is that of line 1 too\nline 3: the model 'other' does not exist" in errors
    assert "scheduler-0" not in errors, "an engine was started for nothing"
    write(tmp_path, [])
    code, errors = end(start(command))
    assert code == 1 and errors.endswith("\nthe input file has no requests\n")
    write(tmp_path, [line("a", "other")] * 70)
    code, errors = end(start(command))
    assert code == 1 and errors.count("\nline ") == 50
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_usage(command: list[str]) -> None:
    code, errors = end(start([*command, "--port", "8000"]))
    assert code == 2 and "--port means nothing here" in errors


@pytest.mark.parametrize(
    ("source", "output", "words"),
    [
        ("none", "out", "input {}/none is not there, or not a file"),
        (".", "out", "input {} is not there, or not a file"),
        ("in.jsonl", "none/out", "output {}/none/out cannot be written: its folder is not there, or not writable"),
        ("in.jsonl", "/", "output / cannot be written: its folder is not there, or not writable"),
    ],
)
def test_files_that_cannot_be_used_are_told_before_a_model_is_fetched(
    command: list[str], tmp_path: Path, source: str, output: str, words: str
) -> None:
    write(tmp_path, [line("a", MODEL)])
    given = command[: command.index("run") + 1]
    files = [str(tmp_path / source), "-o", str(tmp_path / output)]
    code, errors = end(start([*given, *files, "--model-path", "/nowhere/at/all"]))
    assert (code, errors) == (1, f"error: {words.format(tmp_path)}\n")
