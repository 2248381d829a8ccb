"""Who is stuck and who is not, by pulses in a folder and a clock that only the test moves."""

import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ramet.ipc.channel import Addresses
from ramet.ipc.pulse import Pulse
from ramet.ipc.watchdog import Watchdog


class Clock:
    """Takes the place of `time.monotonic`; a beat and a look are of no CPU time, so that nobody has slack."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        patch.setattr(time, "monotonic", lambda: self.now_s)
        patch.setattr(time, "thread_time", lambda: 0.0)

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock() -> Iterator[Clock]:
    with pytest.MonkeyPatch.context() as patch:
        yield Clock(patch)


def watched(folder: Path, timeout_s: float) -> tuple[Addresses, Watchdog]:
    addresses = Addresses(str(folder))
    return addresses, Watchdog(addresses, timeout_s)


def test_who_does_not_beat_is_stuck(tmp_path: Path, clock: Clock) -> None:
    addresses, watchdog = watched(tmp_path, 0.5)
    pulse = Pulse(addresses, "lives")
    Pulse(addresses, "hangs")
    begun_s, stuck = clock.now_s, {}
    while not stuck:
        clock.sleep(min(0.0625, watchdog.patience_s(["lives", "hangs"])))
        pulse.beat()
        assert clock.now_s - begun_s <= 0.5
        stuck = watchdog.stuck(["lives", "hangs"])
    assert stuck == {"hangs": 0.5}


def test_a_look_that_comes_late_finds_nobody(tmp_path: Path, clock: Clock) -> None:
    addresses, watchdog = watched(tmp_path, 0.25)
    Pulse(addresses, "stopped as well")
    clock.sleep(0.5)
    assert watchdog.stuck(["stopped as well"]) == {}
    assert watchdog.patience_s(["stopped as well"]) == 0.0625
    clock.sleep(0.125)
    assert watchdog.stuck(["stopped as well"]) == {}
    clock.sleep(0.125)
    assert watchdog.stuck(["stopped as well"]) == {"stopped as well": 0.25}


def test_the_owner_sleeps_five_seconds_at_most_and_not_beyond_the_first_to_be_stuck(
    tmp_path: Path, clock: Clock
) -> None:
    addresses, watchdog = watched(tmp_path, 1000)
    assert watchdog.patience_s([]) == 5
    Pulse(addresses, "a")
    assert watchdog.patience_s(["a"]) == 5
    _, watchdog = watched(tmp_path, 8)
    Path(addresses.pulse("a")).write_bytes(struct.pack("d", clock.now_s - 7))
    assert watchdog.patience_s(["a"]) == 2  # a watchdog that has just been made trusts everybody
    for _ in range(3):
        clock.sleep(2)
        assert watchdog.stuck(["a"]) == {}
    clock.sleep(1.5)
    assert watchdog.patience_s(["a"]) == 0.5
