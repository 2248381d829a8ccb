"""Several ranks as a user starts them: on one machine and on two, with ranks that die and machines that do not fit.

The two machines are two launchers on loopback, which meet at 127.0.0.2 and share nothing but a secret.
"""

import concurrent.futures
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine import InlineEngine, runner_config
from support.server import PATIENCE_S, ROLES, RunningServer, free_port, tiny_flags, until

from ramet.ipc.channel import RankServer
from ramet.ipc.ranks import Hello
from ramet.launch.hardware import why_no_cuda
from ramet.scheduler.config import TpConfig
from ramet.scheduler.ranks import lead

pytestmark = pytest.mark.e2e

PROMPT = [(7 * i * i + 3) % 300 + 3 for i in range(50)]
SECRET = "a secret of two machines"
# How long a start may take that is bound to fail; most of it is spent on importing torch.
FAILS_S = 60.0


class Node(RunningServer):
    """A machine that only computes: it answers nobody."""

    def wait_until_ready(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _alone(servers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    servers.close()
    monkeypatch.setenv("RAMET_DIST_SECRET", SECRET)


def node_flags(folder: Path, rank: int, address: str) -> tuple[str, ...]:
    flags = ("--tp-size", "2", "--nnodes", "2", "--node-rank", str(rank), "--dist-init-addr", address)
    return (*tiny_flags(folder), "--device", "cpu", *flags)


def address_of_node_0() -> str:
    return f"127.0.0.2:{free_port()}"


def check_tokens(server: RunningServer, folder: Path) -> None:
    """Greedy and seeded tokens are those of one rank."""
    torch.set_num_threads(1)
    engine = InlineEngine(folder)
    for name, sampling in (("greedy", {"temperature": 0.0}), ("seeded", {"temperature": 0.8, "seed": 7})):
        engine.add(name, PROMPT, 16, **sampling)
        engine.run()
        named = {"sampling_seed" if key == "seed" else key: value for key, value in sampling.items()}
        params = {"max_new_tokens": 16, "ignore_eos": True, **named}
        answer = server.http.post("/generate", json={"input_ids": PROMPT, "sampling_params": params})
        assert answer.json()["output_ids"] == engine.tokens[name], answer.text


def long_stream(server: RunningServer) -> Iterator[str]:
    """Pieces of an answer, after the first."""
    stream = server.client.completions.create(
        model=server.model, prompt=PROMPT, max_tokens=600, stream=True, extra_body={"ignore_eos": True}
    )
    pieces = (chunk.choices[0].text for chunk in stream)
    next(pieces)
    return pieces


def test_two_ranks_serve_and_start_again_when_one_is_killed(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("gemma3")
    flags = (*tiny_flags(folder), "--device", "cpu", "--tp-size", "2")
    with RunningServer(*flags, roles=(*ROLES, "scheduler-1")) as server:
        check_tokens(server, folder)
        # The other rank has a pulse too, also when it has nothing to do; else it would be killed as stuck.
        assert server.http.get("/health").status_code == 200
        pulse = server.private_folders()[0] / "scheduler-1.pulse"
        beat = pulse.read_bytes()
        until(lambda: pulse.read_bytes() != beat, PATIENCE_S, lambda: "scheduler-1 does not beat")
        chat = server.client.chat.completions.create(
            model=server.model, messages=[{"role": "user", "content": "Hello!"}], max_tokens=8
        )
        assert chat.usage is not None and chat.usage.completion_tokens > 0
        pieces = long_stream(server)
        os.kill(server.pids()["scheduler-1"], signal.SIGKILL)
        assert len("".join(pieces)) > 100  # it goes on when both ranks are there again
        assert server.metrics()["ramet_requests_resumed_total"] == 1
        check_tokens(server, folder)


def test_two_machines_serve_and_find_each_other_again(tiny_model: Callable[[str], Path]) -> None:
    """When a rank has died, and when the launcher of the machine that answers has."""
    folder, address = tiny_model("qwen3_moe"), address_of_node_0()
    with (
        Node(*node_flags(folder, 1, address), roles=("scheduler-1",)) as node_1,
        RunningServer(*node_flags(folder, 0, address)) as node_0,
    ):
        until(lambda: "the ranks are ready" in node_1.log(), PATIENCE_S, node_1.log)
        check_tokens(node_0, folder)
        time.sleep(1.5)  # idle: rank 0 looks after the others
        os.kill(node_1.pids()["scheduler-1"], signal.SIGKILL)  # nobody computes: only the channel tells
        until(lambda: "rank is gone: Host unreachable; it is started again" in node_0.log(), PATIENCE_S, node_0.log)
        until(lambda: "scheduler-1 was killed by SIGKILL" in node_1.log(), PATIENCE_S, node_1.log)
        node_0.wait_until_ready()
        check_tokens(node_0, folder)

        node_0.process.kill()
        node_0.process.wait()
        until(lambda: "scheduler-1: PeerLost: rank 0" in node_1.log(), PATIENCE_S, node_1.log)
        node_0.start_again()
        check_tokens(node_0, folder)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_without_the_other_gives_up(tiny_model: Callable[[str], Path], rank: int) -> None:
    address = address_of_node_0()
    with Node(*node_flags(tiny_model("llama"), rank, address), "--dist-timeout", "1") as node:
        until(lambda: f"scheduler-{rank}: waiting" in node.log(), FAILS_S, node.log)
        assert node.exit_code() == 1
        missing = "rank 1 did not come to rank 0" if rank == 0 else "rank 0 did not answer"
        words = f"error: scheduler-{rank}: {missing} at tcp://{address} within 1 s (--dist-timeout): "
        assert words in node.log()
        node.assert_nothing_left()


def test_a_machine_that_cannot_be_machine_0_says_so_before_it_looks_for_the_model() -> None:
    with Node(*node_flags(Path("/nowhere"), 0, "192.0.2.1:5000")) as node:
        assert node.exit_code() == 1
        assert "error: dist_init_addr '192.0.2.1:5000': machine 0 cannot listen on it: Cannot assign" in node.log()
        node.assert_nothing_left()


def test_fewer_devices_than_ranks_end_the_start(tiny_model: Callable[[str], Path]) -> None:
    flags = ("--device", "cuda", "--tp-size", "2", "--base-gpu-id", "90")
    with Node(*tiny_flags(tiny_model("llama")), *flags) as server:
        assert server.exit_code(FAILS_S) == 1
        words = r"scheduler-\d: there is no CUDA device 9[01]: \d+ are visible"
        if why_no_cuda() is not None:  # then no process is started
            words = "device is cuda, but "
        assert re.search(f"error: {words}", server.log())
        assert "loading weights" not in server.log()
        server.assert_nothing_left()


def test_heads_that_do_not_divide_end_the_start(tiny_model: Callable[[str], Path]) -> None:
    with Node(*tiny_flags(tiny_model("llama")), "--device", "cpu", "--tp-size", "3") as server:
        assert server.exit_code(FAILS_S) == 1
        assert "tp_size is 3, but the model has 4 query and 2 key-value heads" in server.log()
        server.assert_nothing_left()


def test_a_machine_with_another_secret_is_turned_away(tiny_model: Callable[[str], Path]) -> None:
    address = address_of_node_0()
    server: RankServer[Hello] = RankServer(f"tcp://{address}", SECRET + "!", Hello)
    try:
        with Node(*node_flags(tiny_model("llama"), 1, address)) as node:
            assert node.exit_code(FAILS_S) == 1
            assert "does not accept this rank: is the secret the same on both machines?" in node.log()
            node.assert_nothing_left()
    finally:
        server.close()


def test_a_machine_with_another_model_is_refused_on_both(tiny_model: Callable[[str], Path]) -> None:
    address = address_of_node_0()
    config = TpConfig(size=2, address=f"tcp://{address}", host="127.0.0.2", secret=SECRET)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        leading = pool.submit(lead, config, runner_config(tiny_model("llama")), lambda text: None)
        with Node(*node_flags(tiny_model("qwen2"), 1, address)) as node:
            assert node.exit_code(FAILS_S) == 1
            with pytest.raises(ValueError, match="rank 1 cannot work with rank 0") as refused:
                leading.result(PATIENCE_S)
            assert "config.json (" in str(refused.value)
            assert "weight files (" in str(refused.value)
            assert f"error: scheduler-1: {refused.value}" in node.log()
            node.assert_nothing_left()
