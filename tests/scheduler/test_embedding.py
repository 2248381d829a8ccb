"""The queue of a server that embeds, driven at random, and its worker over real sockets with a model that breaks."""

import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.ipc.channel import FRONTEND, SCHEDULER, Addresses, Inbox, Outbox
from ramet.ipc.errors import FailureKind
from ramet.ipc.messages import (
    Abort,
    Embed,
    Embedded,
    Failed,
    FlushCache,
    Flushed,
    Generate,
    Stats,
    ToFrontend,
    ToScheduler,
)
from ramet.ipc.sampling import SamplingParams
from ramet.scheduler.embedding import EmbeddingQueue
from ramet.scheduler.embedding_worker import EmbeddingWorker

BUDGET, MOST = 32, 4
_ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 50), st.integers(-2, 2)),
        st.tuples(st.just("abort"), st.integers(0, 40), st.just(0)),
        st.tuples(st.just("step"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@given(actions=_ACTIONS)
def test_each_prompt_is_taken_once_best_first_within_the_budget(actions: list[tuple[str, int, int]]) -> None:
    queue = EmbeddingQueue(BUDGET, MOST)
    waiting: dict[str, Embed] = {}
    added = 0
    for kind, number, priority in [*actions, *[("step", 0, 0)] * 60]:
        if kind == "add":
            message = Embed(f"{added:03}", [1] * number, priority)
            added += 1
            waiting[message.rid] = message
            queue.add(message)
        elif kind == "abort":
            before = queue.counters.aborted
            known = waiting.pop(f"{number:03}", None)
            queue.abort([f"{number:03}", "unknown"])
            assert queue.counters.aborted - before == (known is not None)
        else:
            step = queue.take_step()
            expected = sorted(waiting.values(), key=lambda message: (message.priority, message.rid))
            assert step == expected[: len(step)]
            assert bool(step) == bool(waiting)
            sizes = [len(message.prompt_ids) for message in expected]
            count = len(step)
            assert count <= 1 or (count <= MOST and sum(sizes[:count]) <= BUDGET)
            assert count in (len(sizes), MOST) or sum(sizes[: count + 1]) > BUDGET  # as many as fit
            for message in step:
                del waiting[message.rid]
        assert len(queue) == len(waiting)
    assert not waiting


class BreakingEmbedder:
    """Raises if 13 is among the tokens of a step, and has no finite vector for a prompt that begins with 7."""

    embedding_size = 1

    def __init__(self) -> None:
        self.steps: list[int] = []

    def execute(self, prompts: list[list[int]]) -> list[bytes | None]:
        self.steps.append(len(prompts))
        if any(13 in prompt for prompt in prompts):
            raise RuntimeError("out of memory")
        return [None if prompt[0] == 7 else bytes([prompt[0]]) for prompt in prompts]


class Harness:
    def __init__(self, folder: str) -> None:
        addresses = Addresses(folder)
        self._inbox: Inbox[ToScheduler] = Inbox(addresses.inbox(SCHEDULER), ToScheduler)
        self._answers: Inbox[ToFrontend] = Inbox(addresses.inbox(FRONTEND), ToFrontend)
        self._outboxes = Outbox(addresses.inbox(SCHEDULER)), Outbox(addresses.inbox(FRONTEND))
        self.embedder = BreakingEmbedder()
        queue = EmbeddingQueue(BUDGET, 16)
        self.worker = EmbeddingWorker(queue, self.embedder, self._inbox, self._outboxes[1])  # type: ignore[arg-type]

    def send(self, *messages: Embed | Generate | Abort | FlushCache) -> None:
        for message in messages:
            self._outboxes[0].send(message)

    def news(self) -> list[ToFrontend]:
        found = []
        while (message := self._answers.receive(0.3)) is not None:
            found.append(message)
        return found

    def close(self) -> None:
        for channel in (self._inbox, self._answers, *self._outboxes):
            channel.close()


@pytest.fixture
def harness() -> Iterator[Harness]:
    with tempfile.TemporaryDirectory(prefix="ramet-test-") as folder:
        harness = Harness(folder)
        yield harness
        harness.close()


def test_a_prompt_that_breaks_a_step_fails_alone(harness: Harness) -> None:
    harness.send(Embed("a", [1, 2]), Embed("b", [3, 13]), Embed("c", [7]), Embed("gone", [5]), Abort(["gone"]))
    harness.send(Embed("d", [4]), FlushCache("f"), Generate("g", [1], SamplingParams(max_tokens=1)))
    while not harness.embedder.steps:
        harness.worker.take_messages()
        if len(harness.worker._queue) == 4:
            harness.worker.step()
    assert harness.embedder.steps == [4, 1, 1, 1, 1]
    news = harness.news()
    assert [message for message in news if isinstance(message, Embedded)] == [
        Embedded("a", 2, b"\1"),
        Embedded("d", 1, b"\4"),
    ]
    assert Flushed("f", 0) in news
    failures = {message.rids[0]: message.failure for message in news if isinstance(message, Failed)}
    assert set(failures) == {"b", "c", "g"}
    assert failures["b"].message == "the model step failed: out of memory"
    assert failures["c"].message == "the embedding is not finite"
    assert failures["b"].kind is failures["c"].kind is FailureKind.INTERNAL
    assert failures["g"].kind is FailureKind.INVALID_REQUEST
    assert "without --is-embedding" in failures["g"].message
    first, *_, last = [message for message in news if isinstance(message, Stats)]
    assert (first.running, first.waiting) == (4, 0)
    told = [message for message in news if isinstance(message, Stats)]
    assert (last.running, last.waiting) == (0, 0)
    totals = {name: sum(getattr(stats.news, name) for stats in told) for name in ("finished", "failed", "aborted")}
    assert totals == {"finished": 2, "failed": 2, "aborted": 1}
    assert sum(stats.news.computed_tokens for stats in told) == 3
    assert [step.rows for stats in told for step in stats.steps] == [4]
