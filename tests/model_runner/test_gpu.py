"""On CUDA: tiny models answer as on a CPU, and graphs, steps ahead and float8 change what they should and no more."""

import pytest
import torch
from support.engine import InlineEngine
from support.lives import KINDS, run_all, told
from support.tiny_models import NATIVE_ARCHITECTURES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
PROMPTS = [[(17 * i + 5 * j) % 300 for j in range(length)] for i, length in enumerate((3, 40, 100, 17, 64))]


def greedy(folder, **settings) -> list[list[int]]:
    engine = InlineEngine(folder, **settings)
    for i, prompt in enumerate(PROMPTS):
        engine.add(f"r{i}", prompt, 24)
    engine.run()
    return [engine.tokens[f"r{i}"] for i in range(len(PROMPTS))]


@pytest.mark.parametrize("arch", sorted(NATIVE_ARCHITECTURES))
def test_greedy_answers_are_those_of_a_cpu(tiny_model, arch):
    folder = tiny_model(arch)
    assert greedy(folder, device="cuda", cuda_graph_max_bs=8, steps_ahead=1) == greedy(folder)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen3_moe"])
def test_graphs_and_steps_ahead_change_nothing(tiny_model, arch):
    folder = tiny_model(arch)
    settings = [(graphs, ahead) for graphs in (0, 8) for ahead in (0, 1)]
    plain, *others = [
        {rid: tokens for rid, (tokens, *_) in told(outputs).items()}
        for graphs, ahead in settings
        for outputs in [run_all(folder, device="cuda", cuda_graph_max_bs=graphs, steps_ahead=ahead)]
    ]
    assert len(plain) == 2 * len(KINDS)
    for other in others:
        assert other == plain


def test_small_steps_run_as_graphs(tiny_model):
    engine = InlineEngine(tiny_model("llama"), device="cuda", cuda_graph_max_bs=8)
    assert engine.runner._graphs is not None
    captured = sorted(engine.runner._graphs._replays)
    assert captured == [(1, 1), (2, 2), (4, 4), (8, 8), (16, 8), (32, 8), (64, 8)]


def test_float8_is_near_bfloat16(tiny_model):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this device has no float8 products")
    folder = tiny_model("llama")
    values = []
    for quantization in (None, "fp8"):
        engine = InlineEngine(folder, device="cuda", dtype="bfloat16", quantization=quantization)
        engine.add("r", PROMPTS[2], 0, prompt_logprobs=0)
        engine.run()
        scored = engine.outputs["r"][0].admitted.prompt_logprobs[1:]
        values.append(torch.tensor([logprob.logprob for logprob in scored]))
    assert (values[0] - values[1]).abs().mean() < values[0].std() / 4
