"""The pulse of a process: when its loop last turned, in a file of eight bytes that the launcher and the frontend read.

A beat is a write to shared memory, so it costs a loop nothing, and a reader wakes nobody. Times are of CLOCK_MONOTONIC,
which is the same for all processes. A loop that waits must wake up every `BEAT_S`. Does not judge what is late.

A slow turn of a loop is no hang: each beat is so far in the future as the next turn may well take.
"""

import mmap
import struct
import time
from pathlib import Path

from ramet.ipc.channel import Addresses

BEAT_S = 1.0
_SLOT = struct.Struct("d")
# A turn may take so many times as long as the longest before it. They grow little by little: each step of a long prompt
# attends to more than the one before.
_GROWTH = 2


class Pulse:
    """The writing end, for one thread. Beats once when it is made. `turn_s`: how long a turn of the loop takes, as far
    as is known. Later it is known better: CPU time counts, of which a process that is frozen or waits takes none."""

    def __init__(self, addresses: Addresses, process: str, turn_s: float = 0.0) -> None:
        self._slack_s = _GROWTH * turn_s
        self._cpu_s = time.thread_time()
        path = Path(addresses.pulse(process))
        path.touch(0o600)
        with path.open("r+b") as file:
            file.truncate(_SLOT.size)
            # `Struct.pack_into` writes zeros first, and who reads those takes the process for one that never beat.
            self._slot = memoryview(mmap.mmap(file.fileno(), _SLOT.size)).cast("d")
        self.beat()

    def beat(self, next_s: float = 0.0) -> None:
        """`next_s`: how long what comes now may take, if it is known."""
        begun_s, self._cpu_s = self._cpu_s, time.thread_time()
        self._slack_s = max(self._slack_s, _GROWTH * (self._cpu_s - begun_s))
        self._slot[0] = time.monotonic() + max(self._slack_s, next_s)


def last_beat_s(addresses: Addresses, process: str) -> float:
    """When a process last beat, on the clock of `time.monotonic`; now if nobody can say: it has not come so far, or a
    cleaner of temporary files has removed its pulse."""
    try:
        return float(_SLOT.unpack(Path(addresses.pulse(process)).read_bytes())[0])
    except (FileNotFoundError, struct.error):
        return time.monotonic()
