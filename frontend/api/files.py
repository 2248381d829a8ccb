"""`/v1/files`: upload (multipart, streamed to disk), list, retrieve, content, delete.

An upload takes the memory of one piece of it, whatever its size; each limit is checked while the body is being read.
"""

from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, BinaryIO, Literal, get_args

import msgspec
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import StreamingResponse

from ramet.frontend.config import FrontendConfig
from ramet.frontend.exchange import check_head, too_large
from ramet.frontend.schemas.batches import ExpiresAfter
from ramet.frontend.store import File, Store, Upload
from ramet.ipc.errors import invalid

Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
PURPOSES: tuple[str, ...] = get_args(Purpose)
MAX_BATCH_INPUT_BYTES = 200 * 2**20

_MAX_FIELD_BYTES = 1024
_PIECE_BYTES = 1 << 16  # what each of many slow uploads may hold in memory
# What the form adds to the file: fields, headers, boundaries.
_FORM_BYTES = 1 << 20
_FIELDS = {"file", "purpose", "expires_after[anchor]", "expires_after[seconds]"}

BINARY, FORM = "application/octet-stream", "multipart/form-data"


class UploadForm(msgspec.Struct):
    """What an upload is made of; for the description of the API alone, since it is never in memory as a whole."""

    file: Any
    purpose: Purpose
    expires_after: ExpiresAfter | None = None


class FileListQuery(msgspec.Struct, forbid_unknown_fields=True):
    purpose: str | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"
    after: Annotated[str, msgspec.Meta(pattern="^file-[0-9a-f]{32}$")] | None = None


class Files:
    def __init__(self, config: FrontendConfig, store: Store, changed: Callable[[], None]) -> None:
        """`changed` is called when something new may expire."""
        self._config = config
        self._store = store
        self._changed = changed

    async def create(self, http: Request) -> File:
        check_head(http, self._config.max_file_bytes + _FORM_BYTES)
        try:
            form = Form(http.headers.get("content-type", ""))
            upload = await self._store.call(Upload, self._store)
            try:
                file = await self._receive(http, form, upload)
            except BaseException:
                await self._store.call(upload.discard)
                raise
        except FormParserError as error:
            raise invalid(f"the multipart body is malformed: {error}", code="invalid_multipart") from error
        self._changed()
        return file

    async def _receive(self, http: Request, form: "Form", upload: Upload) -> File:
        async for chunk in http.stream():
            form.feed(chunk)
            self._check_size(form)
            if len(form.pending) >= _PIECE_BYTES:
                await self._store.call(upload.write, form.take())
        purpose, expires_after_s = form.finish()
        self._check_size(form)  # the purpose may have come after the file
        await self._store.call(upload.write, form.take())
        return await self._store.call(self._store.add, upload, form.filename, purpose, expires_after_s)

    def _check_size(self, form: "Form") -> None:
        largest = self._config.max_file_bytes
        if form.fields.get("purpose") == b"batch":
            largest = min(largest, MAX_BATCH_INPUT_BYTES)
        if form.file_bytes > largest:
            raise too_large("file", largest, form.file_bytes)

    async def list(self, _http: Request, query: FileListQuery) -> dict[str, Any]:
        descending = query.order == "desc"
        files = await self._store.call(self._store.page, query.purpose, query.after, query.limit + 1, descending)
        return page_of(files, query.limit)

    async def retrieve(self, http: Request) -> File:
        return await self._store.call(self._store.get, http.path_params["file_id"])

    async def content(self, http: Request) -> StreamingResponse:
        file, content = await self._store.call(self._store.open_content, http.path_params["file_id"])
        headers = {"content-length": str(file.bytes)}
        return StreamingResponse(self._pieces(content, is_wanted=http.method == "GET"), 200, headers, BINARY)

    async def _pieces(self, content: BinaryIO, is_wanted: bool) -> AsyncIterator[bytes]:
        with content:
            while is_wanted and (piece := await self._store.call(content.read, _PIECE_BYTES)):
                yield piece

    async def delete(self, http: Request) -> dict[str, Any]:
        file_id = http.path_params["file_id"]
        await self._store.call(self._store.delete, file_id)
        return {"id": file_id, "object": "file", "deleted": True}


class Form:
    """The form of an upload, fed piece by piece. Raises RequestError, HTTPException and FormParserError."""

    def __init__(self, content_type: str) -> None:
        kind, options = parse_options_header(content_type)
        if kind != FORM.encode():
            raise HTTPException(415, f"content-type must be {FORM}, got {kind.decode('latin-1') or 'none'!r}")
        if not options.get(b"boundary"):
            raise invalid("the multipart body has no boundary", code="invalid_multipart")
        self.fields: dict[str, bytes] = {}  # of every part, but empty for the file
        self.filename = ""
        self.file_bytes = 0
        self.pending = bytearray()
        self._part = self._name = ""
        self._header = self._value = b""
        self._ended = False
        # Methods of this class by the parser's names for them.
        names = ("header_field", "header_value", "header_end", "headers_finished", "part_data")
        callbacks: Any = {f"on_{name}": getattr(self, f"_on_{name}") for name in names}
        callbacks["on_end"] = lambda: setattr(self, "_ended", True)
        self.feed = MultipartParser(options[b"boundary"], callbacks).write

    def finish(self) -> tuple[str, int | None]:
        """Purpose, and seconds until the file expires."""
        if not self._ended:
            raise invalid("the multipart body ends before its last boundary", code="invalid_multipart")
        for name in ("file", "purpose"):
            if name not in self.fields:
                raise invalid(f"missing required parameter: {name!r}", name, "missing_required_parameter")
        fields = {name: value.decode(errors="replace") for name, value in self.fields.items()}
        purpose = fields["purpose"]
        if purpose not in PURPOSES:
            raise invalid(f"purpose must be one of {', '.join(PURPOSES)}, got {purpose!r}", "purpose")
        anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
        if anchor is None and seconds is None:
            return purpose, None
        if not (seconds or "").isdecimal():
            raise invalid(f"expires_after.seconds must be an integer, got {seconds!r}", "expires_after.seconds")
        expiry = ExpiresAfter(anchor or "", int(seconds or 0))
        expiry.check("expires_after")
        return purpose, expiry.seconds

    def take(self) -> bytes:
        """What came of the file since the last time."""
        piece, self.pending = bytes(self.pending), bytearray()
        return piece

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            self._name = options.get(b"name", b"").decode(errors="replace")
            if self._name == "file":
                given = options.get(b"filename", b"file").decode(errors="replace")
                self.filename = given.replace("\\", "/").rpartition("/")[2] or "file"
        self._header = self._value = b""

    def _on_headers_finished(self) -> None:
        name, self._name = self._name, ""
        if name not in _FIELDS:
            raise invalid(f"unknown parameter: {name!r}", name, "unknown_parameter")
        if name in self.fields:
            raise invalid(f"{name} is given more than once", name)
        self._part, self.fields[name] = name, b""

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        name = self._part
        if name == "file":
            self.pending += data[start:end]
            self.file_bytes += end - start
        else:
            self.fields[name] += data[start:end]
            if len(self.fields[name]) > _MAX_FIELD_BYTES:
                raise invalid(f"{name} must be at most {_MAX_FIELD_BYTES} bytes", name)


def page_of(entries: list[Any], limit: int) -> dict[str, Any]:
    """A page of a list, from one entry more than the page holds, if there are so many."""
    page = entries[:limit]
    first, last = (page[0].id, page[-1].id) if page else (None, None)
    has_more = len(entries) > limit
    return {"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": has_more}
