"""One batch on disk while it runs: hands out lines, appends results, and finds out after a crash what is left to do.

In the batch's folder: `input`; `index`, where each line stands, in the order of running (a line is named by its
position there); `output` and `errors`, the results so far; `taken`, the positions handed out.

Results on disk are the truth: a line is settled when its result is in one of the parts, whose torn end, if a crash
left one, is cut off at opening. So nothing is lost, nothing is there twice, and counts are counted. `taken` serves one
purpose, not to die for ever of one line: a line that was running when its server died for the `_ALONE`th time runs
alone, and one that was at `MAX_ATTEMPTS` deaths, or failures of the engine, is reported. Memory does not depend on how
long the lines are.
"""

import collections
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import msgspec

from ramet.frontend.batch_input import INDEX_ENTRY
from ramet.frontend.schemas.batches import RequestCounts
from ramet.frontend.store import fsync_folder, write_all

INPUT, INDEX, OUTPUT, ERRORS, TAKEN = "input", "index", "output", "errors", "taken"
MAX_ATTEMPTS = 5

_ALONE = 3
_POSITION = struct.Struct("<I")
_POSITION_DIGITS = 8


class BatchLine(msgspec.Struct, frozen=True, gc=False):
    position: int
    custom_id: str
    body: bytes


class _Line(msgspec.Struct):
    """What is read of a line, which has been checked."""

    custom_id: str
    body: msgspec.Raw


class _Result(msgspec.Struct):
    """What is read back of a result."""

    id: str


class BatchJob:
    def __init__(self, folder: Path, batch_id: str) -> None:
        """Opens and repairs; `folder` has an input and an index."""
        self._id = batch_id.removeprefix("batch_")
        self._index = (folder / INDEX).read_bytes()
        self.total = len(self._index) // INDEX_ENTRY.size
        self._input = (folder / INPUT).open("rb")
        parts = [(folder / name).open("a+b", buffering=0) for name in (OUTPUT, ERRORS, TAKEN)]
        self._output, self._errors, self._taken = parts
        fsync_folder(folder)
        completed, failed = self._recover(self._output), self._recover(self._errors)
        self._completed, self._failed = len(completed), len(failed)
        self._attempts = self._count_attempts()
        left = set(range(self.total)) - completed - failed
        # Those that ran before first, the least suspect of them at the head.
        self._left = collections.deque(sorted(left, key=lambda at: (self._attempts[at] or MAX_ATTEMPTS + 1, at)))
        self._running = 0
        self._has_suspect = False

    @property
    def counts(self) -> RequestCounts:
        return RequestCounts(self.total, self._completed, self._failed)

    @property
    def is_done(self) -> bool:
        return self._completed + self._failed == self.total

    def take(self, most: int) -> list[BatchLine]:
        """The next lines to run. None while a line runs that must be alone; none left once nothing runs either."""
        lines: list[BatchLine] = []
        while self._left and len(lines) < most and not self._has_suspect:
            position = self._left[0]
            if self._attempts[position] >= _ALONE:
                if lines or self._running:
                    break
                if self._attempts[position] >= MAX_ATTEMPTS:
                    died = f"the engine died {self._attempts[position]} times while it ran this line"
                    self._give_up(1, "engine_died", died)
                    continue
                self._has_suspect = True
            self._left.popleft()
            self._attempts[position] += 1
            lines.append(self._read(position))
        # Not synced: a power cut is not the fault of a line.
        self._taken.write(b"".join([_POSITION.pack(line.position) for line in lines]))
        self._running += len(lines)
        return lines

    def retry(self, line: BatchLine) -> bool:
        """The engine failed under this line: hand it out again. False, and nothing done, if it has had its chances."""
        if self._attempts[line.position] >= MAX_ATTEMPTS:
            return False
        self._left.appendleft(line.position)
        self._end_run()
        return True

    def append(self, results: Iterable[tuple[BatchLine, int, str, bytes]]) -> None:
        """Make results durable: for each line status, request id and body of the answer."""
        output: list[bytes] = []
        errors: list[bytes] = []
        for line, status, request_id, body in results:
            response = {"status_code": status, "request_id": request_id, "body": msgspec.Raw(body)}
            (output if status == 200 else errors).append(self._result(line, response, None))
            self._end_run()
        self._write(self._output, output)
        self._completed += len(output)
        self._write(self._errors, errors)
        self._failed += len(errors)

    def expire(self, most: int) -> bool:
        """Report so many of the lines that are left as expired; False when none is left."""
        return self._give_up(most, "batch_expired", "the batch expired before this line was run")

    def close(self, *, in_peace: bool) -> None:
        """`in_peace`: the lines that run now were stopped, and did not see their engine die."""
        if in_peace:
            self._taken.truncate(0)
        for file in (self._input, self._output, self._errors, self._taken):
            file.close()

    # ---- reading ----------------------------------------------------------------------------------------------------

    def _recover(self, part: BinaryIO) -> set[int]:
        """The positions whose results are in a part, which is cut where they end."""
        decoder = msgspec.json.Decoder(_Result)
        settled: set[int] = set()
        whole = 0
        part.seek(0)
        with open(part.fileno(), "rb", closefd=False) as lines:
            for line in lines:
                try:
                    position = int(decoder.decode(line).id[-_POSITION_DIGITS:], 16)
                except (msgspec.MsgspecError, ValueError):
                    break
                if not line.endswith(b"\n") or position >= self.total:
                    break
                settled.add(position)
                whole += len(line)
        part.truncate(whole)
        return settled

    def _count_attempts(self) -> bytearray:
        attempts = bytearray(self.total)
        self._taken.seek(0)
        data = self._taken.read()
        for (position,) in _POSITION.iter_unpack(data[: len(data) // _POSITION.size * _POSITION.size]):
            attempts[position] = min(attempts[position] + 1, MAX_ATTEMPTS)
        return attempts

    def _read(self, position: int) -> BatchLine:
        offset, length = INDEX_ENTRY.unpack_from(self._index, position * INDEX_ENTRY.size)
        line = msgspec.json.decode(os.pread(self._input.fileno(), length, offset), type=_Line)
        return BatchLine(position, line.custom_id, bytes(line.body))

    # ---- writing ----------------------------------------------------------------------------------------------------

    def _give_up(self, most: int, code: str, message: str) -> bool:
        """Report so many of the lines that are next; False when none is left."""
        lines = [self._read(self._left.popleft()) for _ in range(min(most, len(self._left)))]
        error = {"code": code, "message": message}
        self._write(self._errors, [self._result(line, None, error) for line in lines])
        self._failed += len(lines)
        return bool(lines)

    def _result(self, line: BatchLine, response: dict[str, object] | None, error: dict[str, str] | None) -> bytes:
        result = {
            "id": f"batch_req_{self._id}{line.position:0{_POSITION_DIGITS}x}",
            "custom_id": line.custom_id,
            "response": response,
            "error": error,
        }
        # Only between its tokens can JSON hold a line break.
        return msgspec.json.encode(result).replace(b"\n", b"") + b"\n"

    def _write(self, part: BinaryIO, lines: list[bytes]) -> None:
        if lines:
            write_all(part, b"".join(lines))
            os.fdatasync(part.fileno())

    def _end_run(self) -> None:
        self._running -= 1
        self._has_suspect = False
