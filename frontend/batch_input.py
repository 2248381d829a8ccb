"""Checks the input of a batch, all or nothing, and puts its lines into the order in which they will run.

Reads line by line, some at a time, so that the store's thread is free in between. Of each line it keeps a digest of
its id, where it stands, and a short key of its prompt: memory does not depend on how long the lines are. Sorted by
that key, lines that share the start of their prompt follow one another and find it in the prefix cache.
"""

import hashlib
import struct
import zlib
from pathlib import Path
from typing import Any

import msgspec

from ramet.frontend.config import FrontendConfig
from ramet.frontend.errors import invalid_json
from ramet.frontend.store import fsync_folder
from ramet.ipc.errors import RequestError, invalid

# Offset and length of a line in the input.
INDEX_ENTRY = struct.Struct("<QI")
MAX_ERRORS = 50

_MAX_ID = 512
# A prompt's key: its first bytes, then a hash of each block. Equal starts give equal keys up to there.
_HEAD_BYTES = 128
_BLOCK_BYTES = 256
_MAX_BLOCKS = 32


class _Body(msgspec.Struct):
    """What must be known of a body before it is sent; the endpoint checks the rest."""

    model: str
    stream: bool | None = None
    tools: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()


class Line(msgspec.Struct, forbid_unknown_fields=True):
    custom_id: str
    method: str
    url: str
    body: _Body


class InputCheck:
    """`step` until it returns True; then there are `errors`, or `model` and `total` are known."""

    def __init__(self, path: Path, endpoint: str, config: FrontendConfig) -> None:
        self._file = path.open("rb")
        self._endpoint = endpoint
        self._config = config
        self._decoder = msgspec.json.Decoder(Line)
        self._number = 0
        self._seen: dict[bytes, int] = {}
        self._entries: list[tuple[bytes, bytes]] = []
        self.errors: list[dict[str, Any]] = []
        self.model = ""

    @property
    def total(self) -> int:
        return len(self._entries)

    def step(self, num_lines: int) -> bool:
        """Check so many lines; True at the end, which too many errors bring too."""
        for _ in range(num_lines):
            offset = self._file.tell()
            line = self._file.readline(self._config.max_body_bytes + 1)
            self._number += 1
            if not line:
                if not self._seen and not self.errors:
                    self._error(invalid("the input file has no requests", code="empty_file"), None)
                return True
            try:
                self._check(line, offset)
                if self.total > (most := self._config.max_batch_lines):
                    self.errors = []  # the others are of no more interest
                    raise invalid(f"the input file must have at most {most} requests", code="too_many_lines")
            except RequestError as error:
                self._error(error, self._number)
            if len(self.errors) >= MAX_ERRORS or self.total > self._config.max_batch_lines:
                return True
        return False

    def write_index(self, path: Path) -> None:
        """Where each line stands, in the order of running."""
        self._entries.sort(key=lambda entry: entry[0])
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(b"".join([entry for _, entry in self._entries]))
        temporary.rename(path)
        fsync_folder(path.parent)

    def close(self) -> None:
        self._file.close()

    def _check(self, line: bytes, offset: int) -> None:
        if len(line) > self._config.max_body_bytes:
            while line and not line.endswith(b"\n"):
                line = self._file.readline(1 << 20)
            raise invalid(f"a line must be at most {self._config.max_body_bytes} bytes", code="line_too_long")
        text = line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line
        if not text.strip():
            return
        try:
            request = self._decoder.decode(text)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise _line_error(error) from None
        body = request.body
        self._check_id(request.custom_id)
        if request.method != "POST":
            raise invalid(f"method must be 'POST', got {request.method!r}", "method")
        self._check_target(request.url, body)
        prompt = b"".join([bytes(raw) for raw in (body.tools, body.messages, body.prompt, body.input)])
        entry = INDEX_ENTRY.pack(offset + len(line) - len(text), len(text))
        self._entries.append((_prompt_key(prompt), entry))

    def _check_id(self, custom_id: str) -> None:
        if not 1 <= len(custom_id) <= _MAX_ID:
            raise invalid(f"custom_id must have 1 to {_MAX_ID} characters, got {len(custom_id)}", "custom_id")
        digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
        first = self._seen.setdefault(digest, self._number)
        if first != self._number:
            raise invalid(f"custom_id {custom_id!r} is that of line {first} too", "custom_id", "duplicate_custom_id")

    def _check_target(self, url: str, body: _Body) -> None:
        if url not in (self._endpoint, self._endpoint.removeprefix("/v1")):
            raise invalid(f"url {url!r} is not the batch's endpoint {self._endpoint!r}", "url", "mismatched_endpoint")
        if body.stream:
            raise invalid("stream must not be true in a batch", "body.stream", "unsupported_parameter")
        if not self._config.serves(body.model):
            raise invalid(f"the model {body.model!r} does not exist", "body.model", "model_not_found")
        self.model = self.model or body.model
        if body.model != self.model:
            raise invalid(
                f"all lines must name one model, got {self.model!r} and {body.model!r}", "body.model", "model_mismatch"
            )

    def _error(self, error: RequestError, line: int | None) -> None:
        failure = error.failure
        entry = {"code": failure.code, "message": failure.message, "param": failure.param, "line": line}
        self.errors.append(entry)


def _line_error(error: msgspec.MsgspecError | ValueError | RecursionError) -> RequestError:
    """The words of the online API, under the code of batches where the line is no JSON object at all."""
    wrong = invalid_json(error)
    if wrong.failure.code == "invalid_json" or wrong.failure.param is None:
        return invalid(f"the line is not a JSON object: {error}", code="invalid_json_line")
    return wrong


def _prompt_key(prompt: bytes) -> bytes:
    starts = range(_HEAD_BYTES, min(len(prompt), _BLOCK_BYTES * _MAX_BLOCKS), _BLOCK_BYTES)
    hashes = [zlib.crc32(prompt[start : start + _BLOCK_BYTES]).to_bytes(4) for start in starts]
    return b"".join([prompt[:_HEAD_BYTES], *hashes])
