"""`EngineClient`: the frontend's side of the engine. Owns request ids, admission, event queues and aborts.

Knows nothing of HTTP. One `Generation` stands for all choices, or all questions, of one HTTP request and takes their
events.

After each `EngineUp` a `Reset` goes through every process of the engine; until it is back nothing is admitted. What the
engine had when a process died is then sent again, once, under other ids; what its clients have had is not told again.

Invariants: a request id is in `_live` (or `_questions`) from its submission to its one terminal event, to its abort, or
to the loss of the engine; what arrives for an id that is not there is dropped. Leaving a `Generation`'s `with` block
aborts whatever of it is still live. All messages about one id go to the same tokenizer worker.
"""

import asyncio
import collections
import itertools
import secrets
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from ramet.frontend.admission import Admission, about_tokens
from ramet.frontend.generation import ChoiceRecord, Generation
from ramet.frontend.metrics import Metrics
from ramet.ipc.channel import TOKENIZER, Addresses, Outbox
from ramet.ipc.errors import Failure, FailureKind, RequestError, invalid
from ramet.ipc.messages import (
    Abort,
    Chat,
    Completion,
    Embedded,
    Embedding,
    EngineDown,
    EngineUp,
    Failed,
    Finish,
    FinishReason,
    Job,
    PromptInfo,
    Question,
    Request,
    Reset,
    Stats,
    TextBatch,
    TextDelta,
    ToFrontend,
    ToTokenizer,
    rids_of,
)
from ramet.ipc.sampling import SamplingParams

DRAINING = Failure(FailureKind.ENGINE_DOWN, "the server is shutting down", code="server_shutting_down")
_ABORTED = Failure(FailureKind.ABORTED, "the request was aborted")

# Ends the id of a choice that has been in flight at a death.
_AGAIN = "+"


class _Live(msgspec.Struct, gc=False):
    """A choice or a question that the engine owes an end. `message` is that of its prompt, `told` are the tokens that a
    choice has said."""

    generation: Generation
    index: int
    tokenizer: int
    message: Request
    name: str | None
    record: ChoiceRecord
    told: list[int] = []

    @property
    def is_counted(self) -> bool:
        """Whether it is among the finished requests of the metrics: a choice or an embedding."""
        return isinstance(self.message, Chat | Completion | Embedding)


class EngineClient:
    """Submits requests and hands each event to its `Generation`."""

    def __init__(self, addresses: Addresses, max_live: int, metrics: Metrics, max_tokens: int | None = None) -> None:
        self.addresses = addresses
        self._tokenizers = [Outbox(addresses.inbox(TOKENIZER.format(index))) for index in range(addresses.tokenizers)]
        self._turns = itertools.cycle(range(addresses.tokenizers))
        self._admission = Admission(max_live, max_tokens)
        self._metrics = metrics
        self._live: dict[str, _Live] = {}
        self._questions: dict[str, _Live] = {}
        self._asking = 0  # calls of `ask`; each may have many questions
        self._down: Failure | None = None
        self._draining = False
        self._resets = 0
        self._resets_missing = 0
        self.up = asyncio.Event()  # set while the engine can take work
        self.settled = asyncio.Event()  # set when it is up, and when it will never be again
        self.processes: tuple[str, ...] = ()  # the launcher and those of the engine, by name
        self.info: dict[str, int | str | float] = {}  # its limits, as the scheduler told them

    @property
    def live(self) -> int:
        """How many requests the engine has not ended yet."""
        return len(self._live) + len(self._questions)

    @property
    def down(self) -> Failure | None:
        """Set while a process of the engine is dead."""
        return None if self.up.is_set() else self._down

    @property
    def refusal(self) -> Failure | None:
        """Why no new request is taken, if none is."""
        return self.down or (DRAINING if self._draining else None)

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
        stem = uuid.uuid4().hex
        messages: list[Request] = []
        for number, (make, wanted) in enumerate(zip(prompts, each, strict=True)):
            # The other choices get seed + 1, + 2, …: a fresh seed leaves room for them in 64 bits.
            seeded = msgspec.structs.replace(wanted, seed=secrets.randbits(62)) if wanted.seed is None else wanted
            rids = [f"{stem}-{number * n + choice}" for choice in range(n)]
            messages.append(make(Job(rids, seeded, priority, echo, stream)))
        return self._start(self._live, messages, self._admit(len(prompts) * n, messages), n, names, keeps_aborted)

    def ask(self, makes: Sequence[Callable[[str], Question]]) -> Generation:
        """Send what each makes of a request id: several questions of one request, which is admitted as one. Raises
        `RequestError` if it is not."""
        messages = [make(uuid.uuid4().hex) for make in makes]
        release = self._admit(1, messages)
        self._asking += 1

        def end() -> None:
            self._asking -= 1
            release()

        return self._start(self._questions, messages, end)

    def _start(
        self,
        owed: dict[str, _Live],
        messages: Sequence[Request],
        release: Callable[[], None],
        n: int = 1,
        names: Sequence[str | None] = (),
        keeps_aborted: bool = False,
    ) -> Generation:
        rids = [rid for message in messages for rid in rids_of(message)]
        generation = Generation(rids, n, keeps_aborted, self.abort, release)
        now = time.monotonic()
        try:
            for number, message in enumerate(messages):
                tokenizer = next(self._turns)
                name = names[number] if names else None
                for index, rid in enumerate(rids_of(message), number * n):
                    generation.records.append(record := ChoiceRecord(now))
                    owed[rid] = _Live(generation, index, tokenizer, message, name, record)
                self._send(tokenizer, message)
        except RequestError:
            self.abort(set(rids), "error")
            release()
            raise
        return generation

    def _send(self, tokenizer: int, message: ToTokenizer) -> None:
        try:
            self._tokenizers[tokenizer].send(message)
        except (OverflowError, RecursionError, TypeError, UnicodeEncodeError) as error:
            # Free-form fields may hold integers and depths that msgpack has not; Python callers, anything.
            raise invalid(f"the request cannot be encoded: {error}", code="invalid_json") from error

    def _admit(self, count: int, messages: Sequence[Request]) -> Callable[[], None]:
        if self.refusal is not None:
            raise RequestError(self.refusal.kind, self.refusal.message, code=self.refusal.code)
        num_tokens = sum(map(about_tokens, messages))
        first_at = next((live.record.submitted_at for live in self._live.values()), time.monotonic())
        return self._admission.admit(count, num_tokens, len(self._live) + self._asking, first_at)

    def _take(self, rid: str) -> _Live | None:
        """Nothing more of it is waited for."""
        return self._live.pop(rid, None) or self._questions.pop(rid, None)

    def abort(self, rids: set[str], reason: str = "abort") -> None:
        """Tell the engine to drop these of the requests that are live; their events are not waited for."""
        dropped = [(rid, live) for rid in rids if (live := self._take(rid)) is not None]
        self._metrics.requests_finished.labels(reason).inc(sum(live.is_counted for _, live in dropped))
        self._send_aborts((rid, live.tokenizer) for rid, live in dropped)

    def _send_aborts(self, dropped: Iterable[tuple[str, int]]) -> None:
        """`dropped`: each id with its tokenizer worker."""
        by_tokenizer: dict[int, list[str]] = collections.defaultdict(list)
        for rid, worker in dropped:
            by_tokenizer[worker].append(rid)
        for tokenizer, group in by_tokenizer.items():
            self._tokenizers[tokenizer].send(Abort(group))

    def abort_named(self, name: str | None) -> int:
        """Have the engine end the live requests of this name (None: all) with the text they have; how many."""
        named = {rid: live for rid, live in self._live.items() if name is None or live.name == name}
        if self.down is None:
            self._send_aborts((rid, live.tokenizer) for rid, live in named.items())
            return len(named)
        for rid, live in named.items():  # the engine does not have them
            end = TextDelta(rid, "", live.record.tokens, finish=Finish(FinishReason.ABORT))
            self._deliver(end, time.monotonic())
        return len(named)

    def drain(self) -> None:
        """Take no new request from now on."""
        self._draining = True

    def fail_all(self, failure: Failure) -> None:
        """End every live request with this failure, and abort it in what is left of the engine."""
        ended = {**self._live, **self._questions}
        self.abort(set(ended), "error")
        for live in ended.values():
            live.generation.fail(live.index, failure)

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
            failure = self._go_down(message.reason)
            if message.final:
                self.fail_all(failure)
                self.settled.set()
        elif isinstance(message, EngineUp):
            self._metrics.processes.watch(message.pids)
            if self.down is None:
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
                    self.up.set()
                    self.settled.set()
                    self._resume()
        elif (question := self._questions.pop(message.rid, None)) is not None:
            question.generation.answer(question.index, message)
            if isinstance(message, Embedded):
                self._count_embedding(message.prompt_tokens, time.monotonic() - question.record.submitted_at)

    def _go_down(self, reason: str) -> Failure:
        failure = Failure(FailureKind.ENGINE_DOWN, f"the engine is down: {reason}")
        if self.down is None:  # of another death before it was up again, the requests have seen nothing
            self._lose(failure)
        self._down = failure
        self.up.clear()
        self.settled.clear()
        self._resets_missing = 0
        self._metrics.engine.forget()
        return failure

    def _lose(self, failure: Failure) -> None:
        """The engine has died under all requests: keep them, but for those that have seen one death already."""
        for owed in (self._live, self._questions):
            for rid, live in list(owed.items()):
                if rid.endswith(_AGAIN) or not live.generation.resumes:
                    self._fail(rid, failure)
                    continue
                # Another id, so that what the engine still tells of this life is not taken for the next one's.
                del owed[rid]
                live.generation.open[live.index] = rid + _AGAIN
                owed[rid + _AGAIN] = live

    def _resume(self) -> None:
        """Send again what was lost: prompts with all their choices, for the sake of the seeds, less those that have
        ended."""
        self._metrics.requests_resumed.inc(self.live)
        owed = {**self._live, **self._questions}
        messages = {id(live.message): (live.tokenizer, live.message) for live in owed.values()}
        for tokenizer, message in messages.values():
            rids = [rid + _AGAIN for rid in rids_of(message)]
            if isinstance(message, Chat | Completion):
                new: dict[str, Any] = {"job": msgspec.structs.replace(message.job, rids=rids)}
            else:
                new = {"rid": rids[0]}
            self._send(tokenizer, msgspec.structs.replace(message, **new))
            self._send_aborts((rid, tokenizer) for rid in rids if rid not in owed)
        for live in self._live.values():
            if live.generation.rewind(live.index):
                live.told.clear()

    def _fail(self, rid: str, failure: Failure) -> None:
        if (live := self._take(rid)) is not None:
            self._metrics.requests_finished.labels("error").inc(live.is_counted)
            live.generation.fail(live.index, failure)

    def _deliver(self, delta: TextDelta, now: float) -> int:
        """How many tokens it brings."""
        live, metrics = self._live.get(delta.rid), self._metrics
        if live is None:
            return 0
        record = live.record
        if delta.prompt is not None and not record.prompt_tokens:
            self._begin(live, delta.prompt)
        start = delta.completion_tokens - len(delta.token_ids)
        if start >= len(live.told):
            live.told += delta.token_ids
        elif live.told[start : delta.completion_tokens] != delta.token_ids:  # it cannot go on with another text
            assert self._down is not None
            self._send_aborts([(delta.rid, live.tokenizer)])
            self._fail(delta.rid, self._down)
            return 0
        elif delta.finish is None:
            return 0
        else:
            delta = TextDelta(delta.rid, "", len(live.told), finish=delta.finish)
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
                live.generation.fail(live.index, _ABORTED)
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
