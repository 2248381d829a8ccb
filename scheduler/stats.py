"""`StatsReporter`: when the frontend hears of the scheduler's state, and what came since the last time.

Once a second under load, and when the last of the work has ended; steps are sent one by one, so that the frontend can
put them into histograms of any buckets. Knows no sockets.
"""

import operator
import time
from collections.abc import Callable

import msgspec

from ramet.ipc.messages import Counters, Stats, Step

STATS_INTERVAL_S = 1.0


class StatsReporter:
    def __init__(self, send: Callable[[Stats], None], counters: Counters) -> None:
        self._send = send
        self._counters = counters
        self._told = msgspec.structs.astuple(Counters())
        self._steps: list[Step] = []
        self._sent_at = 0.0

    def add(self, begun: float, planned: float, ran: float, rows: int) -> None:
        """A step that is committed now; the other times, of `time.monotonic`, are those between its parts."""
        self._steps.append(Step(planned - begun, ran - planned, time.monotonic() - ran, rows))

    def is_due(self, busy: bool) -> bool:
        return not busy or time.monotonic() - self._sent_at >= STATS_INTERVAL_S

    def send(
        self, running: int, waiting: int, *, pages_total: int = 0, pages_free: int = 0, pages_cached: int = 0
    ) -> None:
        totals = msgspec.structs.astuple(self._counters)
        news = Counters(*map(operator.sub, totals, self._told))
        steps, self._steps, self._told = self._steps, [], totals
        self._send(Stats(running, waiting, pages_total, pages_free, pages_cached, steps, news))
        self._sent_at = time.monotonic()
