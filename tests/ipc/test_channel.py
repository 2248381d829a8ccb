"""Messages cross processes whole, typed, and never block the sender."""

import asyncio
import stat
import threading
import time

import msgspec
import pytest
import uvloop
from support.server import PATIENCE_S

from ramet.ipc.channel import LAUNCHER, SCHEDULER, TOKENIZER, Addresses, ChannelError, Inbox, Outbox
from ramet.ipc.messages import Abort, Chat, Completion, Generate, Job, Ready, ToLauncher, ToScheduler, ToTokenizer
from ramet.ipc.sampling import SamplingParams


@pytest.fixture
def addresses(tmp_path):
    return Addresses(str(tmp_path))


def test_tagged_messages_arrive_in_order_and_whole(addresses):
    address = addresses.inbox(TOKENIZER.format(0))
    inbox, outbox = Inbox(address, ToTokenizer), Outbox(address)
    params = SamplingParams(logit_bias={3: -1.5}, stop=("a",), seed=2**63 - 1)
    sent = [
        Chat(Job(["r1"], params), [{"role": "user", "content": "hi"}], template_kwargs={"a": [1]}),
        Completion(Job(["r2"], params), [1, 2]),
        Completion(Job(["r3"], params), "text"),
        Abort(["r1"]),
    ]
    for message in sent:
        outbox.send(message)
    assert [inbox.receive(PATIENCE_S) for _ in sent] == sent
    assert inbox.receive(0) is None
    inbox.close()
    outbox.close()


def test_message_of_another_type_is_dropped_and_logged(addresses, caplog):
    inbox, outbox = Inbox(addresses.inbox(SCHEDULER), ToScheduler), Outbox(addresses.inbox(SCHEDULER))
    outbox.send(Ready("nobody"))
    outbox.send(Abort(["r"]))
    assert inbox.receive(PATIENCE_S) == Abort(["r"])
    assert "not of the expected type" in caplog.text
    inbox.close()
    outbox.close()


def test_sender_does_not_block_without_a_reader(addresses):
    outbox = Outbox(addresses.inbox(SCHEDULER))
    for i in range(20_000):
        outbox.send(Abort([str(i)]))
    inbox = Inbox(addresses.inbox(SCHEDULER), ToScheduler)
    got = [inbox.receive(PATIENCE_S) for _ in range(20_000)]
    assert got[-1] == Abort(["19999"])
    inbox.close()
    outbox.close()


def test_nothing_is_missed_by_asking_without_waiting(addresses):
    inbox, outbox = Inbox(addresses.inbox(SCHEDULER), ToScheduler), Outbox(addresses.inbox(SCHEDULER))
    sender = threading.Thread(target=_send_in_bursts, args=(outbox,))
    sender.start()
    got, deadline = [], time.monotonic() + PATIENCE_S
    while len(got) < 3_000 and time.monotonic() < deadline:
        timeout_s = 0.01 if len(got) % 7 == 0 else 0
        if (message := inbox.receive(timeout_s)) is not None:
            got += message.rids
    sender.join()
    assert got == [str(i) for i in range(3_000)]
    inbox.close()
    outbox.close()


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_nothing_is_missed_in_an_event_loop(addresses, loop_factory):
    async def read() -> list[str]:
        got: list[str] = []

        def take(message):
            got.extend(message.rids)
            if len(got) == 3_000:
                raise EOFError

        inbox = Inbox(addresses.inbox(SCHEDULER), ToScheduler)
        try:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await inbox.deliver(take)
            sender.start()
            await asyncio.sleep(0.05)  # messages come while nobody reads
            with pytest.raises(EOFError):
                async with asyncio.timeout(PATIENCE_S):
                    await inbox.deliver(take)
            return got
        finally:
            inbox.close()

    outbox = Outbox(addresses.inbox(SCHEDULER))
    sender = threading.Thread(target=_send_in_bursts, args=(outbox,))
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        assert runner.run(read()) == [str(i) for i in range(3_000)]
    sender.join()
    outbox.close()


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_reader_may_be_cancelled_after_the_inbox_was_closed(addresses, loop_factory):
    async def close() -> None:
        inbox = Inbox(addresses.inbox(SCHEDULER), ToScheduler)
        reading = asyncio.create_task(inbox.deliver(print))
        await asyncio.sleep(0.05)
        reading.cancel()
        inbox.close()
        with pytest.raises(asyncio.CancelledError):
            await reading

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(close())


def _send_in_bursts(outbox):
    for i in range(3_000):
        outbox.send(Abort([str(i)]))
        if i % 10 == 9:
            time.sleep(0.0005)


def test_address_that_the_kernel_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ChannelError, match="107 bytes"):
        Inbox(str(tmp_path / ("x" * 120)), ToLauncher)


def test_socket_file_is_not_for_everyone(addresses, tmp_path):
    inbox = Inbox(addresses.inbox(LAUNCHER), ToLauncher)
    assert stat.S_ISSOCK((tmp_path / "launcher").stat().st_mode)
    inbox.close()


def test_a_token_message_is_small():
    message = Generate("r", [1, 2, 3], SamplingParams())
    assert len(msgspec.msgpack.encode(message)) < 60
