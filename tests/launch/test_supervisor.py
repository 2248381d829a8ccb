"""The supervisor with real processes, real sockets and real signals."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

TESTS = Path(__file__).parents[1]
NAMES = ["scheduler-0", "tokenizer-0", "detokenizer", "frontend"]


class Run:
    """A launcher process and what its children wrote into the diary."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.diary = folder / "diary"
        self.errors = folder / "stderr"
        environ = {**os.environ, "PYTHONPATH": str(TESTS), "TMPDIR": "/tmp"}
        command = [sys.executable, "-m", "support.engine_targets", str(self.diary), mode]
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(command, env=environ, stderr=errors)

    def notes(self) -> list[list[Any]]:
        if not self.diary.exists():
            return []
        return [json.loads(line) for line in self.diary.read_text().splitlines()]

    def find(self, *words: str) -> list[Any] | None:
        return next((entry for entry in self.notes() if tuple(entry[2 : 2 + len(words)]) == words), None)

    def wait_for(self, *words: str, timeout_s: float = 20) -> list[Any]:
        until(lambda: self.find(*words) is not None, timeout_s, f"{words} in {self.notes()}")
        found = self.find(*words)
        assert found is not None
        return found

    def pid(self, name: str) -> int:
        return int(self.wait_for(name, "started")[1])

    @property
    def folder(self) -> Path:
        return Path(self.wait_for("launcher", "folder")[4])

    def assert_nothing_left(self) -> None:
        alive = [entry[2] for entry in self.notes() if entry[3] == "started" and is_alive(entry[1])]
        assert not alive


def until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[[str], Run]]:
    runs: list[Run] = []

    def start(mode: str = "plain") -> Run:
        runs.append(Run(tmp_path, mode))
        return runs[-1]

    yield start
    for run in runs:
        run.process.terminate()
        try:
            run.process.wait(10)
        except subprocess.TimeoutExpired:
            run.process.kill()
            run.process.wait()


def test_order_of_readiness_and_a_clean_stop(launch: Callable[[str], Run]) -> None:
    run = launch("plain")
    ready = run.wait_for("launcher", "ready")
    order = [entry[2:4] for entry in run.notes()]
    heard = run.find("frontend", "heard")
    assert heard is not None
    assert heard[4:] == [sorted([*NAMES, "launcher"]), {"pages": 7}]  # whose process ids, and the scheduler's facts
    for name in NAMES[:3]:
        assert order.index([name, "ready"]) < order.index(["frontend", "heard"])
    assert ready[0] >= heard[0]
    assert stat.S_IMODE(run.folder.stat().st_mode) == 0o700
    scheduler = psutil.Process(run.pid("scheduler-0"))
    assert scheduler.cmdline()[-2:] == ["ramet.launch.child", "scheduler-0"]
    assert scheduler.environ()["OMP_NUM_THREADS"] == "1"
    assert scheduler.nice() == psutil.Process(run.process.pid).nice() + 1

    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(10) == 0
    assert run.find("frontend", "terminating")
    run.assert_nothing_left()
    assert not run.folder.exists()
    assert "Traceback" not in run.errors.read_text()


def test_ctrl_c_reaches_only_the_launcher(launch: Callable[[str], Run]) -> None:
    run = launch("plain")
    run.wait_for("launcher", "ready")
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(10) == 0
    run.assert_nothing_left()


@pytest.mark.parametrize("name", ["scheduler-0", "detokenizer"])
def test_a_death_is_told_to_the_clients_and_ends_the_launcher(launch: Callable[[str], Run], name: str) -> None:
    run = launch("plain")
    run.wait_for("launcher", "ready")
    killed_at = time.monotonic()
    os.kill(run.pid(name), signal.SIGKILL)
    down = run.wait_for("frontend", "down", timeout_s=2)
    assert down[0] - killed_at < 1
    assert f"{name} was killed by SIGKILL" in down[4]
    assert run.process.wait(10) == 1
    assert run.wait_for("launcher", "failed")[4] == down[4]
    run.assert_nothing_left()
    assert not run.folder.exists()


def test_the_frontends_death_ends_the_launcher(launch: Callable[[str], Run]) -> None:
    run = launch("plain")
    run.wait_for("launcher", "ready")
    os.kill(run.pid("frontend"), signal.SIGKILL)
    assert run.process.wait(5) == 1
    assert "frontend was killed by SIGKILL" in run.wait_for("launcher", "failed")[4]
    run.assert_nothing_left()


def test_a_failure_at_the_start_is_told_in_its_own_words(launch: Callable[[str], Run]) -> None:
    run = launch("broken")
    assert run.process.wait(20) == 1
    assert run.wait_for("launcher", "failed")[4] == "scheduler-0: ValueError: no weights for scheduler-0"
    run.assert_nothing_left()
    assert not run.folder.exists()


def test_killing_the_launcher_leaves_nothing_alive(launch: Callable[[str], Run]) -> None:
    run = launch("plain")
    run.wait_for("launcher", "ready")
    pids = [run.pid(name) for name in NAMES]
    folder = run.folder
    run.process.kill()
    until(lambda: not any(is_alive(pid) for pid in pids), 2, f"{pids} dead")
    for leftover in folder.iterdir():  # nobody is left who could remove it
        leftover.unlink()
    folder.rmdir()


def test_stopping_during_the_start(launch: Callable[[str], Run]) -> None:
    run = launch("plain")
    run.wait_for("scheduler-0", "started")
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(10) == 0
    run.assert_nothing_left()
    assert not run.folder.exists()


def test_a_second_signal_stops_at_once(launch: Callable[[str], Run]) -> None:
    run = launch("stubborn")
    run.wait_for("launcher", "ready")
    run.process.send_signal(signal.SIGTERM)
    run.wait_for("frontend", "terminating")
    time.sleep(0.2)
    assert run.process.poll() is None  # draining, for up to a minute
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(2) == 0
    run.assert_nothing_left()


def test_a_death_while_draining_is_told_to_the_clients(launch: Callable[[str], Run]) -> None:
    run = launch("stubborn")
    run.wait_for("launcher", "ready")
    run.process.send_signal(signal.SIGTERM)
    run.wait_for("frontend", "terminating")
    os.kill(run.pid("scheduler-0"), signal.SIGKILL)
    run.wait_for("frontend", "down", timeout_s=2)
    assert run.process.wait(10) == 0
    run.assert_nothing_left()


def test_an_idle_launcher_sleeps(launch: Callable[[str], Run]) -> None:
    run = launch("plain")
    run.wait_for("launcher", "ready")
    process = psutil.Process(run.process.pid)
    time.sleep(0.3)
    before = process.cpu_times()
    switches = process.num_ctx_switches().voluntary
    time.sleep(1)
    after = process.cpu_times()
    assert (after.user + after.system) - (before.user + before.system) <= 0.01
    assert process.num_ctx_switches().voluntary - switches < 10
