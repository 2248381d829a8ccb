"""`/v1/batches` with a real frontend and a scripted engine: checks, order, states, results, restarts."""

import concurrent.futures
import contextlib
import json
import os
import random
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from support.batches import checked_results, create, line, results, wait
from support.scripted_engine import MODEL, WAIT_S, Request, Script, ScriptedEngine, says
from support.server import until

from ramet.ipc.errors import Failure, FailureKind
from ramet.ipc.messages import Chat, EngineDown

# By hand with 50000, which takes a minute or two.
MEMORY_LINES = int(os.environ.get("RAMET_TEST_MEMORY_LINES", "4000"))

Batch = Any
Served = tuple[ScriptedEngine, openai.OpenAI]


@pytest.fixture
def storage(tmp_path: Path) -> str:
    return str(tmp_path / "store")


@pytest.fixture
def engine(storage: str) -> Iterator[ScriptedEngine]:
    with ScriptedEngine(file_storage_path=storage, batch_window=4) as engine:
        engine.script = says("a", "b")
        yield engine


@pytest.fixture
def client(engine: ScriptedEngine) -> Iterator[openai.OpenAI]:
    with sdk(engine) as client:
        yield client


@contextlib.contextmanager
def serving(storage: str, script: Script | None = None, **config: Any) -> Iterator[Served]:
    """A server on this store; what it goes on with at its start finds the script there."""
    engine = ScriptedEngine(file_storage_path=storage, **config)
    engine.script = script
    with engine, sdk(engine) as client:
        yield engine, client


def sdk(engine: ScriptedEngine) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{engine.url}/v1", api_key="key", max_retries=0, timeout=WAIT_S)


def lines(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [line(f"id-{i}", MODEL, f"question {i}", **fields) for i in range(count)]


def question(request: Request) -> str:
    assert isinstance(request, Chat)
    return str(request.messages[-1]["content"])


def wait_until_unready(engine: ScriptedEngine) -> None:
    """Until it has taken in what was said to it, be it a signal or a message."""
    until(lambda: httpx.get(f"{engine.url}/ready").status_code == 503, WAIT_S, lambda: "unready")


def run(client: openai.OpenAI, entries: list[Any], **fields: Any) -> Batch:
    return wait(client, create(client, entries, **fields).id)


def only(*contents: str) -> Any:
    """A script that answers nothing but these questions."""

    def script(engine: ScriptedEngine, request: Request) -> None:
        if question(request) in contents:
            says("a")(engine, request)

    return script


def answer_from_now_on(engine: ScriptedEngine, script: Script) -> None:
    """And what has come and waits for an answer."""
    engine.script = script
    while not engine.jobs.empty():
        script(engine, engine.jobs.get())


# ---- results --------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_endpoint(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    entries = [*lines(9), line("warm", MODEL, temperature=7), line("two", MODEL, n=2)]
    created = create(client, entries, metadata={"k": "v"})
    assert (created.status, created.object, created.metadata) == ("validating", "batch", {"k": "v"})
    assert created.id.startswith("batch_") and created.expires_at == created.created_at + 24 * 3600
    batch = wait(client, created.id)
    assert (batch.status, batch.errors, batch.model) == ("completed", None, MODEL)
    times = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert times == sorted(times)
    assert (batch.failed_at, batch.expired_at, batch.cancelling_at, batch.cancelled_at) == (None,) * 4
    assert batch.request_counts.to_dict() == {"total": 11, "completed": 10, "failed": 1}
    output, errors = checked_results(client, batch)
    assert set(output) == {*(f"id-{i}" for i in range(9)), "two"}
    online = client.chat.completions.create(**entries[0]["body"]).to_dict()
    response = output["id-0"]["response"]
    assert (output["id-0"]["error"], response["status_code"], len(response["request_id"])) == (None, 200, 32)
    assert {**response["body"], "id": 0, "created": 0} == {**online, "id": 0, "created": 0}
    assert [choice["index"] for choice in output["two"]["response"]["body"]["choices"]] == [0, 1]
    refused = httpx.post(f"{engine.url}/v1/chat/completions", json=entries[9]["body"]).json()
    assert (errors["warm"]["response"]["status_code"], errors["warm"]["response"]["body"]) == (400, refused)
    assert errors["warm"]["error"] is None
    for file_id in (batch.output_file_id, batch.error_file_id):
        file = client.files.retrieve(file_id)
        assert (file.purpose, file.bytes) == ("batch_output", len(client.files.content(file_id).read()))


def test_an_empty_part_is_no_file(client: openai.OpenAI) -> None:
    batch = run(client, lines(2))
    assert batch.output_file_id and batch.error_file_id is None
    batch = run(client, [line("x", MODEL, n=0)])
    assert batch.output_file_id is None and batch.error_file_id
    assert batch.status == "completed"


def test_forms_of_lines(client: openai.OpenAI) -> None:
    """Without /v1, after a byte order mark, with CRLF, blank lines, no last line break, and text of any kind."""
    short = {**line("short", MODEL), "url": "/chat/completions"}
    crlf = json.dumps(line("crlf", MODEL)).encode() + b"\r"
    entries = [b"\xef\xbb\xbf" + json.dumps(short).encode(), b"", b"  ", crlf, line("naïve 日本 \u2028", MODEL)]
    batch = run(client, entries)
    output, _ = checked_results(client, batch)
    assert set(output) == {"short", "crlf", "naïve 日本 \u2028"}
    file = client.files.create(file=json.dumps(line("x", MODEL)).encode(), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    assert wait(client, batch.id).request_counts.completed == 1


def test_completions(client: openai.OpenAI) -> None:
    body = {"model": "alias", "prompt": ["x", "y"], "max_tokens": 2}
    batch = run(
        client,
        [{"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": body}],
        endpoint="/v1/completions",
    )
    [result] = results(client, batch.output_file_id)
    assert [choice["text"] for choice in result["response"]["body"]["choices"]] == ["ab", "ab"]


def test_keys_are_asked_of_clients_and_not_of_lines(storage: str) -> None:
    with serving(storage, says("a"), api_keys=("key",)) as (engine, client):
        assert run(client, lines(2)).request_counts.completed == 2
        assert httpx.get(f"{engine.url}/v1/batches").status_code == 401


def test_output_expires(client: openai.OpenAI) -> None:
    batch = run(client, lines(1), extra_body={"output_expires_after": {"anchor": "created_at", "seconds": 3600}})
    file = client.files.retrieve(batch.output_file_id)
    assert file.expires_at == file.created_at + 3600


# ---- what is refused ------------------------------------------------------------------------------------------------

GOOD = line("good", MODEL)


@pytest.mark.parametrize(
    ("entries", "code", "param", "number"),
    [
        ([GOOD, b"{no"], "invalid_json_line", None, 2),
        ([b'"text"'], "invalid_json_line", None, 1),
        ([b'{"custom_id": "\xff"}'], "invalid_json_line", None, 1),
        ([b"[" * 5000], "invalid_json_line", None, 1),
        ([b"", {**GOOD, "custom_id": 5}], "invalid_type", "custom_id", 2),
        ([{**GOOD, "custom_id": ""}], "invalid_value", "custom_id", 1),
        ([{**GOOD, "zap": 5}], "unknown_parameter", "zap", 1),
        ([{**GOOD, "method": "GET"}], "invalid_value", "method", 1),
        ([{k: v for k, v in GOOD.items() if k != "body"}], "missing_required_parameter", "body", 1),
        ([{**GOOD, "body": []}], "invalid_type", "body", 1),
        ([{**GOOD, "body": {"messages": []}}], "missing_required_parameter", "body.model", 1),
        ([line("s", MODEL, stream=True)], "unsupported_parameter", "body.stream", 1),
        ([GOOD, line("two", MODEL), GOOD], "duplicate_custom_id", "custom_id", 3),
        ([{**GOOD, "url": "/v1/completions"}], "mismatched_endpoint", "url", 1),
        ([line("m", "other")], "model_not_found", "body.model", 1),
        ([GOOD, line("m", "alias")], "model_mismatch", "body.model", 2),
        ([], "empty_file", None, None),
        ([b"", b" "], "empty_file", None, None),
    ],
)
def test_wrong_input(shared: Served, entries: list[Any], code: str, param: str | None, number: int | None) -> None:
    engine, client = shared
    batch = run(client, entries)
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert batch.failed_at and batch.in_progress_at is None
    [error] = batch.errors.data
    assert (error.code, error.param, error.line) == (code, param, number)
    assert error.message
    assert engine.jobs.empty()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path = str(tmp_path_factory.mktemp("store"))
    with ScriptedEngine(file_storage_path=path, max_body_bytes=4_000_000) as engine, sdk(engine) as client:
        yield engine, client


def test_the_one_method_is_told(shared: Served) -> None:
    [error] = run(shared[1], [{**GOOD, "method": "GET"}]).errors.data
    assert error.message == "method must be 'POST', got 'GET'"


def test_all_errors_up_to_a_limit(shared: Served) -> None:
    batch = run(shared[1], [b"x", GOOD, b"y"])
    assert [error.line for error in batch.errors.data] == [1, 3]
    batch = run(shared[1], [b"x"] * 200)
    assert [error.line for error in batch.errors.data] == list(range(1, 51))


def test_50001_lines(shared: Served) -> None:
    _, client = shared
    template = json.dumps(line("NUMBER", MODEL)).encode()
    batch = create(client, [template.replace(b"NUMBER", b"%d" % i) for i in range(50_001)])
    batch = wait(client, batch.id)
    assert batch.status == "failed"
    [error] = batch.errors.data
    assert (error.code, error.line) == ("too_many_lines", 50_001)
    assert "50000" in error.message


def test_a_line_that_is_too_long(shared: Served) -> None:
    batch = run(shared[1], [GOOD, line("long", MODEL, "x" * 4_000_000), b"{"])
    found = [(error.code, error.line) for error in batch.errors.data]
    assert found == [("line_too_long", 2), ("invalid_json_line", 3)]


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"input_file_id": "file-unknown"}, 404, "not_found", None),
        ({"input_file_id": "../../x"}, 404, "not_found", None),
        ({"input_file_id": None}, 400, "invalid_type", "input_file_id"),
        ({"endpoint": "/v1/models"}, 400, "invalid_value", "endpoint"),
        ({"completion_window": "1h"}, 400, "invalid_value", "completion_window"),
        ({"metadata": {str(i): "" for i in range(17)}}, 400, "invalid_value", "metadata"),
        ({"metadata": {"k" * 65: ""}}, 400, "invalid_value", "metadata"),
        ({"metadata": {"k": "v" * 513}}, 400, "invalid_value", "metadata"),
        ({"metadata": {"k": 1}}, 400, "invalid_type", "metadata"),
        ({"zap": 1}, 400, "unknown_parameter", "zap"),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 1}},
            400,
            "invalid_value",
            "output_expires_after.seconds",
        ),
    ],
)
def test_wrong_requests(shared: Served, change: dict[str, Any], status: int, code: str, param: str | None) -> None:
    engine, client = shared
    file = client.files.create(file=b"x", purpose="batch")
    body = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h", **change}
    response = httpx.post(f"{engine.url}/v1/batches", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)


def test_unknown_batches_and_other_files(shared: Served) -> None:
    _, client = shared
    for use in (client.batches.retrieve, client.batches.cancel):
        with pytest.raises(openai.NotFoundError, match="no such batch: 'batch_x'"):
            use("batch_x")
    file = client.files.create(file=b"x", purpose="evals")
    with pytest.raises(openai.BadRequestError, match="the file's purpose must be 'batch', not 'evals'"):
        client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    with pytest.raises(openai.BadRequestError, match="limit"):
        client.batches.list(limit=101)


# ---- states ---------------------------------------------------------------------------------------------------------


def test_cancel_keeps_what_is_done(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = only("question 0", "question 1")
    batch = create(client, lines(20))
    until(
        lambda: client.batches.retrieve(batch.id).request_counts.completed == 2,
        WAIT_S,
        lambda: "two lines",
    )
    cancelled = client.batches.cancel(batch.id)
    assert cancelled.status == "cancelling" and cancelled.cancelling_at
    ended = wait(client, batch.id)
    assert ended.status == "cancelled" and ended.cancelled_at and ended.completed_at is None
    output, errors = checked_results(client, ended)
    assert (set(output), errors, ended.request_counts.total) == ({"id-0", "id-1"}, {}, 20)
    aborted = [rid for _ in range(4) for rid in engine.aborted()]  # the window of lines that were in the engine
    assert len(set(aborted)) == 4
    with pytest.raises(openai.ConflictError, match="is cancelled and cannot be cancelled"):
        client.batches.cancel(batch.id)


def test_cancel_of_one_that_waits(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = None
    first, second = create(client, lines(5)), create(client, lines(5))
    wait(client, second.id, states=("in_progress",))
    assert client.batches.cancel(second.id).status == "cancelling"
    ended = wait(client, second.id)
    assert (ended.status, ended.output_file_id, ended.error_file_id) == ("cancelled", None, None)
    assert client.batches.retrieve(first.id).status == "in_progress"
    client.batches.cancel(first.id)
    assert wait(client, first.id).status == "cancelled"


def test_expiry(storage: str) -> None:
    with serving(storage, only("question 1"), completion_window_s=4) as (_, client):
        # Created a moment later, the second may still have a moment of its own: none of its lines is answered.
        first, second = create(client, lines(5)), create(client, lines(1))
        for batch, done in ((first, {"id-1"}), (second, set())):
            ended = wait(client, batch.id)
            assert ended.status == "expired" and ended.expired_at >= ended.expires_at
            output, errors = checked_results(client, ended)
            assert set(output) == done
            assert len(output) + len(errors) == ended.request_counts.total
            for error in errors.values():
                assert error["response"] is None
                assert error["error"]["code"] == "batch_expired"


def test_one_after_another_and_lists(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    asked: list[str] = []
    all_are_made = threading.Event()

    def script(engine: ScriptedEngine, request: Request) -> None:
        assert all_are_made.wait(WAIT_S)
        asked.append(question(request))
        says("a", "b")(engine, request)

    engine.script = script
    made = [create(client, [line(f"id-{i}", MODEL, f"of batch {n}") for i in range(3)]) for n in range(3)]
    all_are_made.set()
    assert [wait(client, batch.id).status for batch in made] == ["completed"] * 3
    assert asked == sorted(asked) and len(asked) == 9
    assert [batch.id for batch in client.batches.list(limit=2)] == [batch.id for batch in made[::-1]]
    page = httpx.get(f"{engine.url}/v1/batches?limit=2").json()
    assert (page["object"], page["has_more"]) == ("list", True)
    assert (page["first_id"], page["last_id"]) == (made[2].id, made[1].id)
    with pytest.raises(openai.BadRequestError) as raised:
        client.batches.list(after="zzz")
    assert raised.value.param == "after"
    states = {
        name: float(value)
        for name, _, value in (entry.rpartition(" ") for entry in httpx.get(f"{engine.url}/metrics").text.splitlines())
        if name.startswith("ramet_batch")
    }
    assert states['ramet_batch_lines_total{outcome="completed"}'] == 9
    assert states['ramet_batches{state="completed"}'] == 3
    assert states["ramet_batch_lines_in_flight"] == states["ramet_batch_oldest_age_seconds"] == 0


def test_the_input_may_be_deleted_at_once(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = None
    batch = create(client, lines(30))
    client.files.delete(batch.input_file_id)
    answer_from_now_on(engine, says("a"))
    assert wait(client, batch.id).request_counts.completed == 30


# ---- running --------------------------------------------------------------------------------------------------------


def test_lines_yield_to_interactive_requests(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    batch = run(client, [line("a", MODEL), line("b", MODEL, priority=5), line("c", MODEL, priority="high")])
    assert sorted(engine.job().job.priority for _ in range(2)) == [100, 105]
    assert batch.request_counts.failed == 1
    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}])
    assert engine.job().job.priority == 0


def test_lines_that_share_a_prefix_run_together(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    prefixes = [f"{number}. {'You are a careful assistant. ' * 20}" for number in range(5)]
    entries = [line(f"{i}", MODEL, prefixes[i % 5] + f"Question {i}") for i in range(50)]
    random.Random(1).shuffle(entries)
    run(client, entries)
    order = [question(engine.job())[0] for _ in range(50)]
    assert len([i for i in range(1, 50) if order[i] != order[i - 1]]) == 4


def test_the_window_is_kept_full(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = None
    batch = create(client, lines(30))
    waiting = [engine.job() for _ in range(4)]
    for _ in range(26):
        time.sleep(0.02)
        assert engine.jobs.empty()  # never more than four
        says("a")(engine, waiting.pop(0))
        waiting.append(engine.job())
    for request in waiting:
        says("a")(engine, request)
    assert wait(client, batch.id).request_counts.completed == 30


def test_a_full_queue_is_waited_for(storage: str) -> None:
    pool = concurrent.futures.ThreadPoolExecutor(4)
    with serving(storage, max_queued_requests=4, batch_window=4) as (engine, client), pool:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "me first"}]}
        calls = [pool.submit(client.chat.completions.create, **body) for _ in range(4)]
        interactive = [engine.job() for _ in range(4)]
        batch = create(client, lines(6))
        wait(client, batch.id, states=("in_progress",))
        engine.script = says("a")
        time.sleep(0.3)  # lines are refused meanwhile
        for request in interactive:
            says("a")(engine, request)
        assert all(call.result().choices for call in calls)
        assert wait(client, batch.id).request_counts.to_dict() == {"total": 6, "completed": 6, "failed": 0}


def test_a_line_is_tried_again_and_then_reported(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    tries: dict[str, int] = {}

    def script(engine: ScriptedEngine, request: Request) -> None:
        name = question(request)
        tries[name] = tries.get(name, 0) + 1
        if name == "question 0" or (name == "question 1" and tries[name] < 3):
            engine.fail(request, Failure(FailureKind.INTERNAL, "the step failed"))
        else:
            says("a")(engine, request)

    engine.script = script
    batch = run(client, lines(6))
    assert tries == {"question 0": 5, "question 1": 3, **{f"question {i}": 1 for i in range(2, 6)}}
    output, errors = checked_results(client, batch)
    assert (len(output), set(errors)) == (5, {"id-0"})
    response = errors["id-0"]["response"]
    assert (response["status_code"], response["body"]["error"]["message"]) == (500, "the step failed")


# ---- restarts -------------------------------------------------------------------------------------------------------


def test_a_drain_lets_lines_end_and_the_rest_runs_after_it(storage: str) -> None:
    with serving(storage, batch_window=4) as (engine, client):
        batch = create(client, lines(50))
        running = [engine.job() for _ in range(4)]
        engine.terminate()
        wait_until_unready(engine)
        for request in running[:3]:
            says("a")(engine, request)
        time.sleep(0.3)
        assert engine.process.poll() is None  # it waits for the fourth
        says("a")(engine, running[3])
        assert engine.exit_code() == 0
        assert engine.jobs.empty()
    with serving(storage, says("a")) as (engine, client):
        output, _ = checked_results(client, wait(client, batch.id))
        assert len(output) == 50
        assert engine.jobs.qsize() == 46


def test_a_drain_does_not_wait_for_ever(storage: str) -> None:
    with serving(storage, drain_timeout_s=0.5) as (engine, client):
        batch = create(client, lines(5))
        engine.job()
        engine.terminate()
        assert engine.exit_code() == 0
    with serving(storage, says("a")) as (engine, client):
        assert wait(client, batch.id).request_counts.to_dict() == {"total": 5, "completed": 5, "failed": 0}


def test_kills_at_any_moment(storage: str) -> None:
    """Of the frontend, often and fast; `tests/e2e/test_batches.py` kills whole servers."""
    rng = random.Random(0)
    batch_id, total, runs = "", 2000, 0
    while True:
        with serving(storage, says("a"), batch_window=16) as (engine, client):
            if not batch_id:
                batch_id = create(client, lines(total)).id
            runs += 1
            if runs < 6:
                time.sleep(rng.uniform(0, 0.4))
                engine.process.kill()
                continue
            batch = wait(client, batch_id, 60)
            output, errors = checked_results(client, batch)
            assert set(output) == {f"id-{i}" for i in range(total)}
            assert not errors
            return


def test_a_line_that_kills_the_engine_does_so_five_times_at_most(storage: str) -> None:
    """And those that ran beside it are all answered: it runs alone after three deaths."""
    fatal: list[Request] = []
    answer = says("a")

    def script(engine: ScriptedEngine, request: Request) -> None:
        if question(request) == "question 3":
            fatal.append(request)
        elif not fatal:
            answer(engine, request)

    batch_id = ""
    for _ in range(5):
        fatal.clear()
        with serving(storage, script, batch_window=8) as (engine, client):
            batch_id = batch_id or create(client, lines(30)).id
            until(lambda: bool(fatal), WAIT_S, lambda: "the line")
            engine.send(EngineDown("scheduler-0 was killed"))
            wait_until_unready(engine)
            engine.terminate()
            assert engine.exit_code() == 0
    fatal.clear()
    with serving(storage, script, batch_window=8) as (engine, client):
        output, errors = checked_results(client, wait(client, batch_id))
    assert not fatal
    assert (len(output), set(errors)) == (29, {"id-3"})
    assert errors["id-3"]["response"] is None
    assert errors["id-3"]["error"]["code"] == "engine_died"


def test_a_disk_that_refuses_to_be_written(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    """A limit on the size of files stands for a full disk: the batch waits, and loses nothing."""
    engine.script = None  # it must not be done before the disk is full
    batch = create(client, lines(300))
    pid, size = engine.process.pid, resource.RLIMIT_FSIZE
    resource.prlimit(pid, size, (20_000, resource.RLIM_INFINITY))
    answer_from_now_on(engine, says("a"))
    until(lambda: "the batches are in trouble" in engine.errors(), WAIT_S, lambda: "trouble")
    assert httpx.get(f"{engine.url}/ready").status_code == 200
    resource.prlimit(pid, size, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    client.files.create(file=b"x", purpose="evals")  # which wakes the worker before its time
    output, errors = checked_results(client, wait(client, batch.id))
    assert (len(output), errors) == (300, {})
    engine.terminate()
    assert engine.exit_code() == 0


def test_a_batch_waits_for_its_model(storage: str) -> None:
    with serving(storage) as (engine, client):
        batch = create(client, lines(3))
        engine.job()
        engine.process.kill()
    with serving(storage, served_names=("other",), model_path="/other") as (engine, client):
        until(lambda: f"waits for a server of its model '{MODEL}'" in engine.errors(), WAIT_S, engine.errors)
        assert client.batches.retrieve(batch.id).status == "in_progress"
        assert engine.jobs.empty()
    with serving(storage, says("a")) as (engine, client):
        assert wait(client, batch.id).request_counts.completed == 3


def test_memory_does_not_grow_with_the_file(storage: str) -> None:
    with serving(storage, says("a" * 500), batch_window=64) as (engine, client):
        assert run(client, lines(10)).status == "completed"
        process = psutil.Process(engine.process.pid)
        idle = process.memory_info().rss
        batch = create(client, (line(f"id-{i}", MODEL, f"{i % 7}" * 700) for i in range(MEMORY_LINES)))
        peak = idle
        while (news := client.batches.retrieve(batch.id)).status in ("validating", "in_progress", "finalizing"):
            peak = max(peak, process.memory_info().rss)
            engine.jobs.queue.clear()
            time.sleep(0.1)
        assert news.request_counts.completed == MEMORY_LINES
        print(f"{MEMORY_LINES} lines: {(peak - idle) / 1e6:.1f} MB above idle")
        assert peak - idle < 50e6
