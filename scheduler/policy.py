"""The order in which waiting requests are considered."""

import bisect

from ramet.scheduler.config import Policy
from ramet.scheduler.kv_manager import KVManager
from ramet.scheduler.request import Request

# Longest-prefix-match looks at no more than this many requests: each look walks the tree.
_MAX_MATCHED = 128


class WaitingQueue:
    """Requests that have no slot, sorted by priority and arrival; a preempted one returns to its old place."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def best_priority(self) -> int:
        """Of the requests that wait; there must be one."""
        return self._requests[0].priority

    def push(self, request: Request) -> None:
        bisect.insort(self._requests, request, key=lambda r: r.order)

    def remove(self, request: Request) -> None:
        index = bisect.bisect_left(self._requests, request.order, key=lambda r: r.order)
        assert self._requests[index] is request
        del self._requests[index]

    def candidates(self, kv: KVManager, most: int) -> list[Request]:
        """The next requests to admit, best first.

        With longest-prefix-match, among equal priorities the longest cached prefix comes first: requests that share
        a prefix run while it is in the cache.
        """
        if self._policy is Policy.FCFS:
            return self._requests[:most]
        head = self._requests[:_MAX_MATCHED]
        head.sort(key=lambda r: (r.priority, -kv.cached_length(r), r.arrival))
        return head[:most]
