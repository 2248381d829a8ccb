"""A real detokenizer process over the real sockets: what it cannot decode fails alone."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from ramet.detokenizer.config import DetokenizerConfig
from ramet.ipc.channel import DETOKENIZER, FRONTEND, LAUNCHER, SCHEDULER, Addresses, Inbox, Outbox
from ramet.ipc.errors import FailureKind
from ramet.ipc.messages import (
    Abort,
    Admitted,
    Failed,
    Finish,
    FinishReason,
    PromptInfo,
    Ready,
    TextBatch,
    ToFrontend,
    TokenBatch,
    TokenOut,
    ToLauncher,
    ToScheduler,
)
from ramet.ipc.sampling import SamplingParams

WAIT_S = 60.0
PROCESS = """
import sys, msgspec
from ramet.detokenizer.config import DetokenizerConfig
from ramet.detokenizer.worker import run
from ramet.ipc.channel import Addresses
run(msgspec.json.decode(sys.argv[1], type=DetokenizerConfig), msgspec.json.decode(sys.argv[2], type=Addresses))
"""


@pytest.fixture
def addresses(tiny_model, tmp_path: Path) -> Iterator[Addresses]:
    """Of a process that serves."""
    addresses = Addresses(str(tmp_path))
    config = DetokenizerConfig(tokenizer_dir=str(tiny_model("llama")))
    arguments = [msgspec.json.encode(value).decode() for value in (config, addresses)]
    launcher: Inbox[ToLauncher] = Inbox(addresses.inbox(LAUNCHER), ToLauncher)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", PROCESS, *arguments], stderr=log)
    try:
        assert isinstance(launcher.receive(WAIT_S), Ready)
        yield addresses
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
        launcher.close()


def test_what_cannot_be_decoded_fails_alone(addresses: Addresses, tmp_path: Path) -> None:
    frontend: Inbox[ToFrontend] = Inbox(addresses.inbox(FRONTEND), ToFrontend)
    scheduler: Inbox[ToScheduler] = Inbox(addresses.inbox(SCHEDULER), ToScheduler)
    detokenizer, admitted = Outbox(addresses.inbox(DETOKENIZER)), Admitted(PromptInfo(1), SamplingParams())
    try:
        # No vocabulary has a negative id.
        detokenizer.send(TokenBatch([TokenOut(rid, [token], admitted) for rid, token in (("odd", -1), ("even", 70))]))
        failed, first = frontend.receive(WAIT_S), frontend.receive(WAIT_S)
        assert isinstance(failed, Failed) and isinstance(first, TextBatch)
        assert (failed.rids, failed.failure.kind) == (["odd"], FailureKind.INTERNAL)
        assert scheduler.receive(WAIT_S) == Abort(["odd"])
        # The other request goes on, and of the first only its end still passes by, for whom it may concern.
        aborted = TokenOut("odd", finish=Finish(FinishReason.ABORT))
        detokenizer.send(TokenBatch([TokenOut("odd", [71]), TokenOut("even", [72]), aborted]))
        second = frontend.receive(WAIT_S)
        assert isinstance(second, TextBatch)
        assert [(delta.rid, delta.completion_tokens) for delta in (*first.items, *second.items)] == [
            ("even", 1),
            ("even", 2),
            ("odd", 0),
        ]
    finally:
        frontend.close()
        scheduler.close()
        detokenizer.close()
    assert "the tokens of request odd could not be decoded" in (tmp_path / "log").read_text()
