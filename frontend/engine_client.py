"""`EngineClient`: the frontend's side of the engine. Owns request ids, admission, event queues and aborts.

Knows nothing of HTTP. A question is asked and awaited (`ask`). One `Generation` stands for all choices of one HTTP
request and takes their events.

After each `EngineUp` a `Reset` goes through every process of the engine; until it is back nothing is admitted.

Invariants: a request id is in `_live` from its submission to its one terminal event, to its abort, or to the loss of
the engine; what arrives for an id that is not there is dropped. Leaving a `Generation`'s `with` block aborts whatever
of it is still live. All messages about one id go to the same tokenizer worker.
"""

import asyncio
import collections
import itertools
import math
import secrets
import time
import uuid
from collections.abc import Callable, Iterable, Sequence

import msgspec

from ramet.frontend.generation import ChoiceRecord, Generation
from ramet.frontend.metrics import Metrics
from ramet.ipc.channel import Addresses, Outbox
from ramet.ipc.errors import Failure, FailureKind, RequestError, invalid
from ramet.ipc.messages import (
    Abort,
    Answer,
    Chat,
    Completion,
    Detokenize,
    Embedded,
    Embedding,
    EngineDown,
    EngineUp,
    Failed,
    FinishReason,
    FlushCache,
    Job,
    PromptInfo,
    Reset,
    Stats,
    TextBatch,
    TextDelta,
    ToFrontend,
    Tokenize,
    ToTokenizer,
)
from ramet.ipc.sampling import SamplingParams

DRAINING = Failure(FailureKind.ENGINE_DOWN, "the server is shutting down", code="server_shutting_down")
_ABORTED = Failure(FailureKind.ABORTED, "the request was aborted")


# From which the rate of ends is taken: these last seconds, and so many ends.
_RATE_WINDOW_S, _RATE_ENDS = 30.0, 100
_MAX_RETRY_AFTER_S = 60

# Of a text; what the tokenizer makes of it is known too late for admission.
_CHARS_PER_TOKEN = 4


class _Question(msgspec.Struct, gc=False):
    """A request that ends in one `Answer`. `embeds`: it is counted like a choice. `asked_at` is of `time.monotonic`."""

    answer: "asyncio.Future[Answer]"
    tokenizer: int
    embeds: bool
    asked_at: float


class _Live(msgspec.Struct, gc=False):
    """A choice that the engine owes an end."""

    generation: Generation
    index: int
    tokenizer: int
    name: str | None
    record: ChoiceRecord


class EngineClient:
    """Submits requests and hands each event to its `Generation`."""

    def __init__(self, addresses: Addresses, max_live: int, metrics: Metrics, max_tokens: int | None = None) -> None:
        self.addresses = addresses
        self._tokenizers = [Outbox(addresses.tokenizer(index)) for index in range(addresses.tokenizers)]
        self._turns = itertools.cycle(range(addresses.tokenizers))
        self._max_live, self._max_tokens = max_live, max_tokens
        self._tokens = 0  # of the requests that have been admitted, about
        self._ends: collections.deque[float] = collections.deque(maxlen=_RATE_ENDS)
        self._metrics = metrics
        self._live: dict[str, _Live] = {}
        self._questions: dict[str, _Question] = {}
        self._asking = 0  # calls of `ask_all`; each may have many questions
        self._down: Failure | None = None
        self._draining = False
        self._resets = 0
        self._resets_missing = 0
        self.up = asyncio.Event()  # set while the engine can take work
        self.processes: tuple[str, ...] = ()  # the launcher and those of the engine, by name
        self.info: dict[str, int | str | float] = {}  # its limits, as the scheduler told them

    @property
    def live(self) -> int:
        """How many requests the engine has not ended yet."""
        return len(self._live) + len(self._questions)

    @property
    def down(self) -> Failure | None:
        """Set while a process of the engine is dead."""
        return self._down

    @property
    def refusal(self) -> Failure | None:
        """Why no new request is taken, if none is."""
        return self._down or (DRAINING if self._draining else None)

    def submit(
        self,
        prompts: Sequence[Callable[[Job], Chat | Completion]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        n: int = 1,
        priority: int = 0,
        echo: bool = False,
        stream: bool = True,
        names: Sequence[str | None] = (),
        keeps_aborted: bool = False,
    ) -> Generation:
        """Send each prompt with n choices. Raises `RequestError` if they are not admitted.

        Without `stream` the engine leaves out what comes between the first and the last event of each choice.
        `params` may be one for each prompt. `names`, one for each prompt, are what `abort_named` knows them by; a
        choice that it ends is an error, or with `keeps_aborted` a choice whose finish reason is `abort`.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        count = len(prompts) * n
        stem = uuid.uuid4().hex
        rids = [f"{stem}-{index}" for index in range(count)]
        messages = []
        for number, (make, wanted) in enumerate(zip(prompts, each, strict=True)):
            # The other choices get seed + 1, + 2, …: a fresh seed leaves room for them in 64 bits.
            seeded = msgspec.structs.replace(wanted, seed=secrets.randbits(62)) if wanted.seed is None else wanted
            messages.append(make(Job(rids[number * n : (number + 1) * n], seeded, priority, echo, stream)))
        num_tokens = sum(map(_about_tokens, messages))
        self._admit(count, num_tokens)
        generation = Generation(self, rids, n, num_tokens, keeps_aborted)
        now = time.monotonic()
        try:
            for number, message in enumerate(messages):
                tokenizer = next(self._turns)
                name = names[number] if names else None
                for index, rid in enumerate(message.job.rids, number * n):
                    generation.records.append(record := ChoiceRecord(now))
                    self._live[rid] = _Live(generation, index, tokenizer, name, record)
                self._send(tokenizer, message)
        except RequestError:
            self.abort(set(rids), "error")
            raise
        self._tokens += num_tokens
        return generation

    async def ask(self, make: Callable[[str], Embedding | Tokenize | Detokenize | FlushCache]) -> Answer:
        """Send what `make` makes of a request id, and wait for its answer. Raises `RequestError` if it is not admitted
        or fails. Cancelling the task that waits aborts the request."""
        [answer] = await self.ask_all([make])
        return answer

    async def ask_all(
        self, makes: Sequence[Callable[[str], Embedding | Tokenize | Detokenize | FlushCache]]
    ) -> list[Answer]:
        """Several questions of one request, which is admitted as one: the answers in order, or the first failure."""
        messages = [make(uuid.uuid4().hex) for make in makes]
        num_tokens = sum(map(_about_tokens, messages))
        self._admit(1, num_tokens)
        self._asking += 1
        self._tokens += num_tokens
        asked: dict[str, _Question] = {}
        try:
            for message in messages:
                future = asyncio.get_running_loop().create_future()
                embeds = isinstance(message, Embedding)
                question = _Question(future, next(self._turns), embeds, time.monotonic())
                self._questions[message.rid] = asked[message.rid] = question
                self._send(question.tokenizer, message)
            return await asyncio.gather(*[question.answer for question in asked.values()])
        finally:
            self._asking -= 1
            self.release(1, num_tokens)
            left = [(rid, it) for rid, it in asked.items() if self._questions.pop(rid, None)]
            self._metrics.requests_finished.labels("abort").inc(sum(it.embeds for _, it in left))
            self._send_aborts((rid, it.tokenizer) for rid, it in left)

    def _send(self, tokenizer: int, message: ToTokenizer) -> None:
        try:
            self._tokenizers[tokenizer].send(message)
        except (OverflowError, RecursionError, TypeError, UnicodeEncodeError) as error:
            # Free-form fields may hold integers and depths that msgpack has not; Python callers, anything.
            raise invalid(f"the request cannot be encoded: {error}", code="invalid_json") from error

    def release(self, count: int, num_tokens: int) -> None:
        """What was admitted has ended."""
        self._tokens -= num_tokens
        self._ends.extend([time.monotonic()] * count)

    def _admit(self, count: int, num_tokens: int) -> None:
        if self.refusal is not None:
            raise RequestError(self.refusal.kind, self.refusal.message, code=self.refusal.code)
        if count > self._max_live:
            raise invalid(f"at most {self._max_live} choices over all prompts of a request, got {count}", "n")
        admitted = len(self._live) + self._asking
        if admitted + count > self._max_live:
            raise self._queue_full(f"{admitted} of at most {self._max_live} requests are waiting or running")
        # Alone anything may come in: the estimate must not refuse for ever what would fit.
        if self._max_tokens is not None and self._tokens and self._tokens + num_tokens > self._max_tokens:
            raise self._queue_full(
                f"about {self._tokens} of at most {self._max_tokens} tokens are in it, and this has about {num_tokens}"
            )

    def _queue_full(self, words: str) -> RequestError:
        """With the time in which, at the present rate, half of what is there will have ended."""
        now = time.monotonic()
        first_at = next((live.record.submitted_at for live in self._live.values()), now)
        since = max(now - _RATE_WINDOW_S, first_at, self._ends[0] if len(self._ends) == _RATE_ENDS else first_at)
        num_ended = sum(at >= since for at in self._ends)
        wait_s = (len(self._live) + self._asking) / 2 * (now - since) / (num_ended + 1)
        wait_s = max(1, min(math.ceil(wait_s), _MAX_RETRY_AFTER_S))
        return RequestError(FailureKind.QUEUE_FULL, f"the queue is full: {words}", retry_after_s=wait_s)

    def abort(self, rids: set[str], reason: str = "abort") -> None:
        """Tell the engine to drop these of the requests that are live; their events are not waited for."""
        dropped = [(rid, live.tokenizer) for rid in rids if (live := self._live.pop(rid, None)) is not None]
        self._metrics.requests_finished.labels(reason).inc(len(dropped))
        self._send_aborts(dropped)

    def _send_aborts(self, dropped: Iterable[tuple[str, int]]) -> None:
        """`dropped`: each id with its tokenizer worker."""
        by_tokenizer: dict[int, list[str]] = collections.defaultdict(list)
        for rid, worker in dropped:
            by_tokenizer[worker].append(rid)
        for tokenizer, group in by_tokenizer.items():
            self._tokenizers[tokenizer].send(Abort(group))

    def abort_named(self, name: str | None) -> int:
        """Have the engine end the live requests of this name (None: all) with the text they have; how many."""
        named = [(rid, live.tokenizer) for rid, live in self._live.items() if name is None or live.name == name]
        self._send_aborts(named)
        return len(named)

    def drain(self) -> None:
        """Take no new request from now on."""
        self._draining = True

    def fail_all(self, failure: Failure) -> None:
        """End every live request with this failure, and abort it in what is left of the engine."""
        ended = list(self._live.items())
        self.abort(set(self._live), "error")
        for rid, live in ended:
            live.generation.fail(rid, failure)
        for rid in list(self._questions):
            self._fail(rid, failure)

    def dispatch(self, message: ToFrontend) -> None:
        if isinstance(message, TextBatch):
            now = time.monotonic()
            self._metrics.generation_tokens.inc(sum([self._deliver(delta, now) for delta in message.items]))
        elif isinstance(message, Failed):
            for rid in message.rids:
                self._fail(rid, message.failure)
        elif isinstance(message, Stats):
            self._metrics.engine.update(message)
        elif isinstance(message, EngineDown):
            self._go_down(message.reason)
        elif isinstance(message, EngineUp):
            self._metrics.processes.watch(message.pids)
            if self._down is None:
                self._go_down("it is starting")
            else:
                self._metrics.engine_restarts.inc()
            self.processes, self.info = tuple(message.pids), message.info
            self._resets += 1
            self._resets_missing = len(self._tokenizers)
            for outbox in self._tokenizers:
                outbox.send(Reset(self._resets))
        elif isinstance(message, Reset):
            if message.turn == self._resets:
                self._resets_missing -= 1
                if self._resets_missing == 0:
                    self._down = None
                    self.up.set()
        elif (question := self._questions.pop(message.rid, None)) is not None and not question.answer.done():
            question.answer.set_result(message)
            if isinstance(message, Embedded):
                self._count_embedding(message.prompt_tokens, time.monotonic() - question.asked_at)

    def _go_down(self, reason: str) -> None:
        self.up.clear()
        self._resets_missing = 0
        self._down = Failure(FailureKind.ENGINE_DOWN, f"the engine is down: {reason}")
        self._metrics.engine.forget()
        self.fail_all(self._down)

    def _fail(self, rid: str, failure: Failure) -> None:
        if (live := self._live.pop(rid, None)) is not None:
            self._metrics.requests_finished.labels("error").inc()
            live.generation.fail(rid, failure)
        elif (question := self._questions.pop(rid, None)) is not None and not question.answer.done():
            self._metrics.requests_finished.labels("error").inc(question.embeds)
            error = RequestError(failure.kind, failure.message, param=failure.param, code=failure.code)
            question.answer.set_exception(error)

    def _deliver(self, delta: TextDelta, now: float) -> int:
        """How many tokens it brings."""
        live, metrics = self._live.get(delta.rid), self._metrics
        if live is None:
            return 0
        record = live.record
        if delta.prompt is not None:
            self._begin(live, delta.prompt)
        if new := max(0, delta.completion_tokens - record.tokens):
            if record.tokens == 0:
                record.first_at = now
                metrics.time_to_first_token.observe(now - record.submitted_at)
            else:
                metrics.inter_token_latency.observe((now - record.last_at) / new)
            record.tokens, record.last_at = delta.completion_tokens, now
        if delta.finish is not None:
            del self._live[delta.rid]
            metrics.requests_finished.labels(delta.finish.reason.value).inc()
            metrics.request_duration.observe(now - record.submitted_at)
            metrics.request_generation_tokens.observe(record.tokens)
            if delta.finish.reason is FinishReason.ABORT and not live.generation.keeps_aborted:
                live.generation.fail(delta.rid, _ABORTED)
                return new
        live.generation.push(live.index, delta)
        return new

    def _begin(self, live: _Live, prompt: PromptInfo) -> None:
        record = live.record
        record.tokenized_at, record.scheduled_at = prompt.tokenized_at, prompt.scheduled_at
        record.prompt_tokens, record.cached_tokens = prompt.prompt_tokens, prompt.cached_tokens
        self._metrics.request_queue.observe(prompt.scheduled_at - prompt.tokenized_at)
        if live.index % live.generation.n == 0:
            self._metrics.prompt_tokens.inc(prompt.prompt_tokens)
            self._metrics.request_prompt_tokens.observe(prompt.prompt_tokens)

    def _count_embedding(self, prompt_tokens: int, duration_s: float) -> None:
        self._metrics.requests_finished.labels(FinishReason.STOP.value).inc()
        self._metrics.request_duration.observe(duration_s)
        self._metrics.prompt_tokens.inc(prompt_tokens)
        self._metrics.request_prompt_tokens.observe(prompt_tokens)

    def close(self) -> None:
        for outbox in self._tokenizers:
            outbox.close()


def _about_tokens(message: Chat | Completion | Embedding | Tokenize | Detokenize | FlushCache) -> int:
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
