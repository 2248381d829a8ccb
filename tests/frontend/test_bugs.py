"""What a bug of ours looks like from outside: a 500 or an error event, with the traceback in the log alone."""

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.scripted_engine import MODEL

from ramet.frontend import sse
from ramet.frontend.app import build_app
from ramet.frontend.batch_worker import BatchWorker
from ramet.frontend.config import FrontendConfig
from ramet.frontend.engine_client import EngineClient
from ramet.frontend.metrics import Metrics
from ramet.frontend.store import Store
from ramet.ipc.channel import Addresses
from ramet.ipc.messages import Completion, Job, PromptInfo, TextBatch, TextDelta
from ramet.ipc.sampling import SamplingParams
from ramet.ipc.watchdog import Watchdog


@pytest.fixture
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Addresses:
    return Addresses(str(tmp_path_factory.mktemp("s")))


@pytest.fixture
def client(addresses: Addresses) -> Iterator[EngineClient]:
    client = EngineClient(addresses, 8, Metrics())
    yield client
    client.close()


def test_endpoint_that_breaks(client: EngineClient, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Metrics):
        def page(self, accept: str) -> bytes:
            raise ZeroDivisionError("secret detail")

    config = FrontendConfig(
        host="x", port=1, served_names=(MODEL,), model_path="/m", context_length=9, vocab_size=9, file_storage_path="/s"
    )

    async def ask() -> httpx.Response:
        store, metrics = Store("/s"), Broken()
        worker, watchdog = BatchWorker(config, store, client, metrics), Watchdog(client.addresses, 60)
        app = build_app(config, client, metrics, store, worker, watchdog)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            return await http.get("/metrics", headers={"x-request-id": "r1"})

    with caplog.at_level(logging.ERROR):
        response = asyncio.run(ask())
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "internal error",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert response.headers["x-request-id"] == "r1"
    assert "secret detail" in caplog.text
    assert "r1" in caplog.text


@pytest.mark.parametrize("begun", [False, True], ids=["at its first event", "at one written at once"])
def test_stream_that_breaks(client: EngineClient, caplog: pytest.LogCaptureFixture, begun: bool) -> None:
    class Broken:
        def render(self, index: int, delta: TextDelta) -> bytes:
            if begun and delta.text == "a":
                return b"fine"
            raise ZeroDivisionError("secret detail")

        def end(self) -> bytes:
            return b""

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def stream() -> None:
        jobs: list[Job] = []

        def prompt(job: Job) -> Completion:
            jobs.append(job)
            return Completion(job, "x")

        with client.submit([prompt], SamplingParams()) as generation:
            [rid] = jobs[0].rids
            client.dispatch(TextBatch([TextDelta(rid, "a", 1, PromptInfo(1, 0))]))
            writing = asyncio.create_task(sse.write_events(send, lambda piece: True, generation, Broken()))
            await asyncio.sleep(0.01)
            client.dispatch(TextBatch([TextDelta(rid, "b", 2)]))
            await asyncio.wait_for(writing, 5)

    asyncio.run(stream())
    assert client.live == 0
    assert sent[0]["status"] == 200
    error, done, rest = sent[-1]["body"].split(b"\n\n")
    assert json.loads(error.removeprefix(b"data: "))["error"]["message"] == "internal error"
    assert (done, rest) == (b"data: [DONE]", b"")
    assert not sent[-1].get("more_body")
    assert "secret detail" in caplog.text
