"""Who is stuck and who is not, by pulses in a folder and the real clock."""

import struct
import time
from pathlib import Path

from ramet.ipc.channel import Addresses
from ramet.ipc.pulse import Pulse
from ramet.ipc.watchdog import Watchdog


def watched(folder: Path, timeout_s: float) -> tuple[Addresses, Watchdog]:
    addresses = Addresses(str(folder))
    return addresses, Watchdog(addresses, timeout_s)


def test_who_does_not_beat_is_stuck(tmp_path: Path) -> None:
    addresses, watchdog = watched(tmp_path, 0.4)
    pulse = Pulse(addresses, "lives")
    Pulse(addresses, "hangs")
    until = time.monotonic() + 0.6
    while time.monotonic() < until:
        time.sleep(min(0.05, watchdog.patience_s(["lives", "hangs"])))
        pulse.beat()
        stuck = watchdog.stuck(["lives", "hangs"])
    assert set(stuck) == {"hangs"}
    assert 0.4 <= stuck["hangs"] < 0.7


def test_a_look_that_comes_late_finds_nobody(tmp_path: Path) -> None:
    addresses, watchdog = watched(tmp_path, 0.2)
    Pulse(addresses, "stopped as well")
    time.sleep(0.4)
    assert watchdog.stuck(["stopped as well"]) == {}
    assert 0 < watchdog.patience_s(["stopped as well"]) <= 0.05


def test_the_owner_sleeps_five_seconds_at_most_and_not_beyond_the_first_to_be_stuck(tmp_path: Path) -> None:
    addresses, watchdog = watched(tmp_path, 1000)
    assert watchdog.patience_s([]) == 5
    Pulse(addresses, "a")
    assert watchdog.patience_s(["a"]) == 5
    _, watchdog = watched(tmp_path, 8)
    Path(addresses.pulse("a")).write_bytes(struct.pack("d", time.monotonic() - 7))
    assert watchdog.patience_s(["a"]) == 2  # a watchdog that has just been made trusts everybody
