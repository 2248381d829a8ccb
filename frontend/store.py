"""Files that outlive the server: rows in SQLite, contents on disk; one process at a time, one thread in it.

Owns the folder of `--file-storage-path`: `store.db`, `files/ID` (contents), `tmp/` (uploads under way), `batches/ID/`
(`frontend/batch_store.py`), `lock`. Names that users give are never paths. Knows nothing of HTTP.

A content is published before its row (written, fsynced, renamed, folder fsynced; then the row is committed) and, unless
the disk is full, goes after it, so a crash leaves at most a content without a row, which the next opening removes. The
folder is made when something is first asked of the store. `synchronous=FULL`: what was answered survives a power cut.
"""

import asyncio
import concurrent.futures
import contextlib
import errno
import fcntl
import logging
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, ParamSpec, TypeVar

import msgspec

from ramet.ipc.errors import FailureKind, RequestError

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

# Entry i brings a database from version i to i + 1.
_MIGRATIONS = (
    """
    CREATE TABLE files (
        id TEXT PRIMARY KEY, filename TEXT NOT NULL, purpose TEXT NOT NULL, bytes INTEGER NOT NULL,
        created_at INTEGER NOT NULL, expires_at INTEGER
    ) WITHOUT ROWID;
    CREATE TABLE batches (id TEXT PRIMARY KEY, status TEXT NOT NULL, document BLOB NOT NULL) WITHOUT ROWID;
    """,
)
# A server that was killed may need a moment to be gone when the next one starts.
_LOCK_TIMEOUT_S = 3.0
# With less free on the disk, a row may not be changed before its content has made room.
_ROW_ROOM_BYTES = 1 << 20

# States of a batch in which nothing of it is left to do.
ENDED = ("completed", "failed", "expired", "cancelled")


class File(msgspec.Struct, frozen=True):
    """A row (its columns first), in the API's form. Times are Unix seconds."""

    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int | None = None
    object: str = "file"
    status: str = "processed"


_COLUMNS = "id, filename, purpose, bytes, created_at, expires_at"


def new_id(prefix: str) -> str:
    """Later ids sort after earlier ones, so lists need no other order, and a cursor may be of an entry now gone."""
    return f"{prefix}{time.time_ns():016x}{secrets.token_hex(8)}"


class Upload:
    """A content under way. It counts in the quota from its first byte; `Store.add` or `discard` ends it."""

    def __init__(self, store: "Store") -> None:
        self._store = store
        self.path = store.folder / "tmp" / new_id("upload-")
        self.file = self.path.open("xb", buffering=0)
        self.bytes = 0

    def write(self, data: bytes) -> None:
        self._store.reserve(len(data))
        self.bytes += len(data)
        write_all(self.file, data)

    def discard(self) -> None:
        self._store.used_bytes -= self.bytes
        self.file.close()
        self.path.unlink(missing_ok=True)


class Store:
    """All methods but `call` run in the store's own thread, or before and after there is a loop."""

    def __init__(self, path: str, quota_bytes: int | None = None) -> None:
        self.folder = Path(os.path.expanduser(path))
        # A user without a home keeps the "~".
        self._has_folder = self.folder.parts[:1] not in ((), ("~",))
        self._quota_bytes = quota_bytes
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "store")
        self._lock: BinaryIO | None = None
        self.used_bytes = 0
        self.db: sqlite3.Connection

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `function` in the store's thread, with the store open. Raises what it raises, and RequestError for what
        the disk does not do."""

        def opened() -> T:
            self.open()
            try:
                return function(*args, **kwargs)
            except (OSError, sqlite3.OperationalError) as error:
                logger.warning("the file store: %s", error)
                raise self._failure(error) from error

        return await asyncio.get_running_loop().run_in_executor(self._thread, opened)

    # ---- opening ----------------------------------------------------------------------------------------------------

    @property
    def exists(self) -> bool:
        """Whether there may be something in it, or the user has named it; the launcher makes such a folder."""
        return self._has_folder and self.folder.exists()

    def open(self) -> None:
        """Take the lock and clean up after a crash. Does nothing if it is open. Raises RequestError."""
        if self._lock is not None:
            return
        if not self._has_folder:
            raise _unusable("there is no folder for files and batches; give --file-storage-path")
        try:
            for folder in (self.folder, *(self.folder / name for name in ("files", "tmp", "batches"))):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with contextlib.ExitStack() as undo:
                lock = undo.enter_context(_locked(self.folder))
                self.db = sqlite3.connect(self.folder / "store.db", check_same_thread=False)
                undo.callback(self.db.close)
                self.db.execute("PRAGMA journal_mode=WAL")
                self.db.execute("PRAGMA synchronous=FULL")
                self.db.execute("PRAGMA cache_size=-256")  # KiB; else it grows by 2 MiB over thousands of batches
                self._migrate()
                self._sweep()
                undo.pop_all()
        except (OSError, sqlite3.Error) as error:
            raise self._failure(error) from error
        self._lock = lock
        self.expire()

    def _failure(self, error: Exception) -> RequestError:
        full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        if full or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return RequestError(FailureKind.STORAGE_FULL, f"the disk of the file store {self.folder} is full")
        return _unusable(f"the file store {self.folder} cannot be used: {error}")

    def _sweep(self) -> None:
        """Remove contents without a row and folders of batches that have ended, and count the rest."""
        unfinished = f"SELECT id FROM batches WHERE status NOT IN {ENDED}"
        known = {row[0] for row in self.db.execute(f"SELECT id FROM files UNION {unfinished}")}
        for name in ("tmp", "files", "batches"):
            for path in (self.folder / name).iterdir():
                if path.name not in known:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        (self.used_bytes,) = self.db.execute("SELECT coalesce(sum(bytes), 0) FROM files").fetchone()

    def _migrate(self) -> None:
        (version,) = self.db.execute("PRAGMA user_version").fetchone()
        if version > len(_MIGRATIONS):
            raise _unusable(
                f"the file store {self.folder} has version {version} and was made by a newer Ramet; "
                f"this one knows up to {len(_MIGRATIONS)}"
            )
        for number, script in enumerate(_MIGRATIONS[version:], version + 1):
            self.db.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")

    def close(self) -> None:
        self._thread.shutdown()
        if self._lock is not None:
            self.db.close()
            self._lock.close()
            self._lock = None

    # ---- files ------------------------------------------------------------------------------------------------------

    def reserve(self, num_bytes: int) -> None:
        """Count bytes of an upload. Raises RequestError."""
        if self._quota_bytes is not None and self.used_bytes + num_bytes > self._quota_bytes:
            held = f"it holds {self.used_bytes} of at most {self._quota_bytes} bytes"
            raise RequestError(FailureKind.STORAGE_FULL, f"the file store is full: {held}; delete files to make room")
        self.used_bytes += num_bytes

    def add(self, upload: Upload, filename: str, purpose: str, expires_after_s: int | None) -> File:
        """Publish what was uploaded."""
        os.fsync(upload.file.fileno())
        upload.file.close()
        file = new_file(filename, purpose, upload.bytes, expires_after_s)
        upload.path.rename(self.content(file.id))
        fsync_folder(self.folder / "files")
        with self.db:
            self.insert(file)
        return file

    def insert(self, file: File) -> None:
        """Inside a transaction of the caller's; the content is there."""
        values = (file.id, file.filename, file.purpose, file.bytes, file.created_at, file.expires_at)
        self.db.execute(f"INSERT INTO files ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)", values)

    def content(self, file_id: str) -> Path:
        """Where the content of a file is. Only for ids that come from this class."""
        return self.folder / "files" / file_id

    def get(self, file_id: str) -> File:
        """Raises RequestError, also once the file has expired."""
        where = "id = ? AND coalesce(expires_at > ?, 1)"
        row = self.db.execute(f"SELECT {_COLUMNS} FROM files WHERE {where}", (file_id, time.time())).fetchone()
        if row is None:
            raise RequestError(FailureKind.NOT_FOUND, f"no such file: {file_id!r}")
        return File(*row)

    def open_content(self, file_id: str) -> tuple[File, BinaryIO]:
        """An open content can be read to its end, even if the file is deleted meanwhile."""
        file = self.get(file_id)
        return file, self.content(file_id).open("rb")

    def page(self, purpose: str | None, after: str | None, limit: int, descending: bool) -> list[File]:
        """At most `limit` files that come after the id `after`."""
        clause, cursor = page(after, descending)
        rows = self.db.execute(
            f"SELECT {_COLUMNS} FROM files WHERE coalesce(expires_at > ?, 1) AND coalesce(purpose = ?, 1) AND {clause}",
            (time.time(), purpose, cursor, limit),
        )
        return [File(*row) for row in rows]

    def delete(self, file_id: str) -> None:
        """Raises RequestError."""
        self._remove(self.get(file_id))

    def expire(self) -> float | None:
        """Delete what has expired; when the next file will."""
        for row in self.db.execute(f"SELECT {_COLUMNS} FROM files WHERE expires_at <= ?", (time.time(),)).fetchall():
            self._remove(File(*row))
        next_at: float | None = self.db.execute("SELECT min(expires_at) FROM files").fetchone()[0]
        return next_at

    def _remove(self, file: File) -> None:
        content = self.content(file.id)
        if shutil.disk_usage(self.folder).free < _ROW_ROOM_BYTES:
            content.unlink(missing_ok=True)
        with self.db:
            self.db.execute("DELETE FROM files WHERE id = ?", (file.id,))
        content.unlink(missing_ok=True)
        self.used_bytes -= file.bytes


def page(after: str | None, descending: bool) -> tuple[str, str]:
    """The end of a SELECT for a page of a list, and the first of its two values; the other is the limit."""
    if descending:
        return "id < ? ORDER BY id DESC LIMIT ?", "~" if after is None else after
    return "id > ? ORDER BY id LIMIT ?", after or ""


def new_file(filename: str, purpose: str, num_bytes: int, expires_after_s: int | None) -> File:
    now = int(time.time())
    expires_at = None if expires_after_s is None else now + expires_after_s
    return File(new_id("file-"), filename, purpose, num_bytes, now, expires_at)


def write_all(file: BinaryIO, data: bytes) -> None:
    """To a file without a buffer, where a write may take less than all."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def link_or_copy(source: Path, target: Path) -> None:
    """Give a content a second name; where the file system has no hard links, a copy."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Make names in a folder durable: fsync of a file does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unusable(message: str) -> RequestError:
    """The folder is another server's, cannot be written, or was made by a newer version."""
    return RequestError(FailureKind.STORAGE_UNUSABLE, message)


def _locked(folder: Path) -> BinaryIO:
    """The lock file, locked until it is closed or this process ends. Raises RequestError if another one has it."""
    file = (folder / "lock").open("a+b")
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        if time.monotonic() >= deadline:
            file.seek(0)
            owner = file.read(20).decode("ascii", "replace").strip()
            file.close()
            raise _unusable(
                f"the file store {folder} is in use by another server (process {owner}); "
                "give each server a --file-storage-path of its own"
            )
        time.sleep(0.05)
    file.truncate(0)
    file.write(b"%d\n" % os.getpid())
    file.flush()
    return file
