"""A beat in one process is seen in another, and what has no pulse is not taken for dead."""

import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ramet.ipc.channel import Addresses
from ramet.ipc.pulse import Pulse, last_beat_s

OTHER = """
import sys, time
from ramet.ipc.channel import Addresses
from ramet.ipc.pulse import Pulse
pulse = Pulse(Addresses(sys.argv[1]), "other")
for line in sys.stdin:
    pulse.beat()
    print(time.monotonic(), flush=True)
"""


def test_beats_of_another_process(tmp_path: Path) -> None:
    addresses = Addresses(str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for _ in range(3):
            asked_at = time.monotonic()
            process.stdin.write("beat\n")
            answered_at = float(process.stdout.readline())
            # A little later: in the time that a turn may well take, going by the one before.
            assert asked_at < last_beat_s(addresses, "other") < answered_at + 1
        process.stdin.close()


@pytest.mark.parametrize("content", [None, b""])
def test_without_a_pulse_nobody_is_late(tmp_path: Path, content: bytes | None) -> None:
    """A cleaner of temporary files may have removed it, or it is just being made."""
    addresses = Addresses(str(tmp_path))
    if content is not None:
        Path(addresses.pulse("a")).write_bytes(content)
    before = time.monotonic()
    assert before <= last_beat_s(addresses, "a") <= time.monotonic()


def test_slack_is_added_to_each_beat(tmp_path: Path) -> None:
    addresses = Addresses(str(tmp_path))
    Pulse(addresses, "slow", turn_s=50).beat()
    assert last_beat_s(addresses, "slow") > time.monotonic() + 90


def test_a_new_life_beats_at_once(tmp_path: Path) -> None:
    addresses = Addresses(str(tmp_path))
    Path(addresses.pulse("a")).write_bytes(struct.pack("d", time.monotonic() - 1000))
    Pulse(addresses, "a")
    assert last_beat_s(addresses, "a") > time.monotonic() - 10


def test_a_turn_that_computed_long_may_take_twice_as_long_again_and_one_that_waited_may_not(tmp_path: Path) -> None:
    addresses = Addresses(str(tmp_path))
    pulse = Pulse(addresses, "a")
    time.sleep(0.5)
    pulse.beat()
    assert last_beat_s(addresses, "a") <= time.monotonic() + 0.2
    begun_s = time.thread_time()
    while time.thread_time() < begun_s + 0.3:
        pass
    for _ in range(2):  # for good
        beaten_at = time.monotonic()
        pulse.beat()
        assert last_beat_s(addresses, "a") > beaten_at + 0.55


def test_what_is_announced_counts_until_the_next_beat(tmp_path: Path) -> None:
    addresses = Addresses(str(tmp_path))
    pulse = Pulse(addresses, "a")
    pulse.beat(100)
    assert last_beat_s(addresses, "a") > time.monotonic() + 90
    pulse.beat()
    assert last_beat_s(addresses, "a") < time.monotonic() + 10


BUSY = """
import sys
from ramet.ipc.channel import Addresses
from ramet.ipc.pulse import Pulse
pulse = Pulse(Addresses(sys.argv[1]), "busy")
print("beats", flush=True)
while True:
    pulse.beat()
"""


def test_a_beat_that_is_just_being_written_is_read_whole(tmp_path: Path) -> None:
    addresses = Addresses(str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", BUSY, tmp_path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        begun_at = time.monotonic()
        try:
            while time.monotonic() < begun_at + 2:
                assert last_beat_s(addresses, "busy") > begun_at - 10
        finally:
            process.kill()
