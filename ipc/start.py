"""`Startup`: what a process tells the launcher while it starts, until it is ready or cannot be.

The words of an error that set-up is known to raise are for the user; any other error is a bug, and the entry of the
process (`launch/child.py`) reports it.
"""

import contextlib
import gc
import logging
from collections.abc import Iterator

from ramet.ipc.channel import LAUNCHER, Addresses, Outbox
from ramet.ipc.messages import Fatal, Progress, Ready

logger = logging.getLogger(__name__)


class Startup:
    def __init__(self, process: str, addresses: Addresses) -> None:
        self._process = process
        self._launcher = Outbox(addresses.inbox(LAUNCHER))

    def progress(self, text: str) -> None:
        self._launcher.send(Progress(self._process, text))

    @contextlib.contextmanager
    def failing_with(self, *errors: type[Exception], words: str = "") -> Iterator[None]:
        """Set-up that may raise these: each ends the process with status 1, and the launcher gets its words, after
        those given."""
        try:
            yield
        except errors as error:
            logger.debug("set-up failed", exc_info=True)
            self._launcher.send(Fatal(self._process, f"{words}{error}"))
            self._launcher.close()
            raise SystemExit(1) from error

    def ready(self, **info: int | str | float) -> None:
        """What is here now stays for good: later collections of garbage need not go over it."""
        gc.collect()
        gc.freeze()
        self._launcher.send(Ready(self._process, info))
