"""Greedy output equals transformers' token for token, in float32, for every architecture, however the work is cut."""

import random

import pytest
import torch
import transformers
from support.engine import InlineEngine, reference_greedy
from support.tiny_models import TINY_ARCHITECTURES

OUTPUT = 12


@pytest.fixture(scope="module", params=sorted(TINY_ARCHITECTURES))
def model(request, tiny_model):
    """The folder of a tiny model, and transformers' own running of it."""
    torch.set_num_threads(1)
    folder = tiny_model(request.param)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return folder, reference.eval()


def prompts(lengths: list[int], seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 300) for _ in range(length)] for length in lengths]


def test_batch_of_mixed_lengths_in_chunks(model):
    """Prompts from one token to several chunks; decodes and chunks share steps."""
    folder, reference = model
    engine = InlineEngine(folder)
    batch = prompts([1, 7, 8, 40, 100], seed=1)
    for i, prompt in enumerate(batch):
        engine.add(f"r{i}", prompt, OUTPUT)
    engine.run()
    assert [engine.tokens[f"r{i}"] for i in range(len(batch))] == [
        reference_greedy(reference, prompt, OUTPUT) for prompt in batch
    ]


def test_prefix_hits(model):
    folder, reference = model
    engine = InlineEngine(folder)
    shared, *tails = prompts([50, 3, 9, 1], seed=2)
    for i, tail in enumerate(tails):
        engine.add(f"r{i}", shared + tail, OUTPUT)
        engine.run()
    assert engine.core.counters.cached_tokens == 2 * 48
    for i, tail in enumerate(tails):
        assert engine.tokens[f"r{i}"] == reference_greedy(reference, shared + tail, OUTPUT)


def test_after_preemption(model):
    folder, reference = model
    engine = InlineEngine(folder, total_tokens=96, max_running=4)
    batch = prompts([20, 22, 24], seed=3)
    for i, prompt in enumerate(batch):
        engine.add(f"r{i}", prompt, 40)
    engine.run()
    assert engine.core.counters.preemptions > 0
    assert [engine.tokens[f"r{i}"] for i in range(3)] == [reference_greedy(reference, p, 40) for p in batch]
