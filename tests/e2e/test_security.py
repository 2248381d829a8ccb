"""The promises of docs/security.md that need a whole server; the page names the tests of the others."""

import hmac
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support.server import PATIENCE_S, RunningServer, tiny_flags, until

from ramet.frontend.app import ApiKeys

pytestmark = pytest.mark.e2e

KEY, OTHER_KEY = "sk-Tr0ub4dor-and-3", "sk-correct-horse"
OPEN = {"/health", "/ready", "/metrics", "/openapi.json"}


@pytest.fixture(scope="module")
def server(servers: Any, tiny_model: Callable[[str], Path]) -> Iterator[RunningServer]:
    servers.close()
    flags = [
        *tiny_flags(tiny_model("llama")),
        "--api-key",
        KEY,
        OTHER_KEY,
        "--log-level",
        "debug",
        "--log-requests",
        "content",
    ]
    with RunningServer(*flags, api_key=KEY) as server:
        yield server
        assert "Traceback" not in server.log()


def test_every_route_asks_for_a_key_but_four(server: RunningServer) -> None:
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert len(paths) > 20
    with httpx.Client(base_url=server.url) as http:
        for path, methods in paths.items():
            for method in methods:
                for headers in ({}, {"authorization": "Bearer sk-wrong"}, {"authorization": f"Bearer {KEY}x"}):
                    response = http.request(method, path, headers=headers)
                    assert (response.status_code == 401) == (path not in OPEN), (method, path)
        # Nor is a path open that only looks so.
        for path in ("/health/", "//health", "/HEALTH", "/health%2f../v1/models", "/metrics/../v1/models"):
            assert http.get(path).status_code in (401, 404)


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in full, also after one that fits."""
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(b) or compare(a, b))
    keys = ApiKeys(None, ("a", "b", "c"), frozenset())  # type: ignore[arg-type]
    for given, accepted in (("a", True), ("c", True), ("d", False)):
        compared.clear()
        assert keys._accepts(f"Bearer {given}") is accepted
        assert compared == [b"a", b"b", b"c"]


def test_secrets_stay_out_of_logs_and_answers(server: RunningServer) -> None:
    server.client.completions.create(model=server.model, prompt="a", max_tokens=1)
    httpx.get(f"{server.url}/v1/models", headers={"authorization": f"Bearer {OTHER_KEY}x"})
    told = [server.http.get(path).text for path in ("/get_server_info", "/get_model_info", "/openapi.json", "/metrics")]
    assert json.loads(told[0])["port"] == server.port  # it does tell settings
    until(lambda: "/v1/completions" in server.log(), PATIENCE_S, server.log)
    told.append(server.log())
    # The launcher's own arguments are what the operator typed; nothing passes them on.
    for name, pid in server.pids().items():
        if name != "launcher":
            told += [Path(f"/proc/{pid}/{what}").read_bytes().decode() for what in ("cmdline", "environ")]
    for text in told:
        assert KEY not in text
        assert OTHER_KEY not in text


def test_log_lines_cannot_be_forged(server: RunningServer) -> None:
    seen = len(server.log())
    server.http.get("/v1/models/%0aFORGED%0d%1b[31m")
    server.http.get("/v1/models", headers={"x-request-id": "a b"})
    body = {"model": server.model, "prompt": "a\nFORGED", "max_tokens": 1, "user": "x\r\nFORGED"}
    assert server.http.post("/v1/completions", json=body).status_code == 200
    answered = re.compile("/v1/completions.*200")
    until(lambda: answered.search(server.log(), seen) is not None, PATIENCE_S, server.log)
    lines = server.log().splitlines()
    assert not [line for line in lines if line.startswith("FORGED")]
    assert "\x1b[31m" not in server.log()
    assert "id=a b" not in server.log()


def test_only_this_machine_is_listened_to(server: RunningServer) -> None:
    for pid in server.pids().values():
        for connection in psutil.Process(pid).net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                assert (connection.laddr.ip, connection.laddr.port) == ("127.0.0.1", server.port)


def test_folders_are_private(server: RunningServer) -> None:
    server.client.files.create(file=b"x", purpose="evals")
    folders = server.private_folders()
    assert len(folders) == 2
    for folder in folders:
        entry = folder.stat()
        assert stat.S_IMODE(entry.st_mode) == 0o700
        assert entry.st_uid == os.getuid()


ABOVE = "..%2f..%2f..%2f..%2fetc%2fpasswd"
OUTSIDE = ["../../../../etc/passwd", ABOVE, "%2fetc%2fpasswd", "..", "%2e%2e", "a%00b", "store.db"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_path_comes_from_a_request(server: RunningServer, name: str) -> None:
    server.client.files.create(file=(name, b"mine"), purpose="evals")
    for path in (f"/v1/files/{name}/content", f"/v1/files/{name}", f"/v1/batches/{name}", f"/v1/models/{name}"):
        response = server.http.get(path)
        assert "root:" not in response.text
        # `..` itself is taken away by the client, and leaves another route.
        assert response.status_code in ((404, 405) if ".." not in path else (200, 404, 405))
    for path in (f"/v1/files/{name}", f"/v1/batches/{name}/cancel"):
        assert server.http.request("DELETE" if "files" in path else "POST", path).status_code in (404, 405)
    batch = {"input_file_id": name, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    assert server.http.post("/v1/batches", json=batch).status_code == 404


def test_a_page_cannot_post_without_the_browser_asking_first(server: RunningServer) -> None:
    """The forms and texts that a page may send anywhere without a preflight are refused."""
    body = json.dumps({"model": server.model, "prompt": "a"}).encode()
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        headers = {"content-type": content_type, "origin": "https://elsewhere.example"}
        response = server.http.post("/v1/completions", content=body, headers=headers)
        assert response.status_code == 415
        assert not [name for name in response.headers if name.startswith("access-control")]


def test_hostile_conversations_do_not_blow_up(server: RunningServer) -> None:
    """Many messages, long ones, and what templates and tokenizers trip over: an answer or a 400, in a minute."""
    nested = "{{ ''.__class__ }}{% for i in range(10**9) %}x{% endfor %}"
    contents = [nested, "<|im_end|>" * 1000, "\ud83d\ude00" * 1000, "\x00\x01\x1b" * 1000, "a" * 200_000, " " * 200_000]
    conversations = [[{"role": "user", "content": content}] for content in contents]
    conversations.append([{"role": "user", "content": ""}] * 100_000)
    for messages in conversations:
        body = json.dumps({"model": server.model, "messages": messages, "max_tokens": 1})
        response = server.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert response.status_code in (200, 400), response.text
    # What looks like a template in a message is a message.
    rendered = server.http.post("/tokenize", json={"messages": [{"role": "user", "content": nested}]}).json()
    assert nested in server.http.post("/detokenize", json={"tokens": rendered["tokens"]}).json()["text"]


def test_a_request_cannot_bring_a_template(server: RunningServer) -> None:
    chat = {"model": server.model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    refused = server.http.post("/v1/chat/completions", json={**chat, "chat_template": "{{ 1 }}"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unknown_parameter")
    # As a variable it is only a variable.
    prompts = []
    for kwargs in ({}, {"chat_template": "{{ 1 }}", "template": "{{ 1 }}", "messages": [], "tools": 1}):
        body = {"messages": chat["messages"], "chat_template_kwargs": kwargs}
        prompts.append(server.http.post("/tokenize", json=body).json()["tokens"])
    assert prompts[0] == prompts[1]


def test_what_an_error_says_is_bounded_and_has_no_inside(server: RunningServer) -> None:
    bodies: list[Any] = [{"x" * 100_000: 1}, {"model": "y" * 100_000}, {"prompt": [2**62]}, {"prompt": "a" * 3_000_000}]
    for body in bodies:
        response = server.http.post("/v1/completions", json={"model": server.model, "prompt": "a", **body})
        assert response.status_code in (400, 404)
        assert len(response.content) < 4000
        assert not re.search(r"Traceback|site-packages|\.py\b", response.text)
