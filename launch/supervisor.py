"""Starts the processes of an engine, watches them and stops them; owns the private folder of their sockets.

Knows names and messages, not what the processes do (`launch/roles.py` does), and prints nothing but log lines.
Invariants: once `stop()` returns, or the launcher dies in whatever way, no process of the engine is alive; a running
engine costs the launcher nothing, because it sleeps in one poll on the descriptors of the processes.
"""

import contextlib
import logging
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterable

import msgspec

from ramet.ipc.channel import Addresses, Inbox, Outbox
from ramet.ipc.messages import EngineDown, EngineUp, Progress, Ready, ToLauncher
from ramet.launch.child import ChildSpec, Process
from ramet.launch.logs import LogFormat

logger = logging.getLogger(__name__)

FRONTEND = "frontend"
SCHEDULER = "scheduler-0"
# How long a message may take to the frontend, and from there to its clients, before the frontend is told to stop.
_FLUSH_S = 1.0
# How long a process that was told to stop may take before it is killed.
_EXIT_S = 3.0


class EngineFailed(Exception):
    """A process died, or the engine was not ready in time; the message is meant for the user."""


class StopRequested(Exception):
    """`request_stop()` was called while the engine was starting."""


class Supervisor:
    """Runs an engine: `start()`, then `wait()` until it ends, then `stop()`.

    To be used from one thread that lives as long as the engine, since the kernel kills children when the thread that
    started them ends. Only `request_stop` may be called from elsewhere, such as from a signal handler or another
    thread, and at any time.
    """

    def __init__(
        self,
        *,
        num_tokenizers: int,
        drain_timeout_s: float,
        start_timeout_s: float,
        log_level: str = "info",
        log_format: LogFormat = "text",
    ) -> None:
        # mkdtemp makes it with mode 0700. A short name: the path of a Unix socket is limited to 107 bytes.
        self.addresses = Addresses(tempfile.mkdtemp(prefix="ramet-"), num_tokenizers)
        self._drain_timeout_s = drain_timeout_s
        self._start_timeout_s = start_timeout_s
        self._log_level, self._log_format = log_level, log_format
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._pidfds: dict[int, str] = {}  # of the children that have not been seen dead
        self._ready: dict[str, Ready] = {}
        self._fatal: dict[str, str] = {}
        self._progress: dict[str, tuple[str, float]] = {}
        self._stop_requests = 0
        # Runs at the latest when the interpreter ends.
        self._clean_up = weakref.finalize(self, _kill_all, self._children, self.addresses.folder)
        # Sockets, since a closed one refuses a late `request_stop`; the number of a closed pipe may be another file's.
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_writer.setblocking(False)
        self._inbox: Inbox[ToLauncher] = Inbox(self.addresses.launcher, ToLauncher)
        self._to_frontend = Outbox(self.addresses.frontend)

    def start(self, processes: Iterable[Process]) -> None:
        """Returns when all are ready. The frontend, which may be one of them or live in this process, hears
        `EngineUp` once the others are ready.

        Raises EngineFailed or StopRequested, with everything stopped.
        """
        try:
            for process in processes:
                self._spawn(process)
            self._await_ready(self._children.keys() - {FRONTEND})
            pids = {"launcher": os.getpid(), **{name: child.pid for name, child in self._children.items()}}
            self._to_frontend.send(EngineUp(self._ready[SCHEDULER].info, pids))
            self._await_ready(self._children.keys() & {FRONTEND})
        except BaseException:
            self.stop()
            raise

    def wait(self) -> None:
        """Sleep until a stop is requested. Raises EngineFailed when a process dies, once the clients have heard."""
        while not self._stop_requests:
            dead = self._poll(None)
            if dead:
                reason = self._death(dead[0])
                self._to_frontend.send(EngineDown(reason))
                self._poll_until(time.monotonic() + _FLUSH_S, {FRONTEND})
                raise EngineFailed(reason)

    def request_stop(self) -> None:
        """End `start()` or `wait()`; a second time, make `stop()` wait no longer for running requests."""
        self._stop_requests += 1
        with contextlib.suppress(OSError):  # closed, since it has stopped; or full, since nobody reads any more
            self._wake_writer.send(b"!")

    def stop(self) -> None:
        """Let the frontend finish its requests within the drain timeout, stop the rest, remove the sockets."""
        if not self._clean_up.alive:
            return
        try:
            healthy = FRONTEND in self._ready and len(self._pidfds) == len(self._children)
            self._terminate({FRONTEND}, (self._drain_timeout_s if healthy else 0) + _EXIT_S)
            self._terminate(set(self._children), _EXIT_S)
        finally:
            self._clean_up()
            self._inbox.close()
            self._to_frontend.close()
            self._wake_reader.close()
            self._wake_writer.close()
            for descriptor in self._pidfds:
                os.close(descriptor)
            self._pidfds.clear()

    # ---- starting ---------------------------------------------------------------------------------------------------

    def _spawn(self, process: Process) -> None:
        child = subprocess.Popen(
            # -P: a folder that happens to be the working directory must not shadow a library.
            [sys.executable, "-P", "-m", "ramet.launch.child", process.name],
            stdin=subprocess.PIPE,
            env={**os.environ, **process.placement.env},
            process_group=0,  # Ctrl-C in a terminal reaches the launcher only, which decides what follows
        )
        self._children[process.name] = child
        self._pidfds[os.pidfd_open(child.pid)] = process.name
        spec = ChildSpec(process, os.getpid(), self.addresses.launcher, self._log_level, self._log_format)
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError), child.stdin:  # a child that died at once is seen by its pidfd
            child.stdin.write(msgspec.msgpack.encode(spec))

    def _await_ready(self, names: set[str]) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while missing := names - self._ready.keys():
            if self._stop_requests:
                raise StopRequested
            if time.monotonic() > deadline:
                raise EngineFailed(f"not ready after {self._start_timeout_s:g} s: {', '.join(sorted(missing))}")
            if dead := self._poll(0):
                raise EngineFailed(self._death(dead[0]))
            self._read_inbox(0.1)
            if self._fatal:
                name, message = next(iter(self._fatal.items()))
                raise EngineFailed(f"{name}: {message}")

    def _read_inbox(self, timeout_s: float) -> None:
        while (message := self._inbox.receive(timeout_s)) is not None:
            timeout_s = 0
            if isinstance(message, Progress):
                self._show_progress(message)
            elif isinstance(message, Ready):
                facts = ", ".join(f"{key} {value}" for key, value in message.info.items())
                logger.info("%s: ready%s", message.process, f" ({facts})" if facts else "")
                self._ready[message.process] = message
            else:
                self._fatal.setdefault(message.process, message.message)

    def _show_progress(self, message: Progress) -> None:
        """A line for each kind of work, and for the numbers in it one a second at most."""
        kind = re.sub(r"\d+", "#", message.text)
        shown_kind, shown_at = self._progress.get(message.process, ("", 0.0))
        if kind != shown_kind or time.monotonic() - shown_at >= 1:
            logger.info("%s: %s", message.process, message.text)
            self._progress[message.process] = (kind, time.monotonic())

    # ---- watching and stopping --------------------------------------------------------------------------------------

    def _poll(self, timeout_s: float | None) -> list[str]:
        """Names of children that died since the last call; returns early, maybe with none, on a stop request."""
        poller = select.poll()
        for descriptor in (self._wake_reader.fileno(), *self._pidfds):
            poller.register(descriptor, select.POLLIN)
        events = poller.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000)
        dead = []
        for descriptor, _ in events:
            if descriptor == self._wake_reader.fileno():
                self._wake_reader.recv(64)
            else:
                dead.append(self._pidfds.pop(descriptor))
                os.close(descriptor)
        return dead

    def _poll_until(self, deadline: float, names: set[str]) -> list[str]:
        """Wait until all of `names` are dead, or the deadline, or a second stop request; returns who else died."""
        others: list[str] = []
        while names & set(self._pidfds.values()) and self._stop_requests < 2 and not others:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            others += [name for name in self._poll(left) if name not in names]
        return others

    def _terminate(self, names: set[str], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for name in names & set(self._pidfds.values()):
            self._children[name].send_signal(signal.SIGTERM)
        for name in self._poll_until(deadline, names):
            # The requests that the frontend wants to finish will get no more tokens.
            self._to_frontend.send(EngineDown(self._death(name)))
            deadline = min(deadline, time.monotonic() + _FLUSH_S)
        self._poll_until(deadline, names)

    def _death(self, name: str) -> str:
        """Why a child is dead, in its own words if it left any."""
        code = self._children[name].wait()
        self._read_inbox(0.1)
        if name in self._fatal:
            return f"{name}: {self._fatal[name]}"
        if code >= 0:
            return f"{name} ended with exit code {code}"
        hint = " (is the machine out of memory?)" if code == -signal.SIGKILL else ""
        return f"{name} was killed by {signal.Signals(-code).name}{hint}"


def _kill_all(children: dict[str, subprocess.Popen[bytes]], folder: str) -> None:
    for child in children.values():
        # The group, since a child may have started processes of its own. Its id is not reused before the reaping.
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    shutil.rmtree(folder, ignore_errors=True)
