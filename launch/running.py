"""`RunningProcess`: one started process of the engine: its end, all that it started itself, and what it said.

Its stderr passes through here, line by line, so that what it said last is known when it is dead. Does not decide
anything.
"""

import collections
import contextlib
import os
import signal
import subprocess
import sys
import threading

import msgspec

from ramet.launch.child import ChildSpec

_LAST_LINES = 20
# The kernel may take a while to end a process, and cannot end one that hangs in a driver.
_KILL_S = 10.0
_LAST_WORDS_S = 1.0


class RunningProcess:
    """Made in a thread that lives as long as the process, since the kernel kills it when that thread ends."""

    def __init__(self, spec: ChildSpec) -> None:
        self.process = spec.process
        # What its owner hears of it: `Ready`'s info, the words of `Fatal`, the latest `Progress`; and for how many
        # seconds it had been stuck when it was killed for it.
        self.info: dict[str, int | str | float] | None = None
        self.fatal, self.doing = "", ""
        self.stuck_s = 0.0
        self._popen = subprocess.Popen(
            # -P: a folder that happens to be the working directory must not shadow a library.
            [sys.executable, "-P", "-m", "ramet.launch.child", spec.process.name],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **spec.process.placement.env},
            process_group=0,  # Ctrl-C in a terminal reaches the launcher only, which decides what follows
        )
        self.pid = self._popen.pid
        self.pidfd = os.pidfd_open(self.pid)  # readable when it is dead; closed by `end`
        self._lines: collections.deque[bytes] = collections.deque(maxlen=_LAST_LINES)
        self._reader = threading.Thread(target=self._pass_on, daemon=True, name=f"stderr of {spec.process.name}")
        self._reader.start()
        assert self._popen.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._popen.stdin:  # one that died at once is seen by its pidfd
            self._popen.stdin.write(msgspec.msgpack.encode(spec))

    @property
    def exit_code(self) -> int | None:
        """None as long as it has not been seen dead."""
        return self._popen.returncode

    @property
    def last_lines(self) -> list[str]:
        return [line.decode(errors="replace").rstrip() for line in self._lines]

    def terminate(self) -> None:
        self._popen.terminate()

    def end(self) -> int | None:
        """Kill it if it lives, and what it started. The exit code is its own; None if the kernel cannot end it."""
        if self._popen.returncode is None:
            # The group's id is not reused before the reaping, which comes next.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(_KILL_S)
                os.close(self.pidfd)
                self._reader.join(_LAST_WORDS_S)
        return self._popen.returncode

    def _pass_on(self) -> None:
        assert self._popen.stderr is not None
        with self._popen.stderr as lines:
            for line in lines:
                self._lines.append(line)
                with contextlib.suppress(OSError):  # nobody listens to the launcher; the process must not notice
                    os.write(2, line)
