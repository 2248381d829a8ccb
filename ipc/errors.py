"""What can go wrong with one request, as data that crosses process borders.

Every process reports a failure as a `Failure`; only the frontend knows HTTP and maps a kind to a status
(`frontend/errors.py`). A message names the limit and the value given.
"""

import enum
from typing import Any

import msgspec


class FailureKind(enum.StrEnum):
    """Why a request failed; the single vocabulary of all processes."""

    INVALID_REQUEST = "invalid_request"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    STORAGE_FULL = "storage_full"
    STORAGE_UNUSABLE = "storage_unusable"
    QUEUE_FULL = "queue_full"
    TIMEOUT = "timeout"
    ENGINE_DOWN = "engine_down"
    INTERNAL = "internal"
    ABORTED = "aborted"


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """One request's failure. `param` is the dotted name of the parameter at fault, if one is; `retry_after_s` says
    after how many seconds the same request may succeed, where that can be told."""

    kind: FailureKind
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None


class RequestError(Exception):
    """Raised inside a process to fail one request; carries the `Failure` to send."""

    def __init__(self, kind: FailureKind, message: str, **details: Any) -> None:
        """`details` are the other fields of `Failure`."""
        super().__init__(message)
        self.failure = Failure(kind, message, **details)


def invalid(message: str, param: str | None = None, code: str | None = "invalid_value") -> RequestError:
    """The most common failure: a parameter whose value cannot be honoured."""
    return RequestError(FailureKind.INVALID_REQUEST, message, param=param, code=code)
