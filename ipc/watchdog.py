"""`Watchdog`: which processes are stuck, by their pulses (`ipc/pulse.py`). Kills nobody, and knows no processes.
The launcher has one, and so has the frontend, to answer `/health`.

Its owner waits for `patience_s()` at most between two looks. If it waited much longer, it was stopped itself or the
whole machine was, and everybody gets a fresh start.
"""

import time
from collections.abc import Collection

from ramet.ipc.channel import Addresses
from ramet.ipc.pulse import last_beat_s

# The longest sleep of the owner, in seconds, and as a share of the timeout.
_LONGEST_S, _LONGEST_SHARE = 5.0, 0.25


class Watchdog:
    def __init__(self, addresses: Addresses, timeout_s: float) -> None:
        self._addresses = addresses
        self._timeout_s = timeout_s
        self._longest_s = min(_LONGEST_S, timeout_s * _LONGEST_SHARE)
        self._looked_at = self._trusted_from = time.monotonic()

    def patience_s(self, names: Collection[str]) -> float:
        """How long the owner may sleep: until the first of `names` might be found stuck."""
        first = min(map(self._turned_at, names), default=time.monotonic())
        return max(0.01, min(self._longest_s, first + self._timeout_s - time.monotonic()))

    def stuck(self, names: Collection[str]) -> dict[str, float]:
        """Those of `names` whose loops have not turned for the timeout, and for how many seconds."""
        now = time.monotonic()
        if now - self._looked_at > 2 * self._longest_s:
            self._trusted_from = now
        self._looked_at = now
        ages = {name: now - self._turned_at(name) for name in names}
        return {name: age_s for name, age_s in ages.items() if age_s >= self._timeout_s}

    def _turned_at(self, name: str) -> float:
        return max(last_beat_s(self._addresses, name), self._trusted_from)
