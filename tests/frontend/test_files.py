"""`/v1/files` over HTTP: the life of a file, every refusal, and constant memory."""

import concurrent.futures
import http.client
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from support.scripted_engine import WAIT_S, ScriptedEngine
from support.server import until

MB = 2**20


@pytest.fixture(scope="module")
def engine() -> Iterator[ScriptedEngine]:
    with ScriptedEngine(max_file_bytes=4 * MB, max_storage_bytes=8 * MB) as engine:
        yield engine


@pytest.fixture
def files(engine: ScriptedEngine) -> Iterator[Any]:
    """The SDK's files; each test starts with none."""
    with openai.OpenAI(base_url=f"{engine.url}/v1", api_key="x", max_retries=0) as client:
        yield client.files
        for file in client.files.list(limit=1):  # page by page, deleting each cursor
            client.files.delete(file.id)
        assert client.files.list().data == []


def post(
    engine: ScriptedEngine, body: Any, content_type: str | bytes = "multipart/form-data; boundary=b"
) -> httpx.Response:
    return httpx.post(f"{engine.url}/v1/files", content=body, headers={"content-type": content_type}, timeout=60)


def part(name: str, data: bytes, more: str = "") -> bytes:
    return f'--b\r\ncontent-disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + data + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--b--\r\n"


def check_error(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), response.text
    return str(error["message"])


FILE = part("file", b"data", '; filename="f"')
PURPOSE = part("purpose", b"evals")


def test_the_life_of_a_file(engine: ScriptedEngine, files: Any) -> None:
    data = os.urandom(3 * MB)
    file = files.create(file=("../../etc/passwd", data), purpose="user_data")
    assert (file.filename, file.bytes, file.purpose, file.status) == ("passwd", len(data), "user_data", "processed")
    assert file.id.startswith("file-") and file.object == "file" and file.expires_at is None
    assert files.retrieve(file.id) == file
    content = files.content(file.id)
    assert content.read() == data
    assert content.response.headers["content-length"] == str(len(data))
    deleted = files.delete(file.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (file.id, "file", True)
    for use in (files.retrieve, files.delete, files.content):
        with pytest.raises(openai.NotFoundError, match=file.id):
            use(file.id)


def test_head_of_a_content_reads_nothing(engine: ScriptedEngine, files: Any) -> None:
    file = files.create(file=b"x" * 4 * MB, purpose="user_data")

    def read_bytes() -> int:
        return int(psutil.Process(engine.process.pid).io_counters().read_chars)

    before = read_bytes()
    with httpx.Client(base_url=engine.url) as client:
        response = client.head(f"/v1/files/{file.id}/content")
        client.get("/health")  # on the same connection, so the answer before it has ended
    assert (response.status_code, response.headers["content-length"]) == (200, str(4 * MB))
    assert response.headers["content-type"] == "application/octet-stream"
    assert read_bytes() - before < MB
    assert len(files.content(file.id).read()) == 4 * MB
    files.delete(file.id)


def test_names_are_never_paths(engine: ScriptedEngine, files: Any) -> None:
    names = ["a" * 2000, "..", "x\x00y", "日本.jsonl", 'q"uote', ""]
    for name in names:
        assert files.create(file=(name or "file", b"x"), purpose="evals").bytes == 1
    folder = engine.config.file_storage_path
    assert set(os.listdir(folder)) == {"files", "tmp", "batches", "lock", "store.db", "store.db-wal", "store.db-shm"}
    assert all(name.startswith("file-") for name in os.listdir(f"{folder}/files"))


def test_expiry(files: Any) -> None:
    file = files.create(file=b"x", purpose="evals", expires_after={"anchor": "created_at", "seconds": 2_592_000})
    assert file.expires_at == file.created_at + 2_592_000
    for expires_after in ({"anchor": "created_at", "seconds": 3599}, {"anchor": "created_at", "seconds": 2_592_001}):
        with pytest.raises(openai.BadRequestError, match="between 3600 and 2592000") as caught:
            files.create(file=b"x", purpose="evals", expires_after=expires_after)
        assert caught.value.param == "expires_after.seconds"
    with pytest.raises(openai.BadRequestError, match="anchor"):
        files.create(file=b"x", purpose="evals", expires_after={"anchor": "now", "seconds": 3600})


def test_lists(engine: ScriptedEngine, files: Any) -> None:
    ids = [files.create(file=b"x", purpose=("evals", "vision")[i % 2]).id for i in range(5)]
    assert [file.id for file in files.list(limit=2)] == ids[::-1]
    assert [file.id for file in files.list(limit=2, order="asc", purpose="evals")] == ids[::2]
    page = httpx.get(f"{engine.url}/v1/files?limit=2&after={ids[4]}").json()
    assert (page["object"], page["has_more"], page["first_id"], page["last_id"]) == ("list", True, ids[3], ids[2])
    empty = httpx.get(f"{engine.url}/v1/files?purpose=fine-tune").json()
    assert empty == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    files.delete(ids[4])
    assert httpx.get(f"{engine.url}/v1/files?limit=2&after={ids[4]}").json() == page


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=10001", "limit"),
        ("limit=x", "limit"),
        ("order=up", "order"),
        ("after=batch_1", "after"),
    ],
)
def test_wrong_queries(engine: ScriptedEngine, query: str, param: str) -> None:
    message = check_error(httpx.get(f"{engine.url}/v1/files?{query}"), 400, "invalid_type", param)
    assert message.endswith(f"got {query.partition('=')[2]!r}")
    check_error(httpx.get(f"{engine.url}/v1/files?zap=1"), 400, "unknown_parameter", "zap")
    twice = check_error(httpx.get(f"{engine.url}/v1/files?limit=1&limit=2"), 400, "invalid_value")
    assert "limit=1&limit=2" in twice


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (form(FILE), "missing_required_parameter", "purpose"),
        (form(PURPOSE), "missing_required_parameter", "file"),
        (form(FILE, part("purpose", b"fun")), "invalid_value", "purpose"),
        (form(FILE, part("purpose", b"batch_output")), "invalid_value", "purpose"),
        (form(FILE, part("purpose", b"\xff" * 2000)), "invalid_value", "purpose"),
        (form(PURPOSE, FILE, FILE), "invalid_value", "file"),
        (form(PURPOSE, FILE, part("zap", b"")), "unknown_parameter", "zap"),
        (form(b"--b\r\n\r\nx\r\n"), "unknown_parameter", ""),
        (form(b"--b\r\nx: " + b"y" * 100_000 + b"\r\n\r\nx\r\n"), "invalid_multipart", None),
        (form(PURPOSE, FILE)[:-6], "invalid_multipart", None),
        (b"", "invalid_multipart", None),
        (b"--c\r\n", "invalid_multipart", None),
        (os.urandom(5000), "invalid_multipart", None),
    ],
)
def test_malformed_forms(engine: ScriptedEngine, body: bytes, code: str, param: str | None) -> None:
    check_error(post(engine, body), 400, code, param)
    assert os.listdir(f"{engine.config.file_storage_path}/tmp") == []


def test_what_has_come_of_a_slow_upload_is_on_disk(engine: ScriptedEngine) -> None:
    """Many of them must not hold much in memory."""
    host, port = engine.url.removeprefix("http://").split(":")
    folder = Path(engine.config.file_storage_path, "tmp")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
        head = "POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=b\r\n"
        body = form(PURPOSE, part("file", b"x" * 400_000))
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[:300_000])
        until(lambda: sum(path.stat().st_size for path in folder.glob("*")) > 150_000, WAIT_S, lambda: "on disk")
    until(lambda: not list(folder.glob("*")), WAIT_S, lambda: "gone with its client")


def test_other_content_types(engine: ScriptedEngine) -> None:
    for other in ("application/json", b"\xe9"):
        check_error(post(engine, b"{}", other), 415, "unsupported_media_type")
    encoded = {"content-type": "multipart/form-data; boundary=b", "content-encoding": "gzip"}
    check_error(httpx.post(f"{engine.url}/v1/files", content=b"x", headers=encoded), 415, "unsupported_media_type")
    check_error(post(engine, b"", "multipart/form-data"), 400, "invalid_multipart")
    check_error(post(engine, b"", f"multipart/form-data; boundary={'b' * 300}"), 400, "invalid_multipart")


def test_too_large(engine: ScriptedEngine, files: Any) -> None:
    check_error(post(engine, form(PURPOSE, part("file", b"x" * (4 * MB + 1)))), 413, "request_too_large")
    check_error(post(engine, form(part("file", b"x" * (4 * MB + 1)), PURPOSE)), 413, "request_too_large")
    # The announced length is enough to refuse it.
    host, port = engine.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=WAIT_S)
    connection.putrequest("POST", "/v1/files")
    connection.putheader("content-type", "multipart/form-data; boundary=b")
    connection.putheader("content-length", str(6 * MB))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    files.create(file=b"x" * 4 * MB, purpose="evals")


def test_a_full_store(engine: ScriptedEngine, files: Any) -> None:
    kept = [files.create(file=b"x" * 3 * MB, purpose="evals") for _ in range(2)]
    with pytest.raises(openai.APIStatusError, match="of at most 8388608 bytes") as caught:
        files.create(file=b"x" * 3 * MB, purpose="evals")
    assert (caught.value.status_code, caught.value.code) == (413, "storage_full")
    files.delete(kept[0].id)
    files.create(file=b"x" * 3 * MB, purpose="evals")


def test_a_client_that_leaves_in_the_middle(engine: ScriptedEngine) -> None:
    host, port = engine.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=b\r\n"
        connection.sendall(f"{head}content-length: 100000\r\n\r\n".encode() + PURPOSE)
        tmp = f"{engine.config.file_storage_path}/tmp"
        until(lambda: os.listdir(tmp) != [], WAIT_S, lambda: "the upload")
    until(lambda: os.listdir(tmp) == [], WAIT_S, lambda: "its removal")


def test_300_mb_are_refused_without_taking_memory() -> None:
    """And 512 MB is the limit of other files, but this one is the input of a batch."""

    def body() -> Iterator[bytes]:
        yield part("purpose", b"batch") + b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n'
        for _ in range(300):
            yield b"x" * MB
        yield b"\r\n--b--\r\n"

    with ScriptedEngine() as engine, concurrent.futures.ThreadPoolExecutor(1) as pool:
        httpx.get(f"{engine.url}/v1/files")
        process = psutil.Process(engine.process.pid)
        before = process.memory_info().rss
        upload = pool.submit(post, engine, body())
        peak = before
        while not upload.done():
            peak = max(peak, process.memory_info().rss)
            concurrent.futures.wait([upload], 0.05)
        assert "at most 209715200 bytes" in check_error(upload.result(), 413, "request_too_large")
        assert peak - before < 16 * MB
        assert os.listdir(f"{engine.config.file_storage_path}/tmp") == []


def test_uploads_do_not_stop_the_server(engine: ScriptedEngine, files: Any) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        uploads = [pool.submit(files.create, file=bytes([i]) * MB, purpose="evals") for i in range(6)]
        made = [upload.result(WAIT_S) for upload in uploads]
    assert [files.content(file.id).read() for file in made] == [bytes([i]) * MB for i in range(6)]


def test_a_second_server_on_one_store_does_not_start(engine: ScriptedEngine) -> None:
    httpx.get(f"{engine.url}/v1/files")
    with ScriptedEngine(start=False, file_storage_path=engine.config.file_storage_path) as second:
        fatal = second.news.get(timeout=WAIT_S)
        assert f"in use by another server (process {engine.process.pid})" in fatal.message
        assert second.exit_code() == 1
