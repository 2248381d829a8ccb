"""The batch object, as the API shows it and the store keeps it, and the body of `POST /v1/batches`."""

from typing import Any

import msgspec

from ramet.frontend.schemas.common import Int
from ramet.ipc.errors import invalid

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
COMPLETION_WINDOW = "24h"
MIN_EXPIRY_S = 3600
MAX_EXPIRY_S = 30 * 24 * 3600

_MAX_METADATA = 16
_MAX_METADATA_KEY = 64
_MAX_METADATA_VALUE = 512


class RequestCounts(msgspec.Struct, frozen=True):
    """Of lines. A line is completed or failed once its result is on disk."""

    total: int = 0
    completed: int = 0
    failed: int = 0

    @property
    def done(self) -> int:
        return self.completed + self.failed


class ExpiresAfter(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    anchor: str
    seconds: Int

    def check(self, name: str) -> None:
        if self.anchor != "created_at":
            raise invalid(f"{name}.anchor must be 'created_at', got {self.anchor!r}", f"{name}.anchor")
        if not MIN_EXPIRY_S <= self.seconds <= MAX_EXPIRY_S:
            limits = f"between {MIN_EXPIRY_S} and {MAX_EXPIRY_S}"
            raise invalid(f"{name}.seconds must be {limits}, got {self.seconds}", f"{name}.seconds")


class Batch(msgspec.Struct, kw_only=True, frozen=True):
    """`model` is set once the input has been checked; all lines name the same one."""

    id: str
    object: str = "batch"
    endpoint: str
    model: str | None = None
    errors: dict[str, Any] | None = None
    input_file_id: str
    completion_window: str = COMPLETION_WINDOW
    status: str = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = RequestCounts()
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None


class BatchRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None

    def check(self) -> None:
        """Raise `RequestError` for what is out of range."""
        if self.endpoint not in ENDPOINTS:
            raise invalid(f"endpoint must be one of {', '.join(ENDPOINTS)}, got {self.endpoint!r}", "endpoint")
        if self.completion_window != COMPLETION_WINDOW:
            raise invalid(
                f"completion_window must be {COMPLETION_WINDOW!r}, got {self.completion_window!r}", "completion_window"
            )
        if self.output_expires_after is not None:
            self.output_expires_after.check("output_expires_after")
        metadata = self.metadata or {}
        if len(metadata) > _MAX_METADATA:
            raise invalid(f"metadata must have at most {_MAX_METADATA} pairs, got {len(metadata)}", "metadata")
        for key, value in metadata.items():
            if len(key) > _MAX_METADATA_KEY or len(value) > _MAX_METADATA_VALUE:
                limits = f"{_MAX_METADATA_KEY} characters and values {_MAX_METADATA_VALUE}"
                raise invalid(f"metadata: keys have at most {limits}, got {len(key)} and {len(value)}", "metadata")
