"""How rank 0 gathers the others."""

import concurrent.futures
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.engine import runner_config
from support.server import free_port, until

from ramet.ipc.channel import RankClient
from ramet.ipc.ranks import Hello, ToRank
from ramet.scheduler.config import TpConfig
from ramet.scheduler.ranks import lead, rank_facts

SECRET = "a secret of two machines"


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
            until(lambda count=count: len(said) > count or leading.done(), 20, lambda: str(said))
            if count == 1:
                clients[-1].close()
                time.sleep(0.5)
        with pytest.raises(ValueError, match="two ranks say that they are rank 1: is --node-rank the same"):
            leading.result(10)
    assert said[1:] == [f"waiting at tcp://{address} for ranks 2"] * 2
    for client in clients[1:]:
        client.close()
