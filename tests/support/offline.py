"""What tests of the offline API share: settings for a tiny model, and the check that nothing is left of an engine."""

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.server import PATIENCE_S, until

from ramet import Engine
from ramet.ipc.sampling import SamplingParams

PROMPT = "The quick brown fox"
ENDLESS = SamplingParams(max_tokens=1900, ignore_eos=True)
SMALL: dict[str, Any] = {"dtype": "float32", "max_total_tokens": 6144, "max_queued_requests": 8}


def children() -> dict[str, psutil.Process]:
    """The processes of this process's engines, by name."""
    found = {}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie, or reaped meanwhile
            if "ramet.launch.child" in (line := child.cmdline()):
                found[line[-1]] = child
    return found


def once_busy(engine: Engine, act: Callable[[], object]) -> None:
    """Act in another thread when calls have taken all the places of an engine, be it up or down."""

    def wait() -> None:
        until(engine._host._free.locked, PATIENCE_S, lambda: "nobody asks for anything")
        act()

    threading.Thread(target=wait).start()


@contextlib.contextmanager
def nothing_left() -> Iterator[Path]:
    """What is started in the block must be gone after it: processes, threads, the folder of the sockets, which is made
    below the one that is given."""
    folder = Path(tempfile.mkdtemp(prefix="off-"))  # short: the path of a socket is limited to 107 bytes
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TMPDIR", str(folder))
            patch.setattr(tempfile, "tempdir", None)
            yield folder
        threads = [thread for thread in threading.enumerate() if thread.name == "ramet-engine"]
        assert (children(), threads, list(folder.iterdir())) == ({}, [], [])
    finally:
        shutil.rmtree(folder)
