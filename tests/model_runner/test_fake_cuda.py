"""The whole path for CUDA, but for the kernels' own code, on a device that does not exist (`support/fake_cuda.py`):
graphs, streams, copies in time. Answers must be those of a CPU, and no launch of a step may wait for the device.

Several ranks are in test_tensor_parallel.py, the kernels interpreted in test_cuda_decoder.py."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support import fake_kernels
from support.engine import InlineEngine, runner_config
from support.fake_cuda import FakeCuda, FakeEvent, fake_cuda, spoil
from support.lives import run_all, told
from support.tiny_embedders import make_tiny_embedder
from support.tiny_models import NATIVE_ARCHITECTURES

from ramet.model_runner import cuda_graph, runner, sampler
from ramet.model_runner.batch import pack
from ramet.model_runner.cuda_graph import StepGraphs, capture_graphs
from ramet.model_runner.embedder import Embedder
from ramet.model_runner.models.cuda_decoder import CudaDecoder

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device")
PROMPTS = [[(17 * i + 5 * j) % 300 for j in range(length)] for i, length in enumerate((3, 40, 17))]
GRAPHS = {"cuda_graph_max_bs": 4, "steps_ahead": 1}


@pytest.fixture
def device(monkeypatch) -> Iterator[FakeCuda]:
    torch.set_num_threads(1)
    with fake_cuda() as device:
        fake_kernels.install(device, monkeypatch)
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


@pytest.mark.parametrize(("arch", "settings"), [("llama", {"attention_backend": "torch"}), ("gpt2", {})])
def test_plain_torch_and_the_fallback_answer_as_on_a_cpu(tiny_model, arch, settings, device):
    expected = greedy(tiny_model(arch))
    assert greedy(tiny_model(arch), device="cuda", **GRAPHS, **settings) == expected


def test_float8_is_near_bfloat16(tiny_model, device):
    values = []
    for quantization in (None, "fp8"):
        engine = InlineEngine(tiny_model("llama"), device="cuda", dtype="bfloat16", quantization=quantization, **GRAPHS)
        engine.add("scored", PROMPTS[1], 4, prompt_logprobs=0)
        engine.run()
        values.append(
            torch.tensor([found.logprob for found in engine.outputs["scored"][0].admitted.prompt_logprobs[1:]])
        )
    assert 0 < (values[0] - values[1]).abs().mean() < values[0].std() / 4


def test_logits_are_not_rounded(tiny_model, device):
    runner = InlineEngine(tiny_model("llama"), device="cuda", dtype="bfloat16").runner
    with torch.inference_mode():
        logits = runner._model.logits(torch.randn(3, 64).to(torch.bfloat16).to("cuda")).cpu()
    assert logits.dtype is torch.float32 and (logits != logits.bfloat16().float()).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_embeddings_are_those_of_a_cpu(tmp_path, kind, device):
    folder = make_tiny_embedder(kind, tmp_path)
    found, expected = (
        Embedder(runner_config(folder, device=name), lambda text: None).execute(PROMPTS) for name in ("cuda", "cpu")
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert np.frombuffer(ours, "<f4") == pytest.approx(np.frombuffer(theirs, "<f4"), abs=1e-4)


def test_nothing_is_left_from_the_step_before(tiny_model, device, monkeypatch):
    """What one step hands to its graph is spoilt before the next is handed over."""
    fill = StepGraphs._fill

    def fill_anew(graphs: StepGraphs, *args) -> None:
        device.put(lambda: spoil(graphs._buffer.inner))
        device.put(lambda: spoil(graphs._logits.inner))
        fill(graphs, *args)

    expected = greedy(tiny_model("llama"))
    monkeypatch.setattr(StepGraphs, "_fill", fill_anew)
    assert greedy(tiny_model("llama"), device="cuda", **GRAPHS) == expected


def one_buffer_for_all(monkeypatch) -> None:
    """Written for the next step before the device has copied it for this one."""
    lasting: dict[tuple[int, bool], torch.Tensor] = {}

    def pack_there(arrays, *, pinned):
        packed = pack(arrays, pinned=pinned)
        return lasting.setdefault((len(packed), pinned), packed).copy_(packed)

    monkeypatch.setattr(cuda_graph, "pack", pack_there)


def half_a_step(monkeypatch) -> None:
    """All but the tokens and the positions are as they were before."""

    def pack_less(arrays, *, pinned):
        packed = pack(arrays, pinned=pinned)
        return packed[:32].clone().pin_memory() if pinned else packed

    monkeypatch.setattr(cuda_graph, "pack", pack_less)


def results_unawaited(monkeypatch) -> None:
    monkeypatch.setattr(FakeEvent, "synchronize", lambda event: None)


def results_left_to_the_next_step(monkeypatch) -> None:
    """Read where a graph left them, when the next one has run."""
    monkeypatch.setattr(sampler, "_to_host", lambda tensor: tensor)


def a_wait(monkeypatch) -> None:
    choose = sampler.choose_on_cuda
    monkeypatch.setattr(sampler, "choose_on_cuda", lambda *args: (args[0].max().item(), choose(*args))[1])


def a_tensor_of_the_host(monkeypatch) -> None:
    logits = CudaDecoder.logits
    monkeypatch.setattr(CudaDecoder, "logits", lambda self, hidden: logits(self, hidden) + torch.zeros(1, 1))


def memory_of_a_moment(monkeypatch) -> None:
    """What graphs read is given back after their capture."""
    run = StepGraphs._run

    def run_with_a_guest(graphs: StepGraphs, bucket):
        found = run(graphs, bucket)
        found.chosen[0].add_(guests[0])
        return found

    def capture(*args):
        guests.append(torch.zeros(1, dtype=torch.int64, device="cuda"))
        found = capture_graphs(*args)
        guests.clear()
        return found

    guests: list[torch.Tensor] = []
    monkeypatch.setattr(StepGraphs, "_run", run_with_a_guest)
    monkeypatch.setattr(runner, "capture_graphs", capture)


@pytest.mark.parametrize(
    "mistake",
    [
        one_buffer_for_all,
        half_a_step,
        results_unawaited,
        results_left_to_the_next_step,
        a_wait,
        a_tensor_of_the_host,
        memory_of_a_moment,
    ],
)
def test_mistakes_would_show(tiny_model, mistake, device, monkeypatch):
    expected = greedy(tiny_model("llama"))
    mistake(monkeypatch)
    try:
        found = greedy(tiny_model("llama"), device="cuda", **GRAPHS)
    except (RuntimeError, AssertionError, IndexError):
        return
    assert found != expected


@pytest.mark.parametrize("mistake", ["waits", "copies"])
def test_without_graphs_where_a_capture_fails(tiny_model, mistake, device, monkeypatch, caplog):
    """The first such run is allowed, a capture of it is not; what follows is as if it had not been tried."""
    logits, stream = CudaDecoder.logits, device.stream

    def worse_logits(decoder: CudaDecoder, hidden: torch.Tensor) -> torch.Tensor:
        if device.waiting:
            found = logits(decoder, hidden)
            found.sum().item() if mistake == "waits" else torch.tensor([1.0], device="cuda")
            return found
        return logits(decoder, hidden)

    monkeypatch.setattr(CudaDecoder, "logits", worse_logits)
    expected = greedy(tiny_model("llama"))
    assert greedy(tiny_model("llama"), device="cuda", **GRAPHS) == expected
    assert "decoding without CUDA graphs" in caplog.text
    assert device.stream is stream
