"""Start a server by its command line from a program or a notebook, wait until it answers, and end it.

Knows of the server only its command and its `/ready`. The command runs in a process group of its own, by which all that
it started is found.
"""

import os
import signal
import subprocess
import sys
import time
import urllib.request

# A server lets its running requests finish on the first SIGTERM, and ends at once on the second.
_DRAIN_S = 5.0
_EXIT_S = 10.0
_POLL_S = 0.2


def execute_shell_command(command: str) -> "subprocess.Popen[bytes]":
    r"""Start `command`, which may be of several lines joined by `\`. Its `python` is the one that runs this."""
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    joined = command.replace("\\\n", " ").strip()
    return subprocess.Popen(joined, shell=True, env={**os.environ, "PATH": path}, start_new_session=True)


def wait_for_server(base_url: str, timeout_s: float = 900.0) -> None:
    """Return when the server at `base_url` is ready. Raises TimeoutError."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is near: no proxy
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with opener.open(f"{base_url.rstrip('/').removesuffix('/v1')}/ready", timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no server was ready at {base_url} within {timeout_s:g} s: {error}") from error
        time.sleep(_POLL_S)


def terminate_process(process: "subprocess.Popen[bytes]") -> None:
    """End what `execute_shell_command` has started; what runs in it is not finished. The processes of an engine, which
    are in groups of their own, end with their launcher."""
    for number, timeout_s in ((signal.SIGTERM, _DRAIN_S), (signal.SIGTERM, _EXIT_S), (signal.SIGKILL, _EXIT_S)):
        deadline = time.monotonic() + timeout_s
        try:
            os.killpg(process.pid, number)
            while time.monotonic() < deadline:
                process.poll()  # lets the kernel forget it
                os.killpg(process.pid, 0)  # fails when nobody is left
                time.sleep(_POLL_S / 4)
        except ProcessLookupError:
            return
