"""Log lines of a process: text for people, objects for machines, and nothing that a client sent can fake either."""

import json
import subprocess
import sys
from datetime import UTC, datetime

from support.server import free_port

PROGRAM = """
import logging, sys, warnings
from ramet.launch.logs import set_up_logging
set_up_logging("frontend", "info", sys.argv[1])
log = logging.getLogger("ramet.some.module")
log.debug("not shown")
log.info("request", extra={"fields": {"id": "a-1", "status": 200, "path": "/x\\n12:00 ERROR fake=1", "text": "a b"}})
try:
    1 / 0
except ZeroDivisionError:
    log.exception("step %d failed: \\ud800", 7)
warnings.warn("mind this")
logging.getLogger("httpx").info("not shown")
logging.getLogger("python_multipart.multipart").warning("not shown")
"""


def log(form: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, form], capture_output=True, text=True, check=True, timeout=300
    )
    return done.stderr.splitlines()


def test_text() -> None:
    request, *rest = log("text")
    time, level, process, *words = request.split()
    datetime.strptime(time, "%H:%M:%S.%f")
    assert (level, process) == ("INFO", "frontend")
    assert " ".join(words) == r'request id=a-1 status=200 path="/x\n12:00 ERROR fake=1" text="a b"'
    assert any("ZeroDivisionError" in line for line in rest)


def test_json() -> None:
    request, failure, warning = [json.loads(line) for line in log("json")]
    told = datetime.now(UTC) - datetime.fromisoformat(request.pop("time"))
    assert abs(told.total_seconds()) < 60
    assert request == {
        "level": "info",
        "process": "frontend",
        "logger": "ramet.some.module",
        "message": "request",
        "id": "a-1",
        "status": 200,
        "path": "/x\n12:00 ERROR fake=1",
        "text": "a b",
    }
    assert (failure["level"], failure["message"]) == ("error", "step 7 failed: \ud800")
    assert failure["exception"].endswith("ZeroDivisionError: division by zero")
    assert (warning["level"], warning["logger"]) == ("warning", "py.warnings")


def test_a_failed_start_is_a_line_of_the_log_as_well() -> None:
    command = [sys.executable, "-m", "ramet.launch_server", "--model-path", "/nowhere/at-all", "--log-format", "json"]
    done = subprocess.run([*command, "--port", str(free_port())], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    last = json.loads(done.stderr.splitlines()[-1])
    assert (last["level"], last["process"]) == ("error", "launcher")
    assert "/nowhere/at-all" in last["message"]
