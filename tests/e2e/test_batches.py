"""Batches on real engines: answers as online, and servers and single processes killed at random moments."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.batches import checked_results, create, line, wait
from support.server import PATIENCE_S, ROLES, RunningServer, tiny_flags, until

pytestmark = pytest.mark.e2e

# In full, by hand: RAMET_TEST_KILLS=10 RAMET_TEST_KILL_LINES=5000, which takes some minutes.
KILLS = int(os.environ.get("RAMET_TEST_KILLS", "1"))
LINES = int(os.environ.get("RAMET_TEST_KILL_LINES", "600"))


def lines(server: RunningServer, count: int) -> list[dict[str, Any]]:
    return [line(f"id-{i}", server.model, f"{i % 10} is a number", max_tokens=1 + i % 2) for i in range(count)]


def test_seeded_lines_are_answered_as_online(tiny: RunningServer) -> None:
    body = {"messages": [{"role": "user", "content": "Tell me"}], "seed": 7, "max_tokens": 8, "temperature": 1.0}
    entry = line("seeded", tiny.model)
    entry["body"].update(body)
    online = tiny.client.chat.completions.create(model=tiny.model, **body)
    batch = wait(tiny.client, create(tiny.client, [entry, *lines(tiny, 20)]).id)
    output, _ = checked_results(tiny.client, batch)
    [choice] = output["seeded"]["response"]["body"]["choices"]
    assert choice["message"]["content"] == online.choices[0].message.content


def test_an_endpoint_that_refuses_all(tiny: RunningServer) -> None:
    """A batch for a kind of model that this is not."""
    body = {"model": tiny.model, "input": "x"}
    entry = {"custom_id": "e", "method": "POST", "url": "/v1/embeddings", "body": body}
    batch = wait(tiny.client, create(tiny.client, [entry], endpoint="/v1/embeddings").id)
    assert (batch.status, batch.request_counts.failed, batch.output_file_id) == ("completed", 1, None)


@pytest.fixture
def server(tiny_model: Callable[[str], Path]) -> Iterator[RunningServer]:
    """A server of the test's own, slow enough that a batch lives to see its deaths."""
    flags = (*tiny_flags(tiny_model("llama")), "--max-running-requests", "2", "--max-restarts", "100")
    with RunningServer(*flags, module="support.faulty_server") as server:
        yield server


def kill(server: RunningServer, role: str) -> None:
    """One process, which is started again, or ("launcher") all at once and the whole server anew."""
    pids, restarts = server.pids(), server.log().count("all processes are ready again")
    for pid in pids.values() if role == "launcher" else [pids[role]]:
        os.kill(pid, signal.SIGKILL)
    if role == "launcher":
        server.exit_code()
        server.start_again()
    else:
        until(lambda: server.log().count("all processes are ready again") > restarts, PATIENCE_S, server.log)
        server.wait_until_ready()


def test_kills_at_random_moments(server: RunningServer) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    print(f"seed {seed}")
    batch = create(server.client, lines(server, LINES))
    server.client.files.delete(batch.input_file_id)
    roles = ["launcher", rng.choice(ROLES)] * KILLS
    rng.shuffle(roles)
    deaths_in_progress = 0
    for number, role in enumerate(roles):
        # Until a share of the lines is done, and then some moment.
        share = rng.uniform(number, number + 1) / len(roles) * 0.9
        while (news := server.client.batches.retrieve(batch.id)).status == "in_progress":
            if news.request_counts.completed >= share * LINES:
                break
            time.sleep(0.02)
        with server.dawdling():  # so that some are left
            time.sleep(rng.uniform(0, 0.3))
            deaths_in_progress += server.client.batches.retrieve(batch.id).status == "in_progress"
            kill(server, role)
    ended = wait(server.client, batch.id, 300)
    print(f"{deaths_in_progress} of {len(roles)} deaths while the batch ran")
    assert deaths_in_progress >= len(roles) / 2
    output, errors = checked_results(server.client, ended)
    assert (ended.status, ended.request_counts.total) == ("completed", LINES)
    assert set(output) | set(errors) == {f"id-{i}" for i in range(LINES)}
    assert not errors
