"""`Admission`: who may come into the engine, by the number of requests and of their tokens that are in it.

Knows neither ids nor messages' ways. Tokens are an estimate, since prompts are tokenized later.
"""

import collections
import functools
import math
import time
from collections.abc import Callable

from ramet.ipc.errors import FailureKind, RequestError, invalid
from ramet.ipc.messages import Chat, Completion, Embedding, Request

# From which the rate of ends is taken: these last seconds, and so many ends.
_RATE_WINDOW_S, _RATE_ENDS = 30.0, 100
_MAX_RETRY_AFTER_S = 60

# Of a text; what the tokenizer makes of it is known too late for admission.
_CHARS_PER_TOKEN = 4


class Admission:
    def __init__(self, max_live: int, max_tokens: int | None) -> None:
        self._max_live, self._max_tokens = max_live, max_tokens
        self.tokens = 0  # of the requests that have been admitted, about
        self._ends: collections.deque[float] = collections.deque(maxlen=_RATE_ENDS)

    def admit(self, count: int, num_tokens: int, live: int, first_at: float) -> Callable[[], None]:
        """What is to be called when they have ended. Raises `RequestError` if `count` more, of so many tokens, are too
        many beside the `live` ones, the oldest of which came at `first_at` (of `time.monotonic`)."""
        if count > self._max_live:
            raise invalid(f"at most {self._max_live} choices over all prompts of a request, got {count}", "n")
        if live + count > self._max_live:
            words = f"{live} of at most {self._max_live} requests are waiting or running"
            raise self._queue_full(live, first_at, words)
        # Alone anything may come in: the estimate must not refuse for ever what would fit.
        if self._max_tokens is not None and self.tokens and self.tokens + num_tokens > self._max_tokens:
            words = f"about {self.tokens} of at most {self._max_tokens} tokens are in it"
            raise self._queue_full(live, first_at, f"{words}, and this has about {num_tokens}")
        self.tokens += num_tokens
        return functools.partial(self._release, count, num_tokens)

    def _release(self, count: int, num_tokens: int) -> None:
        self.tokens -= num_tokens
        self._ends.extend([time.monotonic()] * count)

    def _queue_full(self, live: int, first_at: float, words: str) -> RequestError:
        """With the time in which, at the present rate, half of what is there will have ended."""
        now = time.monotonic()
        since = max(now - _RATE_WINDOW_S, first_at, self._ends[0] if len(self._ends) == _RATE_ENDS else first_at)
        num_ended = sum(at >= since for at in self._ends)
        wait_s = max(1, min(math.ceil(live / 2 * (now - since) / (num_ended + 1)), _MAX_RETRY_AFTER_S))
        return RequestError(FailureKind.QUEUE_FULL, f"the queue is full: {words}", retry_after_s=wait_s)


def about_tokens(message: Request) -> int:
    """What a request will hold: its prompt, and for each choice the `max_tokens` that it asks for."""
    match message:
        case Chat():
            num_chars, num_ids = sum(len(one.get("content") or "") for one in message.messages), 0
        case Completion(prompt=str()) | Embedding(prompt=str()):
            num_chars, num_ids = len(message.prompt), 0
        case Completion() | Embedding():
            num_chars, num_ids = 0, len(message.prompt)
        case _:
            return 0
    num_new = 0 if isinstance(message, Embedding) else len(message.job.rids) * (message.job.params.max_tokens or 0)
    return num_chars // _CHARS_PER_TOKEN + num_ids + num_new
