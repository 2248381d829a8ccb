"""A batch on disk: what a crash at any byte leaves, and the order in which lines are handed out."""

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.batches import line

from ramet.frontend.batch_input import InputCheck
from ramet.frontend.batch_job import ERRORS, INDEX, INPUT, MAX_ATTEMPTS, OUTPUT, TAKEN, BatchJob, BatchLine
from ramet.frontend.config import FrontendConfig
from ramet.frontend.schemas.batches import RequestCounts

ID = "batch_" + "a" * 32
CONFIG = FrontendConfig(host="", port=0, served_names=("m",), model_path="m", context_length=1, vocab_size=1)


def prepare(folder: Path, contents: list[str]) -> None:
    entries = [json.dumps(line(f"id-{i}", "m", content)) + "\n" for i, content in enumerate(contents)]
    (folder / INPUT).write_text("".join(entries))
    check = InputCheck(folder / INPUT, "/v1/chat/completions", CONFIG)
    assert check.step(1000)
    assert check.errors == []
    check.write_index(folder / INDEX)
    check.close()


def result(taken: BatchLine, status: int = 200) -> tuple[BatchLine, int, str, bytes]:
    return taken, status, "request", b'{"text": "an answer",\n "n": 1}'


def kill(job: BatchJob) -> None:
    job.close(in_peace=False)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(entry) for entry in path.read_text().splitlines()]


def test_every_torn_end_is_cut_and_its_line_runs_again(tmp_path: Path) -> None:
    prepare(tmp_path, [f"{i}" for i in range(4)])
    job = BatchJob(tmp_path, ID)
    for taken in job.take(3):
        job.append([result(taken)])
    kill(job)
    whole = (tmp_path / OUTPUT).read_bytes()
    second_end = len(b"".join(whole.splitlines(keepends=True)[:2]))
    for size in range(second_end, len(whole)):
        (tmp_path / OUTPUT).write_bytes(whole[:size])
        job = BatchJob(tmp_path, ID)
        assert job.counts == RequestCounts(4, 2, 0)
        left = job.take(9)
        assert {taken.custom_id for taken in left} == {"id-2", "id-3"}
        job.close(in_peace=True)
        assert (tmp_path / OUTPUT).read_bytes() == whole[:second_end]
    # What a disk may leave after a power cut: room that was never written.
    (tmp_path / OUTPUT).write_bytes(whole[:second_end] + bytes(5000))
    job = BatchJob(tmp_path, ID)
    assert job.counts.completed == 2
    job.append([result(taken) for taken in job.take(9)])
    assert job.is_done
    job.close(in_peace=True)
    assert sorted(entry["custom_id"] for entry in read(tmp_path / OUTPUT)) == ["id-0", "id-1", "id-2", "id-3"]


def test_a_torn_record_of_what_was_taken(tmp_path: Path) -> None:
    prepare(tmp_path, ["a", "b"])
    job = BatchJob(tmp_path, ID)
    job.take(2)
    kill(job)
    os.truncate(tmp_path / TAKEN, 7)
    job = BatchJob(tmp_path, ID)
    assert len(job.take(9)) == 2
    kill(job)


def test_suspects_run_alone_and_are_given_up(tmp_path: Path) -> None:
    prepare(tmp_path, [f"{i}" for i in range(6)])
    for _ in range(3):
        job = BatchJob(tmp_path, ID)
        assert len(job.take(3)) == 3
        kill(job)
    deaths = 3
    while True:
        job = BatchJob(tmp_path, ID)
        lines = job.take(3)
        if len(lines) != 1 or lines[0].custom_id != "id-2":
            # The others that were there when it died: each alone, and well.
            assert len(lines) == 1 or {taken.custom_id for taken in lines} == {"id-3", "id-4", "id-5"}
            assert len(lines) == 3 or job.take(3) == []
            job.append([result(taken) for taken in lines])
            job.close(in_peace=False)
            if job.is_done:
                break
            continue
        deaths += 1
        kill(job)
    assert deaths == MAX_ATTEMPTS
    [error] = read(tmp_path / ERRORS)
    assert (error["custom_id"], error["response"], error["error"]["code"]) == ("id-2", None, "engine_died")
    assert len(read(tmp_path / OUTPUT)) == 5


def test_a_stop_in_peace_is_no_death(tmp_path: Path) -> None:
    prepare(tmp_path, ["a", "b"])
    for _ in range(10):
        job = BatchJob(tmp_path, ID)
        assert len(job.take(2)) == 2
        job.close(in_peace=True)


def test_retries_end(tmp_path: Path) -> None:
    prepare(tmp_path, ["a", "b"])
    job = BatchJob(tmp_path, ID)
    first, second = job.take(2)
    job.append([result(second, 400)])
    for _ in range(MAX_ATTEMPTS - 1):
        assert job.retry(first)
        assert job.take(2) == [first]
    assert not job.retry(first)
    job.append([result(first, 500)])
    assert job.take(2) == []
    assert job.counts == RequestCounts(2, 0, 2)
    kill(job)


def test_expiry_goes_on_after_a_crash(tmp_path: Path) -> None:
    prepare(tmp_path, [f"{i}" for i in range(5)])
    job = BatchJob(tmp_path, ID)
    job.append([result(job.take(1)[0])])
    assert job.expire(2)
    kill(job)
    job = BatchJob(tmp_path, ID)
    while job.expire(1):
        pass
    assert job.counts == RequestCounts(5, 1, 4)
    kill(job)
    assert {entry["error"]["code"] for entry in read(tmp_path / ERRORS)} == {"batch_expired"}


def test_the_first_line_too_many_ends_the_check(tmp_path: Path) -> None:
    entries = [json.dumps(line(f"id-{i}", "m")) + "\n" for i in range(9)]
    (tmp_path / INPUT).write_text("".join(entries))
    config = msgspec.structs.replace(CONFIG, max_batch_lines=3)
    check = InputCheck(tmp_path / INPUT, "/v1/chat/completions", config)
    assert check.step(1000)
    check.close()
    assert [(error["code"], error["line"]) for error in check.errors] == [("too_many_lines", 4)]


@pytest.mark.parametrize("length", [300, 3000])
def test_order(tmp_path: Path, length: int) -> None:
    """By the beginnings of the prompts, also of those longer than the part that is compared byte by byte."""
    prefixes = [("x" * 200 + name * length) for name in "abc"]
    prepare(tmp_path, [prefixes[i % 3] + f" question {i}" for i in range(12)])
    job = BatchJob(tmp_path, ID)
    groups = [int(taken.custom_id.removeprefix("id-")) % 3 for taken in job.take(12)]
    kill(job)
    assert len([i for i in range(1, 12) if groups[i] != groups[i - 1]]) == 2
