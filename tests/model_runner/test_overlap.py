"""Steps launched ahead, and small steps as a CUDA graph would run them, give the same answers to the last bit."""

import msgspec
import numpy as np
import pytest
import torch
from support.engine import InlineEngine
from support.lives import KINDS, run_all, told, use_graphs

from ramet.ipc.step import UNKNOWN_TOKEN
from ramet.model_runner.batch import pack, unpack
from ramet.model_runner.cuda_graph import Bucket, StepGraphs, buckets
from ramet.model_runner.runner import ModelRunner


@pytest.fixture(scope="module")
def folder(tiny_model):
    torch.set_num_threads(1)
    return tiny_model("llama")


@pytest.fixture(scope="module")
def expected(folder):
    return told(run_all(folder))


def test_the_lives_are_what_they_should_be(expected):
    assert len(expected) == 2 * len(KINDS)
    ends = {finish.reason for _, finish, _, _ in expected.values()}
    assert ends == {"stop", "length"}
    assert any(logprobs for _, _, logprobs, _ in expected.values())


def test_steps_ahead_change_nothing(folder, expected, monkeypatch):
    unknown = watch_unknown(monkeypatch)
    assert told(run_all(folder, steps_ahead=1)) == expected
    assert sum(unknown) > 20, "hardly a step was planned before its input was known"


def test_steps_ahead_change_nothing_where_pages_are_scarce(folder, expected):
    engines = []

    def squeeze(engine: InlineEngine) -> None:
        engine.core._growth = 0.0  # let in more than there is room for
        engines.append(engine)

    assert told(run_all(folder, steps_ahead=1, total_tokens=144, change=squeeze)) == expected
    assert engines[0].core.counters.preemptions > 0


def test_padded_steps_at_fixed_addresses_change_nothing(folder, expected, monkeypatch):
    """The capture that is passed here runs the step again each time, as a replay does."""
    replayed = []
    watched = spy(StepGraphs.replay, lambda _, plan, bucket: replayed.append((plan, bucket)))
    monkeypatch.setattr(StepGraphs, "replay", watched)
    assert told(run_all(folder, steps_ahead=1, change=use_graphs)) == expected
    decodes = {len(plan.rows) for plan, bucket in replayed if bucket.longest == 1}
    assert len(decodes) > 3 and max(decodes) <= 8
    with_chunks = [plan for plan, bucket in replayed if bucket.longest > 1]
    assert any(plan.token_ids.count(UNKNOWN_TOKEN) and len(plan.rows) > 2 for plan in with_chunks)
    assert len({bucket for _, bucket in replayed if bucket.longest > 1}) > 1


@pytest.mark.parametrize("new", [15, 16, 17])
def test_a_prompt_behind_a_cached_prefix_is_one_graph(folder, new):
    """One token less than the graph holds, just as many, and one more."""
    answers = []
    for change in (lambda engine: None, use_graphs):
        engine = InlineEngine(folder)
        change(engine)
        prefix = list(range(3, 67))
        engine.add("first", prefix, 1)
        engine.run()
        engine.add("hit", prefix + list(range(90, 90 + new)), 3, logprobs=1)
        plan = engine.core.schedule()
        assert [(row.start, row.length) for row in plan.rows] == [(64, new)]
        if engine.runner._graphs is not None:
            assert engine.runner._graphs.find(plan) == Bucket(16 if new <= 16 else 32, 8)
        engine.core.commit(plan, engine.runner.execute(plan))
        engine.run()
        answers.append(told(engine.outputs)["hit"])
    assert answers[0] == answers[1]


def test_padding_rows_touch_the_dummy_page_alone(folder):
    engine = InlineEngine(folder)
    use_graphs(engine)
    for i in range(3):  # which a graph of four computes
        engine.add(f"r{i}", [5 + i, 6, 7], 4)
    engine.run()
    assert [len(tokens) for tokens in engine.tokens.values()] == [4, 4, 4]
    pool = engine.runner._pool
    written = [page for page in range(pool.num_pages) if pool.keys[0][page].any()]
    # The warm-up wrote to the first four.
    assert set(written) <= {0, 1, 2, 3} and pool.keys[0][pool.num_pages].any()


def test_graphs_hold_small_steps_whose_rows_all_sample(folder):
    engine = InlineEngine(folder)
    use_graphs(engine)
    engine.add("r", list(range(3, 80)), 4)
    found = []
    while (plan := engine.core.schedule()) is not None:
        found.append(engine.runner._graphs.find(plan))
        engine.core.commit(plan, engine.runner.execute(plan))
    # A chunk of 64, one of 13, three tokens.
    assert found == [None, Bucket(16, 8), *[Bucket(1, 1)] * 3]


def test_a_graph_keeps_a_row_for_padding_beside_chunks():
    chunks, decodes = Bucket(32, 8), Bucket(8, 8)
    assert chunks.holds(7, 32) and chunks.holds(1, 2)
    assert not chunks.holds(8, 20) and not chunks.holds(3, 33)
    assert not chunks.holds(5, 5) and decodes.holds(5, 5) and not decodes.holds(5, 6)


def test_buckets(folder):
    config = InlineEngine(folder).runner._config  # steps of 64 tokens
    chunks = [(16, 8), (32, 8), (64, 8)]

    def sizes(most: int) -> list[tuple[int, int]]:
        return buckets(msgspec.structs.replace(config, cuda_graph_max_bs=most))

    assert sizes(1) == [(1, 1), *chunks]
    assert sizes(6) == [(1, 1), (2, 2), (4, 4), (6, 6), *chunks]
    assert sizes(20) == [(1, 1), (2, 2), (4, 4), (8, 8), (16, 8), (16, 16), (20, 20), (32, 8), (64, 8)]


def test_packed_arrays_come_back_as_they_were():
    arrays = {
        "long": np.arange(5),
        "none": np.zeros(0, dtype=np.int64),
        "pairs": np.arange(6, dtype=np.int32).reshape(3, 2),
        "floats": np.linspace(0, 1, 7, dtype=np.float32),
    }
    longer = torch.cat([pack(arrays, pinned=False), torch.zeros(100, dtype=torch.uint8)])
    found = unpack(longer, arrays)
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert torch.equal(found[name], torch.from_numpy(array)) and found[name].data_ptr() % 8 == 0


def watch_unknown(monkeypatch) -> list[int]:
    """How many unknown inputs each plan had."""
    unknown: list[int] = []
    watched = spy(ModelRunner.launch, lambda _, plan, *rest: unknown.append(plan.token_ids.count(UNKNOWN_TOKEN)))
    monkeypatch.setattr(ModelRunner, "launch", watched)
    return unknown


def spy(function, look):
    def watched(*args):
        look(*args)
        return function(*args)

    return watched
