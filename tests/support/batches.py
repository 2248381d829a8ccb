"""Makes batches through the SDK, waits for them, and checks their results as a whole."""

import json
import time
from collections.abc import Iterable
from typing import Any

import openai
from support.server import PATIENCE_S

ENDED = ("completed", "failed", "cancelled", "expired")


def line(custom_id: str, model: str, content: str = "hi", **fields: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": content}], **fields}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def create(
    client: openai.OpenAI, lines: Iterable[Any], endpoint: Any = "/v1/chat/completions", **fields: Any
) -> openai.types.Batch:
    """Lines are bytes, or become JSON."""
    data = b"".join(
        [
            (entry if isinstance(entry, bytes) else json.dumps(entry, ensure_ascii=False).encode()) + b"\n"
            for entry in lines
        ]
    )
    file = client.files.create(file=("input.jsonl", data), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **fields)


def wait(client: openai.OpenAI, batch_id: str, timeout_s: float = PATIENCE_S, states: tuple[str, ...] = ENDED) -> Any:
    deadline = time.monotonic() + timeout_s
    while (batch := client.batches.retrieve(batch_id)).status not in states:
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
    return batch


def results(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """The lines of an output or error file."""
    if file_id is None:
        return []
    text = client.files.content(file_id).text
    assert text.endswith("\n")
    return [json.loads(entry) for entry in text[:-1].split("\n")]


def checked_results(client: openai.OpenAI, batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Output and errors by custom id, after checks: no line is twice in them, and the counts are theirs."""
    output, errors = results(client, batch.output_file_id), results(client, batch.error_file_id)
    ids = [result["custom_id"] for result in output + errors]
    assert len(set(ids)) == len(ids)
    assert len({result["id"] for result in output + errors}) == len(ids)
    assert all(result["id"].startswith("batch_req_") for result in output + errors)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (len(output), len(errors))
    return ({result["custom_id"]: result for result in part} for part in (output, errors))  # type: ignore[return-value]
