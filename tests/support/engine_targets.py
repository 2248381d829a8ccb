"""Stand-in processes for tests of the supervisor, and a launcher that runs them: `python -m support.engine_targets`.

They speak the real messages over the real sockets; what they saw is appended to `diary`, one JSON list a line.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from ramet.ipc.channel import Addresses, Inbox, Outbox
from ramet.ipc.messages import EngineDown, EngineUp, Progress, Ready, ToFrontend
from ramet.launch.child import Process
from ramet.launch.placement import Placement
from ramet.launch.serve import run
from ramet.launch.supervisor import EngineFailed, Supervisor

TARGETS = "support.engine_targets"


def note(diary: str, *words: object) -> None:
    with Path(diary).open("a") as file:
        file.write(json.dumps([time.monotonic(), os.getpid(), *words]) + "\n")


def worker(name: str, delay_s: float, diary: str, addresses: Addresses) -> None:
    note(diary, name, "started")
    launcher = Outbox(addresses.launcher)
    launcher.send(Progress(name, "warming up"))
    time.sleep(delay_s)
    note(diary, name, "ready")
    launcher.send(Ready(name, {"pages": 7}))
    signal.pause()


def broken(name: str, delay_s: float, diary: str, addresses: Addresses) -> None:
    note(diary, name, "started")
    time.sleep(delay_s)
    raise ValueError(f"no weights\nfor {name}")


def frontend(name: str, stubborn: bool, diary: str, addresses: Addresses) -> None:
    """Ends on SIGTERM, or with `stubborn` never."""
    note(diary, name, "started")
    inbox: Inbox[ToFrontend] = Inbox(addresses.frontend, ToFrontend)

    def on_term(*_: object) -> None:
        note(diary, name, "terminating")
        if not stubborn:
            sys.exit(0)

    signal.signal(signal.SIGTERM, on_term)
    while True:
        message = inbox.receive(None)
        if isinstance(message, EngineUp):
            note(diary, name, "heard", sorted(message.pids), message.info)
            Outbox(addresses.launcher).send(Ready(name))
        elif isinstance(message, EngineDown):
            note(diary, name, "down", message.reason)


def processes(diary: str, *, stubborn: bool = False, broken_worker: bool = False) -> list[Process]:
    place = Placement(env={"OMP_NUM_THREADS": "1"}, nice=1)

    def child(name: str, function: str, argument: object) -> Process:
        return Process(name, f"{TARGETS}:{function}", [name, argument, diary], place)

    return [
        child("scheduler-0", "broken" if broken_worker else "worker", 0.2),
        child("tokenizer-0", "worker", 0),
        child("detokenizer", "worker", 0),
        child("frontend", "frontend", stubborn),
    ]


def with_addresses(children: list[Process], addresses: Addresses) -> list[Process]:
    folder = {"folder": addresses.folder, "tokenizers": addresses.tokenizers}
    return [Process(c.name, c.target, [*c.arguments, folder], c.placement) for c in children]


def main() -> None:
    diary, mode = sys.argv[1:]
    supervisor = Supervisor(num_tokenizers=1, drain_timeout_s=60 if mode == "stubborn" else 5, start_timeout_s=30)
    note(diary, "launcher", "folder", supervisor.addresses.folder)
    children = processes(diary, stubborn=mode == "stubborn", broken_worker=mode == "broken")
    try:
        run(supervisor, with_addresses(children, supervisor.addresses), lambda: note(diary, "launcher", "ready"))
    except EngineFailed as error:
        note(diary, "launcher", "failed", str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
