"""What takes long but is no hang: an idle server, a long text, a machine that sleeps. Nobody may be killed for it.

The watchdog waits as short as it can be told to, so that each lasts longer than its patience.
"""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.server import ROLES, RunningServer
from support.tiny_models import make_tiny_model

pytestmark = pytest.mark.e2e

WATCHDOG_S = 3.0
FROZEN_S = 4.0
CONTEXT = 65536
LONG = {"max_tokens": 300, "temperature": 0, "ignore_eos": True, "stream": True}


def test_nobody_is_killed_who_is_idle_busy_or_frozen(servers: Any, tmp_path: Path) -> None:
    servers.close()
    make_tiny_model("llama", tmp_path, max_position_embeddings=CONTEXT)
    flags = ("--model-path", str(tmp_path), "--dtype", "float32", "--device", "cpu", "--max-total-tokens", "6144")
    flags += ("--tp-size", "2", "--tokenizer-worker-num", "2", "--watchdog-timeout", f"{WATCHDOG_S:g}")
    with RunningServer(*flags, roles=(*ROLES, "scheduler-1", "tokenizer-1")) as server:
        pids = server.pids()
        time.sleep(WATCHDOG_S + 0.5)
        check_health(server, pids)

        with server.http.stream(
            "POST", "/v1/completions", json={"model": server.model, "prompt": "a", **LONG}
        ) as stream:
            pieces = stream.iter_text()
            text = next(pieces)
            for number, pause_s in ((signal.SIGSTOP, FROZEN_S), (signal.SIGCONT, 0)):
                for pid in pids.values():
                    os.kill(pid, number)
                time.sleep(pause_s)
            text += "".join(pieces)
        assert '"finish_reason":"length"' in text and "error" not in text
        check_health(server, pids)

        # The most characters that are encoded at all: seconds of work, at the end of which they are too many tokens.
        body = {"model": server.model, "prompt": "a b c 12, " * (CONTEXT * 128 // 10)}
        answer = server.http.post("/v1/completions", json=body)
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert "maximum context length is " in answer.json()["error"]["message"]
        check_health(server, pids)
        assert not re.search(" (WARNING|ERROR) ", server.log())


def check_health(server: RunningServer, pids: dict[str, int]) -> None:
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert server.pids() == pids
