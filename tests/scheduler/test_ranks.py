"""How rank 0 gathers the others."""

import concurrent.futures
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.engine import runner_config
from support.server import PATIENCE_S, free_port, until

from ramet.ipc.channel import ChannelError, RankClient, RankServer
from ramet.ipc.ranks import Hello, Ping, Refused, ToRank
from ramet.scheduler.config import TpConfig
from ramet.scheduler.ranks import join, lead, rank_facts

SECRET = "a secret of two machines"


def listening(address: str) -> RankServer[Hello]:
    """A predecessor may hold the port for a moment."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return RankServer(address, SECRET, Hello)
        except ChannelError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_machine_that_starts_again_is_awaited_once_more(tiny_model: Callable[[str], Path]) -> None:
    """It came, left, and came; a third that says to be the same rank is one too many."""
    address = f"127.0.0.2:{free_port()}"
    said: list[str] = []
    config = TpConfig(size=3, address=f"tcp://{address}", host="127.0.0.2", secret=SECRET)
    runner = runner_config(tiny_model("llama"))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        leading = pool.submit(lead, config, runner, said.append)
        clients: list[RankClient[ToRank]] = []
        for count in range(1, 4):
            clients.append(RankClient(config.address, SECRET, ToRank))
            clients[-1].send(Hello(1, rank_facts(runner)))
            until(lambda count=count: len(said) > count or leading.done(), PATIENCE_S, lambda: str(said))
            if count == 1:
                clients[-1].close()
                time.sleep(1)  # rank 0 has to find out
        with pytest.raises(ValueError, match="two ranks say that they are rank 1: is --node-rank the same"):
            leading.result(PATIENCE_S)
    assert said[1:] == [f"waiting at tcp://{address} for rank 2"] * 2
    for client in clients[1:]:
        client.close()


def test_ranks_that_do_not_come_are_named_to_all_who_have(tiny_model: Callable[[str], Path]) -> None:
    address = f"tcp://127.0.0.2:{free_port()}"
    config = TpConfig(size=4, address=address, host="127.0.0.2", secret=SECRET, meet_timeout_s=3)
    runner = runner_config(tiny_model("llama"))
    client: RankClient[ToRank] = RankClient(address, SECRET, ToRank)
    client.send(Hello(2, rank_facts(runner)))
    words = f"ranks 1, 3 did not come to rank 0 at {address} within 3 s (--dist-timeout)"
    started = time.monotonic()
    with pytest.raises(ValueError, match=re.escape(words)):
        lead(config, runner, lambda text: None)
    assert time.monotonic() - started < 30  # not as long as by default
    assert client.receive(PATIENCE_S) == Ping()
    refused = client.receive(PATIENCE_S)
    assert isinstance(refused, Refused) and refused.message.startswith(words)
    client.close()


def test_a_rank_0_that_is_not_there_is_not_awaited_for_ever(tiny_model: Callable[[str], Path]) -> None:
    address = f"tcp://127.0.0.2:{free_port()}"
    config = TpConfig(rank=1, size=2, address=address, host="127.0.0.2", secret=SECRET, meet_timeout_s=1)
    said: list[str] = []
    words = f"rank 0 did not answer at {address} within 1 s (--dist-timeout): Connection refused"
    with pytest.raises(ValueError, match=re.escape(words)):
        join(config, runner_config(tiny_model("llama")), said.append)
    assert said == [f"waiting for rank 0 at {address}: Connection refused"]


def test_a_rank_0_that_ends_before_it_has_heard_all_is_awaited_again(tiny_model: Callable[[str], Path]) -> None:
    address = f"tcp://127.0.0.2:{free_port()}"
    config = TpConfig(rank=1, size=2, address=address, host="127.0.0.2", secret=SECRET, meet_timeout_s=PATIENCE_S)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        joining = pool.submit(join, config, runner_config(tiny_model("llama")), lambda text: None)
        for last in (False, True):
            server = listening(address)
            came = server.receive(time.monotonic() + PATIENCE_S)
            assert came is not None and came[1].rank == 1
            server.send([came[0]], Refused("enough") if last else Ping())
            server.close()
        with pytest.raises(ValueError, match="enough"):
            joining.result(PATIENCE_S)
