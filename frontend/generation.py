"""`Generation`: the events of one HTTP request's choices or questions, from the engine to the one who answers.

Its queue lives in this process, so a reader that is slow, or waits for the whole answer, costs the memory of the text
and nothing more. Leaving its `with` block aborts whatever of it is still live.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from ramet.ipc.errors import Failure, RequestError
from ramet.ipc.messages import Answer, TextDelta

# Takes a choice's text as it comes; false if what follows has to wait.
Sink = Callable[[int, TextDelta], bool]


class ClientDisconnectedError(Exception):
    """Nobody reads the answer any more."""


class ChoiceRecord(msgspec.Struct, gc=False):
    """How a choice went. Times are of `time.monotonic`, in seconds, 0 before they come."""

    submitted_at: float
    tokenized_at: float = 0.0
    scheduled_at: float = 0.0
    first_at: float = 0.0
    last_at: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0


class Generation:
    """The events of all choices of one HTTP request; choice `prompt_i * n + j` is the j-th of prompt `prompt_i`.
    `abort` drops choices by their ids, `release` is called when nobody waits for any of them."""

    def __init__(
        self,
        rids: list[str],
        n: int,
        keeps_aborted: bool,
        abort: Callable[[set[str]], None],
        release: Callable[[], None],
    ) -> None:
        self._abort, self._release = abort, release
        self.keeps_aborted = keeps_aborted
        self.resumes = True  # if the engine dies under it, it may be sent again
        self.records: list[ChoiceRecord] = []
        self.open = dict(enumerate(rids))  # the id of each choice that has not ended
        self._pending: dict[int, list[Any]] = {}  # deltas of choices, or the answer to a question
        self.n = n
        self._silent_prompts = set(range(len(rids) // n))
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._wake_per_delta = True
        self._sink: Sink | None = None

    def __enter__(self) -> "Generation":
        return self

    def __exit__(self, *_: object) -> None:
        self._abort(set(self.open.values()))
        self._release()

    async def started(self) -> None:
        """Wait until each prompt has had an event. Raises what failed: nothing has been sent to the client yet."""
        while self._silent_prompts and self._error is None:
            await self._changed()
        self._raise_error()

    async def change(self, sink: Sink | None = None) -> list[tuple[int, TextDelta]]:
        """What is new, by choice; nothing if all have ended. What came in meanwhile is merged. Raises after the last
        text if a choice failed. What comes while this waits goes into the sink, if it is not an end, and wakes
        nobody."""
        while not self._pending and self.open and self._error is None:
            self._sink = sink
            await self._changed()
        if not self._pending:
            self._raise_error()
        pending, self._pending = self._pending, {}
        return [(index, merged(deltas)) for index, deltas in pending.items()]

    async def whole(self) -> list[TextDelta]:
        """Each choice as one delta, in order, when all have ended."""
        return [merged(deltas) for deltas in await self.parts()]

    async def parts(self) -> list[list[TextDelta]]:
        """The deltas of each choice, in order, when all have ended; tokens on the way wake nobody."""
        self._wake_per_delta = False
        while self.open and self._error is None:
            await self._changed()
        self._raise_error()
        return [self._pending[index] for index in sorted(self._pending)]

    async def answers(self) -> list[Any]:
        """That to each question, in order, when all have come."""
        return [answer for [answer] in await self.parts()]

    def usage(self) -> dict[str, int]:
        """Tokens so far. A prompt counts once, however many choices it has; the one that computed it tells what was
        cached, since the others found what that one computed."""
        prompts = [self.records[first : first + self.n] for first in range(0, len(self.records), self.n)]
        begun = [group for records in prompts if (group := [record for record in records if record.prompt_tokens])]
        return {
            "prompt_tokens": sum(group[0].prompt_tokens for group in begun),
            "cached_tokens": sum(min(record.cached_tokens for record in group) for group in begun),
            "completion_tokens": sum(record.tokens for record in self.records),
        }

    def stop(self, error: Exception) -> None:
        """End it with this error, in the engine at once: who writes to a slow reader may take long to hear of it."""
        self._abort(set(self.open.values()))
        self._fail(error)

    def rewind(self, index: int) -> bool:
        """Forget what a choice has said, if the answer is to be whole and so nobody has read it; whether that is so."""
        if not self._wake_per_delta:
            self._pending.pop(index, None)
        return not self._wake_per_delta

    def push(self, index: int, delta: TextDelta) -> None:
        if self._sink is not None and delta.finish is None:
            try:
                if not self._sink(index, delta):
                    self._sink = None
            except Exception as error:  # noqa: BLE001 - a bug, which who waits raises and tells
                self._fail(error)
            return
        self._pending.setdefault(index, []).append(delta)
        self._silent_prompts.discard(index // self.n)
        if delta.finish is not None:
            self.open.pop(index, None)
        if self._wake_per_delta or not self.open:
            self._wake()

    def answer(self, index: int, answer: Answer) -> None:
        """The end of a question."""
        self._pending[index] = [answer]
        del self.open[index]
        if not self.open:
            self._wake()

    def fail(self, index: int, failure: Failure) -> None:
        self.open.pop(index, None)
        self._fail(RequestError(failure.kind, failure.message, param=failure.param, code=failure.code))

    def _fail(self, error: Exception) -> None:
        # One answer cannot hold both choices and an error: the first failure is that of the whole.
        self._error = self._error or error
        self._wake()

    def _changed(self) -> asyncio.Future[None]:
        self._waiter = asyncio.get_running_loop().create_future()
        return self._waiter

    def _wake(self) -> None:
        self._sink = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


def merged(deltas: list[TextDelta]) -> TextDelta:
    """Deltas of one choice as one."""
    if len(deltas) == 1:
        return deltas[0]
    first, last = deltas[0], deltas[-1]
    logprobs = [token for delta in deltas for token in delta.logprobs or ()]
    return TextDelta(
        rid=first.rid,
        text="".join([delta.text for delta in deltas]),
        completion_tokens=last.completion_tokens,
        prompt=first.prompt,
        logprobs=logprobs if any(delta.logprobs is not None for delta in deltas) else None,
        finish=last.finish,
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
    )
