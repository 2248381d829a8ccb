"""What is in flight when a process of the engine dies is sent again, and told once. The test plays the engine."""

import asyncio
import functools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.client_harness import Harness, answers

from ramet.frontend.engine_client import DRAINING
from ramet.frontend.generation import Generation
from ramet.ipc.errors import Failure, FailureKind, RequestError
from ramet.ipc.messages import (
    Abort,
    Answer,
    Completion,
    Embedding,
    EngineDown,
    Failed,
    Finish,
    FinishReason,
    PromptInfo,
    TextBatch,
    TextDelta,
    Tokenize,
    Tokenized,
    TokenText,
)

LENGTH, ABORT = Finish(FinishReason.LENGTH), Finish(FinishReason.ABORT)
TOKENIZE = functools.partial(Tokenize, prompt="x")


@pytest.fixture
def harness() -> Iterator[Harness]:
    with Harness() as harness:
        yield harness


def say(harness: Harness, rid: str, text: str, start: int = 1, last: int = 99, cached: int = 0) -> None:
    """An event for each letter, which is a token; the first has the number `start`, and number `last` is the end."""
    for number, letter in enumerate(text, start):
        delta = TextDelta(
            rid,
            letter,
            number,
            PromptInfo(7, cached, "the prompt") if number == 1 else None,
            [TokenText(letter, letter.encode(), -1.0)],
            LENGTH if number == last else None,
            [ord(letter)],
        )
        harness.client.dispatch(TextBatch([delta]))


async def at_once(generation: Generation) -> TextDelta:
    """What there is to read now of the only choice."""
    [(_, delta)] = await asyncio.wait_for(generation.change(), 5)
    return delta


async def failure(generation: Generation) -> str:
    with generation, pytest.raises(RequestError) as raised:
        await asyncio.wait_for(generation.parts(), 5)
    return str(raised.value)


def again(harness: Harness, message: Completion) -> list[str]:
    """The new ids of a request that must have been sent again."""
    second = harness.received()
    assert isinstance(second, Completion)
    assert (second.prompt, second.job.params) == (message.prompt, message.job.params)
    assert second.job.params.seed is not None
    assert len(second.job.rids) == len(message.job.rids)
    assert not set(second.job.rids) & set(message.job.rids)
    return second.job.rids


def test_a_stream_goes_on_where_it_was(harness: Harness) -> None:
    async def live() -> None:
        generation, message = harness.submit()
        [rid] = message.job.rids
        say(harness, rid, "abc", cached=2)
        delta = await at_once(generation)
        assert (delta.text, delta.prompt) == ("abc", PromptInfo(7, 2, "the prompt"))
        say(harness, rid, "d", 4)  # told, and not read yet
        harness.client.dispatch(EngineDown("gone"))
        # What is left of the first life.
        say(harness, rid, "x", 5, last=5)
        harness.client.dispatch(Failed([rid], Failure(FailureKind.INTERNAL, "x")))
        harness.restart()
        [rid] = again(harness, message)
        say(harness, rid, "abcde")
        say(harness, rid, "f", 6, last=6)
        delta = await at_once(generation)
        assert (delta.text, delta.completion_tokens, delta.prompt, delta.finish) == ("def", 6, None, LENGTH)
        assert [one.token for one in delta.logprobs or ()] == list("def")
        assert delta.token_ids == list(b"def")
        with generation:
            assert await generation.change() == []
        assert generation.records[0].cached_tokens == 2

    asyncio.run(live())
    assert (harness.client.live, harness.ended(), harness.client._admission.tokens) == (0, 1, 0)
    assert harness.count("requests_resumed_total") == harness.count("engine_restarts_total") == 1
    assert (harness.count("generation_tokens_total"), harness.count("prompt_tokens_total")) == (6, 7)
    for name in ("time_to_first_token_seconds", "request_queue_seconds", "request_duration_seconds"):
        assert harness.count(f"{name}_count") == 1


def test_nobody_has_read_a_whole_answer_yet(harness: Harness) -> None:
    """So it may become another one, where the last bits depend on who is computed beside it."""

    async def live() -> None:
        generation, message = harness.submit()
        reading = asyncio.create_task(generation.whole())
        await asyncio.sleep(0)
        say(harness, message.job.rids[0], "abcdef", cached=2)
        harness.restart("gone")
        [rid] = again(harness, message)
        say(harness, rid, "xyz", last=3)
        [delta] = await asyncio.wait_for(reading, 5)
        assert (delta.text, delta.completion_tokens, delta.prompt) == ("xyz", 3, PromptInfo(7, 0, "the prompt"))
        assert len(delta.logprobs or ()) == len(delta.token_ids) == 3
        with generation:
            pass

    asyncio.run(live())
    assert (harness.client.live, harness.ended()) == (0, 1)
    assert (harness.count("generation_tokens_total"), harness.count("prompt_tokens_total")) == (6, 7)


def test_a_stream_cannot_become_another_one(harness: Harness) -> None:
    async def live() -> None:
        generation, message = harness.submit()
        say(harness, message.job.rids[0], "abc")
        assert (await at_once(generation)).text == "abc"
        harness.restart("gone")
        [rid] = again(harness, message)
        say(harness, rid, "ax")
        assert harness.received() == Abort([rid])
        say(harness, rid, "y", 3)
        assert await failure(generation) == "the engine is down: gone"

    asyncio.run(live())
    assert (harness.client.live, harness.ended()) == (0, 1)


def test_a_second_death_is_one_too_many(harness: Harness) -> None:
    """But several before it could be sent again are one."""
    generation, message = harness.submit()
    harness.restart("one", "two", "three")
    again(harness, message)
    other, later = harness.submit()
    harness.client.dispatch(EngineDown("four"))
    assert asyncio.run(failure(generation)) == "the engine is down: four"
    harness.restart()
    again(harness, later)
    with other:
        pass
    assert harness.client.live == 0
    assert harness.ended() == 2
    assert harness.count("requests_resumed_total") == 2


def test_choices_that_have_ended_are_not_computed_again(harness: Harness) -> None:
    """They are sent, for the sake of the others' seeds, and aborted."""

    async def live() -> None:
        generation, message = harness.submit(3)
        first = message.job.rids
        reading = asyncio.create_task(generation.whole())
        await asyncio.sleep(0)
        say(harness, first[1], "ab", last=2)
        say(harness, first[2], "a")
        harness.restart("gone")
        second = again(harness, message)
        assert harness.received() == Abort([second[1]])
        for rid, text in zip(second, ("xy", "no", "abc"), strict=True):
            say(harness, rid, text, last=len(text))
        with generation:
            assert [delta.text for delta in await asyncio.wait_for(reading, 5)] == ["xy", "ab", "abc"]

    asyncio.run(live())
    assert (harness.client.live, harness.ended()) == (0, 3)
    assert harness.count("requests_resumed_total") == 2


def test_questions_are_asked_again_once(harness: Harness) -> None:
    client = harness.client

    async def live(deaths: int) -> list[Answer]:
        asking = asyncio.create_task(answers(client.ask([TOKENIZE, TOKENIZE])))
        await asyncio.sleep(0)
        one, two = harness.received(), harness.received()
        assert isinstance(one, Tokenize) and isinstance(two, Tokenize)
        client.dispatch(Tokenized(one.rid, [1], ["a"]))
        rid = two.rid
        for _ in range(deaths):
            harness.restart("gone")
            if client.live:
                again = harness.received()
                assert isinstance(again, Tokenize) and again.prompt == two.prompt and again.rid != two.rid
                client.dispatch(Tokenized(two.rid, [3], ["of its first life"]))
                rid = again.rid
        client.dispatch(Tokenized(rid, [2], ["b"]))
        answered = await asking
        assert [answer.token_ids for answer in answered] == [[1], [2]]
        return answered

    assert [answer.rid != "" for answer in asyncio.run(live(1))] == [True, True]
    with pytest.raises(RequestError, match="gone"):
        asyncio.run(live(2))
    assert client.live == 0


def test_lines_of_batches_hear_of_each_death(harness: Harness) -> None:
    """Since the batch counts them, and sends the line again by itself."""

    async def ask() -> None:
        asked = harness.client.ask([functools.partial(Embedding, prompt="x")])
        asked.resumes = False
        await answers(asked)

    async def live() -> None:
        generation, _ = harness.submit()
        generation.resumes = False
        asking = asyncio.create_task(ask())
        await asyncio.sleep(0)
        harness.received()
        harness.client.dispatch(EngineDown("gone"))
        assert await failure(generation) == "the engine is down: gone"
        with pytest.raises(RequestError, match="gone"):
            await asking

    asyncio.run(live())
    assert (harness.client.live, harness.ended()) == (0, 2)


def test_who_leaves_meanwhile_is_not_sent_again(harness: Harness) -> None:
    async def live() -> None:
        generation, message = harness.submit(2)
        asking = asyncio.create_task(answers(harness.client.ask([TOKENIZE])))
        await asyncio.sleep(0)
        harness.received()
        harness.client.dispatch(EngineDown("gone"))
        say(harness, message.job.rids[0], "a")
        with generation:
            pass
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        harness.restart()
        assert harness.inbox.receive(0.1) is None

    asyncio.run(live())
    assert (harness.client.live, harness.ended(), harness.client._admission.tokens) == (0, 2, 0)
    assert harness.count("requests_resumed_total") == 0


def test_who_is_aborted_by_name_meanwhile_ends_with_what_it_has(harness: Harness) -> None:
    async def live() -> None:
        generation, message = harness.submit(name="mine")
        say(harness, message.job.rids[0], "ab")
        harness.client.dispatch(EngineDown("gone"))
        assert harness.client.abort_named("other") == 0
        assert harness.client.abort_named("mine") == 1
        delta = await at_once(generation)
        assert (delta.text, delta.completion_tokens, delta.finish) == ("ab", 2, ABORT)
        harness.restart()
        assert harness.inbox.receive(0.1) is None

    asyncio.run(live())
    assert (harness.client.live, harness.ended()) == (0, 1)


def test_an_abort_while_the_stream_catches_up(harness: Harness) -> None:
    async def live() -> None:
        generation, message = harness.submit(name="mine")
        say(harness, message.job.rids[0], "abc")
        assert (await at_once(generation)).text == "abc"
        harness.restart("gone")
        [rid] = again(harness, message)
        say(harness, rid, "ab")
        assert harness.client.abort_named("mine") == 1
        assert harness.received() == Abort([rid])
        harness.client.dispatch(TextBatch([TextDelta(rid, "", 2, finish=ABORT)]))
        delta = await at_once(generation)
        assert (delta.text, delta.completion_tokens, delta.finish) == ("", 3, ABORT)

    asyncio.run(live())
    assert (harness.client.live, harness.ended()) == (0, 1)


@pytest.mark.parametrize("down", [False, True])
def test_nobody_waits_for_an_engine_that_will_not_come_back(harness: Harness, down: bool) -> None:
    async def live() -> None:
        generation, _ = harness.submit()
        asking = asyncio.create_task(answers(harness.client.ask([TOKENIZE])))
        await asyncio.sleep(0)
        if down:
            harness.client.dispatch(EngineDown("gone"))
            assert not harness.client.settled.is_set()
        harness.client.dispatch(EngineDown("gone for ever", final=True))
        assert await failure(generation) == "the engine is down: gone for ever"
        with pytest.raises(RequestError, match="gone for ever"):
            await asking
        assert harness.client.settled.is_set()
        assert not harness.client.up.is_set()

    asyncio.run(live())
    assert (harness.client.live, harness.ended()) == (0, 1)


def test_the_end_of_a_drain_ends_what_waits(harness: Harness) -> None:
    generation, _ = harness.submit()
    harness.client.dispatch(EngineDown("gone"))
    harness.client.drain()
    harness.client.fail_all(DRAINING)
    assert asyncio.run(failure(generation)) == "the server is shutting down"
    assert (harness.client.live, harness.ended()) == (0, 1)


TEXTS = ("abcde", "fghij", "klmno")
_STEPS = st.lists(st.sampled_from([0, 1, 2, "read", "die", "restart"]), max_size=40)


@settings(deadline=None)  # other processes may hold the cores
@given(steps=_STEPS, streamed=st.booleans())
def test_whenever_it_dies_each_text_is_told_once(steps: list[int | str], streamed: bool) -> None:
    """Three choices, whose tokens come in any order; deaths and restarts at any moment."""
    with Harness() as harness:
        asyncio.run(asyncio.wait_for(_live(harness, [*steps, "restart", *[0, 1, 2] * 5], streamed), 5))


async def _live(harness: Harness, steps: list[int | str], streamed: bool) -> None:
    generation, message = harness.submit(3)
    rids, told, deaths = list(message.job.rids), [0, 0, 0], 0
    heard, ends = ["", "", ""], [0, 0, 0]
    whole = None if streamed else asyncio.create_task(generation.whole())
    await asyncio.sleep(0)

    async def hear() -> None:
        for index, delta in await generation.change() if generation._pending else ():
            heard[index] += delta.text
            ends[index] += delta.finish is not None

    for step in steps:
        if isinstance(step, int):
            if told[step] < 5:  # also of an engine that is dead: of what it said last
                say(harness, rids[step], TEXTS[step][told[step]], told[step] + 1, last=5)
                told[step] += 1
        elif step == "read" and streamed:
            await hear()
        elif step == "die":
            deaths += harness.client.down is None and harness.client.live > 0
            harness.client.dispatch(EngineDown("gone"))
        elif step == "restart" and harness.client.down:
            harness.restart()
            if harness.client.live:
                rids, told = again(harness, message), [0, 0, 0]
                ended = {rid for rid in rids if rid not in harness.client._live}
                if ended:
                    abort = harness.received()
                    assert isinstance(abort, Abort)
                    assert set(abort.rids) == ended
        assert harness.client.live == 0 or deaths < 2
    with generation:
        if deaths > 1:
            with pytest.raises(RequestError, match="gone"):
                await (whole or generation.parts())
            assert all(text.startswith(part) for text, part in zip(TEXTS, heard, strict=True))
        elif whole is not None:
            assert [delta.text for delta in await whole] == list(TEXTS)
        else:
            await hear()
            assert (tuple(heard), ends) == (TEXTS, [1, 1, 1])
    assert (harness.client.live, harness.ended()) == (0, 3)
