"""One answer of an OpenAI-compatible server, read as it comes, however it is cut: server-sent events, chunks, usage."""

from typing import Any

import msgspec

from ramet.launch.bench.http_client import RequestFailed


class EventParser:
    """The `data` of server-sent events (HTML standard, section 9.2); other fields and comments are left out."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
        return events


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: dict[str, Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: dict[str, Any] | None = None
    finish_reason: str | None = None


class _Body(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Body).decode


class Record(msgspec.Struct, kw_only=True):
    """What is known of one request. `arrivals_s[i]` after it was sent, `arrival_tokens[i]` tokens came.

    Token counts are the server's; where it gives none, `counted_by` is `chunks`: a token for each chunk with text.
    """

    index: int
    sent_s: float
    input_len: int
    output_len: int
    e2e_s: float = 0.0
    error: str | None = "interrupted"  # until it has ended
    message: str | None = None
    finish_reason: str | None = None
    input_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int = 0
    counted_by: str = "usage"
    arrivals_s: list[float] = []
    arrival_tokens: list[float] = []


class Answer:
    """Feed it the body, then `finish` makes the record whole. Both raise RequestFailed."""

    def __init__(self, record: Record, stream: bool) -> None:
        self._record, self._stream, self._events = record, stream, EventParser()
        self._whole: list[bytes] = []  # what is not a stream
        self._usage: _Usage | None = None
        self._done = False

    def feed(self, status: int, data: bytes, at_s: float) -> None:
        if status != 200 or not self._stream:
            self._whole.append(data)
            return
        for event in self._events.feed(data):
            if event == b"[DONE]":
                self._done = True
            else:
                self._take(event, at_s)

    def finish(self, status: int) -> None:
        record, whole = self._record, b"".join(self._whole)
        if status != 200:
            raise RequestFailed(f"status {status}", whole.decode(errors="replace")[:500])
        if not self._stream:
            self._take(whole, None)
        if not (self._done or record.finish_reason):
            raise RequestFailed("cut short", "the answer has neither a finish_reason nor a [DONE]")
        usage, told = self._usage or _Usage(), sum(record.arrival_tokens)
        record.input_tokens = usage.prompt_tokens
        record.cached_tokens = (usage.prompt_tokens_details or {}).get("cached_tokens")
        if usage.completion_tokens:
            record.output_tokens = usage.completion_tokens
            # Where chunks carry several tokens and do not say how many, all carry the same share.
            record.arrival_tokens = [tokens * record.output_tokens / told for tokens in record.arrival_tokens]
        else:
            record.counted_by, record.output_tokens = "chunks", round(told)

    def _take(self, body: bytes, at_s: float | None) -> None:
        record = self._record
        try:
            chunk = _decode(body)
        except msgspec.MsgspecError as error:
            raise RequestFailed("not OpenAI's form", f"{error}: {body[:200]!r}") from error
        if chunk.error is not None:
            raise RequestFailed("error in the answer", str(chunk.error)[:500])
        tokens = 0
        for choice in chunk.choices:
            record.finish_reason = choice.finish_reason or record.finish_reason
            # Text, reasoning or a part of a tool call, whatever the server calls it.
            if choice.text or any(value for key, value in (choice.delta or {}).items() if key != "role"):
                tokens = 1
        if chunk.usage is not None:
            # With the first text already: a running count. Only at the end: the sum.
            if chunk.choices and (self._usage is not None or not record.arrivals_s):
                before = self._usage.completion_tokens if self._usage is not None else None
                tokens = (chunk.usage.completion_tokens or 0) - (before or 0)
            self._usage = chunk.usage
        if tokens > 0 and at_s is not None:
            if record.arrivals_s and record.arrivals_s[-1] == at_s:  # of one read from the socket
                record.arrival_tokens[-1] += tokens
            else:
                record.arrivals_s.append(at_s)
                record.arrival_tokens.append(tokens)
