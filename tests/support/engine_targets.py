"""Stand-in processes for tests of the supervisor, and a launcher that runs them: `python -m support.engine_targets`.

They speak the real messages over the real sockets; what they saw is appended to `diary`, one JSON list a line.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from ramet.ipc.channel import FRONTEND, LAUNCHER, Addresses, Inbox, Outbox
from ramet.ipc.messages import EngineDown, EngineUp, Progress, Ready, ToFrontend
from ramet.ipc.pulse import Pulse
from ramet.launch.child import Process
from ramet.launch.placement import Placement
from ramet.launch.serve import run
from ramet.launch.server_args import ServerArgs
from ramet.launch.supervisor import EngineFailed, Supervisor

TARGETS = "support.engine_targets"
# Of the mode "watched", and of the others: for a busy machine may hold somebody up who does not hang.
WATCHDOG_S, PATIENT_S = 2.0, 300.0
BEAT_S = 0.3
MAX_RESTARTS = 3


def note(diary: str, *words: object) -> None:
    with Path(diary).open("a") as file:
        file.write(json.dumps([time.monotonic(), os.getpid(), *words]) + "\n")


def worker(name: str, delay_s: float, diary: str, addresses: Addresses) -> None:
    note(diary, name, "started")
    sys.stderr.write(f"the words of {name}\n")
    launcher = Outbox(addresses.inbox(LAUNCHER))
    launcher.send(Progress(name, "warming up"))
    time.sleep(delay_s)
    note(diary, name, "ready")

    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    signal.signal(signal.SIGUSR1, fail)
    pulse = Pulse(addresses, name)
    launcher.send(Ready(name, {"pages": 7}))
    while True:
        time.sleep(BEAT_S)
        pulse.beat()


def once(name: str, delay_s: float, diary: str, addresses: Addresses) -> None:
    """A worker that cannot be started a second time."""
    (broken if has_lived(name, diary) else worker)(name, delay_s, diary, addresses)


def slow_again(name: str, delay_s: float, diary: str, addresses: Addresses) -> None:
    """A worker whose second start outlasts every test."""
    worker(name, 300 if has_lived(name, diary) else delay_s, diary, addresses)


def has_lived(name: str, diary: str) -> bool:
    return f'"{name}", "started"' in Path(diary).read_text()


def broken(name: str, delay_s: float, diary: str, addresses: Addresses) -> None:
    note(diary, name, "started")
    time.sleep(delay_s)
    raise ValueError(f"no weights\nfor {name}")


def frontend(name: str, stubborn: bool, diary: str, addresses: Addresses) -> None:
    """Ends on SIGTERM, when nothing more is told, or with `stubborn` never."""
    note(diary, name, "started")
    inbox: Inbox[ToFrontend] = Inbox(addresses.inbox(FRONTEND), ToFrontend)
    launcher = Outbox(addresses.inbox(LAUNCHER))
    pulse = Pulse(addresses, name)

    ending = False

    def on_term(*_: object) -> None:
        nonlocal ending
        note(diary, name, "terminating")
        ending = not stubborn

    signal.signal(signal.SIGTERM, on_term)
    while True:
        message = inbox.receive(BEAT_S)
        if ending and message is None:
            return
        pulse.beat()
        if isinstance(message, EngineUp):
            note(diary, name, "heard", sorted(message.pids), message.info)
            launcher.send(Ready(name))
        elif isinstance(message, EngineDown):
            note(diary, name, "down", message.reason, message.final)


def processes(diary: str, mode: str, addresses: Addresses) -> list[Process]:
    place = Placement(env={"OMP_NUM_THREADS": "1"}, nice=1)
    folder = {"folder": addresses.folder, "tokenizers": addresses.tokenizers}

    def child(name: str, function: str, argument: object, group: str = "") -> Process:
        return Process(name, f"{TARGETS}:{function}", [name, argument, diary, folder], place, group)

    return [
        child("scheduler-0", mode if mode in ("broken", "once") else "worker", 0.2, "ranks"),
        *([child("scheduler-1", "worker", 0.2, "ranks")] if mode == "ranks" else []),
        child("tokenizer-0", "worker", 0),
        child("detokenizer", "slow_again" if mode == "stubborn" else "worker", 0),
        child("frontend", "frontend", mode == "stubborn"),
    ]


def main() -> None:
    diary, mode = sys.argv[1:]
    supervisor = Supervisor(
        ServerArgs(
            drain_timeout=300,
            start_timeout=120,
            watchdog_timeout=WATCHDOG_S if mode == "watched" else PATIENT_S,
            max_restarts=MAX_RESTARTS,
        )
    )
    note(diary, "launcher", "folder", supervisor.addresses.folder)
    children = processes(diary, mode, supervisor.addresses)
    try:
        run(supervisor, children, lambda: note(diary, "launcher", "ready"))
    except EngineFailed as error:
        note(diary, "launcher", "failed", str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
