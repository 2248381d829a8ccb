"""The pipeline launches at most one step ahead, commits in order, and lets no failure pass its own step."""

import dataclasses

import pytest

from ramet.ipc.messages import Generate
from ramet.ipc.sampling import SamplingParams
from ramet.ipc.step import RowResult, StepPlan, StepResult
from ramet.scheduler.config import SchedulerConfig
from ramet.scheduler.core import SchedulerCore
from ramet.scheduler.pipeline import Pipeline

CONFIG = SchedulerConfig(
    page_size=4, max_running=4, max_step_tokens=64, max_prefill_tokens=32, context_length=100, eos_ids=(0,)
)


@dataclasses.dataclass
class Pending:
    runner: "ScriptedRunner"
    plan: StepPlan

    def result(self) -> StepResult:
        self.runner.log.append(f"read {self.plan.step}")
        if self.plan.step in self.runner.broken_results:
            raise RuntimeError("the device is gone")
        return StepResult(self.plan.step, [RowResult(1 if row.sample else None) for row in self.plan.rows])


class ScriptedRunner:
    """Answers 1 in every row, and fails where it is told to."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.num_recoveries = 0
        self.broken_launches: set[int] = set()
        self.broken_results: set[int] = set()

    def launch(self, plan, masks=None) -> Pending:
        self.log.append(f"launch {plan.step}")
        if plan.step in self.broken_launches:
            raise MemoryError("no memory")
        return Pending(self, plan)

    def recover(self) -> None:
        self.num_recoveries += 1


@pytest.fixture
def runner():
    return ScriptedRunner()


def engine(runner: ScriptedRunner, ahead: int) -> tuple[SchedulerCore, Pipeline]:
    core = SchedulerCore(CONFIG, num_pages=50)
    return core, Pipeline(core, runner, ahead)


def add(core: SchedulerCore, rid: str, max_tokens: int = 3) -> None:
    core.add(Generate(rid, [5, 6, 7], SamplingParams(max_tokens=max_tokens, seed=0)))


def run(core: SchedulerCore, pipeline: Pipeline) -> dict[str, str]:
    """How each request ended."""
    ends = {}
    for _ in range(100):
        if not core.has_work:
            return ends
        pipeline.turn()
        for out in core.take_outputs():
            if out.failure or out.finish:
                ends[out.rid] = out.failure.message if out.failure else str(out.finish.reason)
    raise AssertionError("it does not end")


def test_in_lock_step_each_result_is_read_before_the_next_launch(runner):
    core, pipeline = engine(runner, ahead=0)
    add(core, "r")
    assert run(core, pipeline) == {"r": "length"}
    assert runner.log == ["launch 1", "read 1", "launch 2", "read 2", "launch 3", "read 3"]


def test_one_step_ahead_the_last_token_is_not_computed_twice(runner):
    core, pipeline = engine(runner, ahead=1)
    add(core, "r")
    assert run(core, pipeline) == {"r": "length"}
    assert runner.log == ["launch 1", "launch 2", "read 1", "launch 3", "read 2", "read 3"]


def test_a_stop_that_is_seen_late_costs_one_row_and_no_token(runner):
    core, pipeline = engine(runner, ahead=1)
    core.add(Generate("r", [5, 6], SamplingParams(max_tokens=9, seed=0, stop_token_ids=[1])))
    assert run(core, pipeline) == {"r": "stop"}
    assert core.counters.generated_tokens == 1
    assert runner.log == ["launch 1", "launch 2", "read 1", "read 2"]
    assert core.kv.num_available == 50


def test_turns_tell_whether_a_step_ended(runner):
    core, pipeline = engine(runner, ahead=1)
    add(core, "r", max_tokens=2)
    assert [pipeline.turn() for _ in range(4)] == [False, True, True, False]


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_launch_that_fails_ends_its_requests_alone(runner, ahead):
    core, pipeline = engine(runner, ahead)
    runner.broken_launches = {2}
    add(core, "first")
    ends = {}
    while len(runner.log) < 2 or not ends:
        pipeline.turn()
        ends |= {out.rid: out.failure.message for out in core.take_outputs() if out.failure}
    assert ends == {"first": "the model step failed: no memory"}
    assert runner.num_recoveries == 1
    add(core, "second")
    assert run(core, pipeline) == {"second": "length"}
    assert core.kv.num_available == 50


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_result_that_fails_ends_its_requests_and_the_step_behind_it_changes_nothing(runner, ahead):
    core, pipeline = engine(runner, ahead)
    runner.broken_results = {2}
    add(core, "first", max_tokens=9)
    pipeline.turn()
    add(core, "second", max_tokens=9)
    ends = run(core, pipeline)
    assert ends == dict.fromkeys(["first", "second"], "the model step failed: the device is gone")
    assert core.kv.num_available == 50 and not core.has_work
