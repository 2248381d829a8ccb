"""`CudaDecoder` with the Triton backend equals its plain twin, in every variation that decoders have."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from support.engine import InlineEngine
from support.fake_cuda import fake_cuda
from support.fake_kernels import interpret
from support.interpreter import patched_once_a_launch
from support.model_driver import ModelDriver, load
from support.triton_device import DEVICE, INTERPRETED, kernel_test

from ramet.kernels.triton.attention import Gpu
from ramet.model_runner.attention.triton_backend import TritonBackend
from ramet.model_runner.models.cuda_decoder import CudaDecoder

pytestmark = kernel_test


@pytest.fixture(autouse=True)
def nothing_ahead(monkeypatch) -> Iterator[None]:
    """Interpreted kernels are not compiled, so that the backend need not launch all of them first, at seconds each."""
    if INTERPRETED:
        monkeypatch.setattr("ramet.model_runner.attention.triton_backend.EVERY_KIND", ())
    with patched_once_a_launch() if INTERPRETED else contextlib.nullcontext():
        yield


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


def test_the_engine_answers_as_on_a_cpu(tiny_model, monkeypatch):
    """Interpreted, on a device that does not exist, whose unwritten memory is NaN. Tokens are equal; logits need not
    be, for a tile of another height adds up in another order."""
    sizes = {"max_step_tokens": 16, "max_running": 4}
    with contextlib.ExitStack() as stack:
        engines = [InlineEngine(tiny_model("llama"), **sizes)]
        if DEVICE.type == "cpu":
            interpret(stack.enter_context(fake_cuda()), monkeypatch)
        engines.append(InlineEngine(tiny_model("llama"), device="cuda", cuda_graph_max_bs=2, steps_ahead=1, **sizes))
        for engine in engines:
            for i, length in enumerate((3, 18, 1)):
                prompt = [7 * i + j for j in range(length)]
                engine.add(f"r{i}", prompt, 4, temperature=float(i), seed=i, top_k=5 * (i == 2))
            engine.run()
    assert engines[0].tokens == engines[1].tokens
