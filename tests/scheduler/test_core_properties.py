"""Random lives of the scheduler core: whatever is added, aborted, scheduled and committed, in tiny pools with shared
prefixes, with results that come at once or a step late, the pages add up after every step, each request ends exactly
once, and its tokens are those that it would get alone."""

import collections
import dataclasses

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from ramet.ipc.errors import Failure, FailureKind
from ramet.ipc.messages import Generate, Logprob
from ramet.ipc.sampling import SamplingParams
from ramet.ipc.step import UNKNOWN_TOKEN, RowResult, StepPlan, StepResult
from ramet.scheduler.config import Policy, SchedulerConfig
from ramet.scheduler.core import SchedulerCore

EOS = 7


@dataclasses.dataclass
class Slot:
    """What a runner keeps of a request; the test's own copy, fed by plans alone."""

    tokens: list[int]
    prompt_len: int
    pages: list[int]


class FakeMatcher:
    """A grammar that allows everything, and knows what it has been told."""

    def __init__(self) -> None:
        self.consumed: list[int] = []

    def advance(self, token: int) -> None:
        self.consumed.append(token)

    def failure(self) -> None:
        return None

    def is_stopped(self) -> bool:
        return False


class FakeMemory:
    """Plays the model runner: keeps, for each page, the tokens written to it, and checks what each row would read.

    It executes plans in their order; a result that the core gets late has been there all the time."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.slots: dict[int, Slot] = {}
        self.sampled: dict[int, int] = {}
        self.written: dict[int, list[int | None]] = {}
        self.writers: dict[tuple[int, int], int] = {}  # the step that wrote an entry of a page last

    def execute(self, plan: StepPlan) -> StepResult:
        for slot in plan.released:
            self.slots.pop(slot, None)
        for admission in plan.admissions:
            assert admission.slot not in self.slots, "a slot was given twice"
            self.slots[admission.slot] = Slot(list(admission.token_ids), admission.prompt_len, [])
        for grant in plan.grants:
            pages = self.slots[grant.slot].pages
            assert grant.first <= len(pages), "a gap in the page table"
            pages[grant.first :] = grant.pages
        assert len({row.slot for row in plan.rows}) == len(plan.rows), "a slot twice in a plan"
        lengths = [row.length for row in plan.rows]
        assert lengths == sorted(lengths, key=lambda n: n > 1), "decode rows come first"
        results, at = [], 0
        for row in plan.rows:
            self._write(plan.step, row.slot, row.start, plan.token_ids[at : at + row.length])
            at += row.length
        at = 0
        for row in plan.rows:
            at += row.length
            results.append(self._result(row))
        assert at == len(plan.token_ids)
        return StepResult(plan.step, results)

    def forget(self, step: int) -> None:
        """This step did not run after all."""
        for (page, entry), writer in self.writers.items():
            if writer == step:
                self.written[page][entry] = None

    def _write(self, step: int, slot: int, start: int, tokens: list[int]) -> None:
        state = self.slots[slot]
        for position, token in enumerate(tokens, start):
            if token == UNKNOWN_TOKEN:
                assert position == len(state.tokens), "this token was known"
                token = self.sampled[slot]
            if position == len(state.tokens):
                state.tokens.append(token)
            assert state.tokens[position] == token
            page, entry = state.pages[position // self.page_size], position % self.page_size
            self.written.setdefault(page, [None] * self.page_size)[entry] = token
            self.writers[page, entry] = step

    def _result(self, row) -> RowResult:
        state = self.slots[row.slot]
        end = row.start + row.length
        # The whole context must read back as this request's own tokens, cached pages included.
        seen = [self.written[state.pages[p // self.page_size]][p % self.page_size] for p in range(end)]
        assert seen == state.tokens[:end], "a row reads someone else's KV"
        prompt_logprobs = None
        if row.prompt_logprobs:
            last = min(end, state.prompt_len - 1)
            prompt_logprobs = [Logprob(state.tokens[p + 1], -float(p)) for p in range(row.start, last)]
        token = (sum(state.tokens[:end]) * 31 + end) % 11 if row.sample else None
        if token is not None:
            self.sampled[row.slot] = token
        return RowResult(token, prompt_logprobs=prompt_logprobs)


class CoreMachine(RuleBasedStateMachine):
    rids = Bundle("rids")

    @initialize(
        page_size=st.sampled_from([1, 2, 4]),
        num_pages=st.integers(6, 24),
        max_running=st.integers(1, 5),
        step_tokens=st.integers(5, 24),
        prefill_tokens=st.integers(1, 12),
        policy=st.sampled_from(Policy),
        prefix_cache=st.booleans(),
    )
    def start(self, page_size, num_pages, max_running, step_tokens, prefill_tokens, policy, prefix_cache):
        self.num_pages = num_pages
        self.core = SchedulerCore(
            SchedulerConfig(
                page_size=page_size,
                max_running=max_running,
                max_step_tokens=step_tokens,
                max_prefill_tokens=prefill_tokens,
                context_length=10_000,
                eos_ids=(EOS,),
                policy=policy,
                prefix_cache=prefix_cache,
            ),
            num_pages,
        )
        self.memory = FakeMemory(page_size)
        self.count = 0
        self.prompts: dict[str, list[int]] = {}
        self.live: dict[str, Generate] = {}
        self.generated: dict[str, list[int]] = {}
        self.flying: collections.deque[tuple[StepPlan, StepResult]] = collections.deque()

    @rule(
        target=rids,
        family=st.integers(0, 2),
        shared=st.integers(0, 20),
        own=st.lists(st.integers(0, 10), max_size=6),
        max_tokens=st.integers(0, 30),
        given_max=st.booleans(),
        min_tokens=st.sampled_from([0, 0, 3]),
        priority=st.sampled_from([0, 0, 0, 5]),
        prompt_logprobs=st.sampled_from([None, 0]),
        ignore_eos=st.booleans(),
        matcher=st.sampled_from([False, False, True]),
    )
    def add(
        self, family, shared, own, max_tokens, given_max, min_tokens, priority, prompt_logprobs, ignore_eos, matcher
    ):
        prompt = [(family * 13 + i * 7) % 11 for i in range(shared)] + own or [1]
        return self.submit(prompt, max_tokens, given_max, min_tokens, priority, prompt_logprobs, ignore_eos, matcher)

    @rule(target=rids, rid=rids, cut=st.integers(0, 6), own=st.lists(st.integers(0, 10), max_size=9))
    def follow_up(self, rid, cut, own):
        """A next turn: the prompt goes on from what an earlier request was given, or from a part of it."""
        told = self.prompts[rid] + self.generated.get(rid, [])
        return self.submit((told[: len(told) - cut] or [1]) + own, 6, False, 0, 0, None, True, False)

    def submit(self, prompt, max_tokens, given_max, min_tokens, priority, prompt_logprobs, ignore_eos, matcher):
        rid = f"r{self.count}"
        self.prompts[rid] = prompt
        self.count += 1
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min(min_tokens, max_tokens),
            prompt_logprobs=prompt_logprobs,
            ignore_eos=ignore_eos,
            repetition_penalty=1.1,  # so that admissions tell the tokens, to compare with what rows read
            seed=1,
        )
        message = Generate(rid, prompt, params, given_max, priority)
        self.live[rid] = message
        self.core.add(message, FakeMatcher() if matcher else None)
        self.collect()
        return rid

    @rule(rid=rids)
    def abort(self, rid):
        self.core.abort([rid])
        self.collect()
        assert rid not in self.live

    @rule(steps=st.integers(1, 8), ahead=st.integers(0, 2))
    def step(self, steps, ahead):
        """Steps whose results come at once, or so many steps late."""
        for _ in range(steps):
            if not self.turn(ahead):
                assert not self.core.has_work, "requests wait although nothing runs"
                return
            self.collect()
            self.pages_add_up()

    def turn(self, ahead):
        """Plan and launch a step, then take in the oldest that may not fly on; False if there was nothing to do."""
        plan = self.core.schedule()
        if plan is not None:
            self.launch(plan)
        if self.flying and (plan is None or len(self.flying) > ahead):
            self.core.commit(*self.flying.popleft())
            return True
        return plan is not None

    def launch(self, plan):
        for _, request in self.core.constrained(plan):
            assert request.matcher.consumed == request.generated
            assert request.num_computed == request.num_tokens, "a mask for a token that is not the next"
        self.flying.append((plan, self.memory.execute(plan)))

    @rule(late=st.booleans())
    def step_fails(self, late):
        """When it is launched, or when its result is read and others have been launched behind it."""
        plan = None if late else self.core.schedule()
        if plan is not None:
            self.launch(plan)
        if self.flying:
            failed, _ = self.flying.popleft() if late else self.flying.pop()
            self.memory.forget(failed.step)
            self.core.fail_step(failed, Failure(FailureKind.INTERNAL, "the device is gone"))
            self.collect()

    def collect(self):
        for out in self.core.take_outputs():
            message = self.live.get(out.rid)
            assert message is not None, f"{out.rid} spoke after its end"
            tokens = self.generated.setdefault(out.rid, [])
            assert (out.admitted is not None) == (bool(out.token_ids or out.finish) and not tokens) or (
                out.finish is not None and out.finish.reason == "abort"
            )
            tokens += out.token_ids
            if out.admitted and message.params.prompt_logprobs is not None:
                given = out.admitted.prompt_logprobs
                assert [lp.token_id for lp in given[1:]] == message.prompt_ids[1:]
                assert [lp.logprob for lp in given[1:]] == [-float(p) for p in range(len(message.prompt_ids) - 1)]
            if out.failure:
                del self.live[out.rid]
            elif out.finish:
                del self.live[out.rid]
                self.check_end(message, tokens, out.finish)

    def check_end(self, message, tokens, finish):
        params = message.params
        expected, context = [], list(message.prompt_ids)
        while len(expected) < params.max_tokens:
            token = (sum(context) * 31 + len(context)) % 11
            context.append(token)
            expected.append(token)
            if token == EOS and not params.ignore_eos and len(expected) >= params.min_tokens:
                break
        assert tokens == expected[: len(tokens)]
        if finish.reason == "abort":
            return
        if finish.reason == "stop":
            assert finish.matched == EOS and tokens == expected
        elif message.max_tokens_given:
            assert len(tokens) == params.max_tokens

    @invariant()
    def pages_add_up(self):
        if not hasattr(self, "core"):
            return
        kv, core = self.core.kv, self.core
        requests = core._running
        owned = sum(len(r.pages) - r.num_shared for r in requests)
        assert kv.allocator.num_free + kv.cache.num_pages + owned == self.num_pages
        # Nodes, locks and counts of the tree are what a walk finds.
        nodes, stack = [], [kv.cache.root]
        while stack:
            node = stack.pop()
            stack += node.children.values()
            nodes.append(node)
        assert sum(len(n.pages) for n in nodes) == kv.cache.num_pages
        assert sum(len(n.pages) for n in nodes if not n.locks) == kv.cache.evictable_pages
        assert all(len(n.key) == len(n.pages) * kv.cache.page_bytes for n in nodes)
        every = [p for n in nodes for p in n.pages] + [p for r in requests for p in r.pages[r.num_shared :]]
        assert len(set(every)) == len(every), "a page has two owners"
        assert len(requests) + len(core._waiting) == len(self.live)

    def teardown(self):
        if not hasattr(self, "core"):
            return
        for _ in range(100_000):
            if not self.turn(ahead=1):
                break
            self.collect()
        assert not self.live and not self.core.has_work
        assert self.core.kv.num_available == self.num_pages, "pages leaked"
        assert not self.core.kv._pending, "a prefix is announced by nobody"


CoreMachine.TestCase.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
TestSchedulerCore = CoreMachine.TestCase
