"""`POST /v1/chat/completions`, parameter by parameter, through the official SDK; every raw answer is checked by schema.

Not here: tools, `response_format` and its relatives, reasoning. What other files test is named where it belongs:
what a parameter does to the choice of tokens in `test_features.py` (penalties, bias, filters, seeds, `min_tokens`),
errors in `test_errors.py`, seeds among neighbours in `test_smollm2.py`.
"""

import concurrent.futures
import math
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from support.contract import checking_client
from support.server import RunningServer

pytestmark = pytest.mark.e2e

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "The quick brown fox jumps"}]
EOS_ID = 2
Ask = Callable[..., Any]


@pytest.fixture
def sdk(tiny: RunningServer) -> Iterator[openai.OpenAI]:
    with checking_client(tiny.url) as client:
        yield client


@pytest.fixture
def ask(tiny: RunningServer, sdk: openai.OpenAI) -> Ask:
    """By default greedy, eight tokens. Fields that the SDK does not know go into `extra_body`."""

    def ask(**fields: Any) -> Any:
        body = {"model": tiny.model, "messages": HELLO, "temperature": 0, "max_tokens": 8, **fields}
        return sdk.chat.completions.create(**body)

    return ask


@pytest.fixture
def refused(ask: Ask) -> Callable[..., None]:
    def refused(param: str, **fields: Any) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            ask(**fields)
        assert caught.value.param == param

    return refused


def text(answer: Any, index: int = 0) -> str:
    return answer.choices[index].message.content


def streamed(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_the_schema_sees_what_passes(tiny: RunningServer, sdk: openai.OpenAI) -> None:
    """Models, errors and every path; the rest of this file relies on it."""
    assert sdk.models.list().data[0].id == tiny.model
    assert sdk.models.retrieve(tiny.model).id == tiny.model
    for call in (sdk.models.retrieve, lambda name: sdk.completions.create(model=name, prompt="a")):
        with pytest.raises(openai.NotFoundError) as caught:
            call("gpt-99")
        assert caught.value.code == "model_not_found"
    assert sdk._client._transport.answers == 4


def test_messages_of_every_role(ask: Ask) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for message in (
        {"role": "developer", "content": "a"},
        {"role": "system", "content": "a", "name": "x"},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "a", "tool_call_id": "call_1"},
        {"role": "function", "content": "a", "name": "f"},
    ):
        assert ask(messages=[message, *HELLO]).choices[0].message.role == "assistant"
    parts = [{"type": "text", "text": "The quick brown "}, {"type": "text", "text": "fox jumps"}]
    assert text(ask(messages=[{"role": "user", "content": parts}])) == text(ask())


def test_messages_that_are_refused(refused: Callable[..., None]) -> None:
    refused("messages", messages=[])
    refused("messages[0].role", messages=[{"role": "wizard", "content": "a"}])
    refused("messages[0].content", messages=[{"role": "user", "content": None}])
    for kind in ("image_url", "input_audio", "file"):
        part = {"type": kind, kind: {}}
        refused("messages[0].content[0].type", messages=[{"role": "user", "content": [part]}])


def test_max_completion_tokens_wins(ask: Ask, refused: Callable[..., None]) -> None:
    free = {"extra_body": {"ignore_eos": True}}
    assert ask(max_tokens=3, **free).usage.completion_tokens == 3
    assert ask(max_tokens=3, max_completion_tokens=5, **free).usage.completion_tokens == 5
    assert ask(max_tokens=None, max_completion_tokens=4, **free).usage.completion_tokens == 4
    refused("max_tokens", max_tokens=0)
    refused("max_tokens", max_tokens=5000)


def test_temperature_and_top_p(ask: Ask, refused: Callable[..., None]) -> None:
    greedy = text(ask())
    assert text(ask(temperature=2, top_p=0)) == greedy
    # Without a temperature the model's own counts, and else 1: a seed then shows that it is not greedy.
    assert text(ask(temperature=None, seed=3)) == text(ask(temperature=1, seed=3)) != greedy
    for name, value in (("temperature", 2.1), ("temperature", -0.1), ("top_p", 1.1), ("top_p", -0.1)):
        refused(name, **{name: value})


def test_the_extras_of_other_engines(ask: Ask, refused: Callable[..., None]) -> None:
    """Each does something; that it is the right thing, `test_features.py` and the detokenizer's tests tell."""
    plain = text(ask())
    extras = {"min_p": 1, "top_k": 1, "repetition_penalty": 1.0, "min_tokens": 1, "priority": 3, "rid": "mine"}
    answer = ask(temperature=2, extra_body=extras)
    assert (answer.id, text(answer)) == ("mine", plain)
    ended = {"logit_bias": {EOS_ID: 100}}
    assert ask(**ended, extra_body={"ignore_eos": True}).usage.completion_tokens == 8
    assert text(ask(**ended, extra_body={"ignore_eos": True, "skip_special_tokens": False})) == "<|im_end|>" * 8
    assert ask(logit_bias={30: 100}, extra_body={"stop_token_ids": [30]}).choices[0].matched_stop == 30
    for keep in ("include_stop_str_in_output", "no_stop_trim"):
        assert text(ask(stop=plain[2], extra_body={keep: True})) == plain[: plain.index(plain[2]) + 1]
    refused("stop_token_ids", extra_body={"stop_token_ids": [9999]})
    refused("temprature", extra_body={"temprature": 1})


def test_the_form_of_the_prompt(tiny: RunningServer, sdk: openai.OpenAI, ask: Ask) -> None:
    def spelled(prompt: str) -> str:
        answer = sdk.completions.create(model=tiny.model, prompt=prompt, temperature=0, max_tokens=8)
        return answer.choices[0].text

    head = f"<|im_start|>user\n{HELLO[0]['content']}<|im_end|>\n"
    assert text(ask()) == spelled(f"{head}<|im_start|>assistant\n")
    assert text(ask(extra_body={"add_generation_prompt": False})) == spelled(head)
    begun = [*HELLO, {"role": "assistant", "content": "over"}]
    answer = ask(messages=begun, extra_body={"continue_final_message": True})
    assert text(answer) == spelled(f"{head}<|im_start|>assistant\nover")
    assert ask(extra_body={"chat_template_kwargs": {"enable_thinking": False}})


def test_n(ask: Ask, refused: Callable[..., None]) -> None:
    one, many = ask(), ask(n=3, seed=5, temperature=1)
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    assert many.usage.prompt_tokens == one.usage.prompt_tokens
    assert many.usage.completion_tokens <= 3 * 8
    assert len({text(many, index) for index in range(3)}) == 3
    assert len(ask(n=128, max_tokens=1).choices) == 128
    for n in (0, 129):
        refused("n", n=n)


def test_n_in_a_stream(ask: Ask) -> None:
    """Every choice has its own first and last chunk; chunks interleave by index."""
    whole = ask(n=3, seed=5, temperature=1)
    chunks = list(ask(n=3, seed=5, temperature=1, stream=True))
    for index in range(3):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert (own[0].delta.role, own[0].delta.content) == ("assistant", "")
        assert "".join(choice.delta.content or "" for choice in own) == text(whole, index)
        reasons = [choice.finish_reason for choice in own]
        assert reasons == [None] * (len(own) - 1) + [whole.choices[index].finish_reason]


def test_the_form_of_a_stream(ask: Ask) -> None:
    chunks = list(ask(stream=True))
    assert streamed(chunks) == text(ask())
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[-1].choices[0].delta.model_dump(exclude_unset=True) == {}
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


def test_stream_options(ask: Ask, refused: Callable[..., None]) -> None:
    *chunks, last = ask(stream=True, stream_options={"include_usage": True})
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage == ask().usage.model_copy(update={"prompt_tokens_details": last.usage.prompt_tokens_details})
    running = [chunk.usage for chunk in ask(stream=True, stream_options={"continuous_usage_stats": True})]
    counts = [usage.completion_tokens for usage in running]
    assert counts == sorted(counts) and counts[-1] == 8
    refused("stream_options", stream_options={"include_usage": True})
    refused("stream_options.zap", stream=True, stream_options={"zap": 1})


def test_stop_and_what_matched(ask: Ask, refused: Callable[..., None]) -> None:
    """A string or up to 16 of them; where it matches, `test_features.py` and the detokenizer's tests tell."""
    plain = text(ask())
    stop = plain[3]
    for given in (stop, [stop], ["\x00\x00", *[f"\x00{i}" for i in range(14)], stop]):
        [choice] = ask(stop=given).choices
        assert (choice.message.content, choice.finish_reason) == (plain.partition(stop)[0], "stop")
        assert choice.matched_stop == stop
        chunks = list(ask(stop=given, stream=True))
        assert streamed(chunks) == plain.partition(stop)[0]
        assert (chunks[-1].choices[0].finish_reason, chunks[-1].choices[0].matched_stop) == ("stop", stop)
    [choice] = ask(logit_bias={EOS_ID: 100}).choices
    assert (choice.message.content, choice.finish_reason, choice.matched_stop) == ("", "stop", EOS_ID)
    [choice] = ask().choices
    assert (choice.finish_reason, choice.matched_stop) == ("length", None)
    refused("stop", stop=["x"] * 17)
    refused("stop", stop="")


def test_penalties_and_bias(ask: Ask, refused: Callable[..., None]) -> None:
    for name in ("presence_penalty", "frequency_penalty"):
        assert ask(**{name: 2}).choices and ask(**{name: -2}).choices
        refused(name, **{name: 2.1})
        refused(name, **{name: -2.1})
    refused("repetition_penalty", extra_body={"repetition_penalty": 0})
    refused("logit_bias.5", logit_bias={"5": 101})
    refused("logit_bias", logit_bias={"9999": 1})
    refused("logit_bias", logit_bias={"x": 1})


def test_logprobs(ask: Ask, refused: Callable[..., None]) -> None:
    whole = ask(logprobs=True, top_logprobs=20)
    content = whole.choices[0].logprobs.content
    assert len(content) == whole.usage.completion_tokens == 8
    for token in content:
        assert len(token.top_logprobs) == 20
        assert sum(math.exp(other.logprob) for other in token.top_logprobs) <= 1 + 1e-6
        assert token.logprob == token.top_logprobs[0].logprob
    assert b"".join(bytes(token.bytes) for token in content).decode(errors="replace") == text(whole)
    chunks = list(ask(logprobs=True, top_logprobs=20, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    assert [token for part in parts if part for token in part.content] == content
    assert ask(logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    # The second time all but the end of the prompt comes from the prefix cache.
    again = ask(logprobs=True, top_logprobs=20)
    assert again.choices[0].logprobs == whole.choices[0].logprobs
    refused("top_logprobs", top_logprobs=2)
    refused("top_logprobs", logprobs=True, top_logprobs=21)


def test_seed_among_others(ask: Ask) -> None:
    def seeded(_: int) -> str:
        return text(ask(seed=9, temperature=1, max_tokens=24))

    alone = seeded(0)
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        others = [pool.submit(ask, temperature=1, max_tokens=60) for _ in range(6)]
        assert list(pool.map(seeded, range(3))) == [alone] * 3
        concurrent.futures.wait(others)


def test_no_ops_and_null(tiny: RunningServer, ask: Ask) -> None:
    plain = ask()
    without_effect: dict[str, Any] = {"store": True, "metadata": {"a": "b"}, "service_tier": "auto", "user": "me"}
    without_effect |= {"safety_identifier": "s", "prompt_cache_key": "k"}
    assert text(ask(**without_effect)) == text(plain)
    names = ["n", "stop", "seed", "logprobs", "top_logprobs", "stream", "stream_options", "tools", "logit_bias", "rid"]
    assert text(ask(extra_body=dict.fromkeys(names))) == text(plain)
    assert plain.model == tiny.model
    usage = plain.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens <= usage.prompt_tokens
