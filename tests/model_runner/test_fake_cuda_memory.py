"""The memory of real models on an H100 that does not exist: what torch's allocator would have to give, in bytes. What
libraries and kernels allocate for themselves, and what the allocator wastes, is not in it."""

import argparse
import contextlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from support import fake_kernels
from support.engine import runner_config
from support.fake_cuda import FakeCuda, fake_cuda

from ramet.model_runner.config import LoadFormat
from ramet.model_runner.cuda_graph import graph_bytes
from ramet.model_runner.memory import PoolTooLarge
from ramet.model_runner.models import loader
from ramet.model_runner.runner import ModelRunner

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device")
MIB, GIB = 2**20, 2**30
CONTEXT = 8192
H100 = {"total_bytes": 79 * GIB, "taken_outside": 500 * MIB}  # a context's


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory):
    """The folder of a config; the number of layers may be another."""

    def write(layers: int = 32):
        config = transformers.LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=CONTEXT,
        )
        folder = tmp_path_factory.mktemp("llama")
        config.save_pretrained(folder)
        return folder

    return write


@pytest.fixture(autouse=True)
def no_values(monkeypatch) -> None:
    monkeypatch.setattr(loader, "fill", lambda *args: None)


@contextlib.contextmanager
def hollow(monkeypatch, **settings) -> Iterator[FakeCuda]:
    with fake_cuda(hollow=True, **settings) as device:
        fake_kernels.install(device, monkeypatch)
        yield device


def make(folder, memory_fraction: float = 0.95, **settings) -> ModelRunner:
    sizes = {"max_running": 256, "max_step_tokens": 8192, "context_length": CONTEXT, "max_total_tokens": None}
    kind = {"load_format": LoadFormat.DUMMY, "dtype": "bfloat16", "device": "cuda", "memory_fraction": memory_fraction}
    return ModelRunner(runner_config(folder, **sizes, **kind, **settings), lambda text: None)


def test_the_cache_of_llama_8b_on_an_h100(llama_8b, monkeypatch):
    measure, run_prompts = ModelRunner._measure_steps, ModelRunner._run_prompts
    found: dict[str, int] = {}

    def watch(runner: ModelRunner) -> int:
        found["weights"] = device.reserved_bytes
        found["steps"] = measure(runner)
        return found["steps"]

    def load_kernels(runner: ModelRunner, *args, **params) -> None:
        run_prompts(runner, *args, **params)
        device.taken_outside = 800 * MIB

    monkeypatch.setattr(ModelRunner, "_measure_steps", watch)
    monkeypatch.setattr(ModelRunner, "_run_prompts", load_kernels)
    with hollow(monkeypatch, **H100) as device:
        runner = make(llama_8b())
        free, total = torch.cuda.mem_get_info()
    # 8.03 billion parameters in bfloat16, of which norms are in float32, and the rope's table.
    assert found["weights"] == pytest.approx(2 * 8_030_261_248 + 2 * 65 * 4096 + CONTEXT * 2 * 128 * 4, abs=MIB)
    # 8192 tokens: residual in float32 (128 MiB), norm (64), gate and up (448), their product (224); for 256 rows of
    # logits sorting is less.
    assert 864 * MIB < found["steps"] < 1000 * MIB
    assert runner._pool.num_bytes == (runner.num_pages + 1) * 2 * MIB
    assert runner.num_pages == pytest.approx(
        (0.95 * 79 * 1024 - 800 - (found["weights"] + found["steps"]) / MIB) / 2, abs=8
    )
    assert free == pytest.approx(0.05 * total + found["steps"], abs=32 * MIB)


def test_graphs_take_less_than_is_left_for_them(llama_8b, monkeypatch):
    with hollow(monkeypatch, **H100) as device:
        runner = make(llama_8b(layers=2), cuda_graph_max_bs=256)
        assert runner._graphs is not None
        taken = device.graph_bytes + runner._graphs._logits.nbytes
    assert 256 * 128256 * 4 < taken < graph_bytes(runner._config, 128256) - len(runner._graphs._buckets) * 4 * MIB


@pytest.mark.parametrize(
    ("gib", "fraction", "words"),
    [
        (8, 0.95, r"the memory of cuda does not hold the weights and one full step \(CUDA out of memory"),
        (15, 0.95, r"the memory of cuda does not hold the weights and one full step \(CUDA out of memory"),
        (
            18,
            0.8,
            r"\d+ of 18432 MiB are free on cuda, 9\d\d of them for the steps; .* not hold one page of 2 MiB: raise",
        ),
    ],
)
def test_a_device_that_is_too_small_is_told_with_the_numbers(llama_8b, monkeypatch, gib, fraction, words):
    with hollow(monkeypatch, total_bytes=gib * GIB), pytest.raises(PoolTooLarge, match=words):
        make(llama_8b(), memory_fraction=fraction)


def test_the_benchmark_of_gpus_runs_through(monkeypatch, tmp_path):
    path = Path(__file__).parents[2] / "benchmarks/gpu.py"
    spec = importlib.util.spec_from_file_location("gpu_benchmark", path)
    gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")
    args = argparse.Namespace(device="cuda", tiny=True, lock_step=False, json=tmp_path / "lines")
    with hollow(monkeypatch, **H100):
        for part in (gpu.ATTENTION, "llama-8b", "qwen-0.6b"):
            gpu.run_part(part, args)
    lines = [json.loads(line) for line in args.json.read_text().splitlines()]
    assert [line["error"] for line in lines if "error" in line] == []
    assert sum("value" in line for line in lines) == 11
