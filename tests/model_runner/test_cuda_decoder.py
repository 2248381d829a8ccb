"""`CudaDecoder` with the Triton backend equals its plain twin, in every variation that decoders have."""

import pytest
import torch
from support.engine import InlineEngine
from support.model_driver import ModelDriver, load
from support.triton_device import DEVICE, kernel_test

from ramet.kernels.triton.attention import Gpu
from ramet.model_runner.attention.triton_backend import TritonBackend
from ramet.model_runner.cuda_graph import StepGraphs
from ramet.model_runner.models.cuda_decoder import CudaDecoder
from ramet.model_runner.sampler import DeviceChooser

pytestmark = kernel_test


@pytest.mark.parametrize("arch", ["qwen2", "qwen3_moe", "gemma3"])
def test_equals_the_plain_decoder(tiny_model, arch):
    """Prompts in chunks beside decodes, over pages that earlier steps have filled."""
    plain = load(tiny_model(arch), device=DEVICE.type, attention_backend="torch")
    drivers = [
        ModelDriver(plain, device=DEVICE),
        ModelDriver(CudaDecoder(plain), backend=TritonBackend(Gpu(1, 90)), device=DEVICE),
    ]
    for rows in ({"a": list(range(5, 23)), "b": [7]}, {"a": [4, 5], "b": [9]}):
        expected, found = (driver.step(rows) for driver in drivers)
        for name in rows:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-3)


def test_padded_steps_answer_as_the_plain_engine(tiny_model):
    """The whole path of a step on CUDA; interpreted, what a graph would replay is run again each time. Tokens are
    equal; logits need not be, for a tile of another height adds up in another order."""
    folder = tiny_model("llama")
    plain, engine = InlineEngine(folder), InlineEngine(folder, device=DEVICE.type, cuda_graph_max_bs=4)
    if DEVICE.type == "cpu":
        runner = engine.runner
        runner._model, runner._backend = CudaDecoder(runner._model), TritonBackend(Gpu(64, 90))
        runner._choose = DeviceChooser()
        parts = (runner._model, runner._slots, runner._pool, runner._backend, runner._choose)
        runner._graphs = StepGraphs(runner._config, *parts, capture=lambda run: run, progress=lambda text: None)
    for made in (plain, engine):
        for i, length in enumerate((3, 18, 1)):
            made.add(f"r{i}", [7 * i + j for j in range(length)], 4, temperature=float(i), seed=i, top_k=5 * (i == 2))
        made.run()
    assert engine.tokens == plain.tokens
