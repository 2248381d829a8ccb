"""Steps launched ahead, and decodes as a CUDA graph would run them, give the same answers to the last bit."""

import numpy as np
import pytest
import torch
from support.engine import InlineEngine
from support.lives import KINDS, run_all, told, use_graphs

from ramet.ipc.step import UNKNOWN_TOKEN
from ramet.model_runner.batch import pack, unpack
from ramet.model_runner.cuda_graph import DecodeGraphs, batch_sizes
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


def test_decodes_in_padded_batches_of_fixed_addresses_change_nothing(folder, expected, monkeypatch):
    """The capture that is passed here runs the step again each time, as a replay does."""
    replayed = []
    monkeypatch.setattr(DecodeGraphs, "replay", spy(DecodeGraphs.replay, lambda _, plan: replayed.append(plan)))
    outputs = run_all(folder, steps_ahead=1, change=use_graphs)
    assert told(outputs) == expected
    sizes = {len(plan.rows) for plan in replayed}
    assert len(replayed) > 20 and len(sizes) > 3 and max(sizes) <= 8


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


def test_graphs_cover_decodes_that_sample_and_nothing_else(folder):
    engine = InlineEngine(folder)
    use_graphs(engine)
    engine.add("r", list(range(3, 80)), 4)
    covered = []
    while (plan := engine.core.schedule()) is not None:
        covered.append(engine.runner._graphs.cover(plan))
        engine.core.commit(plan, engine.runner.execute(plan))
    # A chunk of 64, one of 13, three tokens.
    assert covered == [False, False, True, True, True]


def test_batch_sizes():
    assert batch_sizes(1) == [1]
    assert batch_sizes(6) == [1, 2, 4, 6]
    assert batch_sizes(20) == [1, 2, 4, 8, 16, 20]


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
