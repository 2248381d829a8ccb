"""Entry of every process the launcher starts: `python -m ramet.launch.child NAME`, with a `ChildSpec` on stdin.

The order matters: die with the launcher, ignore the terminal's Ctrl-C (the launcher decides), take the placement, and
only then import the heavy libraries. What a process is, is a function named by the spec; its annotations say what its
arguments are decoded to. Secrets come with the spec, never in argv or the environment.
"""

import ctypes
import faulthandler
import logging
import os
import pkgutil
import signal
import sys
import typing
from collections.abc import Callable
from typing import Any

import msgspec

from ramet.ipc.channel import Outbox
from ramet.ipc.messages import Fatal
from ramet.launch.logs import LogFormat, set_up_logging
from ramet.launch.placement import Placement

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


class Process(msgspec.Struct, frozen=True):
    """`name` is what `Ready` and log lines carry. `target` is `module:function`, called with `arguments`.

    SIGTERM ends the process at once, unless the target handles it: only the frontend has something to finish.
    Processes of one `group` are restarted together; without one, a process is a group by itself.
    """

    name: str
    target: str
    arguments: list[Any]
    placement: Placement
    group: str = ""


class ChildSpec(msgspec.Struct, frozen=True):
    """What the launcher writes to a child's stdin."""

    process: Process
    launcher_pid: int
    launcher_address: str
    log_level: str
    log_format: LogFormat


def main() -> None:
    spec = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=ChildSpec)
    process = spec.process
    die_with_parent(spec.launcher_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.placement.apply()
    faulthandler.enable()  # a crash in native code leaves some last words
    set_up_logging(process.name, spec.log_level, spec.log_format)
    try:
        target = pkgutil.resolve_name(process.target)
        target(*_decode(target, process.arguments))
    except Exception as error:
        logger.exception("%s cannot go on", process.name)
        words = " ".join(str(error).split())
        launcher = Outbox(spec.launcher_address)
        launcher.send(Fatal(process.name, f"{type(error).__name__}: {words}" if words else type(error).__name__))
        launcher.close()
        sys.exit(1)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the one that started it is gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(1)


def _decode(target: Callable[..., None], arguments: list[Any]) -> list[Any]:
    hints = typing.get_type_hints(target)
    hints.pop("return", None)
    return [msgspec.convert(value, kind) for value, kind in zip(arguments, hints.values(), strict=True)]


if __name__ == "__main__":
    main()
