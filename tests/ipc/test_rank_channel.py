"""The channel between tensor-parallel ranks: who is let in, and how a loss is noticed."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.server import PATIENCE_S, free_port, until

from ramet.ipc import channel
from ramet.ipc.channel import ChannelError, PeerLost, RankClient, RankServer
from ramet.ipc.ranks import Hello, Ping, ToRank, Welcome
from ramet.ipc.step import Row, StepPlan

SECRET = "sixteen characters"
HELLO = Hello(1, {"version": "1"})
PLAN = StepPlan(7, [Row(0, 0, 2, sample=True)], [5, 6])


@pytest.fixture(params=["ipc", "tcp"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """An address and its secret."""
    return (f"ipc://{tmp_path}/ranks", "") if request.param == "ipc" else (f"tcp://127.0.0.2:{free_port()}", SECRET)


@contextlib.contextmanager
def connected(place: tuple[str, str]) -> Iterator[tuple[RankServer[Hello], bytes, RankClient[ToRank]]]:
    """The client first: it waits for the server to come."""
    client: RankClient[ToRank] = RankClient(*place, ToRank)
    client.send(HELLO)
    server: RankServer[Hello] = RankServer(*place, Hello)
    try:
        came = server.receive(time.monotonic() + PATIENCE_S)
        assert came is not None
        peer, hello = came
        assert hello == HELLO
        yield server, peer, client
    finally:
        server.close()
        if not client._socket.closed:
            client.close()


def is_lost(server: RankServer[Hello], peer: bytes) -> bool:
    """Says something, to find out."""
    try:
        server.send([peer], Ping())
    except PeerLost:
        return True
    return False


def test_plans_arrive_in_order_and_whole(place: tuple[str, str]) -> None:
    with connected(place) as (server, peer, client):
        sent = [Welcome("/store"), PLAN, Ping()]
        for message in sent:
            server.send([peer], message)
        assert [client.receive() for _ in sent] == sent


def test_a_rank_hears_that_rank_0_is_gone_after_what_it_said(place: tuple[str, str]) -> None:
    with connected(place) as (server, peer, client):
        server.send([peer], PLAN)
        server.close()
        assert client.receive() == PLAN
        with pytest.raises(PeerLost, match=f"rank 0 at {place[0]} is gone"):
            client.receive()


def test_nobody_waits_longer_than_told(place: tuple[str, str]) -> None:
    with connected(place) as (server, _, client):
        assert client.receive(0.1) is None
        assert server.receive(time.monotonic() + 0.1) is None


def test_rank_0_finds_out_that_a_rank_is_gone(place: tuple[str, str]) -> None:
    with connected(place) as (server, peer, client):
        assert not is_lost(server, peer)
        client.close()
        until(lambda: is_lost(server, peer), PATIENCE_S, lambda: "the loss is not noticed")


@pytest.mark.parametrize("secret", ["another secret of some length", ""])
def test_without_the_secret_nobody_gets_in(secret: str) -> None:
    address = f"tcp://127.0.0.2:{free_port()}"
    stranger: RankClient[ToRank] = RankClient(address, secret, ToRank)
    stranger.send(Hello(2, {}))
    refused = pytest.raises(ChannelError, match="does not accept this rank: is the secret the same on both machines")
    with connected((address, SECRET)), refused:  # rank 0 hears the right one's word, not the stranger's
        stranger.receive()
    stranger.close()


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    with pytest.raises(ChannelError, match=r"cannot listen on tcp://192\.0\.2\.1:5000 for the other ranks"):
        RankServer("tcp://192.0.2.1:5000", SECRET, Hello)


STOPPABLE = """
import sys
from ramet.ipc.channel import RankClient
from ramet.ipc.ranks import Hello, ToRank
client = RankClient(*sys.argv[1:], ToRank)
client.send(Hello(1, {}))
while True:
    print(client.receive(), flush=True)
"""


def test_a_machine_that_falls_silent_is_lost_and_a_process_that_is_stopped_for_a_while_is_not(
    place: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a debugger. The launcher ends one that stays so."""
    monkeypatch.setattr(channel, "_HEARTBEAT_MS", 100)
    monkeypatch.setattr(channel, "_SILENCE_MS", 1000)  # so long a busy machine does not keep it from answering
    server: RankServer[Hello] = RankServer(*place, Hello)
    with subprocess.Popen([sys.executable, "-c", STOPPABLE, *place], stdout=subprocess.PIPE, text=True) as process:
        try:
            came = server.receive(time.monotonic() + PATIENCE_S)
            assert came is not None and process.stdout is not None
            server.send([came[0]], PLAN)
            assert "StepPlan" in process.stdout.readline()
            process.send_signal(signal.SIGSTOP)
            if place[1]:
                until(lambda: is_lost(server, came[0]), PATIENCE_S, lambda: "the loss is not noticed")
            else:
                time.sleep(2)
                server.send([came[0]], Ping())
                process.send_signal(signal.SIGCONT)
                assert process.stdout.readline() == "Ping()\n"
        finally:
            process.kill()
            server.close()
