"""The supervisor with real processes, real sockets and real signals."""

import json
import os
import select
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
from support.engine_targets import MAX_RESTARTS, WATCHDOG_S
from support.server import PATIENCE_S, until

TESTS = Path(__file__).parents[1]
NAMES = ["scheduler-0", "tokenizer-0", "detokenizer", "frontend"]
# Within which clients hear of a death, and so the frontend.
HEARD_S = 2.0


class Run:
    """A launcher process and what its children wrote into the diary."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.diary = folder / "diary"
        self.errors = folder / "stderr"
        path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
        environ = {**os.environ, "PYTHONPATH": path, "TMPDIR": "/tmp"}
        command = [sys.executable, "-m", "support.engine_targets", str(self.diary), mode]
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(command, env=environ, stderr=errors)

    def notes(self) -> list[list[Any]]:
        if not self.diary.exists():
            return []
        *whole, _ = self.diary.read_text().split("\n")  # the last line may be about to be written
        return [json.loads(line) for line in whole]

    def find(self, *words: str) -> list[Any] | None:
        return next((entry for entry in self.notes() if tuple(entry[2 : 2 + len(words)]) == words), None)

    def wait_for(self, *words: str) -> list[Any]:
        self.until(lambda: self.find(*words) is not None, f"{words}")
        found = self.find(*words)
        assert found is not None
        return found

    def pid(self, name: str) -> int:
        """Of its first life."""
        return int(self.wait_for(name, "started")[1])

    def count(self, *words: str) -> int:
        return sum(tuple(entry[2 : 2 + len(words)]) == words for entry in self.notes())

    def wait_until_up(self, times: int) -> None:
        """Until the frontend has heard so often that the engine is up."""
        self.until(lambda: self.count("frontend", "heard") >= times, f"up {times} times")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        until(condition, PATIENCE_S, lambda: f"{what}; the notes:\n{self.notes()}")

    def exit_code(self) -> int:
        return self.process.wait(PATIENCE_S)

    def pids(self) -> dict[str, int]:
        """The processes of now, by name."""
        return {entry[2]: entry[1] for entry in self.notes() if entry[3] == "started"}

    def log(self) -> str:
        return self.errors.read_text()

    @property
    def folder(self) -> Path:
        return Path(self.wait_for("launcher", "folder")[4])

    def assert_nothing_left(self) -> None:
        alive = [entry[2] for entry in self.notes() if entry[3] == "started" and is_alive(entry[1])]
        assert not alive


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
            run.exit_code()
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
    assert run.exit_code() == 0
    assert run.find("frontend", "terminating")
    run.assert_nothing_left()
    assert not run.folder.exists()
    assert "Traceback" not in run.errors.read_text()


def test_ctrl_c_reaches_only_the_launcher(launch: Callable[[str], Run]) -> None:
    run = launch("plain")
    run.wait_for("launcher", "ready")
    run.process.send_signal(signal.SIGINT)
    assert run.exit_code() == 0
    run.assert_nothing_left()


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGKILL, "was killed by SIGKILL"), (signal.SIGSTOP, "hung, silent for more than 2.")]
)
@pytest.mark.parametrize("name", ["scheduler-0", "detokenizer"])
def test_what_dies_or_hangs_is_started_again(
    launch: Callable[[str], Run], name: str, number: signal.Signals, reason: str
) -> None:
    """And the frontend hears of it soon: at the first death, or where the machine is busy at one of the next."""
    run = launch("watched" if number == signal.SIGSTOP else "plain")
    run.wait_for("launcher", "ready")
    for life in range(1, MAX_RESTARTS + 1):
        before = run.pids()
        hurt_at = time.monotonic()
        os.kill(before[name], number)
        run.wait_until_up(life + 1)
        down = [entry for entry in run.notes() if entry[2:4] == ["frontend", "down"]][-1]
        assert down[4].startswith(f"{name} {reason}")
        after = run.pids()
        assert {other for other in NAMES if after[other] != before[other]} == {name}
        assert not is_alive(before[name])
        assert [entry[4] for entry in run.notes() if entry[3] == "heard"][-1] == sorted([*NAMES, "launcher"])
        pause_s = (0, 1, 2)[life - 1]
        assert f"{down[4]}; it is started again in {pause_s} s (restart {life} of {MAX_RESTARTS})" in run.log()
        assert len(psutil.Process(run.process.pid).children()) == len(NAMES)
        heard_s = down[0] - hurt_at
        if heard_s < HEARD_S + (WATCHDOG_S if number == signal.SIGSTOP else 0):
            return
    raise AssertionError(f"heard only after {heard_s:.1f} s")


def test_a_bug_that_ends_a_process_is_survived(launch: Callable[[str], Run]) -> None:
    """Its `Fatal` comes when it had been ready; one at a start is another matter."""
    run = launch("plain")
    run.wait_for("launcher", "ready")
    os.kill(run.pid("tokenizer-0"), signal.SIGUSR1)
    assert run.wait_for("frontend", "down")[4] == "tokenizer-0: RuntimeError: a bug"
    run.wait_until_up(2)
    assert run.count("tokenizer-0", "started") == 2


def test_the_frontend_is_started_again_alone(launch: Callable[[str], Run]) -> None:
    run = launch("watched")
    run.wait_for("launcher", "ready")
    before = run.pids()
    os.kill(before["frontend"], signal.SIGSTOP)
    run.wait_until_up(2)
    assert not run.find("frontend", "down")
    assert {name for name, pid in run.pids().items() if pid != before[name]} == {"frontend"}


def test_a_group_is_started_again_together(launch: Callable[[str], Run]) -> None:
    run = launch("ranks")
    run.wait_for("launcher", "ready")
    before = run.pids()
    os.kill(before["scheduler-1"], signal.SIGKILL)
    run.wait_until_up(2)
    after = run.pids()
    assert {name for name in after if after[name] != before[name]} == {"scheduler-0", "scheduler-1"}
    assert not is_alive(before["scheduler-0"])


def test_a_group_that_dies_at_once_takes_one_restart_from_the_budget(launch: Callable[[str], Run]) -> None:
    run = launch("ranks")
    run.wait_for("launcher", "ready")
    before = run.pids()
    run.process.send_signal(signal.SIGSTOP)  # so that it sees both at the same look
    run.until(lambda: psutil.Process(run.process.pid).status() == psutil.STATUS_STOPPED, "stopped")
    for name in ("scheduler-0", "scheduler-1"):
        ended = os.pidfd_open(before[name])
        os.kill(before[name], signal.SIGKILL)
        assert select.select([ended], [], [], PATIENCE_S)[0]
        os.close(ended)
    run.process.send_signal(signal.SIGCONT)
    run.wait_until_up(2)
    down = run.wait_for("frontend", "down")[4]
    assert "scheduler-0 was killed" in down and "scheduler-1 was killed" in down
    assert run.log().count("(restart ") == 1


def test_several_deaths_at_once(launch: Callable[[str], Run]) -> None:
    """The frontend among them; and one more while the others are on their way."""
    run = launch("plain")
    run.wait_for("launcher", "ready")
    before = run.pids()
    for name in ("scheduler-0", "frontend"):
        os.kill(before[name], signal.SIGKILL)
    run.until(lambda: run.pids()["scheduler-0"] != before["scheduler-0"], "started again")
    os.kill(before["tokenizer-0"], signal.SIGKILL)
    run.until(lambda: run.pids()["tokenizer-0"] != before["tokenizer-0"], "started again")
    run.wait_until_up(2)
    assert {name for name, pid in run.pids().items() if pid == before.get(name)} == {"detokenizer"}
    run.process.send_signal(signal.SIGTERM)
    assert run.exit_code() == 0
    run.assert_nothing_left()


def test_too_many_deaths_end_the_launcher(launch: Callable[[str], Run]) -> None:
    run = launch("plain")
    run.wait_for("launcher", "ready")
    for life in range(1, MAX_RESTARTS + 1):
        os.kill(run.pids()["tokenizer-0"], signal.SIGKILL)
        run.wait_until_up(life + 1)
    assert [f"again in {pause_s} s" in run.log() for pause_s in (0, 1, 2)] == [True] * 3
    os.kill(run.pids()["tokenizer-0"], signal.SIGKILL)
    assert run.exit_code() == 1
    reason, *words = run.wait_for("launcher", "failed")[4].splitlines()
    assert reason.startswith("tokenizer-0 was killed by SIGKILL")
    assert reason.endswith(f"after {MAX_RESTARTS} restarts in 10 minutes")
    assert words == ["the last lines of tokenizer-0:", "the words of tokenizer-0"]
    assert [entry[4:] for entry in run.notes() if entry[3] == "down"][-1] == [reason, True]
    run.assert_nothing_left()
    assert not run.folder.exists()


def test_a_failure_at_a_restart_ends_the_launcher(launch: Callable[[str], Run]) -> None:
    run = launch("once")
    run.wait_for("launcher", "ready")
    os.kill(run.pid("scheduler-0"), signal.SIGKILL)
    assert run.exit_code() == 1
    assert run.wait_for("launcher", "failed")[4] == "scheduler-0: ValueError: no weights for scheduler-0"
    downs = [entry[4:] for entry in run.notes() if entry[3] == "down"]
    assert downs[0] == ["scheduler-0 was killed by SIGKILL (is the machine out of memory?)", False]
    assert downs[-1] == ["scheduler-0: ValueError: no weights for scheduler-0", True]
    run.assert_nothing_left()


def test_stopping_during_a_restart_ends_what_waits(launch: Callable[[str], Run]) -> None:
    """The frontend does not drain for minutes what nobody will compute."""
    run = launch("stubborn")
    run.wait_for("launcher", "ready")
    os.kill(run.pid("detokenizer"), signal.SIGKILL)
    run.wait_for("frontend", "down")
    run.process.send_signal(signal.SIGTERM)
    assert run.exit_code() == 0
    assert [entry[4:] for entry in run.notes() if entry[3] == "down"][-1] == ["it is being stopped", True]
    run.assert_nothing_left()


def test_a_machine_that_slept_kills_nobody(launch: Callable[[str], Run]) -> None:
    run = launch("watched")
    run.wait_for("launcher", "ready")
    pids = run.pids()
    family = [run.process.pid, *pids.values()]
    for pid in family:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(WATCHDOG_S + 1)
    for pid in family:
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.1)  # the launcher first: nobody else has turned when it looks
    time.sleep(WATCHDOG_S)
    assert run.pids() == pids
    assert "hung" not in run.log()


def test_a_failure_at_the_start_is_told_in_its_own_words(launch: Callable[[str], Run]) -> None:
    run = launch("broken")
    assert run.exit_code() == 1
    assert run.wait_for("launcher", "failed")[4] == "scheduler-0: ValueError: no weights for scheduler-0"
    run.assert_nothing_left()
    assert not run.folder.exists()


def test_killing_the_launcher_leaves_nothing_alive(launch: Callable[[str], Run]) -> None:
    run = launch("plain")
    run.wait_for("launcher", "ready")
    pids = [run.pid(name) for name in NAMES]
    folder = run.folder
    run.process.kill()
    run.until(lambda: not any(is_alive(pid) for pid in pids), f"{pids} dead")
    assert folder.exists()  # nobody is left who could remove it
    kept = run.diary
    kept.rename(kept.with_suffix(".first"))
    launch("plain").wait_for("launcher", "ready")
    assert not folder.exists()


def test_stopping_during_the_start(launch: Callable[[str], Run]) -> None:
    run = launch("plain")
    run.wait_for("scheduler-0", "started")
    run.process.send_signal(signal.SIGTERM)
    assert run.exit_code() == 0
    run.assert_nothing_left()
    assert not run.folder.exists()


def test_a_second_signal_stops_at_once(launch: Callable[[str], Run]) -> None:
    run = launch("stubborn")
    run.wait_for("launcher", "ready")
    run.process.send_signal(signal.SIGTERM)
    run.wait_for("frontend", "terminating")
    time.sleep(0.2)
    assert run.process.poll() is None  # draining, for minutes
    run.process.send_signal(signal.SIGTERM)
    assert run.exit_code() == 0
    run.assert_nothing_left()


def test_a_death_while_draining_is_told_to_the_clients(launch: Callable[[str], Run]) -> None:
    run = launch("stubborn")
    run.wait_for("launcher", "ready")
    run.process.send_signal(signal.SIGTERM)
    run.wait_for("frontend", "terminating")
    os.kill(run.pid("scheduler-0"), signal.SIGKILL)
    assert run.wait_for("frontend", "down")[5] is True
    assert run.exit_code() == 0
    run.assert_nothing_left()


def test_an_idle_launcher_sleeps(launch: Callable[[str], Run]) -> None:
    """Soon: the end of its start may still be in the first seconds that are looked at."""
    run = launch("plain")
    run.wait_for("launcher", "ready")
    process = psutil.Process(run.process.pid)

    def spent_in_a_second() -> tuple[float, int]:
        before, switches = process.cpu_times(), process.num_ctx_switches().voluntary
        time.sleep(1)
        after = process.cpu_times()
        cpu_s = (after.user + after.system) - (before.user + before.system)
        return cpu_s, process.num_ctx_switches().voluntary - switches

    spent = [spent_in_a_second()]
    while spent[-1] >= (0.015, 0) or spent[-1][1] >= 10:  # more than a tick
        assert len(spent) < 10, spent
        spent.append(spent_in_a_second())
