"""The store on a real disk: what survives a crash, limits, lists, and who may open it."""

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ramet.frontend import store as store_module
from ramet.frontend.batch_worker import BatchWorker
from ramet.frontend.config import FrontendConfig
from ramet.frontend.engine_client import EngineClient
from ramet.frontend.metrics import Metrics
from ramet.frontend.store import File, Store, Upload
from ramet.ipc.channel import Addresses
from ramet.ipc.errors import RequestError

DAY_S = 24 * 3600


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(str(tmp_path / "s"))
    store.open()
    yield store
    store.close()


def add(store: Store, data: bytes = b"abc", purpose: str = "batch", expires_after_s: int | None = None) -> File:
    upload = Upload(store)
    upload.write(data)
    return store.add(upload, "name.jsonl", purpose, expires_after_s)


def reopened(store: Store) -> Store:
    store.close()
    again = Store(str(store.folder))
    again.open()
    return again


def contents(store: Store) -> list[str]:
    return sorted(path.name for path in (store.folder / "files").iterdir())


def contents_size(store: Store) -> int:
    return sum(path.stat().st_size for path in (store.folder / "files").iterdir())


def test_a_file_survives(store: Store) -> None:
    file = add(store, b"content")
    again = reopened(store)
    found, content = again.open_content(file.id)
    with content:
        assert (found, content.read()) == (file, b"content")
    again.close()


def test_nothing_is_made_before_it_is_needed(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "s"))
    assert not store.exists
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_crash_leaves_is_removed(store: Store) -> None:
    kept = add(store)
    upload = Upload(store)
    upload.write(b"half of it")  # killed while it came
    upload.file.close()
    store.content("file-without-row").write_bytes(b"x")  # killed between the rename and the row
    (store.folder / "batches" / "batch_gone").mkdir()
    again = reopened(store)
    assert contents(again) == [kept.id]
    assert list((again.folder / "tmp").iterdir()) == []
    assert list((again.folder / "batches").iterdir()) == []
    again.close()


def test_a_deleted_file_is_gone_at_once_but_read_to_its_end(store: Store) -> None:
    file = add(store, b"0123456789")
    _, content = store.open_content(file.id)
    with content:
        assert content.read(3) == b"012"
        store.delete(file.id)
        assert content.read() == b"3456789"
    assert contents(store) == []
    for use in (store.get, store.delete, store.open_content):
        with pytest.raises(RequestError, match=file.id):
            use(file.id)


def test_expiry(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    file, forever = add(store, expires_after_s=3600), add(store)
    assert file.expires_at == file.created_at + 3600
    assert store.expire() == file.expires_at
    monkeypatch.setattr(store_module.time, "time", lambda: file.created_at + 3601.0)
    with pytest.raises(RequestError, match="no such file"):
        store.get(file.id)
    assert store.page(None, None, 10, True) == [forever]
    assert contents(store) == sorted([file.id, forever.id])
    assert store.expire() is None
    assert contents(store) == [forever.id]


def test_a_clock_that_jumps_forward_is_noticed_within_a_minute(store: Store, tmp_path: Path) -> None:
    """Sleep is by a clock that stands still while the machine does."""
    add(store, expires_after_s=DAY_S)
    config = FrontendConfig(
        host="x", port=1, served_names=("m",), model_path="/m", context_length=9, vocab_size=9, file_storage_path="/s"
    )
    client = EngineClient(Addresses(str(tmp_path)), 8, Metrics())
    try:
        assert 0 < asyncio.run(BatchWorker(config, store, client, Metrics())._tidy()) <= 60
    finally:
        client.close()


def test_quota(tmp_path: Path) -> None:
    store = Store(str(tmp_path), quota_bytes=10)
    store.open()
    first = add(store, b"123456")
    upload = Upload(store)
    upload.write(b"789")
    with pytest.raises(RequestError, match="holds 9 of at most 10 bytes"):
        upload.write(b"01")
    upload.discard()
    add(store, b"7890")
    assert contents_size(store) == 10
    upload = Upload(store)
    with pytest.raises(RequestError, match="the file store is full"):
        upload.write(b"x")
    upload.discard()
    store.delete(first.id)
    add(store, b"123456")
    store.close()


def test_a_full_disk_is_the_same_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = Upload(store)
    upload.file.close()
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full")
    upload.file = full.open("wb", buffering=0)
    with pytest.raises(RequestError, match=r"the disk .* is full"):
        asyncio.run(store.call(upload.write, b"x"))
    upload.discard()


def test_a_full_disk_can_be_emptied(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where SQLite finds no room for the change before the content has gone."""
    file = add(store, b"x" * 100_000)
    content = store.content(file.id)
    usage = shutil.disk_usage(store.folder)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    changes = sqlite3.SQLITE_DELETE
    store.db.set_authorizer(lambda action, *_: sqlite3.SQLITE_DENY if action == changes and content.exists() else 0)
    store.delete(file.id)
    store.db.set_authorizer(None)
    assert (contents(store), store.page(None, None, 9, True), store.used_bytes) == ([], [], 0)


def test_what_the_disk_does_not_do_is_told(store: Store) -> None:
    store.db.execute("PRAGMA query_only=1")
    with pytest.raises(RequestError, match=r"the file store .* cannot be used: attempt to write a readonly database"):
        asyncio.run(store.call(add, store))
    store.db.execute("PRAGMA query_only=0")
    assert store.page(None, None, 9, True) == []


@pytest.mark.parametrize("descending", [True, False])
def test_pages(store: Store, descending: bool) -> None:
    ids = [add(store, purpose=purpose).id for purpose in ("batch", "evals", "batch", "batch", "evals")]
    ordered = ids[::-1] if descending else ids
    assert [f.id for f in store.page(None, None, 3, descending)] == ordered[:3]
    # A cursor that is deleted while the list is being read.
    store.delete(ordered[2])
    assert [f.id for f in store.page(None, ordered[2], 10, descending)] == ordered[3:]
    evals = [i for i in ordered if i in (ids[1], ids[4])]
    assert [f.id for f in store.page("evals", None, 10, descending)] == evals


def test_a_second_server_is_refused(store: Store) -> None:
    code = "import sys; from ramet.frontend.store import Store; Store(sys.argv[1]).open()"
    done = subprocess.run([sys.executable, "-c", code, str(store.folder)], capture_output=True, text=True, check=False)
    assert f"in use by another server (process {os.getpid()})" in done.stderr
    reopened(store).close()


def test_the_lock_of_a_killed_server_is_free(tmp_path: Path) -> None:
    code = "import os, sys; from ramet.frontend.store import Store; Store(sys.argv[1]).open(); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    store = Store(str(tmp_path))
    store.open()
    store.close()


def test_a_store_of_a_newer_version_is_refused(store: Store) -> None:
    store.db.execute("PRAGMA user_version = 99")
    with pytest.raises(RequestError, match="version 99"):
        reopened(store)


def test_a_broken_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store.db").write_bytes(b"no database" * 1000)
    with pytest.raises(RequestError, match="cannot be used"):
        Store(str(tmp_path)).open()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="cannot be used"):
        Store(str(tmp_path / "file" / "s")).open()


@pytest.mark.parametrize("path", ["", "~/.local/share/ramet/30000"])
def test_without_a_folder_or_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    store = Store(path)
    assert not store.exists
    with pytest.raises(RequestError, match="--file-storage-path"):
        store.open()
    assert list(tmp_path.iterdir()) == []
