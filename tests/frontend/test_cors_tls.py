"""Browsers from other origins, and https: over real sockets, with certificates made for the test."""

import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme
from support.scripted_engine import MODEL, WAIT_S, ScriptedEngine, says

from ramet.frontend.config import Tls
from ramet.ipc.messages import PromptInfo, TextDelta

ORIGIN = "https://page.example"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def engine() -> Iterator[ScriptedEngine]:
    with ScriptedEngine(cors_allow_origins=(ORIGIN,), api_keys=("s3cret",)) as engine:
        yield engine


def test_a_preflight_needs_no_key(engine: ScriptedEngine) -> None:
    headers = {
        "origin": ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type",
    }
    response = httpx.options(f"{engine.url}/v1/chat/completions", headers=headers)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in response.headers["access-control-allow-methods"]
    assert "authorization" in response.headers["access-control-allow-headers"].lower()
    assert response.headers["x-request-id"]
    headers["origin"] = "https://other.example"
    response = httpx.options(f"{engine.url}/v1/chat/completions", headers=headers)
    assert "access-control-allow-origin" not in response.headers


def test_a_page_can_read_answers_and_errors(engine: ScriptedEngine) -> None:
    engine.script = says("x")
    headers = {"origin": ORIGIN, "authorization": "Bearer s3cret"}
    response = httpx.post(f"{engine.url}/v1/chat/completions", json=CHAT, headers=headers)
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert "x-request-id" in response.headers["access-control-expose-headers"]
    response = httpx.post(f"{engine.url}/v1/chat/completions", json=CHAT, headers={"origin": ORIGIN})
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (401, ORIGIN)
    engine.job()


def test_a_page_that_leaves_aborts_and_streams_are_not_held_back(engine: ScriptedEngine) -> None:
    engine.script = None
    host, port = engine.url.removeprefix("http://").split(":")
    content = json.dumps({**CHAT, "stream": True}).encode()
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "host: x",
        f"origin: {ORIGIN}",
        "authorization: Bearer s3cret",
        "content-type: application/json",
        f"content-length: {len(content)}",
    ]
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
        connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + content)
        job = engine.job()
        engine.deltas(TextDelta(job.job.rids[0], "some", 1, PromptInfo(3, 0)))
        data = b""
        while b"some" not in data:
            data += connection.recv(65536)
    assert engine.aborted() == job.job.rids


def test_without_the_flag_no_origin_is_allowed() -> None:
    with ScriptedEngine() as engine:
        response = httpx.get(f"{engine.url}/v1/models", headers={"origin": ORIGIN})
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("mutual", [False, True])
def test_https(tmp_path: Path, mutual: bool) -> None:
    authority = trustme.CA()
    files = {name: tmp_path / f"{name}.pem" for name in ("authority", "server", "client")}
    authority.cert_pem.write_to_path(files["authority"])
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(files["server"])
    authority.issue_cert("someone@example.org").private_key_and_cert_chain_pem.write_to_path(files["client"])
    tls = Tls(ssl_certfile=str(files["server"]), ssl_ca_certs=str(files["authority"]) if mutual else None)
    trusting = ssl.create_default_context(cafile=str(files["authority"]))
    known = ssl.create_default_context(cafile=str(files["authority"]))
    known.load_cert_chain(files["client"])
    with ScriptedEngine(tls=tls) as engine:
        engine.script = says("x")
        url = engine.url.replace("http://127.0.0.1", "https://localhost") + "/v1/chat/completions"
        assert httpx.post(url, json=CHAT, verify=known).status_code == 200
        if mutual:
            with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
                httpx.post(url, json=CHAT, verify=trusting)
        else:
            assert httpx.post(url, json=CHAT, verify=trusting).status_code == 200
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            httpx.get(engine.url + "/health")  # plain HTTP
