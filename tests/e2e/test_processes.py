"""The life and death of a real engine's processes: killed, told to stop, told twice."""

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support.server import PATIENCE_S, ROLES, START_S, TESTS, RunningServer, tiny_flags, until

pytestmark = pytest.mark.e2e

# The acceptance criterion is that clients hear within 2 s of a death that ends their requests. Here others may hold the
# cores: `tests/launch/test_supervisor.py` holds the launcher to it.
HEARD_S = 20.0
# Longer than any test here waits, on a server that dawdles.
LONG = {"prompt": "The quick brown", "max_tokens": 2000, "ignore_eos": True}


@pytest.fixture(scope="module")
def started(servers: Any, tiny_model: Callable[[str], Path]) -> Iterator[RunningServer]:
    servers.close()
    with RunningServer(*tiny_flags(tiny_model("llama")), module="support.faulty_server") as server:
        yield server


@pytest.fixture
def server(started: RunningServer) -> Iterator[RunningServer]:
    """These tests' own server, started again if the test before has ended it."""
    seen = len(started.log())
    if started.process.poll() is not None:
        started.start_again()
    with started.dawdling():
        yield started
    print(started.log()[seen:])


class Client:
    """Asks in a thread, and keeps what came back, when."""

    def __init__(self, server: RunningServer, **fields: Any) -> None:
        self._url = f"{server.url}/v1/completions"
        self._body = {"model": server.model, **LONG, **fields}
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self.status: int | None = None
        self.text = ""
        self.ended_at = 0.0
        self.broken: httpx.TransportError | None = None
        self._done = self._pool.submit(self._ask)
        self._pool.shutdown(wait=False)

    def _ask(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=60) as response:
                self.status = response.status_code
                for piece in response.iter_text():
                    self.text += piece
        except httpx.TransportError as error:
            self.broken = error
        self.ended_at = time.monotonic()

    def wait(self, timeout_s: float) -> None:
        self._done.result(timeout_s)

    @property
    def busy(self) -> bool:
        return not self._done.done()

    def events(self) -> list[Any]:
        """Of a stream that came to its end."""
        *events, done, rest = self.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


def two_clients(server: RunningServer) -> tuple[Client, Client]:
    """One that streams and one that waits for the whole; both are being answered."""
    whole, stream = Client(server), Client(server, stream=True)
    until(lambda: stream.text.count("data: ") > 3, PATIENCE_S, lambda: f"a stream: {stream.text} {server.log()}")
    running = "ramet_http_requests_in_flight"
    until(lambda: server.metrics()[running] == 3, PATIENCE_S, lambda: f"two clients: {server.metrics()}")
    assert whole.busy and stream.busy
    return whole, stream


def test_a_dead_frontend_is_mended(server: RunningServer) -> None:
    """The other processes' deaths: `tests/e2e/test_resumption.py`."""
    whole, stream = two_clients(server)
    before = server.pids()
    killed_at = time.monotonic()
    os.kill(before["frontend"], signal.SIGKILL)
    for client in (whole, stream):
        client.wait(PATIENCE_S)
        assert client.ended_at - killed_at < HEARD_S
        assert client.broken
    server.wait_until_ready()
    after = server.pids()
    assert {name for name in after if after[name] != before[name]} == {"frontend"}
    answer = server.client.completions.create(model=server.model, prompt="a", max_tokens=3)
    assert answer.choices[0].finish_reason
    metrics = server.quiet_metrics(finished=1)  # it counts from nothing
    assert metrics['ramet_kv_pages{state="in_use"}'] == 0
    # The two long ones were ended, and did not run on for nobody.
    assert (count(metrics, "finished"), count(metrics, "aborted")) == (1, 2)


def test_a_signal_while_the_engine_is_down_ends_what_waits_for_it(server: RunningServer) -> None:
    whole, stream = two_clients(server)
    os.kill(server.pids()["scheduler-0"], signal.SIGKILL)
    until(lambda: httpx.get(f"{server.url}/ready").status_code == 503, PATIENCE_S, lambda: "down")
    assert whole.busy and stream.busy
    signalled_at = time.monotonic()
    server.send_signal()
    for client in (whole, stream):
        client.wait(PATIENCE_S)
        assert client.ended_at - signalled_at < HEARD_S
    error = {
        "message": "the engine is down: it is being stopped",
        "type": "server_error",
        "param": None,
        "code": "engine_down",
    }
    assert (whole.status, json.loads(whole.text)) == (503, {"error": error})
    assert (stream.status, stream.events()[-1]) == (200, {"error": error})
    assert server.exit_code() == 0
    server.assert_nothing_left()


def count(metrics: dict[str, float], name: str) -> int:
    return int(metrics.get(f"ramet_scheduler_{name}_total", 0))


def test_a_killed_launcher_leaves_no_process(server: RunningServer) -> None:
    pids = server.pids()
    del pids["launcher"]
    server.process.kill()
    server.process.wait()
    until(lambda: not any(map(is_alive, pids.values())), PATIENCE_S, lambda: f"{pids} are dead")
    [left] = server.private_folders()
    server.start_again()  # which removes the sockets that the first one left
    [now] = server.private_folders()
    assert now != left


def test_sigterm_lets_a_stream_finish(server: RunningServer) -> None:
    stream = Client(server, stream=True, max_tokens=150)
    until(lambda: stream.text.count("data: ") > 3, PATIENCE_S, lambda: f"a stream: {stream.text}")
    with httpx.Client(base_url=server.url) as http:
        assert http.get("/ready").status_code == 200
        server.send_signal()
        until(lambda: http.get("/ready").status_code == 503, PATIENCE_S, lambda: "draining")
        assert http.get("/health").status_code == 200
        refused = http.post("/v1/completions", json={"model": server.model, "prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_shutting_down")
        assert refused.headers["retry-after"]
        assert stream.busy  # else it was no drain
    stream.wait(PATIENCE_S)
    events = stream.events()
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert len(events) > 50
    assert server.exit_code() == 0
    server.assert_nothing_left()


def test_a_second_signal_ends_at_once(server: RunningServer) -> None:
    whole, stream = two_clients(server)
    server.send_signal(signal.SIGINT)
    until(lambda: httpx.get(f"{server.url}/ready").status_code == 503, PATIENCE_S, lambda: "draining")
    assert whole.busy and stream.busy
    server.send_signal(signal.SIGTERM)
    assert server.exit_code() == 0
    for client in (whole, stream):
        client.wait(PATIENCE_S)
    assert '"finish_reason":"length"' not in stream.text
    server.assert_nothing_left()


def test_a_process_that_hangs_is_named_and_a_death_beyond_the_budget_ends_the_server(
    servers: Any, tiny_model: Callable[[str], Path]
) -> None:
    """`/health` tells before it is killed, which the launcher, stopped as well, cannot do at first."""
    servers.close()
    flags = ("--watchdog-timeout", "3", "--max-restarts", "1")
    module = "support.faulty_server"
    with RunningServer(*tiny_flags(tiny_model("llama")), *flags, module=module) as server, server.dawdling():

        def unhealthy(words: str) -> bool:
            response = httpx.get(f"{server.url}/health")
            return response.status_code == 503 and words in response.json()["error"]["message"]

        pids = server.pids()
        os.kill(pids["launcher"], signal.SIGSTOP)
        until(lambda: unhealthy("launcher hangs, silent for more than "), PATIENCE_S, lambda: "not healthy")
        assert server.is_ready(), "requests are taken and answered"
        assert server.http.post("/v1/completions", json={**LONG, "model": server.model, "max_tokens": 2}).is_success
        os.kill(pids["scheduler-0"], signal.SIGSTOP)
        until(lambda: unhealthy("scheduler-0 hangs, silent for more than "), PATIENCE_S, lambda: "not healthy")
        response = httpx.get(f"{server.url}/health_generate")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_down")
        assert response.headers["retry-after"]
        os.kill(pids["launcher"], signal.SIGCONT)
        until(lambda: "all processes are ready again" in server.log(), START_S, server.log)
        assert "scheduler-0 hung" in server.log()
        server.wait_until_ready()
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/health_generate").status_code == 200

        whole, stream = two_clients(server)
        os.kill(server.pids()["scheduler-0"], signal.SIGKILL)
        for client in (whole, stream):
            client.wait(HEARD_S)
        words = (
            "the engine is down: scheduler-0 was killed by SIGKILL (is the machine out of memory?), after 1 restarts"
        )
        assert stream.events()[-1]["error"]["message"].startswith(words)
        assert json.loads(whole.text)["error"]["message"].startswith(words)
        assert server.exit_code() == 1
        assert "\nerror: scheduler-0 was killed by SIGKILL" in server.log()
        server.assert_nothing_left()


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_servers_of_tests_die_with_them(servers: Any, tiny_model: Callable[[str], Path]) -> None:
    servers.close()
    script = """
import sys, time
from support.server import RunningServer
with RunningServer(*sys.argv[1:]) as server:
    print(server.process.pid, flush=True)
    time.sleep(600)
"""
    with tempfile.TemporaryDirectory(prefix="e2e-") as folder:
        command = [sys.executable, "-c", script, *tiny_flags(tiny_model("llama"))]
        paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        environ = {**os.environ, "TMPDIR": folder, "PYTHONPATH": paths}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environ) as tests:
            assert tests.stdout is not None
            launcher = psutil.Process(int(tests.stdout.readline()))
            processes = [launcher, *launcher.children()]
            assert len(processes) == 1 + len(ROLES)
            tests.kill()
        assert psutil.wait_procs(processes, 20)[1] == []
