"""`EmbeddingQueue`: which prompts are embedded together in the next step. Plain data; knows neither models nor sockets.

A prompt is computed whole, in one step, and needs nothing but its tokens: there is no cache and nothing to resume.
Invariant: what was added ends once, by `finish`, `fail` or `abort`; a step is over before anything is added or aborted.
"""

import bisect

from ramet.ipc.messages import Counters, Embed


class EmbeddingQueue:
    """`max_step_tokens` bounds the tokens of a step, `max_running` its prompts; a longer prompt is a step by itself."""

    def __init__(self, max_step_tokens: int, max_running: int) -> None:
        self._max_step_tokens = max_step_tokens
        self._max_running = max_running
        self._waiting: list[tuple[int, int, Embed]] = []  # by priority, then arrival
        self._arrivals = 0
        self.counters = Counters()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def rids(self) -> list[str]:
        return [message.rid for _, _, message in self._waiting]

    def add(self, message: Embed) -> None:
        self._arrivals += 1
        bisect.insort(self._waiting, (message.priority, self._arrivals, message))

    def abort(self, rids: list[str]) -> None:
        gone = set(rids)
        kept = [item for item in self._waiting if item[2].rid not in gone]
        self.counters.aborted += len(self._waiting) - len(kept)
        self._waiting = kept

    def take_step(self) -> list[Embed]:
        """The prompts of the next step, best first; none if nothing waits."""
        tokens, count = 0, 0
        for _, _, message in self._waiting[: self._max_running]:
            tokens += len(message.prompt_ids)
            if count and tokens > self._max_step_tokens:
                break
            count += 1
        step = [message for _, _, message in self._waiting[:count]]
        del self._waiting[:count]
        return step

    def finish(self, message: Embed) -> None:
        self.counters.prompt_tokens += len(message.prompt_ids)
        self.counters.computed_tokens += len(message.prompt_ids)
        self.counters.finished += 1

    def fail(self) -> None:
        self.counters.failed += 1
