"""No kernel is compiled while requests are served, which would hold up a step for a second: what is launched then has
been launched before, as the server started. On the simulated device; the keys are those by which Triton itself would
look up its compiled kernels."""

import functools
from collections.abc import Iterator

import pytest
import torch
from support import fake_kernels
from support.engine import InlineEngine
from support.fake_cuda import FakeCuda, fake_cuda, inner
from support.lives import KINDS
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device")
# With a choice of splits, and steps of which experts have tiles of each height.
SIZES = {"context_length": 512, "max_step_tokens": 192, "max_prefill_tokens": 192, "total_tokens": 2048}


@pytest.fixture
def device(monkeypatch) -> Iterator[FakeCuda]:
    torch.set_num_threads(1)
    with fake_cuda() as device:
        fake_kernels.install(device, monkeypatch)
        yield device


@functools.cache
def binder(kernel: JITFunction):
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))


class Launches:
    """The keys of all launches, by the kernel's name; `new` are those since `settle`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.known: set[str] = set()
        self.new: set[str] = set()
        run = JITFunction.run

        def run_and_note(kernel, *args, grid, warmup, **settings):
            _, kinds, options = binder(kernel)(*inner(args), **inner(settings))
            self.new.add(f"{kernel.fn.__name__} {kinds} {options}")
            return run(kernel, *args, grid=grid, warmup=warmup, **settings)

        patch.setattr(JITFunction, "run", run_and_note)

    def settle(self) -> None:
        self.known |= self.new
        self.new = set()

    @property
    def compiled_late(self) -> list[str]:
        return sorted(self.new - self.known)


def serve(engine: InlineEngine) -> None:
    """Every kind of request, alone and together, with prompts around all sizes at which something is chosen."""
    for length in (1, 2, 16, 17, 33, 65, 130, 400):
        engine.add(f"alone{length}", [(7 * j + length) % 300 for j in range(length)], 2)
        engine.run()
    for i, params in enumerate(KINDS.values()):
        engine.add(f"together{i}", [(31 * i + 7 * j) % 300 for j in range(3 + 20 * i)], 5, **params)
        engine.run(steps=1)
    engine.run()


@pytest.mark.parametrize(
    ("arch", "multiprocessors", "settings"),
    [
        ("llama", 4, {"dtype": "bfloat16", "quantization": "fp8"}),
        ("gemma3", 4, {"cuda_graph_max_bs": 4, "steps_ahead": 1}),
        ("qwen3_moe", 40, {"dtype": "bfloat16"}),
        ("gpt2", 40, {}),
    ],
)
def test_all_is_compiled_before_the_first_request(tiny_model, arch, multiprocessors, settings, device, monkeypatch):
    properties = torch.cuda.get_device_properties()
    properties.multi_processor_count = multiprocessors
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    launches = Launches(monkeypatch)
    engine = InlineEngine(tiny_model(arch), device="cuda", max_running=8, **SIZES, **settings)
    assert len(launches.new) > 3
    launches.settle()
    serve(engine)
    assert launches.new and launches.compiled_late == []
