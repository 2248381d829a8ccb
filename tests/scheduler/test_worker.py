"""The scheduler process alone, over its real sockets: how it takes messages while somebody decodes."""

import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.engine import runner_config

from ramet.ipc.channel import DETOKENIZER, LAUNCHER, SCHEDULER, Addresses, Inbox, Outbox
from ramet.ipc.messages import (
    Abort,
    Finish,
    FinishReason,
    Generate,
    Message,
    Progress,
    Ready,
    ToDetokenizer,
    TokenBatch,
    TokenOut,
    ToLauncher,
)
from ramet.ipc.sampling import SamplingParams
from ramet.scheduler.config import SchedulerConfig

CONTEXT = 2048
FLOOD = 1000
WAIT_S = 60
PROGRAM = """
import sys, msgspec
from ramet.ipc.channel import Addresses
from ramet.model_runner.config import RunnerConfig
from ramet.scheduler.config import SchedulerConfig
from ramet.scheduler.worker import run
kinds = (SchedulerConfig, RunnerConfig, Addresses)
run(*[msgspec.json.decode(text, type=kind) for text, kind in zip(sys.argv[1:], kinds, strict=True)])
"""


class Scheduler:
    """A scheduler process whose detokenizer is the test."""

    def __init__(self, model: Path, addresses: Addresses) -> None:
        self._news: Inbox[Any] = Inbox(addresses.inbox(DETOKENIZER), ToDetokenizer)
        self._launcher: Inbox[Any] = Inbox(addresses.inbox(LAUNCHER), ToLauncher)
        config = SchedulerConfig(
            page_size=16,
            max_running=8,
            max_step_tokens=64,
            max_prefill_tokens=32,
            context_length=CONTEXT,
            eos_ids=(),
            tokenizer_dir=str(model),
        )
        runner = runner_config(model, context_length=CONTEXT, max_total_tokens=2 * CONTEXT)
        arguments = [msgspec.json.encode(value).decode() for value in (config, runner, addresses)]
        self.process = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments])
        self._outbox = Outbox(addresses.inbox(SCHEDULER))
        while isinstance(said := self._launcher.receive(WAIT_S), Progress):
            pass
        assert isinstance(said, Ready), said

    def send(self, *messages: Message) -> None:
        for message in messages:
            self._outbox.send(message)

    def outputs(self) -> list[TokenOut]:
        """The news of a step."""
        batch = self._news.receive(WAIT_S)
        assert isinstance(batch, TokenBatch), batch
        return batch.items

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for channel in (self._news, self._launcher, self._outbox):
            channel.close()


@pytest.fixture
def scheduler(tiny_model: Callable[[str], Path]) -> Iterator[Scheduler]:
    with tempfile.TemporaryDirectory(prefix="ramet-test-") as folder:
        scheduler = Scheduler(tiny_model("llama"), Addresses(folder))
        yield scheduler
        scheduler.close()


def ask(rid: str, prompt: list[int], max_tokens: int) -> Generate:
    return Generate(rid, prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=0))


def test_a_flood_of_messages_does_not_hold_up_who_decodes(scheduler: Scheduler) -> None:
    """Prompts that are too long for the cache cost the time of their messages, and are answered at once."""
    scheduler.send(ask("decodes", [5, 7, 9], 2000))
    assert [out.rid for out in scheduler.outputs()] == ["decodes"]
    scheduler.process.send_signal(signal.SIGSTOP)
    flood = [ask(f"long-{i}", [1] * 20_000, 1) for i in range(FLOOD)]
    scheduler.send(*flood, ask("gone", [5, 7], 2000), Abort(["gone", "decodes"]), ask("last", [5, 7], 1))
    scheduler.process.send_signal(signal.SIGCONT)
    steps = []
    while not steps or all(out.rid != "last" for out in steps[-1]):
        steps.append(scheduler.outputs())
    refused = [[out.rid for out in step if out.failure is not None] for step in steps]
    assert [rid for step in refused for rid in step] == [message.rid for message in flood], "each once, in order"
    assert max(map(len, refused)) < FLOOD / 2
    assert sum(1 for step in steps for out in step if out.rid == "decodes" and out.token_ids) > 5
    ends = {out.rid: out.finish for step in steps for out in step if out.finish is not None}
    aborted = Finish(FinishReason.ABORT)
    assert ends.pop("last").reason is FinishReason.LENGTH
    assert ends == {"decodes": aborted, "gone": aborted}
