"""`SchedulerCore`: decides what each step computes. Pure Python: no torch, no sockets, no clock.

There is no prefill phase and no decode phase: each running request has known tokens and computed tokens, and every
step spends a budget of tokens on letting the second number catch up with the first. One-token rows (decodes) go
first, so that a long prompt never stops the streams; prompts get what is left, in chunks. A better priority (a lower
number) comes first in everything, and worse ones pause while it waits for its first token.

`add`, `abort`, then in turn `schedule` and `commit`; news for the detokenizer pile up until `take_outputs`. Steps may
be planned while earlier ones are in flight; they are committed in order. A request that has left its slot meanwhile
takes nothing more from them. Pages and slots are given anew at once, because the device computes steps in order.

Invariants: each request that was added ends in exactly one `TokenOut` with `finish` or `failure`; the pages invariant
of `KVManager`; a request that fits the pool alone is never failed for lack of pages.
"""

import bisect
import itertools

import msgspec

from ramet.ipc.errors import Failure, FailureKind, RequestError
from ramet.ipc.messages import Admitted, Counters, Finish, FinishReason, Generate, TokenOut
from ramet.ipc.step import Admission, Row, RowResult, StepPlan, StepResult
from ramet.scheduler.config import SchedulerConfig
from ramet.scheduler.grammar import Matcher
from ramet.scheduler.kv_manager import KVManager
from ramet.scheduler.policy import WaitingQueue
from ramet.scheduler.request import Request

# How much of its remaining output a running request is expected to need, when admission counts pages. A preemption
# shows that the guess was low; every quiet step lowers it a little.
_GROWTH_START, _GROWTH_MIN, _GROWTH_PENALTY, _GROWTH_DECAY = 0.5, 0.1, 0.25, 0.001

# Prompts of a worse priority than the default get this fraction of what others get beside decodes: a better one that
# arrives has to wait for the step under way.
_YIELDING_SHARE = 0.75


class SchedulerCore:
    def __init__(self, config: SchedulerConfig, num_pages: int) -> None:
        if config.max_running > config.max_step_tokens:
            raise ValueError(
                f"max_running_requests ({config.max_running}) is above the tokens of one step "
                f"({config.max_step_tokens}): each running request decodes one token a step"
            )
        self.config = config
        self.kv = KVManager(num_pages, config.page_size, config.prefix_cache)
        self.counters = Counters()
        self._capacity = min(num_pages * config.page_size, config.context_length)
        self._waiting = WaitingQueue(config.policy)
        self._running: list[Request] = []  # sorted by `Request.order`
        self._requests: dict[str, Request] = {}
        self._free_slots = list(range(config.max_running - 1, -1, -1))
        self._released: list[int] = []
        self._outputs: list[TokenOut] = []
        # By step in flight: the request of each row, by its slot. One that leaves its slot leaves these too.
        self._flights: dict[int, dict[int, Request]] = {}
        self._growth = _GROWTH_START
        self._steps = 0
        self._arrivals = 0
        self._now = 0.0

    # ---- what the worker calls ---------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._flights)

    @property
    def rids(self) -> list[str]:
        """Of all requests that have not ended."""
        return list(self._requests)

    def add(self, message: Generate, matcher: Matcher | None = None) -> None:
        """Queue a request, with the matcher of its grammar. One that can never run fails at once."""
        try:
            max_tokens = self._check(message)
        except RequestError as error:
            self.refuse(message.rid, error.failure)
            return
        self._arrivals += 1
        request = Request(message, self._arrivals, max_tokens, self.config.eos_ids, matcher)
        self._requests[request.rid] = request
        self._waiting.push(request)

    def refuse(self, rid: str, failure: Failure) -> None:
        """End a request that is not queued."""
        self.counters.failed += 1
        self._outputs.append(TokenOut(rid, failure=failure))

    def abort(self, rids: list[str]) -> None:
        """End these requests now; ids that have ended already are ignored."""
        for rid in rids:
            request = self._requests.get(rid)
            if request is not None:
                self.counters.aborted += 1
                self._end(request, TokenOut(rid, finish=Finish(FinishReason.ABORT)))

    def schedule(self, now: float = 0.0) -> StepPlan | None:
        """The next step; None if there is nothing to compute, or not before a step in flight is committed. Each plan
        must be committed or failed. `now` (of `time.monotonic`) becomes the `scheduled_at` of who is let in."""
        self._now = now
        while not (planned := self._plan_rows()):
            if self._flights or not self._running:
                return None
            # Prompts hold all the pages and none can go on: the last comer gives way.
            self._preempt(self._running[-1])
        self._steps += 1
        self._flights[self._steps] = {row.slot: request for request, row in planned}
        self._growth = max(_GROWTH_MIN, self._growth - _GROWTH_DECAY)
        released, self._released = self._released, []
        return StepPlan(
            step=self._steps,
            rows=[row for _, row in planned],
            token_ids=list(itertools.chain.from_iterable(request.inputs(row) for request, row in planned)),
            admissions=[self._announce(request) for request, _ in planned if not request.announced],
            grants=[request.take_grant() for request, _ in planned if request.num_granted < len(request.pages)],
            released=released,
        )

    def constrained(self, plan: StepPlan) -> list[tuple[int, Request]]:
        """Requests of a plan in flight that sample under a grammar, by their index among the sampled rows."""
        flight = self._flights[plan.step]
        sampled = [flight[row.slot] for row in plan.rows if row.sample]
        return [(i, request) for i, request in enumerate(sampled) if request.matcher is not None]

    def commit(self, plan: StepPlan, result: StepResult) -> None:
        """Take in what the step gave: new tokens, finished requests, pages that others may now share."""
        flight = self._flights.pop(plan.step)
        for row, got in zip(plan.rows, result.rows, strict=True):
            if (request := flight.get(row.slot)) is None:
                continue  # it has ended or given way since
            self.counters.computed_tokens += row.length
            request.num_stored = row.start + row.length
            request.num_in_flight -= row.sample
            if got.error is not None:
                self._fail(request, (request.matcher and request.matcher.failure()) or got.error)
                continue
            if row.start < request.prompt_len:
                if row.prompt_logprobs:
                    # A chunk may be computed again after a preemption; take only what is new.
                    known = len(request.prompt_logprobs) - row.start
                    request.prompt_logprobs += (got.prompt_logprobs or [])[known:]
                self.kv.publish(request)
            if row.sample:
                self._take_token(request, got)
            elif request.num_stored == request.num_tokens:  # max_tokens is 0: the prompt was all that was asked
                self._tell(request, [], got, Finish(FinishReason.LENGTH))

    def fail_step(self, plan: StepPlan, failure: Failure) -> None:
        """The step did not run: end its requests. Their pages are not trusted and go back unpublished."""
        for request in self._flights.pop(plan.step).values():
            self._fail(request, failure)

    def take_outputs(self) -> list[TokenOut]:
        """News since the last call, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs

    # ---- planning ----------------------------------------------------------------------------------------------

    def _plan_rows(self) -> list[tuple[Request, Row]]:
        """Let newcomers in, then spend one step's budget on decodes, oldest first, and on chunks of prompts.

        Requests of a worse priority sit out the steps in which a better one's prompt is computed.
        """
        self._admit_newcomers()
        behind = [r for r in self._running if r.awaits_first_token]
        if not behind:
            return self._plan_decodes(self._running)
        urgent = min(r.priority for r in behind)
        planned = self._plan_decodes([r for r in self._running if r.priority <= urgent])
        budget = self._prompt_budget(urgent, len(planned))
        for request in behind:
            if request.priority == urgent and request.slot is not None and request.num_remaining > 1:
                budget -= self._plan_chunk(request, budget, planned)
        planned.sort(key=lambda item: item[1].length > 1)  # a prompt's last chunk may have one token as well
        return planned

    def _prompt_budget(self, priority: int, num_decoding: int) -> int:
        """Tokens of a step that prompts of this priority may have beside the requests that decode."""
        share = self.config.max_prefill_tokens if num_decoding else self.config.max_step_tokens
        if priority > 0:
            share = min(share, max(1, int(self.config.max_prefill_tokens * _YIELDING_SHARE)))
        return min(self.config.max_step_tokens - num_decoding, share)

    def _plan_decodes(self, active: list[Request]) -> list[tuple[Request, Row]]:
        """A row for each request that lacks one token; the oldest first, the newest give way if pages run out."""
        planned: list[tuple[Request, Row]] = []
        for request in [r for r in active if r.num_remaining == 1]:
            while request.slot is not None and not self.kv.reserve(request, request.num_computed + 1):
                self._preempt(self._running[-1])
            if request.slot is not None:
                planned.append((request, request.plan_row(1)))
        return planned

    def _plan_chunk(self, request: Request, budget: int, planned: list[tuple[Request, Row]]) -> int:
        """Plan as much of a prompt as budget and pages allow; returns its tokens, 0 if nothing can be had."""
        length = min(request.num_remaining, budget)
        while (room := self._room(request)) < length and self._displace(request):
            continue
        length = min(length, room)
        if length <= 0 or not self.kv.reserve(request, request.num_computed + length):
            return 0
        planned.append((request, request.plan_row(length)))
        return length

    def _room(self, request: Request) -> int:
        """Tokens that a request could compute in its pages and those that can be had."""
        return (len(request.pages) + self.kv.num_available) * self.config.page_size - request.num_computed

    def _admit_newcomers(self) -> None:
        """Let waiting requests in while budget, slots and the estimate of pages allow. For a better priority, running
        requests of a worse one give way."""
        if not self._waiting:
            return
        if not self._free_slots and self._waiting.best_priority >= self._running[-1].priority:
            return  # nobody gives way: do not look for cached prefixes in every step
        promised = sum(self._expected_pages(r) for r in self._running)
        priority: int | None = None
        for request in self._waiting.candidates(self.kv, 2 * self.config.max_running):
            if request.priority != priority:
                priority = request.priority
                ahead = [r.num_remaining for r in self._running if r.priority <= priority]
                owed, decoding = sum(n for n in ahead if n > 1), ahead.count(1)
            if owed >= self._prompt_budget(request.priority, decoding):
                return  # it would not get a token
            if self.kv.awaits_prefix(request):
                continue
            if not self._free_slots and not self._displace(request):
                return
            self.kv.open(request)
            needed = self.kv.pages_for(request.num_tokens + 1) - len(request.pages)
            while self._running and needed + promised > self.kv.num_available:
                if not self._displace(request):
                    self.kv.close(request, publish=False)
                    return  # nobody overtakes it: a large request would wait for ever
                promised = sum(self._expected_pages(r) for r in self._running)
            self._admit(request)
            promised += self._expected_pages(request)
            owed += request.num_remaining if request.num_remaining > 1 else 0
            decoding += request.num_remaining == 1

    def _displace(self, newcomer: Request) -> bool:
        """Preempt the newest of the worst priority for a request of a better one; False if there is none."""
        last = self._running[-1]
        if last.priority <= newcomer.priority:
            return False
        self._yield(last)
        return True

    def _admit(self, request: Request) -> None:
        self._waiting.remove(request)
        request.slot = self._free_slots.pop()
        request.announced = False
        bisect.insort(self._running, request, key=lambda r: r.order)
        if not request.info.prompt_tokens:  # the first time
            request.info = msgspec.structs.replace(
                request.info,
                prompt_tokens=request.prompt_len,
                cached_tokens=request.num_computed,
                scheduled_at=self._now,
            )
            self.counters.prompt_tokens += request.prompt_len
            self.counters.cached_tokens += request.num_computed

    def _announce(self, request: Request) -> Admission:
        assert request.slot is not None
        request.announced = True
        params = request.params
        banned = sorted(request.stop_ids) if params.min_tokens else []
        tokens = request.tokens(0, request.num_tokens) if params.reads_tokens else []
        return Admission(request.slot, tokens, request.prompt_len, params, banned)

    def _expected_pages(self, request: Request) -> int:
        """Pages that a running request will probably still ask for."""
        growth = self._growth * (request.max_tokens - len(request.generated))
        return max(0, self.kv.pages_for(int(request.num_tokens + growth)) - len(request.pages))

    def _preempt(self, request: Request) -> None:
        """Pages have run out: the estimate was too low, and a request gives way."""
        self._growth = min(1.0, self._growth + _GROWTH_PENALTY)
        self._yield(request)

    def _yield(self, request: Request) -> None:
        """Take a request's slot and pages; it resumes later, mostly from the radix tree."""
        self.counters.preemptions += 1
        self._leave_slot(request, publish=True)
        self._waiting.push(request)

    # ---- results -----------------------------------------------------------------------------------------------

    def _take_token(self, request: Request, got: RowResult) -> None:
        token = got.token_id
        assert token is not None
        if request.matcher is not None and (failure := request.matcher.advance(token)):
            self._fail(request, failure)
            return
        request.generated.append(token)
        self.counters.generated_tokens += 1
        finish = None
        if token in request.stop_ids and len(request.generated) >= request.params.min_tokens:
            finish = Finish(FinishReason.STOP, matched=token)
        elif request.matcher is not None and request.matcher.is_stopped():
            finish = Finish(FinishReason.STOP)
        elif len(request.generated) >= request.max_tokens:
            finish = Finish(FinishReason.LENGTH)
        self._tell(request, [token], got, finish)

    def _tell(self, request: Request, tokens: list[int], got: RowResult, finish: Finish | None) -> None:
        """The news of a request, which end it with `finish`."""
        admitted = self._describe(request) if len(request.generated) <= 1 else None  # with the first of them
        output = TokenOut(request.rid, tokens, admitted, [got.logprob] if got.logprob is not None else None, finish)
        if finish is None:
            self._outputs.append(output)
        else:
            self.counters.finished += 1
            self._end(request, output)

    def _describe(self, request: Request) -> Admitted:
        wants_logprobs = request.params.prompt_logprobs is not None
        return Admitted(
            request.info,
            request.params,
            request.stream,
            prompt_ids=request.tokens(0, request.prompt_len) if request.echo or wants_logprobs else None,
            prompt_logprobs=[None, *request.prompt_logprobs] if wants_logprobs else None,
        )

    def _fail(self, request: Request, failure: Failure) -> None:
        self.counters.failed += 1
        self._end(request, TokenOut(request.rid, failure=failure), publish=False)

    def _end(self, request: Request, output: TokenOut, publish: bool = True) -> None:
        del self._requests[request.rid]
        if request.slot is None:
            self._waiting.remove(request)
        else:
            self._leave_slot(request, publish)
        self._outputs.append(output)

    def _leave_slot(self, request: Request, publish: bool) -> None:
        assert request.slot is not None
        self.kv.close(request, publish)
        self._running.remove(request)
        self._released.append(request.slot)
        self._free_slots.append(request.slot)
        for flight in self._flights.values():
            flight.pop(request.slot, None)
        request.slot = None

    def _check(self, message: Generate) -> int:
        """The request's effective max_tokens; raises `RequestError` if it cannot fit even alone."""
        prompt_len, wanted = len(message.prompt_ids), message.params.max_tokens
        assert wanted is not None and prompt_len > 0
        if message.rid in self._requests:
            raise RequestError(FailureKind.INVALID_REQUEST, f"request id {message.rid!r} is in use", param="rid")
        room = self._capacity - prompt_len
        if room < min(wanted, 1) or (message.max_tokens_given and wanted > room):
            raise RequestError(
                FailureKind.CONTEXT_LENGTH_EXCEEDED,
                f"the prompt has {prompt_len} tokens and up to {wanted} are to be generated, "
                f"but the KV cache holds {self._capacity} tokens in all",
                param="max_tokens" if room > 0 else None,
                code="context_length_exceeded",
            )
        return min(wanted, room)
