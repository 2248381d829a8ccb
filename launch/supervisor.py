"""Starts the processes of an engine, watches them, starts anew what dies, and stops them.

Knows names and messages, not what the processes do (`launch/roles.py` does), and prints nothing but log lines. A
process dies by itself, or is killed because it is stuck (`ipc/watchdog.py`); its group is started again, within a
budget.

Invariants: the frontend hears `EngineDown` at once when a process of the engine is dead, then `EngineUp` when all are
ready, or `EngineDown` with `final` when nobody will start it again; once `stop()` returns, or the launcher dies in
whatever way, no process of the engine is alive; a running engine costs the launcher nearly nothing, because it sleeps
in one poll on the descriptors of the processes.
"""

import collections
import contextlib
import logging
import os
import re
import select
import shutil
import signal
import socket
import time
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from ramet.ipc.channel import FRONTEND, LAUNCHER, SCHEDULER, Addresses, Inbox, Outbox
from ramet.ipc.messages import EngineDown, EngineUp, Progress, Ready, ToLauncher
from ramet.ipc.pulse import BEAT_S, Pulse
from ramet.ipc.watchdog import Watchdog
from ramet.launch.child import ChildSpec, Process
from ramet.launch.owned_folder import make_folder
from ramet.launch.running import RunningProcess
from ramet.launch.server_args import ServerArgs

logger = logging.getLogger(__name__)

# How long a message may take to the frontend, and from there to its clients, before the frontend is told to stop.
_FLUSH_S = 1.0
# How long a process that was told to stop may take before it is killed.
_EXIT_S = 3.0
# The time in which restarts are counted against the budget.
_BUDGET_S = 600.0
# A group that died within this time before is started after a pause: 1 s, and twice as much each time.
_CALM_S = 30.0


class EngineFailed(Exception):
    """The engine was not ready in time, or processes died too often; the message is meant for the user."""


class StopRequested(Exception):
    """`request_stop()` was called while the engine was starting."""


class Supervisor:
    """Runs an engine: `start()`, then `wait()` until it ends, then `stop()`.

    To be used from one thread that lives as long as the engine, since the kernel kills children when the thread that
    started them ends. Only `request_stop` may be called from elsewhere, such as from a signal handler or another
    thread, and at any time.
    """

    def __init__(self, args: ServerArgs) -> None:
        # A short name: the path of a Unix socket is limited to 107 bytes.
        folder, locks = make_folder("ramet-")
        self.addresses = Addresses(str(folder), args.tokenizer_worker_num)
        self._args = args
        self._watchdog = Watchdog(self.addresses, args.watchdog_timeout)
        self._pulse = Pulse(self.addresses, LAUNCHER)
        self._children: dict[str, RunningProcess] = {}
        self._restarts: collections.deque[tuple[float, str]] = collections.deque()  # when, and of which group
        self._shown: dict[tuple[str, str], float] = {}  # when a line of progress was logged, by process and kind
        self._stop_requests = 0
        self._end = "it is being stopped"  # why a process that is dead or on its way will not be awaited
        # Runs at the latest when the interpreter ends.
        self._clean_up = weakref.finalize(self, _kill_all, self._children, folder, locks)
        # Sockets, since a closed one refuses a late `request_stop`; the number of a closed pipe may be another file's.
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_writer.setblocking(False)
        self._inbox: Inbox[ToLauncher] = Inbox(self.addresses.inbox(LAUNCHER), ToLauncher)
        self._to_frontend = Outbox(self.addresses.inbox(FRONTEND))

    def start(self, processes: Iterable[Process]) -> None:
        """Returns when all are ready. The frontend, which may be one of them or live in this process, hears
        `EngineUp` once the others are ready.

        Raises EngineFailed or StopRequested, with everything stopped.
        """
        try:
            for process in processes:
                self._spawn(process)
            if dead := self._bring_up():
                raise EngineFailed(self._death(dead[0]))
        except BaseException:
            self.stop()
            raise

    def wait(self) -> None:
        """Keep the engine running until a stop is requested. Raises EngineFailed when that cannot be done, once the
        clients have heard; StopRequested if processes were just being restarted."""
        while True:
            dead = self._watch()
            if self._stop_requests:
                return
            if dead:
                try:
                    self._restart(dead)
                except EngineFailed as error:
                    self._end = str(error).splitlines()[0]
                    raise

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
            healthy = self._alive & self._ready == self._children.keys()
            if not healthy:
                self._to_frontend.send(EngineDown(self._end, final=True))
            self._terminate({FRONTEND}, (self._args.drain_timeout if healthy else 0) + _EXIT_S)
            self._terminate(set(self._children), _EXIT_S)
        finally:
            self._clean_up()
            self._inbox.close()
            self._to_frontend.close()
            self._wake_reader.close()
            self._wake_writer.close()

    # ---- starting ---------------------------------------------------------------------------------------------------

    def _spawn(self, process: Process) -> None:
        spec = ChildSpec(
            process, os.getpid(), self.addresses.inbox(LAUNCHER), self._args.log_level, self._args.log_format
        )
        self._children[process.name] = RunningProcess(spec)

    def _bring_up(self) -> list[str]:
        """Wait until all are ready; the frontend hears of it when the others are. Returns early with who died."""
        if dead := self._await_ready(self._children.keys() - {FRONTEND}):
            return dead
        pids = {LAUNCHER: os.getpid(), **{name: child.pid for name, child in self._children.items()}}
        if SCHEDULER in self._children:  # else this machine only has other ranks
            self._to_frontend.send(EngineUp(self._children[SCHEDULER].info or {}, pids))
        return self._await_ready(set(self._children))

    def _await_ready(self, names: set[str]) -> list[str]:
        deadline = time.monotonic() + self._args.start_timeout
        while missing := names - self._ready:
            if self._stop_requests:
                raise StopRequested
            if time.monotonic() > deadline:
                children = [(name, self._children[name]) for name in sorted(missing)]
                waiting = [f"{name} ({child.doing})" if child.doing else name for name, child in children]
                raise EngineFailed(f"not ready after {self._args.start_timeout:g} s: {', '.join(waiting)}")
            if dead := self._watch(0):
                return dead
            self._read_inbox(0.1)
            for name in missing:
                if words := self._children[name].fatal:
                    raise EngineFailed(f"{name}: {words}")
        return []

    def _read_inbox(self, timeout_s: float) -> None:
        while (message := self._inbox.receive(timeout_s)) is not None:
            timeout_s = 0
            child = self._children[message.process]
            if isinstance(message, Progress):
                child.doing = message.text
                self._show_progress(message)
            elif isinstance(message, Ready):
                facts = ", ".join(f"{key} {value}" for key, value in message.info.items())
                logger.info("%s: ready%s", message.process, f" ({facts})" if facts else "")
                child.info = message.info
            else:
                child.fatal = child.fatal or message.message

    def _show_progress(self, message: Progress) -> None:
        """A line for each kind of work, and for the numbers in it one a second at most."""
        kind = message.process, re.sub(r"\d+", "#", message.text)
        if time.monotonic() - self._shown.get(kind, 0.0) >= 1:
            logger.info("%s: %s", message.process, message.text)
            self._shown[kind] = time.monotonic()

    # ---- restarting -------------------------------------------------------------------------------------------------

    def _restart(self, dead: list[str]) -> None:
        """Start what died, and the rest of its groups, until all are ready."""
        died_at = time.monotonic()
        while dead:
            reasons = {name: self._death(name) for name in dead}
            if dead != [FRONTEND]:
                self._to_frontend.send(EngineDown("; ".join(reasons.values())))
            now = time.monotonic()
            pause_s = max(self._take_from_budget(name, reason, now) for name, reason in reasons.items())
            groups = {self._group(name) for name in dead}
            members = [child for name, child in self._children.items() if self._group(name) in groups]
            for child in members:
                child.end()
            self._read_inbox(0)  # the last of it, lest it is taken for word from their successors
            dead = self._pause(pause_s)
            for child in members:
                self._spawn(child.process)
            dead = dead or self._bring_up()
        logger.info("all processes are ready again after %.1f s", time.monotonic() - died_at)

    def _take_from_budget(self, name: str, reason: str, now: float) -> float:
        """Seconds to wait before the restart. Raises EngineFailed if there is to be none."""
        child, group = self._children[name], self._group(name)
        if child.exit_code is None:
            self._give_up(child, f"{reason}, and it cannot be killed")
        if child.fatal and child.info is None:
            self._give_up(child, reason)
        if (now, group) in self._restarts:  # another of the group is down as well, and all are started again at once
            return 0.0
        while self._restarts and self._restarts[0][0] < now - _BUDGET_S:
            self._restarts.popleft()
        if (count := len(self._restarts)) >= self._args.max_restarts:
            tried = f", after {count} restarts in {_BUDGET_S / 60:g} minutes" if count else ""
            self._give_up(child, reason + tried)
        recent = sum(which == group and when > now - _CALM_S for when, which in self._restarts)
        self._restarts.append((now, group))
        pause_s = 2.0 ** (recent - 1) if recent else 0.0
        which = f"restart {count + 1} of {self._args.max_restarts}"
        logger.error("%s; it is started again in %g s (%s)", reason, pause_s, which)
        return pause_s

    def _give_up(self, child: RunningProcess, reason: str) -> NoReturn:
        lines = [] if child.fatal else child.last_lines
        raise EngineFailed(
            "\n".join([reason, *([f"the last lines of {child.process.name}:"] if lines else []), *lines])
        )

    def _pause(self, seconds: float) -> list[str]:
        """Returns early with who died meanwhile."""
        until = time.monotonic() + seconds
        dead: list[str] = []
        while not dead and (left_s := until - time.monotonic()) > 0:
            if self._stop_requests:
                raise StopRequested
            dead = self._watch(left_s)
        return dead

    def _group(self, name: str) -> str:
        return self._children[name].process.group or name

    # ---- watching and stopping --------------------------------------------------------------------------------------

    @property
    def _alive(self) -> set[str]:
        return {name for name, child in self._children.items() if child.exit_code is None}

    @property
    def _ready(self) -> set[str]:
        return {name for name, child in self._children.items() if child.info is not None}

    def _watch(self, timeout_s: float = float("inf")) -> list[str]:
        """Sleep until something happens, or there may be something to see. Names of those that died, or hung and were
        killed."""
        watched = self._alive & self._ready
        dead = self._poll(min(timeout_s, self._watchdog.patience_s(watched)))
        for name, stuck_s in self._watchdog.stuck(watched - set(dead)).items():
            self._children[name].stuck_s = stuck_s
            self._children[name].end()
            dead.append(name)
        return dead

    def _poll(self, timeout_s: float) -> list[str]:
        """Names of children that died since the last call; returns early, maybe with none, on a stop request."""
        self._pulse.beat()
        names = {self._children[name].pidfd: name for name in self._alive}
        poller = select.poll()
        for descriptor in (self._wake_reader.fileno(), *names):
            poller.register(descriptor, select.POLLIN)
        dead = []
        for descriptor, _ in poller.poll(max(0.0, timeout_s) * 1000):
            if descriptor == self._wake_reader.fileno():
                self._wake_reader.recv(64)
            else:
                self._children[names[descriptor]].end()
                dead.append(names[descriptor])
        return dead

    def _terminate(self, names: set[str], timeout_s: float) -> None:
        """Until they are dead, the time is up, or a second stop is requested."""
        deadline = time.monotonic() + timeout_s
        for name in names & self._alive:
            self._children[name].terminate()
        while names & self._alive and self._stop_requests < 2 and (left_s := deadline - time.monotonic()) > 0:
            for name in set(self._poll(min(left_s, BEAT_S))) - names:
                # The requests that the frontend wants to finish will get no more tokens.
                self._to_frontend.send(EngineDown(self._death(name), final=True))
                deadline = min(deadline, time.monotonic() + _FLUSH_S)

    def _death(self, name: str) -> str:
        """Why a child is dead, in its own words if it left any."""
        child = self._children[name]
        code = child.end()
        self._read_inbox(0.1)
        if child.fatal:
            return f"{name}: {child.fatal}"
        if child.stuck_s:
            return f"{name} hung, silent for more than {child.stuck_s:.1f} s"
        if code is None or code >= 0:
            return f"{name} ended with exit code {code}"
        hint = " (is the machine out of memory?)" if code == -signal.SIGKILL else ""
        return f"{name} was killed by {signal.Signals(-code).name}{hint}"


def _kill_all(children: dict[str, RunningProcess], folder: Path, locks: contextlib.ExitStack) -> None:
    for child in children.values():
        child.end()
    shutil.rmtree(folder, ignore_errors=True)
    locks.close()
