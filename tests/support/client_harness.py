"""An `EngineClient` whose only tokenizer worker is the test, which receives what is sent and dispatches answers."""

import functools
import tempfile
from typing import Any

from ramet.frontend.engine_client import EngineClient
from ramet.frontend.generation import Generation
from ramet.frontend.metrics import Metrics
from ramet.ipc.channel import TOKENIZER, Addresses, Inbox
from ramet.ipc.messages import Abort, Completion, EngineDown, EngineUp, Reset, ToTokenizer
from ramet.ipc.sampling import SamplingParams

PROMPT = functools.partial(Completion, prompt="x")


async def answers(asked: Generation) -> list[Any]:
    with asked:
        return await asked.answers()


class Harness:
    """`with Harness() as harness:`; `harness.client` is the client."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ramet-test-")
        addresses = Addresses(self._folder.name)
        self.inbox: Inbox[ToTokenizer] = Inbox(addresses.inbox(TOKENIZER.format(0)), ToTokenizer)
        self.metrics = Metrics()
        self.client = EngineClient(addresses, 8, self.metrics, max_tokens=1000)

    def __enter__(self) -> "Harness":
        return self

    def submit(self, n: int = 1, seed: int | None = None, name: str | None = None) -> tuple[Generation, Completion]:
        params = SamplingParams(seed=seed, max_tokens=5)
        generation = self.client.submit([PROMPT], params, n=n, names=[name], keeps_aborted=name is not None)
        message = self.received()
        assert isinstance(message, Completion)
        return generation, message

    def received(self) -> ToTokenizer | None:
        return self.inbox.receive(5)

    def restart(self, *reasons: str) -> None:
        """After these deaths; whoever listens hears what had been sent to the engine before."""
        for reason in reasons:
            self.client.dispatch(EngineDown(reason))
        self.client.dispatch(EngineUp())
        while not isinstance(message := self.received(), Reset):
            assert isinstance(message, Abort)
        self.client.dispatch(message)

    def count(self, name: str, **labels: str) -> float:
        """A sample of the metrics."""
        return self.metrics.registry.get_sample_value(f"ramet_{name}", labels) or 0.0

    def ended(self) -> int:
        """How many choices and embeddings, for whatever reason."""
        return int(sum(self.count("requests_finished_total", reason=it) for it in ("stop", "length", "abort", "error")))

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.inbox.close()
        self._folder.cleanup()
