"""Random lives of the scheduler core: whatever is added, aborted, scheduled and committed, in tiny pools with shared
prefixes, the pages add up after every step and each request ends exactly once."""

import dataclasses

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from ramet.ipc.errors import Failure, FailureKind
from ramet.ipc.messages import Generate, Logprob
from ramet.ipc.sampling import SamplingParams
from ramet.ipc.step import RowResult, StepPlan, StepResult
from ramet.scheduler.config import Policy, SchedulerConfig
from ramet.scheduler.core import SchedulerCore

EOS = 7


@dataclasses.dataclass
class Slot:
    """What a runner keeps of a request; the test's own copy, fed by plans alone."""

    tokens: list[int]
    prompt_len: int
    pages: list[int]


class FakeMemory:
    """Plays the model runner: keeps, for each page, the tokens written to it, and checks what each row would read."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.slots: dict[int, Slot] = {}
        self.written: dict[int, list[int | None]] = {}

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
            self._write(row.slot, row.start, plan.token_ids[at : at + row.length])
            at += row.length
        at = 0
        for row in plan.rows:
            at += row.length
            results.append(self._result(row))
        assert at == len(plan.token_ids)
        return StepResult(plan.step, results)

    def _write(self, slot: int, start: int, tokens: list[int]) -> None:
        state = self.slots[slot]
        for position, token in enumerate(tokens, start):
            if position == len(state.tokens):
                state.tokens.append(token)
            assert state.tokens[position] == token
            page = state.pages[position // self.page_size]
            self.written.setdefault(page, [None] * self.page_size)[position % self.page_size] = token

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
    )
    def add(self, family, shared, own, max_tokens, given_max, min_tokens, priority, prompt_logprobs, ignore_eos):
        prompt = [(family * 13 + i * 7) % 11 for i in range(shared)] + own or [1]
        return self.submit(prompt, max_tokens, given_max, min_tokens, priority, prompt_logprobs, ignore_eos)

    @rule(target=rids, rid=rids, cut=st.integers(0, 6), own=st.lists(st.integers(0, 10), max_size=9))
    def follow_up(self, rid, cut, own):
        """A next turn: the prompt goes on from what an earlier request was given, or from a part of it."""
        told = self.prompts[rid] + self.generated.get(rid, [])
        return self.submit((told[: len(told) - cut] or [1]) + own, 6, False, 0, 0, None, True)

    def submit(self, prompt, max_tokens, given_max, min_tokens, priority, prompt_logprobs, ignore_eos):
        rid = f"r{self.count}"
        self.prompts[rid] = prompt
        self.count += 1
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min(min_tokens, max_tokens),
            prompt_logprobs=prompt_logprobs,
            ignore_eos=ignore_eos,
            seed=1,
        )
        message = Generate(rid, prompt, params, given_max, priority)
        self.live[rid] = message
        self.core.add(message)
        self.collect()
        return rid

    @rule(rid=rids)
    def abort(self, rid):
        self.core.abort([rid])
        self.collect()
        assert rid not in self.live

    @rule(steps=st.integers(1, 8))
    def step(self, steps):
        for _ in range(steps):
            plan = self.core.schedule()
            if plan is None:
                assert not self.core.has_work, "requests wait although nothing runs"
                return
            self.core.commit(plan, self.memory.execute(plan))
            self.collect()
            self.pages_add_up()

    @rule()
    def step_fails(self):
        plan = self.core.schedule()
        if plan is not None:
            self.memory.execute(plan)
            self.core.fail_step(Failure(FailureKind.INTERNAL, "the device is gone"))
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
        if finish.reason == "abort":
            return
        expected, context = [], list(message.prompt_ids)
        while len(expected) < params.max_tokens:
            token = (sum(context) * 31 + len(context)) % 11
            context.append(token)
            expected.append(token)
            if token == EOS and not params.ignore_eos and len(expected) >= params.min_tokens:
                break
        assert tokens == expected[: len(tokens)]
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
        assert all(len(n.key) == len(n.pages) * kv.page_size for n in nodes)
        every = [p for n in nodes for p in n.pages] + [p for r in requests for p in r.pages[r.num_shared :]]
        assert len(set(every)) == len(every), "a page has two owners"
        assert len(requests) + len(core._waiting) == len(self.live)

    def teardown(self):
        if not hasattr(self, "core"):
            return
        for _ in range(100_000):
            plan = self.core.schedule()
            if plan is None:
                break
            self.core.commit(plan, self.memory.execute(plan))
            self.collect()
        assert not self.live and not self.core.has_work
        assert self.core.kv.num_available == self.num_pages, "pages leaked"
        assert not self.core.kv._pending, "a prefix is announced by nobody"


CoreMachine.TestCase.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
TestSchedulerCore = CoreMachine.TestCase
