"""The programs in `examples/` and in the README, run as a user would run them."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.server import RunningServer

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]


def run_example(name: str, server: RunningServer, *arguments: str, typed: str = "") -> bytes:
    return run_python(str(ROOT / "examples" / name), "--base-url", f"{server.url}/v1", *arguments, typed=typed)


def run_python(*arguments: str, typed: str = "") -> bytes:
    """What it prints. As bytes: a model of random weights writes any control character."""
    done = subprocess.run(
        [sys.executable, *arguments],
        input=typed.encode(),
        capture_output=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def answer(server: RunningServer, *turns: str) -> str:
    """The greedy answer to a conversation that the user begins."""
    roles = ("user", "assistant")
    chat = server.client.chat.completions.create(
        model=server.model,
        messages=[{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)],
        temperature=0,
        max_tokens=8,
    )
    return chat.choices[0].message.content or ""


def test_chat_sends_the_whole_conversation(tiny: RunningServer) -> None:
    printed = run_example("chat.py", tiny, "--max-tokens", "8", typed="Who are you?\nAnd I?\n\nunread\n")
    first = answer(tiny, "Who are you?")
    second = answer(tiny, "Who are you?", first, "And I?")
    assert printed == f"Talking to {tiny.model}; an empty line ends.\n> {first}\n> {second}\n> ".encode()


def test_streaming_prints_text_and_usage(tiny: RunningServer) -> None:
    prompt = "Streams of text are read as they come."
    text = answer(tiny, prompt)
    printed = run_example("streaming.py", tiny, "--max-tokens", "8", prompt)
    assert printed.startswith(f"{text}\n\nended by ".encode())
    usage = re.search(rb"(\d+) prompt tokens, of which cached (\d+); (\d+) generated", printed)
    assert usage is not None
    prompt_tokens, cached, generated = map(int, usage.groups())
    assert 0 < cached < prompt_tokens  # `answer` has sent the same prompt before
    assert 0 < generated <= 8


def test_completions_are_seeded_and_in_order(tiny: RunningServer) -> None:
    printed = run_example("completions.py", tiny, "-n", "3", "--max-tokens", "4", "One", "Two")
    heads = re.findall(rb"^\[(\d)\] (One|Two)", printed, re.MULTILINE)
    assert heads == [(b"%d" % i, b"One" if i < 3 else b"Two") for i in range(6)]
    assert printed == run_example("completions.py", tiny, "-n", "3", "--max-tokens", "4", "One", "Two")
    assert printed != run_example("completions.py", tiny, "-n", "3", "--max-tokens", "4", "--seed", "7", "One", "Two")


def test_batch_answers_in_the_order_of_the_questions(tiny: RunningServer) -> None:
    questions = ("Who are you?", "And I?")
    printed = run_example("batch.py", tiny, "--max-tokens", "8", *questions)
    answers = "".join(f"> {question}\n{answer(tiny, question)}\n" for question in questions)
    assert printed == f"completed: 2 of 2 lines\n{answers}".encode()


def test_structured_output_prints_what_fits(tiny: RunningServer) -> None:
    printed = run_example("structured_output.py", tiny).decode()
    assert re.fullmatch(r".{0,40} \((19|20|21)\d\d\), with .+\nabout science: (yes|no)\n", printed, re.DOTALL)


def test_tools_prints_the_answer(tiny: RunningServer) -> None:
    printed = run_example("tools.py", tiny, "--max-tokens", "8", "Any news?")
    # A model of random weights calls nothing.
    assert 0 < len(printed.decode().strip()) < 200
    assert b"get_weather(" not in printed


def readme_programs() -> list[str]:
    """The one for a server, and the one without."""
    programs = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(programs) == 2
    return programs


def test_the_program_in_the_readme(tiny: RunningServer) -> None:
    program = readme_programs()[0]
    # A tiny model may never end its answer.
    program = program.replace("http://127.0.0.1:30000", tiny.url).replace("stream=True", "stream=True, max_tokens=8")
    assert run_python("-c", program) == answer(tiny, "What is the capital of France?").encode()


def test_the_programs_without_a_server(tiny: RunningServer, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """They give what the server gives."""
    path = str(tiny_model("llama"))
    prompts = [f"{number} prompts" for number in range(20)]
    (tmp_path / "prompts").write_text("\n".join(prompts))
    printed = run_python(
        str(ROOT / "examples" / "offline.py"),
        *("--model-path", path, "--file", str(tmp_path / "prompts"), "--max-tokens", "4"),
    )
    served = tiny.client.completions.create(model=tiny.model, prompt=prompts, temperature=0, max_tokens=4)
    for prompt, choice in zip(prompts, served.choices, strict=True):
        assert f"{prompt}|{choice.text} ({choice.finish_reason})".encode() in printed
    program = readme_programs()[1].replace("Engine()", f"Engine({path!r}, dtype='float32', max_total_tokens=4096)")
    served = tiny.client.completions.create(
        model=tiny.model, prompt=["The capital of France is", "Water boils at"], temperature=0, max_tokens=8
    )
    lines = "".join(f"{choice.text} {choice.finish_reason}\n" for choice in served.choices)
    assert run_python("-c", program).startswith(lines.encode())
