"""Batches in the store: their objects, the moves between their states, and the publication of their results.

A batch that has not ended has a folder `batches/ID/`: its input under a name of its own (so the file may be deleted),
and what `frontend/batch_job.py` adds. Everything here runs in the store's thread, so each move is atomic and sees the
one before. States: validating → in_progress → finalizing → completed; or failed, expired, cancelling → cancelled.
"""

import contextlib
import logging
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any

import msgspec

from ramet.frontend.batch_job import ERRORS, INPUT, OUTPUT
from ramet.frontend.schemas.batches import Batch, BatchRequest, RequestCounts
from ramet.frontend.store import ENDED, File, Store, fsync_folder, link_or_copy, new_file, new_id, page
from ramet.ipc.errors import FailureKind, RequestError, invalid

logger = logging.getLogger(__name__)

# What the results of a batch are published as, by the state in which it stopped.
_END = {"finalizing": "completed", "in_progress": "expired", "cancelling": "cancelled"}


class Batches:
    def __init__(self, store: Store) -> None:
        self._store = store

    def folder(self, batch_id: str) -> Path:
        return self._store.folder / "batches" / batch_id

    def create(self, request: BatchRequest, window_s: int) -> Batch:
        """Raises RequestError without the input file, or if it is not for batches."""
        file = self._store.get(request.input_file_id)
        if file.purpose != "batch":
            raise invalid(f"input_file_id: the file's purpose must be 'batch', not {file.purpose!r}", "input_file_id")
        now = int(time.time())
        batch = Batch(id=new_id("batch_"), created_at=now, expires_at=now + window_s, **msgspec.structs.asdict(request))
        folder = self.folder(batch.id)
        folder.mkdir()
        link_or_copy(self._store.content(file.id), folder / INPUT)
        fsync_folder(folder)
        fsync_folder(folder.parent)
        with self._store.db as db:
            db.execute("INSERT INTO batches VALUES (?, ?, ?)", (batch.id, batch.status, msgspec.json.encode(batch)))
        logger.info("batch %s: created", batch.id)
        return batch

    def get(self, batch_id: str) -> Batch:
        """Raises RequestError."""
        for batch in self._select("WHERE id = ?", batch_id):
            return batch
        raise RequestError(FailureKind.NOT_FOUND, f"no such batch: {batch_id!r}")

    def page(self, after: str | None, limit: int) -> list[Batch]:
        """The newest first, from the id `after` on."""
        clause, cursor = page(after, descending=True)
        return self._select(f"WHERE {clause}", cursor, limit)

    def unfinished(self) -> list[Batch]:
        """The oldest first."""
        return self._select(f"WHERE status NOT IN {ENDED} ORDER BY id")

    def counts(self) -> dict[str, int]:
        """How many there are in each state."""
        return dict(self._store.db.execute("SELECT status, count(*) FROM batches GROUP BY status"))

    def set_counts(self, batch_id: str, counts: RequestCounts) -> None:
        with self._store.db:
            self._save(msgspec.structs.replace(self.get(batch_id), request_counts=counts))

    def move(self, batch_id: str, start: str, end: str, **fields: Any) -> Batch | None:
        """From one state to the next; None, and nothing done, if it is in another one."""
        batch = self.get(batch_id)
        if batch.status != start:
            return None
        with self._store.db:
            batch = self._save(_in_state(batch, end, **fields))
        if end == "failed":
            shutil.rmtree(self.folder(batch_id))
        return batch

    def cancel(self, batch_id: str) -> Batch:
        """Raises RequestError if there is none, or if it has ended."""
        batch = self.get(batch_id)
        if batch.status == "cancelling":
            return batch
        if batch.status in ENDED:
            raise RequestError(FailureKind.CONFLICT, f"batch {batch_id!r} is {batch.status} and cannot be cancelled")
        with self._store.db:
            return self._save(_in_state(batch, "cancelling"))

    def publish(self, batch_id: str) -> Batch:
        """End a batch: its results become files, those that are empty none. The job must be closed."""
        batch, folder = self.get(batch_id), self.folder(batch_id)
        output = self._result_file(batch, folder / OUTPUT)
        errors = self._result_file(batch, folder / ERRORS)
        fsync_folder(self._store.folder / "files")
        with self._store.db:
            for file in (output, errors):
                if file is not None:
                    self._store.insert(file)
                    self._store.used_bytes += file.bytes
            ids = {"output_file_id": output and output.id, "error_file_id": errors and errors.id}
            batch = self._save(_in_state(batch, _END[batch.status], **ids))
        shutil.rmtree(folder)
        return batch

    def _result_file(self, batch: Batch, part: Path) -> File | None:
        """Give the results a name among the files; the row is the caller's to insert. Results are no upload, and
        are kept even if the store is full."""
        num_bytes = part.stat().st_size if part.exists() else 0
        if num_bytes == 0:
            return None
        expires_after_s = batch.output_expires_after.seconds if batch.output_expires_after else None
        file = new_file(f"{batch.id}_{part.name}.jsonl", "batch_output", num_bytes, expires_after_s)
        link_or_copy(part, self._store.content(file.id))
        return file

    def _select(self, clause: str, *values: Any) -> list[Batch]:
        rows = self._store.db.execute(f"SELECT document FROM batches {clause}", values)
        return [msgspec.json.decode(document, type=Batch) for (document,) in rows]

    def _save(self, batch: Batch) -> Batch:
        """Inside a transaction of the caller's."""
        values = (batch.status, msgspec.json.encode(batch), batch.id)
        self._store.db.execute("UPDATE batches SET status = ?, document = ? WHERE id = ?", values)
        return batch


def read_batch(folder: Path, batch_id: str) -> Batch:
    """From a store that another process has open."""
    with contextlib.closing(sqlite3.connect(f"{(folder / 'store.db').absolute().as_uri()}?mode=ro", uri=True)) as db:
        (document,) = db.execute("SELECT document FROM batches WHERE id = ?", (batch_id,)).fetchone()
    return msgspec.json.decode(document, type=Batch)


def _in_state(batch: Batch, status: str, **fields: Any) -> Batch:
    moved = msgspec.structs.replace(batch, status=status, **{f"{status}_at": int(time.time())}, **fields)
    counts = moved.request_counts
    logger.info(
        "batch %s: %s → %s (%d lines, %d completed, %d failed)",
        *(batch.id, batch.status, status, counts.total, counts.completed, counts.failed),
    )
    return moved
