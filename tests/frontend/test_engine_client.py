"""The client's bookkeeping without HTTP: whatever the order of events, each generation ends once and nothing stays."""

import asyncio
import functools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.client_harness import Harness, answers

from ramet.frontend.engine_client import DRAINING
from ramet.ipc.errors import Failure, FailureKind, RequestError
from ramet.ipc.messages import (
    Abort,
    Answer,
    Embedded,
    Embedding,
    EngineDown,
    EngineUp,
    Failed,
    Finish,
    FinishReason,
    PromptInfo,
    Reset,
    TextBatch,
    TextDelta,
)

STOP = Finish(FinishReason.STOP)


@pytest.fixture(scope="module")
def harness() -> Iterator[Harness]:
    with Harness() as harness:
        yield harness


def test_seed(harness: Harness) -> None:
    seeds = set()
    for given_seed in (None, None, -3):
        generation, message = harness.submit(seed=given_seed)
        seeds.add(message.job.params.seed)
        with generation:
            pass
        assert harness.received() == Abort(message.job.rids)
    assert -3 in seeds
    assert None not in seeds
    assert len(seeds) == 3


def test_a_backlog_is_merged(harness: Harness) -> None:
    async def read() -> list[tuple[int, TextDelta]]:
        generation, message = harness.submit()
        [rid] = message.job.rids
        harness.client.dispatch(TextBatch([TextDelta(rid, "a", 1, PromptInfo(7, 0), [])]))
        harness.client.dispatch(TextBatch([TextDelta(rid, "b", 2, None, []), TextDelta(rid, "", 2, finish=STOP)]))
        with generation:
            return await generation.change()

    [(index, delta)] = asyncio.run(read())
    assert index == 0
    assert (delta.text, delta.completion_tokens, delta.prompt, delta.finish) == ("ab", 2, PromptInfo(7, 0), STOP)
    assert delta.logprobs == []
    assert harness.client.live == 0


def test_who_waits_may_have_text_passed_on_at_once(harness: Harness) -> None:
    async def read() -> None:
        generation, message = harness.submit()
        [rid] = message.job.rids
        passed: list[str] = []

        def pass_on(index: int, delta: TextDelta) -> bool:
            assert index == 0
            passed.append(delta.text)
            return delta.text != "c"

        def come(*texts: str, finish: Finish | None = None) -> None:
            harness.client.dispatch(TextBatch([TextDelta(rid, text, 1, finish=finish) for text in texts]))

        async def changed() -> asyncio.Task[list[tuple[int, TextDelta]]]:
            waiting = asyncio.create_task(generation.change(pass_on))
            await asyncio.sleep(0)  # from now on it waits
            return waiting

        with generation:
            come("a")  # nobody waits
            [(_, delta)] = await generation.change(pass_on)
            assert delta.text == "a"
            waiting = await changed()
            come("b", "c")  # after "c" the sink takes no more
            await asyncio.sleep(0.01)
            assert (passed, waiting.done()) == (["b", "c"], False)
            come("d", "e")
            [(_, delta)] = await waiting
            assert (passed, delta.text) == (["b", "c"], "de")
            come("f")  # while the one before is being written
            [(_, delta)] = await generation.change(pass_on)
            assert delta.text == "f"
            waiting = await changed()
            come("g")
            come("h", finish=STOP)  # an end is for who waits
            [(_, delta)] = await waiting
            assert (passed, delta.text) == (["b", "c", "g"], "h")
            assert await generation.change(pass_on) == []

    asyncio.run(read())
    assert harness.client.live == 0


def test_text_that_came_before_a_failure_is_read_first(harness: Harness) -> None:
    async def read() -> None:
        generation, message = harness.submit()
        [rid] = message.job.rids
        harness.client.dispatch(TextBatch([TextDelta(rid, "a", 1)]))
        harness.client.dispatch(Failed([rid], Failure(FailureKind.INTERNAL, "broken")))
        with generation:
            [(_, delta)] = await generation.change()
            assert delta.text == "a"
            with pytest.raises(RequestError, match="broken"):
                await generation.change()

    asyncio.run(read())
    assert harness.client.live == 0


def test_nothing_is_admitted_until_the_reset_is_back() -> None:
    with Harness() as harness:
        harness.client.dispatch(EngineUp())
        harness.client.dispatch(harness.received())
        assert harness.client.up.is_set()
        harness.client.dispatch(EngineDown("gone"))
        with pytest.raises(RequestError, match="gone"):
            harness.submit()
        harness.client.dispatch(EngineUp())
        with pytest.raises(RequestError, match="gone"):
            harness.submit()
        reset = harness.received()
        harness.client.dispatch(Reset(0))  # of an earlier round
        assert harness.client.down
        harness.client.dispatch(reset)
        assert not harness.client.down
        # A second one, though nothing had died.
        harness.client.dispatch(EngineUp())
        harness.client.dispatch(harness.received())
        assert harness.count("engine_restarts_total") == 1


def test_questions_of_one_request_are_admitted_as_one_and_fail_as_one(harness: Harness) -> None:
    client, questions = harness.client, [functools.partial(Embedding, prompt=f"{i:4}") for i in range(20)]

    async def ask(fail: bool) -> list[Answer]:
        asking = asyncio.create_task(answers(client.ask(questions)))
        rids = []
        for i in range(20):
            message = harness.received()
            assert isinstance(message, Embedding)
            assert message.prompt == f"{i:4}"
            rids.append(message.rid)
        assert client.live == 20  # of at most 8 requests
        assert client._admission.tokens == 20
        for rid in reversed(rids[1:]):
            client.dispatch(Embedded(rid, 1, rid.encode()))
        if fail:
            client.dispatch(Failed(rids[:1], Failure(FailureKind.INTERNAL, "x")))
        else:
            client.dispatch(Embedded(rids[0], 1, rids[0].encode()))
        answered = await asking
        assert [answer.rid for answer in answered] == rids
        return answered

    ended = harness.ended()
    asyncio.run(ask(fail=False))
    assert harness.ended() == ended + 20
    with pytest.raises(RequestError, match="x"):
        asyncio.run(ask(fail=True))
    assert harness.ended() == ended + 40
    assert client.live == 0


def test_cancelled_questions_are_aborted(harness: Harness) -> None:
    client = harness.client

    async def leave() -> None:
        embed = functools.partial(Embedding, prompt="x")
        asking = [asyncio.create_task(answers(client.ask([embed] * 3))) for _ in range(8)]
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="8 of at most 8 requests"):
            client.ask([embed])
        rids = [message.rid for _ in range(24) if isinstance(message := harness.received(), Embedding)]
        client.dispatch(Embedded(rids[0], 1, b""))
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        aborted = [rid for _ in range(8) if isinstance(abort := harness.received(), Abort) for rid in abort.rids]
        assert sorted(aborted) == sorted(rids[1:])

    asyncio.run(leave())
    assert client.live == 0


_EVENTS = st.lists(
    st.tuples(st.sampled_from(["text", "finish", "fail", "abort", "down"]), st.integers(0, 2)), max_size=12
)


@settings(deadline=None)  # other processes may hold the cores
@given(events=_EVENTS, streamed=st.booleans())
def test_any_order_of_events_ends_once(harness: Harness, events: list[tuple[str, int]], streamed: bool) -> None:
    """Three choices, random events for them, some of them for choices that have ended; then the reader leaves."""
    ended_before = harness.ended()
    generation, message = harness.submit(3)
    rids = message.job.rids
    told = dict.fromkeys(rids, "")
    aborts: list[set[str]] = []
    ended: set[str] = set()
    failed = False
    for kind, choice in events:
        rid = rids[choice]
        if kind == "down":
            harness.client.fail_all(DRAINING)
            failed = failed or len(ended) < 3
            aborts.append(set(rids) - ended)
            ended.update(rids)
            continue
        if kind == "fail":
            harness.client.dispatch(Failed([rid], Failure(FailureKind.INTERNAL, "x")))
        else:
            finish = {"text": None, "finish": STOP, "abort": Finish(FinishReason.ABORT)}[kind]
            harness.client.dispatch(TextBatch([TextDelta(rid, kind, 1, finish=finish)]))
        if rid not in ended:
            told[rid] += kind if kind in ("text", "finish") else ""
            failed = failed or kind in ("fail", "abort")
            if kind != "text":
                ended.add(rid)
    assert harness.client.live == 3 - len(ended)
    aborts.append(set(rids) - ended)

    async def read() -> dict[str, str]:
        if not streamed:
            return {rids[index]: delta.text for index, delta in enumerate(await generation.whole())}
        heard = dict.fromkeys(rids, "")
        while changes := await generation.change():
            for index, delta in changes:
                heard[rids[index]] += delta.text
        return heard

    with generation:
        if failed:
            with pytest.raises(RequestError):
                asyncio.run(asyncio.wait_for(read(), 5))
        elif not aborts[-1]:
            assert asyncio.run(asyncio.wait_for(read(), 5)) == told
    assert harness.client.live == 0
    assert harness.ended() == ended_before + 3
    assert harness.client._admission.tokens == 0
    for rids_aborted in filter(None, aborts):
        abort = harness.received()
        assert isinstance(abort, Abort)
        assert set(abort.rids) == rids_aborted
