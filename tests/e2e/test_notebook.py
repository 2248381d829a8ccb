"""The cells of a public notebook on an OpenAI-compatible API (chat, completions, batches), as users copy them.

The server too is started, awaited and ended by the notebook's own functions.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from support.server import PATIENCE_S, free_port, until

from ramet.launch.shell import execute_shell_command, terminate_process, wait_for_server

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> str:
    return str(tiny_model("llama"))


@pytest.fixture(scope="module")
def port(servers: Any, model: str) -> Iterator[int]:
    servers.close()
    port = free_port()
    folders = tempfile.TemporaryDirectory(prefix="nb-"), tempfile.TemporaryDirectory()
    with folders[0] as folder, folders[1] as data, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setenv("XDG_DATA_HOME", data)
        server_process = execute_shell_command(
            f"""
python -m ramet.launch_server --model-path {model} \
--port {port} --host 0.0.0.0 --log-level warning
"""
        )
        try:
            wait_for_server(f"http://localhost:{port}", timeout_s=120)
            tree = psutil.Process(server_process.pid).children(recursive=True)
            assert len(tree) >= 4
            yield port
        finally:
            terminate_process(server_process)
        assert not any(map(alive, tree))
        assert list(Path(folder).iterdir()) == []
        terminate_process(server_process)  # again does no harm


@pytest.fixture
def notebook(port: int) -> Iterator[openai.Client]:
    with openai.Client(base_url=f"http://127.0.0.1:{port}/v1", api_key="None") as client:
        yield client


def test_chat(model: str, notebook: openai.Client) -> None:
    response = notebook.chat.completions.create(
        model=model,
        messages=[
            {"role": "system", "content": "You are a helpful AI assistant"},
            {"role": "user", "content": "List 3 countries and their capitals."},
        ],
        temperature=0,
        max_tokens=64,
    )
    [choice] = response.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert choice.model_extra is not None
    assert "matched_stop" in choice.model_extra
    assert response.object == "chat.completion"
    assert response.model == model
    assert response.usage
    assert response.usage.total_tokens == response.usage.prompt_tokens + response.usage.completion_tokens


def test_chat_with_parameters_streamed(model: str, notebook: openai.Client) -> None:
    response = notebook.chat.completions.create(
        model=model,
        messages=[
            {"role": "system", "content": "You are a knowledgeable historian who provides concise responses."},
            {"role": "user", "content": "Tell me about ancient Rome"},
            {"role": "assistant", "content": "Ancient Rome was a civilization centered in Italy."},
            {"role": "user", "content": "What were their major achievements?"},
        ],
        temperature=0.3,
        max_tokens=100,
        top_p=0.95,
        stop=["\n\n"],
        presence_penalty=0.2,
        frequency_penalty=0.2,
        n=1,
        seed=42,
        stream=True,
    )
    text = ""
    for chunk in response:
        text += chunk.choices[0].delta.content or ""
    assert text
    assert chunk.choices[0].finish_reason in ("stop", "length")


def test_completion(model: str, notebook: openai.Client) -> None:
    response = notebook.completions.create(
        model=model,
        prompt="List 3 countries and their capitals.",
        temperature=0,
        max_tokens=64,
        n=1,
        stop=None,
    )
    [choice] = response.choices
    assert choice.text
    assert choice.finish_reason in ("stop", "length")
    assert response.object == "text_completion"
    assert response.usage
    assert 0 < response.usage.completion_tokens <= 64


def test_completion_with_parameters_streamed(model: str, notebook: openai.Client) -> None:
    response = notebook.completions.create(
        model=model,
        prompt="Write a short story about a space explorer.",
        temperature=0.7,
        max_tokens=150,
        top_p=0.9,
        stop=["\n\n", "THE END"],
        presence_penalty=0.3,
        frequency_penalty=0.3,
        n=1,
        seed=123,
        stream=True,
    )
    text = ""
    for chunk in response:
        text += chunk.choices[0].text or ""
    assert text
    assert chunk.choices[0].finish_reason in ("stop", "length")


# Its waits are of seconds; only they are shortened here.
PAUSE_S = 0.1


def start_batch(notebook: openai.Client, folder: Path, bodies: list[dict[str, Any]]) -> Any:
    """Requests are written to a file, uploaded, and made a batch. Their urls lack the /v1."""
    path = folder / "batch_requests.jsonl"
    with path.open("w") as file:
        for i, body in enumerate(bodies):
            request = {"custom_id": f"request-{i}", "method": "POST", "url": "/chat/completions", "body": body}
            file.write(json.dumps(request) + "\n")
    with path.open("rb") as file:
        uploaded = notebook.files.create(file=file, purpose="batch")
    return notebook.batches.create(input_file_id=uploaded.id, endpoint="/v1/chat/completions", completion_window="24h")


def stories(model: str, count: int) -> list[dict[str, Any]]:
    question = {"role": "user", "content": "Write a detailed story about topic. Make it very long."}
    return [
        {
            "model": model,
            "messages": [{"role": "system", "content": f"{i}: You are a helpful AI assistant"}, question],
            "max_tokens": 500,
        }
        for i in range(count)
    ]


def test_batch(model: str, notebook: openai.Client, tmp_path: Path) -> None:
    questions = ("Tell me a joke about programming", "What is Python?")
    bodies = [
        {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 50, "temperature": 0}
        for text in questions
    ]
    batch = start_batch(notebook, tmp_path, bodies)
    while batch.status not in ["completed", "failed", "cancelled"]:
        time.sleep(PAUSE_S)
        batch = notebook.batches.retrieve(batch.id)
    assert batch.status == "completed"
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (2, 2, 0)
    text = notebook.files.content(batch.output_file_id).read().decode("utf-8")
    results = [json.loads(line) for line in text.split("\n") if line.strip() != ""]
    assert {result["custom_id"] for result in results} == {"request-0", "request-1"}
    assert all(result["response"]["body"]["choices"][0]["message"]["content"] for result in results)
    assert notebook.files.delete(batch.output_file_id).deleted


def test_batch_that_is_watched(model: str, notebook: openai.Client, tmp_path: Path) -> None:
    batch = start_batch(notebook, tmp_path, stories(model, 100))
    assert batch.status == "validating"
    for _ in range(5):
        time.sleep(PAUSE_S)
        details = notebook.batches.retrieve(batch_id=batch.id)
        assert (details.id, details.input_file_id) == (batch.id, batch.input_file_id)
        assert details.status in ("validating", "in_progress", "completed")
        counts = details.request_counts
        assert counts.completed + counts.failed <= counts.total in (0, 100)
    if details.status != "completed":
        notebook.batches.cancel(batch.id)
        while notebook.batches.retrieve(batch.id).status == "cancelling":
            time.sleep(PAUSE_S)


def test_batch_that_is_cancelled(model: str, notebook: openai.Client, tmp_path: Path) -> None:
    batch = start_batch(notebook, tmp_path, stories(model, 500))
    time.sleep(PAUSE_S)
    cancelled = notebook.batches.cancel(batch_id=batch.id)
    assert cancelled.status == "cancelling"
    while cancelled.status not in ["failed", "cancelled"]:
        time.sleep(PAUSE_S)
        cancelled = notebook.batches.retrieve(batch.id)
    assert cancelled.status == "cancelled"
    assert notebook.files.delete(batch.input_file_id).deleted


# ---- what the notebook's functions do besides ---------------------------------------------------------------------


def test_a_command_of_several_lines_in_a_raw_string(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the shell joins the lines, not Python; and the kernel's own environment need not be on the path."""
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    command = r"""
python -c 'import sys; print(sys.argv[1:], sys.executable)' \
  "a b" \
  7 > $OUT
"""
    with execute_shell_command(command) as process:
        assert process.wait(PATIENCE_S) == 0
    assert (tmp_path / "out").read_text() == f"['a b', '7'] {Path(sys.executable).with_name('python')}\n"


def test_what_ignores_signals_is_killed_with_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramet.launch.shell._DRAIN_S", 0.3)
    monkeypatch.setattr("ramet.launch.shell._EXIT_S", 0.3)
    process = execute_shell_command("trap '' TERM; sleep 1000 & sleep 1000; true")
    until(lambda: len(psutil.Process(process.pid).children()) == 2, PATIENCE_S, lambda: "two children")
    tree = psutil.Process(process.pid).children()
    terminate_process(process)
    assert process.returncode is not None
    until(lambda: not any(map(alive, tree)), PATIENCE_S, lambda: f"dead: {tree}")


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_server_that_does_not_come() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(TimeoutError, match=f"no server was ready at {url} within 0.3 s"):
        wait_for_server(url, timeout_s=0.3)
