"""What parameters do to the answer, through every process of a real engine; the model is tiny and random."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tokenizers
import torch
import transformers
from support.server import RunningServer

pytestmark = pytest.mark.e2e

PROMPT = "The quick brown fox jumps over the lazy dog"
EOS_ID = 2  # <|im_end|>
Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(tiny: RunningServer, http: httpx.Client) -> Ask:
    """A whole completion, by default greedy, as JSON."""

    def ask(**fields: Any) -> dict[str, Any]:
        body = {"model": tiny.model, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, **fields}
        response = http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    return ask


@pytest.fixture
def ask_chat(tiny: RunningServer, http: httpx.Client) -> Ask:
    def ask(**fields: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": PROMPT}]
        body = {"model": tiny.model, "messages": messages, "max_tokens": 24, "temperature": 0, **fields}
        response = http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    return ask


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Callable[[str], Path]) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(tiny_model("llama") / "tokenizer.json"))


def text(answer: dict[str, Any], index: int = 0) -> str:
    return answer["choices"][index]["text"]


def test_streamed_text_is_the_whole_text(tiny: RunningServer, client: openai.OpenAI, ask: Ask, ask_chat: Ask) -> None:
    chunks = list(client.completions.create(model=tiny.model, prompt=PROMPT, max_tokens=24, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text(ask())
    assert len(chunks) > 3  # it came in pieces; a slow reader gets several tokens in one
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1

    messages: Any = [{"role": "user", "content": PROMPT}]
    stream = list(
        client.chat.completions.create(
            model=tiny.model, messages=messages, max_tokens=24, temperature=0, n=2, stream=True
        )
    )
    whole = ask_chat(n=2)
    for index in (0, 1):
        deltas = [chunk.choices[0] for chunk in stream if chunk.choices[0].index == index]
        assert (deltas[0].delta.role, deltas[0].delta.content) == ("assistant", "")
        assert "".join(choice.delta.content or "" for choice in deltas) == whole["choices"][index]["message"]["content"]
        assert (deltas[-1].delta.content, deltas[-1].finish_reason) == (None, "length")


def test_usage_in_a_stream(tiny: RunningServer, client: openai.OpenAI, ask: Ask) -> None:
    options: Any = {"include_usage": True}
    *chunks, last = client.completions.create(
        model=tiny.model,
        prompt=PROMPT,
        max_tokens=5,
        n=2,
        stream=True,
        stream_options=options,
        extra_body={"ignore_eos": True},
    )
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage
    assert last.usage.prompt_tokens == ask()["usage"]["prompt_tokens"]
    assert last.usage.completion_tokens == 10
    assert last.usage.total_tokens == last.usage.prompt_tokens + 10


def test_seeded_choices(ask: Ask) -> None:
    def seeded(seed: int, n: int) -> dict[str, Any]:
        return ask(n=n, seed=seed, temperature=1, max_tokens=12, ignore_eos=True)

    answer = seeded(11, 4)
    texts = [text(answer, index) for index in range(4)]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    assert answer["usage"]["prompt_tokens"] == ask()["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 48
    again = seeded(11, 4)
    assert [text(again, index) for index in range(4)] == texts
    # Choice i has the seed of the first, plus i.
    assert text(seeded(13, 1)) == texts[2]


def test_without_a_seed_answers_differ(ask: Ask) -> None:
    assert text(ask(temperature=1)) != text(ask(temperature=1))


def test_filters_that_leave_one_token_are_greedy(ask: Ask) -> None:
    greedy = text(ask())
    for filters in ({"top_k": 1}, {"min_p": 1}, {"top_p": 0}, {"top_p": 1e-6}):
        assert text(ask(temperature=1.5, **filters)) == greedy, filters


def test_top_k_narrows_the_choice(ask: Ask) -> None:
    """`logprobs` lists the best three, and the token itself as a fourth where it is none of them."""

    def listed(**fields: Any) -> list[int]:
        [choice] = ask(temperature=2, seed=1, max_tokens=40, ignore_eos=True, logprobs=3, **fields)["choices"]
        return [len(top) for top in choice["logprobs"]["top_logprobs"]]

    assert max(listed()) == 4
    assert max(listed(top_k=3)) <= 3


def boundary_stop(answer: dict[str, Any]) -> str:
    """Two characters of the text, the end of a token and the start of the next, that no earlier place has."""
    whole, tokens = text(answer), answer["choices"][0]["logprobs"]["tokens"]
    for left, right in list(itertools.pairwise(tokens))[3:]:
        stop = left[-1] + right[0]
        inside = any(stop in token for token in tokens)
        if (left + right).isascii() and (left + right).isprintable() and not inside and whole.count(stop) == 1:
            return stop
    raise AssertionError(f"no stop string in {tokens}")


def test_stop_string_over_a_token_boundary(tiny: RunningServer, client: openai.OpenAI, ask: Ask) -> None:
    free = ask(max_tokens=100, logprobs=0)
    stop = boundary_stop(free)
    expected = text(free).partition(stop)[0]
    [choice] = ask(max_tokens=100, stop=["no such thing", stop])["choices"]
    assert (choice["text"], choice["finish_reason"], choice["matched_stop"]) == (expected, "stop", stop)
    [choice] = ask(max_tokens=100, stop=stop, include_stop_str_in_output=True)["choices"]
    assert choice["text"] == expected + stop

    *chunks, last = client.completions.create(
        model=tiny.model, prompt=PROMPT, max_tokens=100, temperature=0, stop=[stop], stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in (*chunks, last)) == expected
    assert last.choices[0].finish_reason == "stop"
    assert last.choices[0].model_extra == {"matched_stop": stop}


def test_a_stop_that_does_not_come_costs_no_text(ask: Ask) -> None:
    """What is held back because it could begin a stop string comes out in the end."""
    free = text(ask())
    assert text(ask(stop=[free[-3:] + "\x00\x00\x00"])) == free


def test_matched_stop_on_tokens_and_length(ask: Ask) -> None:
    [choice] = ask(logit_bias={EOS_ID: 100})["choices"]
    assert (choice["text"], choice["finish_reason"], choice["matched_stop"]) == ("", "stop", EOS_ID)
    [choice] = ask(logit_bias={30: 100}, stop_token_ids=[30])["choices"]
    assert (choice["text"], choice["finish_reason"], choice["matched_stop"]) == ("", "stop", 30)
    [choice] = ask()["choices"]
    assert (choice["finish_reason"], choice["matched_stop"]) == ("length", None)


def test_min_tokens_and_ignore_eos(ask: Ask) -> None:
    bias = {EOS_ID: 100}
    assert ask(logit_bias=bias)["usage"]["completion_tokens"] == 1
    delayed = ask(logit_bias=bias, min_tokens=5)
    assert delayed["usage"]["completion_tokens"] == 6  # five, and the one that ends it
    assert delayed["choices"][0]["finish_reason"] == "stop"
    endless = ask(logit_bias=bias, ignore_eos=True)
    assert (endless["usage"]["completion_tokens"], endless["choices"][0]["finish_reason"]) == (24, "length")


def test_logit_bias_bans_and_forces(ask: Ask, tokenizer: tokenizers.Tokenizer) -> None:
    forced = tokenizer.encode("x").ids[0]
    assert text(ask(logit_bias={forced: 100}, max_tokens=5)) == "xxxxx"
    first = ask(max_tokens=1, logprobs=2)["choices"][0]["logprobs"]
    banned = tokenizer.encode(first["tokens"][0]).ids
    assert len(banned) == 1
    other = ask(max_tokens=1, logprobs=2, logit_bias={banned[0]: -100})["choices"][0]["logprobs"]
    assert other["tokens"] != first["tokens"]
    # Log-probabilities are the model's own, before any bias.
    assert other["top_logprobs"] == first["top_logprobs"]


@pytest.mark.parametrize(
    "penalty", [{"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 1.5}], ids=str
)
def test_penalties_make_repetition_rarer(ask: Ask, penalty: dict[str, float]) -> None:
    def different(**fields: Any) -> int:
        return len(set(ask(max_tokens=80, logprobs=0, **fields)["choices"][0]["logprobs"]["tokens"]))

    assert different(**penalty) > different()


def test_chat_logprobs(ask_chat: Ask) -> None:
    [choice] = ask_chat(logprobs=True, top_logprobs=20)["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 24
    assert (
        bytes(b for token in content for b in token["bytes"]).decode(errors="replace") == choice["message"]["content"]
    )
    for token in content:
        assert bytes(token["bytes"]).decode(errors="replace") == token["token"]
        top = [other["logprob"] for other in token["top_logprobs"]]
        assert len(top) == 20
        assert top == sorted(top, reverse=True)
        assert token["logprob"] == top[0]  # it is greedy
        assert 0.3 < sum(map(math.exp, top)) <= 1 + 1e-5
    assert ask_chat()["choices"][0]["logprobs"] is None


def test_scoring_a_prompt(ask: Ask, tokenizer: tokenizers.Tokenizer, tiny_model: Callable[[str], Path]) -> None:
    """Echo with log-probabilities and no new token, against `transformers`; a second time from the prefix cache."""
    ids = tokenizer.encode(PROMPT).ids
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    for _ in range(2):
        answer = ask(echo=True, logprobs=3, max_tokens=0)
        [choice] = answer["choices"]
        logprobs = choice["logprobs"]
        assert choice["text"] == "".join(logprobs["tokens"]) == PROMPT
        assert (choice["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 0)
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        for position in range(1, len(ids)):
            value = expected[position - 1, ids[position]].item()
            assert logprobs["token_logprobs"][position] == pytest.approx(value, abs=1e-3)
            best = expected[position - 1].max().item()
            assert max(logprobs["top_logprobs"][position].values()) == pytest.approx(best, abs=1e-3)
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            assert PROMPT[offset:].startswith(token)


def test_echo_with_new_tokens(ask: Ask) -> None:
    whole = ask(echo=True, logprobs=1)["choices"][0]
    assert whole["text"] == PROMPT + text(ask())
    assert len(whole["logprobs"]["tokens"]) == ask()["usage"]["total_tokens"]


def test_prompts_as_ids_and_in_lists(ask: Ask, tokenizer: tokenizers.Tokenizer) -> None:
    other = "Paris is the capital of"
    alone = [text(ask()), text(ask(prompt=other))]
    ids = [tokenizer.encode(prompt).ids for prompt in (PROMPT, other)]
    assert text(ask(prompt=ids[0])) == alone[0]
    for prompts in ([PROMPT, other], ids):
        answer = ask(prompt=prompts, n=2)
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert [choice["text"] for choice in answer["choices"]] == [alone[0], alone[0], alone[1], alone[1]]
        assert answer["usage"]["prompt_tokens"] == len(ids[0]) + len(ids[1])
