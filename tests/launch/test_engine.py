"""The offline API on a tiny model: what a program sees of `Engine`, and what it leaves behind."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.offline import ENDLESS, PROMPT, SMALL, nothing_left, once_busy
from support.server import PATIENCE_S, until

import ramet
from ramet import Engine, RequestError, SamplingParams
from ramet.launch.server_args import ConfigError

pytestmark = pytest.mark.e2e

GREEDY = SamplingParams(temperature=0, max_tokens=8)
HELLO = [{"role": "user", "content": "Hello"}]


def live(engine: Engine) -> int:
    return engine._host.client.live


def idle(engine: Engine) -> None:
    until(lambda: live(engine) == 0, PATIENCE_S, lambda: f"idle: {live(engine)}")


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with nothing_left(), Engine(model, **SMALL) as engine:
        yield engine


@pytest.fixture
def quiet(engine: Engine) -> Iterator[Engine]:
    yield engine
    idle(engine)


def test_one_prompt(quiet: Engine) -> None:
    whole = quiet.generate(PROMPT, GREEDY)
    assert (whole.finish_reason, whole.matched_stop, whole.completion_tokens) == ("length", None, 8)
    assert whole.prompt_tokens > 1
    assert whole.logprobs is whole.prompt_logprobs is None
    again = quiet.generate(PROMPT * 20, GREEDY), quiet.generate(PROMPT * 20, GREEDY)
    assert again[0].text == again[1].text
    assert again[0].cached_tokens < again[1].cached_tokens
    stop = whole.text[3]
    ended = quiet.generate(PROMPT, SamplingParams(temperature=0, max_tokens=8, stop=(stop,)))
    assert (ended.text, ended.finish_reason, ended.matched_stop) == (whole.text.partition(stop)[0], "stop", stop)


def test_logprobs_of_prompt_and_answer(quiet: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=0)
    answer = quiet.generate([1, 5, 9], params)
    assert len(answer.prompt_logprobs) == answer.prompt_tokens == 3
    assert answer.prompt_logprobs[0].logprob != answer.prompt_logprobs[0].logprob
    assert [len(token.top) for token in answer.logprobs] == [2, 2, 2]
    assert b"".join(token.data for token in answer.logprobs).decode(errors="replace") == answer.text


def test_many_prompts_in_order(quiet: Engine) -> None:
    """More than the engine takes at a time, which is 8."""
    prompts = [f"{number} is a number" for number in range(100)]
    most = 0

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, live(quiet))
            time.sleep(0.001)

    done = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    outputs = quiet.generate(prompts, GREEDY)
    done.set()
    watcher.join()
    assert most <= 8
    assert len(outputs) == 100
    for number in (0, 41, 99):
        assert outputs[number].text == quiet.generate(prompts[number], GREEDY).text
    assert quiet.generate([], GREEDY) == []


def test_params_for_each_prompt(quiet: Engine) -> None:
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (1, 2, 3)]
    assert [out.completion_tokens for out in quiet.generate(["a", "b", "c"], params)] == [1, 2, 3]
    with pytest.raises(RequestError, match="2 prompts need as many params, got 3"):
        quiet.generate(["a", "b"], params)


def test_choices(quiet: Engine) -> None:
    seeded = SamplingParams(max_tokens=6, seed=1, ignore_eos=True)
    one, two = quiet.generate(["a", "b"], seeded, n=3)
    assert len({choice.text for choice in one}) == 3
    assert [choice.text for choice in two] == [choice.text for choice in quiet.generate("b", seeded, n=3)]
    # Two that need more than half of the places at once, beside others.
    assert [len(choices) for choices in quiet.generate(["a"] * 6, seeded, n=5)] == [5] * 6


def test_chat(quiet: Engine) -> None:
    answer = quiet.chat(HELLO, GREEDY)
    spelled = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert answer.text == quiet.generate(spelled, GREEDY).text
    assert [out.text for out in quiet.chat((HELLO, tuple(HELLO)), GREEDY)] == [answer.text] * 2
    goes_on = [*HELLO, {"role": "assistant", "content": "Good"}]
    continued = quiet.chat(goes_on, GREEDY, continue_final_message=True)
    assert continued.text == quiet.generate(f"{spelled}Good", GREEDY).text


def test_streams(quiet: Engine) -> None:
    long = SamplingParams(temperature=0, max_tokens=60)
    pieces = list(quiet.stream(PROMPT, long))
    assert len(pieces) > 3
    assert "".join(pieces) == quiet.generate(PROMPT, long).text
    assert "".join(quiet.stream(HELLO, GREEDY)) == quiet.chat(HELLO, GREEDY).text


def test_a_stream_that_is_left_is_aborted(quiet: Engine) -> None:
    for _ in quiet.stream(PROMPT, ENDLESS):
        break
    idle(quiet)


def test_async_methods_in_a_loop_of_the_user(quiet: Engine) -> None:
    async def main() -> None:
        texts = [out.text for out in await asyncio.gather(*(quiet.agenerate(PROMPT, GREEDY) for _ in range(20)))]
        # A notebook calls the others too while its loop runs.
        assert texts == [quiet.generate(PROMPT, GREEDY).text] * 20
        assert "".join([piece async for piece in quiet.astream(PROMPT, GREEDY)]) == texts[0]
        assert (await quiet.achat(HELLO, GREEDY)).text == quiet.chat(HELLO, GREEDY).text
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(quiet.agenerate([PROMPT] * 20, ENDLESS), 0.2)
        async for _ in quiet.astream(PROMPT, ENDLESS):
            break
        with pytest.raises(RequestError):
            await quiet.aembed("a")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": 2.5}, "temperature must be between 0 and 2, got 2.5"),
        ({"temperature": "hot"}, "temperature: Expected `float`, got `str`"),
        ({"temperature": np.float32(0.5)}, "temperature: Expected `float`, got `numpy.float32`"),
        ({"stop": "word"}, "stop: Expected `array`, got `str`"),
        ({"logit_bias": {"1": 1.0}}, "logit_bias: Expected `int`, got `str`"),
        ({"logit_bias": {9999: 1.0}}, "logit_bias: token id 9999 is not in the vocabulary of 384 tokens"),
        ({"max_tokens": 4000}, "max_tokens is 4000"),
    ],
)
def test_params_are_refused_in_the_words_of_the_server(quiet: Engine, params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        quiet.generate("a", SamplingParams(**params))
    assert caught.value.failure.param == next(iter(params))


SOME_TYPE = {"set": {"a"}, "dict": {"a": 1}, "bytes": b"a", "NoneType": None, "int": 7, "ndarray": np.array([1])}


@pytest.mark.parametrize("given", SOME_TYPE)
@pytest.mark.parametrize("method", ["generate", "stream", "embed"])
def test_prompts_of_another_type_are_refused(quiet: Engine, given: str, method: str) -> None:
    with pytest.raises(RequestError, match=f"^a prompt must be a text or .*, got {given}$") as caught:
        list(getattr(quiet, method)(SOME_TYPE[given]))
    assert caught.value.failure.param == "prompt"


@pytest.mark.parametrize("given", [{"temperature": 0}, "hot", 7, [{"temperature": 0}], SamplingParams])
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_params_of_another_type_are_refused(quiet: Engine, given: object, method: str) -> None:
    with pytest.raises(RequestError, match=r"^params must be SamplingParams, or a list"):
        list(getattr(quiet, method)("a", given))


def test_what_else_is_refused(quiet: Engine) -> None:
    for prompt in ("", ["a", 3], [[]], [384], "\ud800", [1.5]):
        with pytest.raises(RequestError, match=r"prompt|surrogates"):
            quiet.generate(prompt, GREEDY)
    robot = [{"role": "robot", "content": "x"}]
    for messages in (robot, "hello", None, HELLO[0], [HELLO[0], HELLO], [{"role": "user", "content": object()}]):
        with pytest.raises(RequestError, match="messages"):
            quiet.chat(messages, GREEDY)
    with pytest.raises(RequestError, match="temperature is none of tools"):
        quiet.chat(HELLO, GREEDY, temperature=0)
    with pytest.raises(RequestError, match="this server generates text: to embed, start one with --is-embedding"):
        quiet.embed(["a", "b"])
    for n in (0, 9, "2", 10**30):
        with pytest.raises(RequestError, match=f"n must be a number from 1 to max_queued_requests .8., got {n!r}"):
            quiet.generate("a", GREEDY, n=n)
    with pytest.raises(RequestError) as caught:
        quiet.generate(["a", "b", "c " * 3000], ENDLESS)
    assert caught.value.failure.code == "context_length_exceeded"
    assert caught.value.__notes__ == ["in number 2 of 3, counted from 0"]


def test_settings_without_meaning_are_refused() -> None:
    for settings in ({"port": 1}, {"api_key": ("x",)}, {"served_model_name": ("x",)}, {"zap": 1}, {"page_size": "a"}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            Engine("anything", **settings)


def test_importing_ramet_is_cheap() -> None:
    code = "import ramet, sys; print(len([m for m in ('torch', 'zmq', 'msgspec', 'starlette') if m in sys.modules]))"
    assert subprocess.check_output([sys.executable, "-c", code]) == b"0\n"
    assert {"Engine", "SamplingParams", "RequestError", "__version__"} <= set(dir(ramet))
    with pytest.raises(AttributeError, match="Motor"):
        _ = ramet.Motor


def test_ctrl_c_aborts_what_was_asked(quiet: Engine) -> None:
    once_busy(quiet, lambda: os.kill(os.getpid(), signal.SIGINT))  # to the process, as a terminal does
    with pytest.raises(KeyboardInterrupt):
        quiet.generate([PROMPT] * 50, ENDLESS)
    idle(quiet)
    assert quiet.generate(PROMPT, GREEDY).text
