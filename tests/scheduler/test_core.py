"""What the scheduler promises, one promise a test."""

from array import array

import pytest

from ramet.ipc.errors import FailureKind
from ramet.scheduler.config import Policy
from ramet.scheduler.radix_cache import RadixCache


def test_simultaneous_requests_compute_a_cold_prefix_once(make_driver):
    driver = make_driver(num_pages=200, max_step_tokens=32)
    prefix = list(range(2, 66))
    for i in range(8):
        driver.add(f"r{i}", [*prefix, 70 + i], max_tokens=2)
    driver.finish()
    assert len(driver.ended()) == 8
    # 64 tokens of prefix once, then one own token each, then one decode each.
    assert driver.core.counters.computed_tokens == 64 + 8 + 8
    assert driver.core.counters.cached_tokens == 7 * 64


def test_who_awaits_a_prefix_looks_for_it_twice_however_long_it_takes(make_driver, monkeypatch):
    looks = []
    find = RadixCache.find
    monkeypatch.setattr(RadixCache, "find", lambda self, *args: looks.append(1) or find(self, *args))
    driver = make_driver(num_pages=400, max_step_tokens=20)
    driver.add("stream", [1], max_tokens=60)
    driver.step()
    driver.add("owner", list(range(2, 102)), max_tokens=2, priority=1)
    driver.step()
    for i in range(6):
        driver.add(f"r{i}", [*range(2, 82), 200 + i], max_tokens=2, priority=1)
    steps = 0
    while not driver.core.counters.cached_tokens:
        driver.step()
        steps += 1
    assert steps > 3
    driver.finish()
    assert driver.core.counters.cached_tokens == 6 * 80
    assert len(looks) <= 2 * 6 + 2


def test_a_prefix_that_is_longer_than_what_two_share_is_awaited_only_so_far(make_driver):
    driver = make_driver(num_pages=400, max_step_tokens=16)
    driver.add("long", list(range(2, 162)), max_tokens=1)
    driver.step()
    driver.add("short", [*range(2, 50), 200], max_tokens=1)
    driver.finish()
    assert driver.outputs[1].admitted.prompt.cached_tokens == 48
    # It enters as soon as the other has its 48 tokens, and need not wait for the rest.
    first = next(i for i, plan in enumerate(driver.plans) if any(row.start == 48 for row in plan.rows))
    assert first == 3


def test_a_plan_tells_all_tokens_only_if_the_runner_reads_them(make_driver):
    for params, told in (({}, False), ({"min_tokens": 1}, True), ({"presence_penalty": 1.0}, True)):
        driver = make_driver()
        driver.add("a", [2, 3, 4, 5, 6], **params)
        plan = driver.step()
        assert plan.token_ids == [2, 3, 4, 5, 6]
        assert plan.admissions[0].token_ids == ([2, 3, 4, 5, 6] if told else [])


def test_a_page_is_granted_once(make_driver):
    driver = make_driver(max_step_tokens=10)
    driver.add("a", list(range(2, 27)), max_tokens=6)  # chunks that end within a page of 4 tokens
    driver.finish()
    granted = [page for plan in driver.plans for grant in plan.grants for page in grant.pages]
    assert len(granted) == len(set(granted)) == 8


def test_prefix_is_computed_again_if_its_owner_is_aborted(make_driver):
    driver = make_driver(num_pages=200, max_step_tokens=8)
    prefix = list(range(2, 66))
    driver.add("owner", [*prefix, 70])
    driver.add("other", [*prefix, 71])
    driver.step()
    driver.core.abort(["owner"])
    driver.finish()
    assert driver.ended() == ["owner", "other"]
    # The chunk that the owner computed was kept.
    assert driver.core.counters.cached_tokens == 8


def test_decodes_go_on_while_a_long_prompt_is_read(make_driver):
    driver = make_driver(num_pages=200, max_prefill_tokens=16)
    driver.add("stream", [2, 3], max_tokens=30)
    driver.step()
    driver.add("long", list(range(2, 162)), max_tokens=1)
    while len(driver.ended()) == 0:
        plan = driver.step()
        assert plan.rows[0].length == 1, "the stream has a row in every step"
        assert sum(row.length for row in plan.rows[1:]) <= 16
    assert driver.ended() == ["long"]


def test_a_second_request_reuses_whole_pages_of_the_first(make_driver):
    driver = make_driver()
    prompt = list(range(2, 24))
    driver.add("a", prompt, max_tokens=1)
    driver.finish()
    driver.add("b", prompt, max_tokens=1)
    driver.finish()
    assert [out.admitted.prompt.cached_tokens for out in driver.outputs if out.admitted] == [0, 20]
    assert driver.plans[-1].rows[0].start == 20


def test_generated_tokens_are_reused_by_the_next_turn(make_driver):
    driver = make_driver()
    driver.add("turn1", [2, 3, 4], max_tokens=10)
    driver.finish()
    driver.add("turn2", [2, 3, 4] + [1] * 10 + [5], max_tokens=1)
    driver.finish()
    assert driver.outputs[-1].admitted.prompt.cached_tokens == 12


def test_without_prefix_cache_nothing_is_reused(make_driver):
    driver = make_driver(prefix_cache=False)
    for rid in ("a", "b"):
        driver.add(rid, list(range(2, 24)), max_tokens=1)
        driver.finish()
    assert driver.core.counters.cached_tokens == 0
    assert driver.core.kv.allocator.num_free == 64


def test_running_out_of_pages_preempts_the_newest_and_loses_nothing(make_driver):
    driver = make_driver(num_pages=10, max_prefill_tokens=64)
    for i in range(4):
        driver.add(f"r{i}", [2 + i] * 5, max_tokens=30)
    driver.finish()
    assert driver.core.counters.preemptions > 0
    assert driver.ended()[0] == "r0", "the oldest is never the one to give way"
    assert sorted(driver.ended()) == ["r0", "r1", "r2", "r3"]
    generated = [sum(len(o.token_ids) for o in driver.outputs if o.rid == f"r{i}") for i in range(4)]
    assert generated == [30] * 4


def test_lower_priority_number_goes_first_and_equal_ones_by_arrival(make_driver):
    driver = make_driver(max_running=1)
    driver.add("batch", [2, 3], priority=10)
    driver.add("first", [4, 5])
    driver.add("second", [6, 7])
    driver.finish()
    assert driver.ended() == ["first", "second", "batch"]


def test_longest_prefix_match_prefers_what_is_cached(make_driver):
    driver = make_driver(max_running=1, policy=Policy.LPM)
    driver.add("seed", list(range(2, 22)), max_tokens=1)
    driver.finish()
    driver.add("cold", list(range(30, 50)), max_tokens=1)
    driver.add("warm", list(range(2, 24)), max_tokens=1)
    driver.finish()
    assert driver.ended() == ["seed", "warm", "cold"]


def test_least_recently_used_prefix_is_evicted_first(make_driver):
    driver = make_driver(num_pages=12)
    old, new = list(range(100, 116)), list(range(200, 216))
    for rid, prompt in (("old", old), ("new", new), ("old again", old)):
        driver.add(rid, prompt, max_tokens=1)
        driver.finish()
    driver.add("big", list(range(300, 320)), max_tokens=1)  # needs more than what is free
    driver.finish()
    cached = [driver.core.kv.cache.find(array("I", prompt).tobytes(), 4)[1] for prompt in (old, new)]
    assert cached[0] == 4 and cached[1] < 4


def test_request_too_large_for_the_pool_fails_with_the_numbers(make_driver):
    driver = make_driver(num_pages=4)
    driver.add("big", [1] * 10, max_tokens=7)
    (out,) = driver.outputs
    assert out.failure.kind is FailureKind.CONTEXT_LENGTH_EXCEEDED
    assert "10 tokens" in out.failure.message and "16" in out.failure.message
    assert out.failure.param == "max_tokens"
    driver.add("bigger", [1] * 16, max_tokens=1)
    assert driver.outputs[1].failure.param is None, "no max_tokens would help"


def test_max_tokens_that_nobody_asked_for_is_cut_to_the_pool(make_driver):
    driver = make_driver(num_pages=4)
    driver.add("rest", [1] * 10, max_tokens=900, given=False)
    driver.finish()
    assert sum(len(out.token_ids) for out in driver.outputs) == 6
    assert driver.outputs[-1].finish.reason == "length"


def test_eos_counts_only_after_min_tokens(make_driver):
    driver = make_driver(eos_ids=(1,))
    driver.add("now", [2, 3], max_tokens=9)
    driver.add("later", [2, 3], max_tokens=9, min_tokens=4)
    driver.add("never", [2, 3], max_tokens=9, ignore_eos=True)
    driver.finish()
    counts = {r: sum(len(o.token_ids) for o in driver.outputs if o.rid == r) for r in ("now", "later", "never")}
    assert counts == {"now": 1, "later": 4, "never": 9}
    # The runner is told which tokens to ban until then.
    bans = [a.eos_ids for plan in driver.plans for a in plan.admissions]
    assert bans == [[], [1], []]


def test_more_slots_than_step_tokens_is_refused(make_driver):
    with pytest.raises(ValueError, match="max_running_requests"):
        make_driver(max_running=65)


def test_same_request_id_twice_is_refused(make_driver):
    driver = make_driver()
    driver.add("a", [2, 3])
    driver.add("a", [2, 3])
    assert driver.outputs[0].failure.param == "rid"


def test_flush_drops_the_cache_but_not_what_is_in_use(make_driver):
    driver = make_driver()
    driver.add("a", list(range(2, 24)), max_tokens=1)
    driver.finish()
    driver.add("b", list(range(50, 72)), max_tokens=50)
    driver.step()
    assert driver.core.kv.flush() == 5
    driver.finish()
    assert sorted(driver.ended()) == ["a", "b"]


def test_many_requests_leave_no_stale_entries_in_the_tree(make_driver):
    driver = make_driver()
    for i in range(500):
        driver.add(f"r{i}", list(range(2, 24)), max_tokens=1)
        driver.finish()
    assert len(driver.core.kv.cache._leaves) < 200


def test_prompt_logprobs_stay_whole_over_a_preemption_in_the_middle_of_the_prompt(make_driver):
    driver = make_driver(max_step_tokens=10)
    driver.add("scored", list(range(2, 32)), max_tokens=0, prompt_logprobs=0)
    driver.step()
    driver.core._preempt(driver.core._running[-1])
    driver.finish()
    # It resumed at the last whole page, 8, below the 10 positions that were scored already.
    assert [plan.rows[0].start for plan in driver.plans] == [0, 8, 18, 28]
    given = driver.outputs[-1].admitted.prompt_logprobs
    assert given[0] is None and [lp.token_id for lp in given[1:30]] == list(range(1, 30))


def test_a_better_priority_takes_the_slot_of_the_newest_of_a_worse_one(make_driver):
    driver = make_driver(max_running=2)
    driver.add("batch-0", [1, 2, 3], max_tokens=9, priority=100)
    driver.add("batch-1", [4, 5, 6], max_tokens=9, priority=100)
    driver.step()
    driver.add("chat", [7, 8, 9], max_tokens=2)
    driver.step()
    assert driver.outputs[-1].rid == "chat"
    assert driver.core.counters.preemptions == 1
    driver.finish()
    assert driver.ended() == ["chat", "batch-0", "batch-1"]
    tokens = [token for out in driver.outputs if out.rid == "batch-1" for token in out.token_ids]
    assert len(tokens) == 9


def test_an_equal_priority_takes_no_slot(make_driver):
    driver = make_driver(max_running=1)
    driver.add("first", [1, 2, 3], max_tokens=3, priority=100)
    driver.step()
    driver.add("second", [4, 5, 6], priority=100)
    driver.finish()
    assert driver.ended() == ["first", "second"]
    assert driver.core.counters.preemptions == 0


def test_a_worse_priority_sits_out_the_steps_that_compute_a_better_ones_prompt(make_driver):
    driver = make_driver(max_step_tokens=32, max_prefill_tokens=32)
    driver.add("decoding", [1, 2, 3], max_tokens=20, priority=100)
    driver.add("prefilling", list(range(10, 90)), max_tokens=20, priority=100)
    driver.step()
    driver.step()
    driver.add("chat", list(range(200, 260)), max_tokens=4)
    rows = [[(row.start, row.length) for row in driver.step().rows] for _ in range(3)]
    assert rows[:2] == [[(0, 32)], [(32, 28)]]  # its whole prompt, alone
    assert len(rows[2]) == 3  # and then all go on


def test_prompts_of_a_worse_priority_than_the_default_make_short_steps(make_driver):
    driver = make_driver(max_step_tokens=64, max_prefill_tokens=32)
    driver.add("batch", list(range(10, 90)), priority=100)
    assert [row.length for row in driver.step().rows] == [24]
    driver.add("chat", [1, 2, 3], max_tokens=20)
    assert [row.length for row in driver.step().rows] == [3]
    assert [row.length for row in driver.step().rows] == [1, 24]


def test_a_better_priority_takes_the_pages_of_a_worse_one(make_driver):
    driver = make_driver(num_pages=10)  # 40 tokens
    for index in range(4):
        driver.add(f"batch-{index}", [10 * index + 1, 2, 3, 4, 5, 6, 7], max_tokens=2, priority=100)
    driver.step()
    driver.add("chat", list(range(100, 130)), max_tokens=4)
    driver.step()
    assert driver.outputs[-1].rid == "chat"
    driver.finish()
    assert len(driver.ended()) == 5
    assert driver.core.counters.preemptions > 0


def test_a_better_priority_does_not_wait_for_a_prefix_that_a_worse_one_computes(make_driver):
    driver = make_driver(max_running=4, max_step_tokens=16, max_prefill_tokens=16)
    shared = list(range(2, 66))
    driver.add("batch", shared, priority=100)
    driver.step()
    driver.add("chat", [*shared, 70], max_tokens=1)
    for i in range(12):  # others of its kind keep the worse one from going on
        driver.add(f"other-{i}", list(range(100 * i + 100, 100 * i + 116)), max_tokens=1)
    driver.finish()
    assert driver.ended()[0] == "chat"
