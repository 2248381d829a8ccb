"""`Pipeline`: the turn of the crank between the core, which plans steps, and a runner, which computes them.

With `ahead` 0 each step is planned when the one before has been committed. With 1 the next step is planned and launched
while the device still computes the one before, so that the device never waits for the host. Knows neither sockets nor
torch. A step that raises ends its own requests, whether it fails when it is launched or when its result is read; with
several ranks the error goes on, because they are not in step any more.
"""

import collections
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from ramet.ipc.errors import Failure, FailureKind
from ramet.ipc.step import StepPlan, StepResult, TokenMasks
from ramet.scheduler.core import SchedulerCore
from ramet.scheduler.request import Request

logger = logging.getLogger(__name__)


class PendingStep(Protocol):
    """A step that has been launched; `result` waits for it."""

    def result(self) -> StepResult: ...


class Runner(Protocol):
    """What computes steps, in the order of their launch."""

    def launch(self, plan: StepPlan, masks: Callable[[], TokenMasks] | None = None) -> PendingStep: ...

    def recover(self) -> None:
        """A step has raised: be ready for the next, or raise."""


class Pipeline:
    """`fill` starts to compute the masks of rows under a grammar, and returns a function that waits for them; without
    it no request may have one. `tell_ranks` has the other ranks, if there are any, execute a plan too.

    `report` hears of each step that has ended: the times (of `time.monotonic`) at which its planning began, at which it
    was planned and at which its result was there, and its number of rows."""

    def __init__(
        self,
        core: SchedulerCore,
        runner: Runner,
        ahead: int,
        fill: Callable[[list[tuple[int, Request]]], Callable[[], TokenMasks]] | None = None,
        tell_ranks: Callable[[StepPlan], None] | None = None,
        report: Callable[[float, float, float, int], None] = lambda begun, planned, ran, rows: None,
    ) -> None:
        self._core = core
        self._runner = runner
        self._fill = fill
        self._ahead = ahead
        self._tell_ranks = tell_ranks
        self._report = report
        # Each with the times at which its planning began and ended.
        self._flying: collections.deque[tuple[StepPlan, PendingStep, float, float]] = collections.deque()

    def turn(self) -> bool:
        """Launch a step, if there is one to plan, and commit the oldest if it may not fly on; whether one ended."""
        begun = time.monotonic()
        plan = self._core.schedule(begun)
        if plan is not None and not self._launch(plan, begun):
            return True
        if not self._flying or (plan is not None and len(self._flying) <= self._ahead):
            return False
        self._land(*self._flying.popleft())
        return True

    def _launch(self, plan: StepPlan, begun: float) -> bool:
        planned = time.monotonic()
        with self._failing_alone(plan):
            masks = None
            if self._fill is not None and (constrained := self._core.constrained(plan)):
                masks = self._fill(constrained)
            if self._tell_ranks is not None:
                self._tell_ranks(plan)
            self._flying.append((plan, self._runner.launch(plan, masks), begun, planned))
            return True
        return False

    def _land(self, plan: StepPlan, pending: PendingStep, begun: float, planned: float) -> None:
        result = None
        with self._failing_alone(plan):
            result = pending.result()
        ran = time.monotonic()
        if result is not None:
            self._core.commit(plan, result)
        self._report(begun, planned, ran, len(plan.rows))

    @contextlib.contextmanager
    def _failing_alone(self, plan: StepPlan) -> Iterator[None]:
        """Whatever goes wrong inside a step ends that step's requests, not the server. An error in the core's own
        bookkeeping is not caught: nobody could trust its pages afterwards."""
        try:
            yield
        except Exception as error:
            if self._tell_ranks is not None:
                raise
            logger.exception("step %d failed with %d rows", plan.step, len(plan.rows))
            self._core.fail_step(plan, Failure(FailureKind.INTERNAL, f"the model step failed: {error}"))
            self._runner.recover()
