"""A real model through the offline API, in float32: log-probabilities against transformers."""

import math
from pathlib import Path

import pytest
import torch
import transformers
from support.offline import nothing_left

from ramet import Engine, SamplingParams

pytestmark = [pytest.mark.e2e, pytest.mark.smollm2]

TEXT = "The capital of France is Paris, which lies on the Seine. Its tower was built in 1889 for a world fair."


def test_logprobs_agree_with_transformers(smollm2_gguf: Path) -> None:
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

    folder, name = str(smollm2_gguf.parent), smollm2_gguf.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    prompt = tokenizer(TEXT)["input_ids"]
    assert cold.prompt_tokens == len(prompt) > 20
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        reference = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    assert tokenizer.decode(ids[len(prompt) :]) == cold.text
    for position, token in enumerate([*cold.prompt_logprobs, *cold.logprobs][1:], 1):
        row = reference[position - 1]
        assert token.logprob == pytest.approx(row[ids[position]].item(), abs=1e-3)
        best = row.topk(5).values.tolist()
        assert [other.logprob for other in token.top] == pytest.approx(best, abs=1e-3)
        assert sum(math.exp(other.logprob) for other in token.top) <= 1 + 1e-6
