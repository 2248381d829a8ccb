"""How an engine of the offline API ends: closed, forgotten, failed, killed. Each test has one of its own."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from support.offline import ENDLESS, PROMPT, SMALL, children, nothing_left, once_busy
from support.server import PATIENCE_S, until

from ramet import Engine, RequestError, SamplingParams
from ramet.launch.supervisor import EngineFailed

pytestmark = pytest.mark.e2e


@pytest.fixture
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


def test_a_death_is_survived_and_one_beyond_the_budget_ends_the_engine(model: Path) -> None:
    seeded = SamplingParams(max_tokens=300, ignore_eos=True, seed=3)
    prompts = [f"{PROMPT} {number}" for number in range(20)]
    with nothing_left(), Engine(model, **SMALL, max_restarts=1) as engine:
        texts = [output.text for output in engine.generate(prompts, seeded)]
        stream = engine.stream(PROMPT, seeded)
        pieces = [next(stream)]
        os.kill(children()["scheduler-0"].pid, signal.SIGKILL)
        until(lambda: engine._host.client.down is not None, PATIENCE_S, lambda: "down")
        # Some of these are sent now, and the others when their turn has come; none is refused.
        assert [output.text for output in engine.generate(prompts, seeded)] == texts
        assert "".join([*pieces, *stream]) == engine.generate(PROMPT, seeded).text

        once_busy(engine, children()["detokenizer"].kill)
        with pytest.raises(RequestError, match="the engine is down: detokenizer was killed by SIGKILL"):
            engine.generate([PROMPT] * 20, ENDLESS)
        with pytest.raises(RequestError, match="the engine is down"):
            engine.generate(PROMPT)
        until(lambda: not children(), PATIENCE_S, lambda: f"dead: {children()}")


def test_closing_while_the_engine_is_down_ends_what_waits_for_it(model: Path) -> None:
    with nothing_left():
        engine = Engine(model, **SMALL)
        os.kill(children()["scheduler-0"].pid, signal.SIGKILL)
        until(lambda: engine._host.client.down is not None, PATIENCE_S, lambda: "down")
        once_busy(engine, engine.close)
        with pytest.raises(RequestError, match="the engine is down: it"):  # "was closed", or "is being stopped"
            engine.generate([PROMPT] * 20, ENDLESS)
        engine.close()


def test_closing_ends_a_call_and_happens_once(model: Path) -> None:
    with nothing_left():
        engine = Engine(model, **SMALL)
        assert set(children()) == {"scheduler-0", "detokenizer", "tokenizer-0"}
        once_busy(engine, engine.close)
        with pytest.raises(RequestError, match="it was closed"):
            engine.generate([PROMPT] * 20, ENDLESS)
        engine.close()  # returns when the other call does
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate(PROMPT)


def test_a_start_that_fails_leaves_nothing(model: Path) -> None:
    with nothing_left(), pytest.raises(EngineFailed, match="not ready after"):
        Engine(model, **SMALL, start_timeout=0.05)


def test_an_engine_that_nobody_holds_any_more(model: Path) -> None:
    with nothing_left():
        engine = Engine(model, **SMALL)
        assert engine.generate(PROMPT, SamplingParams(max_tokens=2)).text is not None
        del engine


FORGETFUL = """
import sys
from ramet import Engine, SamplingParams
engine = Engine(sys.argv[1], dtype="float32", max_total_tokens=6144)
print(len(engine.generate(["a"] * 3, SamplingParams(max_tokens=2))), flush=True)
if sys.argv[2] == "raise":
    raise SystemExit(7)
if sys.argv[2] == "wait":
    engine.generate("a", SamplingParams(max_tokens=1900, ignore_eos=True), n=50)
"""


@pytest.mark.parametrize(("ending", "code"), [("raise", 7), ("wait", -signal.SIGKILL)])
def test_a_program_that_forgets_to_close(model: Path, ending: str, code: int) -> None:
    """Without a guard around its main part, as a script or a notebook has it."""
    with (
        nothing_left() as folder,
        subprocess.Popen([sys.executable, "-c", FORGETFUL, model, ending], stdout=subprocess.PIPE) as program,
    ):
        assert program.stdout is not None
        assert program.stdout.readline() == b"3\n"
        if ending == "wait":
            pids = [child.pid for child in psutil.Process(program.pid).children()]
            assert len(pids) == 3
            program.kill()
            until(lambda: not any(map(psutil.pid_exists, pids)), PATIENCE_S, lambda: f"{pids} are dead")
            shutil.rmtree(next(folder.iterdir()))  # nobody is left who could
        assert program.wait(PATIENCE_S) == code
