"""A beat in one process is seen in another, and what never beat is told from what did."""

import subprocess
import sys
import time
from pathlib import Path

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
    assert last_beat_s(addresses, "other") == 0
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for _ in range(3):
            asked_at = time.monotonic()
            process.stdin.write("beat\n")
            answered_at = float(process.stdout.readline())
            assert asked_at < last_beat_s(addresses, "other") < answered_at
        process.stdin.close()


def test_slack_is_added_to_each_beat(tmp_path: Path) -> None:
    addresses = Addresses(str(tmp_path))
    Pulse(addresses, "slow", slack_s=100).beat()
    assert last_beat_s(addresses, "slow") > time.monotonic() + 90


def test_a_new_life_beats_at_once(tmp_path: Path) -> None:
    addresses = Addresses(str(tmp_path))
    Pulse(addresses, "a", slack_s=-1000)
    Pulse(addresses, "a")
    assert last_beat_s(addresses, "a") > time.monotonic() - 10
