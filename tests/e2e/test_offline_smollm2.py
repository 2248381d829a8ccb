"""A real model through the offline API: log-probabilities against transformers in float32, and 4-bit weights."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.offline import nothing_left

from ramet import Engine, SamplingParams
from ramet.kernels.cpu.build import KernelUnavailable
from ramet.kernels.cpu.decoder import DecoderKernel

pytestmark = [pytest.mark.e2e, pytest.mark.smollm2]

TEXT = "The capital of France is Paris, which lies on the Seine. Its tower was built in 1889 for a world fair."


def test_logprobs_agree_with_transformers(smollm2_gguf: Path, smollm2_reference: tuple[Any, Any]) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=5, prompt_logprobs=5, ignore_eos=True)
    with nothing_left(), Engine(smollm2_gguf, dtype="float32", max_total_tokens=2048, context_length=1024) as engine:
        cold, warm = (engine.generate(TEXT, params) for _ in range(2))
        answer = engine.chat(
            [{"role": "user", "content": "What is the capital of France?"}],
            SamplingParams(temperature=0, max_tokens=30),
        )
    assert "Paris" in answer.text
    assert warm.prompt_logprobs[1:] == cold.prompt_logprobs[1:]
    assert (warm.text, warm.logprobs) == (cold.text, cold.logprobs)

    tokenizer, model = smollm2_reference
    prompt = tokenizer(TEXT)["input_ids"]
    assert cold.prompt_tokens == len(prompt) > 20
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        theirs = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    assert tokenizer.decode(ids[len(prompt) :]) == cold.text
    for position, token in enumerate([*cold.prompt_logprobs, *cold.logprobs][1:], 1):
        row = theirs[position - 1]
        assert token.logprob == pytest.approx(row[ids[position]].item(), abs=1e-3)
        best = row.topk(5).values.tolist()
        assert [other.logprob for other in token.top] == pytest.approx(best, abs=1e-3)
        assert sum(math.exp(other.logprob) for other in token.top) <= 1 + 1e-6


def test_it_answers_with_the_files_4_bit_weights(smollm2_gguf: Path, smollm2_reference: tuple[Any, Any]) -> None:
    try:
        DecoderKernel()
    except KernelUnavailable as error:
        pytest.skip(str(error))
    settings = {"dtype": "bfloat16", "quantization": "int4", "max_total_tokens": 2048, "context_length": 1024}
    params = SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=0, ignore_eos=True)
    with nothing_left(), Engine(smollm2_gguf, **settings) as engine:
        answer = engine.generate(TEXT, params)
    assert answer.text and answer.completion_tokens == 6
    tokenizer, model = smollm2_reference
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        theirs = model(ids).logits[0].log_softmax(dim=-1)
    expected = theirs[:-1].gather(1, ids[0, 1:, None])[:, 0]
    found = torch.tensor([token.logprob for token in answer.prompt_logprobs[1:]])
    # The inputs of products and the head have 8 bits.
    assert 0 < (found - expected).abs().mean() < 0.2
