"""The pulse of a process: when its loop last turned, in a file of eight bytes that the launcher and the frontend read.

A beat is a write to shared memory, so it costs a loop nothing, and a reader wakes nobody. Times are of CLOCK_MONOTONIC,
which is the same for all processes. A loop that waits must wake up every `BEAT_S`. Does not judge what is late.
"""

import mmap
import struct
import time
from pathlib import Path

from ramet.ipc.channel import Addresses

BEAT_S = 1.0
_SLOT = struct.Struct("d")


class Pulse:
    """The writing end. Beats once when it is made. `slack_s`: how long a turn of the loop may well take; each beat is
    so much in the future."""

    def __init__(self, addresses: Addresses, process: str, slack_s: float = 0.0) -> None:
        self._slack_s = slack_s
        path = Path(addresses.pulse(process))
        path.touch(0o600)
        with path.open("r+b") as file:
            file.truncate(_SLOT.size)
            self._slot = mmap.mmap(file.fileno(), _SLOT.size)
        self.beat()

    def beat(self) -> None:
        _SLOT.pack_into(self._slot, 0, time.monotonic() + self._slack_s)


def last_beat_s(addresses: Addresses, process: str) -> float:
    """When a process last beat, on the clock of `time.monotonic`; 0 if it never did."""
    try:
        return float(_SLOT.unpack(Path(addresses.pulse(process)).read_bytes())[0])
    except (FileNotFoundError, struct.error):  # it has not come so far
        return 0.0
