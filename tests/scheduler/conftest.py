"""A core with small numbers, and a way to drive it without a model."""

import pytest

from ramet.ipc.messages import Generate, Logprob
from ramet.ipc.sampling import SamplingParams
from ramet.ipc.step import Row, RowResult, StepPlan, StepResult
from ramet.scheduler.config import SchedulerConfig
from ramet.scheduler.core import SchedulerCore


class Driver:
    """Runs a core with a runner that answers every sampled row with token 1, and keeps what happened."""

    def __init__(self, num_pages: int = 64, **config) -> None:
        defaults = {
            "page_size": 4,
            "max_running": 8,
            "max_step_tokens": 64,
            "max_prefill_tokens": 32,
            "context_length": 1000,
            "eos_ids": (0,),
        }
        self.core = SchedulerCore(SchedulerConfig(**{**defaults, **config}), num_pages)
        self.plans: list[StepPlan] = []
        self.outputs = []

    def add(self, rid: str, prompt: list[int], max_tokens: int = 4, *, given: bool = True, priority: int = 0, **params):
        sampling = SamplingParams(max_tokens=max_tokens, seed=0, **params)
        self.core.add(Generate(rid, prompt, sampling, given, priority))
        self.outputs += self.core.take_outputs()

    def step(self) -> StepPlan | None:
        plan = self.core.schedule()
        if plan is not None:
            self.plans.append(plan)
            rows = [RowResult(1 if row.sample else None, prompt_logprobs=self._logprobs(row)) for row in plan.rows]
            self.core.commit(plan, StepResult(plan.step, rows))
        self.outputs += self.core.take_outputs()
        return plan

    def _logprobs(self, row: Row) -> list[Logprob] | None:
        """Entries that name the position they come from."""
        positions = range(row.start, row.start + row.length)
        return [Logprob(p + 1, -1.0) for p in positions] if row.prompt_logprobs else None

    def finish(self) -> None:
        while self.step() is not None:
            assert len(self.plans) < 10_000

    def ended(self) -> list[str]:
        return [out.rid for out in self.outputs if out.finish or out.failure]


@pytest.fixture
def make_driver():
    return Driver
