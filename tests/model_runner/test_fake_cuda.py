"""The whole path for CUDA on a device that does not exist (`support/fake_cuda.py`), with real graphs, streams and copies
in time, but for the kernels' own code. Answers must be those of a CPU, and `launch` must never wait for the device."""

from collections.abc import Iterator

import pytest
import torch
from support import fake_kernels
from support.engine import InlineEngine
from support.fake_cuda import FakeCuda, fake_cuda
from support.lives import run_all, told
from support.tiny_models import NATIVE_ARCHITECTURES

from ramet.model_runner.runner import ModelRunner

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device")
PROMPTS = [[(17 * i + 5 * j) % 300 for j in range(length)] for i, length in enumerate((3, 40, 17))]
GRAPHS = {"cuda_graph_max_bs": 4, "steps_ahead": 1}


@pytest.fixture
def device(monkeypatch) -> Iterator[FakeCuda]:
    torch.set_num_threads(1)
    launch = ModelRunner.launch

    def launch_without_waiting(*args):
        device.waiting = False
        try:
            return launch(*args)
        finally:
            device.waiting = True

    with fake_cuda() as device:
        fake_kernels.install(device, monkeypatch)
        monkeypatch.setattr(ModelRunner, "launch", launch_without_waiting)
        yield device


def greedy(folder, tokens: int = 6, **settings) -> list[list[int]]:
    engine = InlineEngine(folder, **settings)
    for i, prompt in enumerate(PROMPTS):
        engine.add(f"r{i}", prompt, tokens)
    engine.run()
    return [engine.tokens[f"r{i}"] for i in range(len(PROMPTS))]


@pytest.mark.parametrize("arch", sorted(NATIVE_ARCHITECTURES))
def test_graphs_and_steps_ahead_answer_as_a_cpu(tiny_model, arch, device):
    expected = greedy(tiny_model(arch))
    assert greedy(tiny_model(arch), device="cuda", **GRAPHS) == expected


@pytest.mark.parametrize("settings", [{}, {"cuda_graph_max_bs": 8, "steps_ahead": 1}], ids=["plain", "graphs, ahead"])
def test_all_kinds_of_requests_answer_as_on_a_cpu(tiny_model, settings, device):
    """With filters, penalties, biases, log-probabilities and grammars: nothing of it may make `launch` wait."""
    folder = tiny_model("llama")
    expected, found = told(run_all(folder)), told(run_all(folder, device="cuda", **settings))
    for rid, (tokens, finish, logprobs, scored) in expected.items():
        assert found[rid][:2] == (tokens, finish)
        for ours, theirs in zip(found[rid][2] + (found[rid][3] or [])[1:], logprobs + (scored or [])[1:], strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3) and ours.top_ids == theirs.top_ids
