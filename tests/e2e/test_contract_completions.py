"""`POST /v1/completions`, parameter by parameter, through the official SDK; every raw answer is checked by schema.

What both endpoints share is in `test_contract_chat.py`; `test_features.py` has what parameters do to the choice of
tokens, stop strings over token boundaries, and prompts as ids and in lists; `test_errors.py` the errors.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import tokenizers
import torch
import transformers
from support.contract import checking_client
from support.server import RunningServer

pytestmark = pytest.mark.e2e

PROMPT = "Paris is the capital of France"
Ask = Callable[..., Any]


@pytest.fixture
def ask(tiny: RunningServer) -> Iterator[Ask]:
    """By default greedy, eight tokens."""
    with checking_client(tiny.url) as client:
        yield lambda **fields: client.completions.create(
            **{"model": tiny.model, "prompt": PROMPT, "temperature": 0, "max_tokens": 8, **fields}
        )


@pytest.fixture
def refused(ask: Ask) -> Callable[..., None]:
    def refused(param: str, **fields: Any) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            ask(**fields)
        assert caught.value.param == param

    return refused


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Callable[[str], Path]) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(tiny_model("llama") / "tokenizer.json"))


@pytest.fixture(scope="module")
def expected(tiny_model: Callable[[str], Path]) -> Callable[[list[int]], torch.Tensor]:
    """Log-probabilities `[tokens, vocab]` in float64, without any cache."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float64)

    def compute(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)

    return compute


def test_the_four_forms_of_a_prompt(ask: Ask, refused: Callable[..., None], tokenizer: tokenizers.Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT).ids
    plain = ask().choices[0].text
    for prompt in (PROMPT, [PROMPT], ids, [ids]):
        answer = ask(prompt=prompt)
        assert answer.choices[0].text == plain
        assert answer.usage.prompt_tokens == len(ids)  # nothing was added to ids
    for prompt in ("", [], [[]], [384], [-1], ["a", [1]], ["a", 1]):
        refused("prompt", prompt=prompt)


def test_choices_of_several_prompts(ask: Ask) -> None:
    prompts = ["One", "Two", "Three"]
    answer = ask(prompt=prompts, n=2, echo=True, temperature=1, seed=4)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text.startswith(prompts[choice.index // 2]) for choice in answer.choices] == [True] * 6
    alone = sum(ask(prompt=prompt).usage.prompt_tokens for prompt in prompts)
    assert answer.usage.prompt_tokens == alone


def test_max_tokens(ask: Ask, refused: Callable[..., None]) -> None:
    assert ask(max_tokens=None, extra_body={"ignore_eos": True}).usage.completion_tokens == 16
    refused("max_tokens", max_tokens=0)
    refused("max_tokens", max_tokens=-1, echo=True)
    for logprobs in (None, 0, 3):
        answer = ask(max_tokens=0, echo=True, logprobs=logprobs)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (PROMPT, "length")
        assert answer.usage.completion_tokens == 0


def test_best_of(ask: Ask, refused: Callable[..., None]) -> None:
    """Of seeded candidates, known from a request that shows them all, the best by mean log-probability."""
    seeded = {"temperature": 1, "seed": 21}
    shown = ask(n=6, logprobs=0, **seeded)

    def mean(choice: Any) -> float:
        values = choice.logprobs.token_logprobs
        return sum(values) / len(values)

    ranked = sorted(shown.choices, key=mean, reverse=True)
    best = ask(n=2, best_of=6, **seeded)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert all(choice.logprobs is None for choice in best.choices)
    assert best.usage.completion_tokens == shown.usage.completion_tokens
    assert best.usage.prompt_tokens == shown.usage.prompt_tokens
    with_logprobs = ask(best_of=6, logprobs=2, echo=True, **seeded).choices[0]
    assert with_logprobs.text == PROMPT + ranked[0].text
    assert len(ask(prompt=["a", "b"], best_of=3, **seeded).choices) == 2
    assert len(ask(best_of=20, n=20).choices) == 20
    for best_of, n in ((1, 2), (21, 1), (0, 1)):
        refused("best_of", best_of=best_of, n=n)
    refused("best_of", best_of=2, stream=True)
    assert list(ask(best_of=1, stream=True))


def test_echo(ask: Ask, tokenizer: tokenizers.Tokenizer) -> None:
    plain = ask().choices[0].text
    for prompt in (PROMPT, tokenizer.encode(PROMPT).ids):
        assert ask(prompt=prompt, echo=True).choices[0].text == PROMPT + plain
        chunks = [chunk.choices[0] for chunk in ask(prompt=prompt, echo=True, n=2, stream=True)]
        for index in range(2):
            texts = [choice.text for choice in chunks if choice.index == index]
            assert texts[0].startswith(PROMPT)
            assert "".join(texts) == PROMPT + plain


def test_a_stream(ask: Ask) -> None:
    *chunks, last = ask(prompt=[PROMPT, "One"], stream=True, stream_options={"include_usage": True}, logprobs=2)
    whole = ask(prompt=[PROMPT, "One"], logprobs=2)
    for index in range(2):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.text for choice in own) == whole.choices[index].text
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + ["length"]
        for name, values in whole.choices[index].logprobs.model_dump().items():
            assert [value for choice in own for value in getattr(choice.logprobs, name)] == values, name
    assert (last.choices, last.usage.completion_tokens) == ([], 16)
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1


def test_matched_stop(ask: Ask) -> None:
    plain = ask().choices[0].text
    stopped = ask(stop=[plain[2]]).choices[0]
    assert (stopped.text, stopped.finish_reason, stopped.matched_stop) == (
        plain.partition(plain[2])[0],
        "stop",
        plain[2],
    )
    assert ask(logit_bias={2: 100}).choices[0].matched_stop == 2
    assert ask().choices[0].matched_stop is None


def test_suffix(ask: Ask, refused: Callable[..., None]) -> None:
    """For a model without the tokens of it; the others are in `tests/tokenizer_worker/test_infill.py`."""
    with pytest.raises(openai.BadRequestError, match="no fill-in-the-middle tokens"):
        ask(suffix="the end")
    for fields in ({}, {"stream": True}, {"echo": True}, {"prompt": [1, 2]}):
        refused("suffix", suffix="the end", **fields)
    assert ask(suffix="").choices[0].text == ask().choices[0].text


def test_the_four_arrays(ask: Ask, refused: Callable[..., None]) -> None:
    for wanted in (0, 1, 5, 20):
        logprobs = ask(logprobs=wanted).choices[0].logprobs
        assert {len(values) for values in logprobs.model_dump().values()} == {8}
        for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
            assert top[token] >= value
            assert len(top) <= wanted + 1
            assert len(top) >= wanted or "\ufffd" in top  # halves of characters share an entry
            assert sum(map(math.exp, top.values())) <= 1 + 1e-6
        assert logprobs.text_offset[0] == len(PROMPT)
    refused("logprobs", logprobs=21)
    refused("logprobs", logprobs=-1)


def test_offsets_point_into_the_text(ask: Ask) -> None:
    """Where tokens are whole characters; characters over several tokens are in `tests/frontend/test_completions.py`."""
    choice = ask(echo=True, logprobs=0, max_tokens=4, logit_bias={40: 100}).choices[0]
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        assert choice.text[offset : offset + len(token)] == token
    assert (choice.logprobs.token_logprobs[0], choice.logprobs.top_logprobs[0]) == (None, None)


def test_logprobs_agree_with_transformers(
    ask: Ask, tokenizer: tokenizers.Tokenizer, expected: Callable[[list[int]], torch.Tensor]
) -> None:
    """Of a prompt of several chunks and pages and of what follows, cold and from the prefix cache."""
    text = " ".join(f"{number} {PROMPT}" for number in range(60))
    prompt = tokenizer.encode(text).ids
    assert len(prompt) > 600
    seen = []
    for _ in range(2):
        answer = ask(prompt=prompt, echo=True, logprobs=5, max_tokens=8)
        seen.append(answer.choices[0].logprobs)
    assert answer.usage.prompt_tokens_details is not None
    assert seen[0] == seen[1]
    got = seen[0]
    reference = expected(prompt)
    for position in range(1, len(prompt)):
        row = reference[position - 1]
        assert got.token_logprobs[position] == pytest.approx(row[prompt[position]].item(), abs=1e-4)
        assert max(got.top_logprobs[position].values()) == pytest.approx(row.max().item(), abs=1e-4)
        top = sorted(got.top_logprobs[position].values(), reverse=True)
        assert sum(map(math.exp, top)) <= 1 + 1e-6
    ids = list(prompt)
    for value in got.token_logprobs[len(prompt) :]:  # greedy: the best of each row
        row = expected(ids)[-1]
        assert value == pytest.approx(row.max().item(), abs=1e-4)
        ids.append(int(row.argmax()))


def test_scoring_the_rest_of_a_known_prefix(
    ask: Ask, tokenizer: tokenizers.Tokenizer, expected: Callable[[list[int]], torch.Tensor]
) -> None:
    """What evaluation harnesses do: one context, several endings, echo with no new token or one."""
    context = tokenizer.encode(f"Numbers: {PROMPT} " * 8).ids
    for ending in ("Paris", "Berlin", "Rome"):
        ids = [*context, *tokenizer.encode(ending).ids]
        reference = expected(ids)
        want = sum(reference[i - 1, ids[i]].item() for i in range(len(context), len(ids)))
        for max_tokens in (0, 1):
            logprobs = ask(prompt=ids, echo=True, logprobs=1, max_tokens=max_tokens).choices[0].logprobs
            assert len(logprobs.tokens) == len(ids) + max_tokens
            assert sum(logprobs.token_logprobs[len(context) : len(ids)]) == pytest.approx(want, abs=1e-3)
