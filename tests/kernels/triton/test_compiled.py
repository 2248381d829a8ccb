"""Every kernel, as its wrapper launches it for real shapes, compiles for the GPUs that we support, in registers and in
the shared memory that they have. Needs no GPU: launches stop once they are compiled."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
from support.triton_device import INTERPRETED
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from ramet.kernels.triton import sampling
from ramet.kernels.triton.attention import Gpu, paged_attention
from ramet.kernels.triton.fp8 import to_fp8
from ramet.kernels.triton.gated_mlp import gated
from ramet.kernels.triton.moe import experts
from ramet.kernels.triton.norm import add_rms_norm
from ramet.kernels.triton.rope_store import rope_and_store

pytestmark = pytest.mark.skipif(INTERPRETED, reason="an interpreted process compiles nothing")

# Shared memory that a program can have, in bytes, by compute capability (CUDA programming guide, table of limits). What
# is compiled for 8.0 must run on 8.6 and 8.9 as well, which have less.
SHARED = {80: 99 * 1024, 90: 227 * 1024}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
BF16 = torch.bfloat16


class NoDevice:
    """Triton's driver, as far as compiling needs one. The device number is the target's, for the kernels' caches."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@pytest.fixture
def compiled(monkeypatch):
    """A function that calls a wrapper for a target and returns the kernels that it would have launched."""
    launch = JITFunction.run
    kernels = []

    def only_compile(self, *args, grid, warmup, **kwargs):
        kernels.append(launch(self, *args, grid=grid, warmup=True, **kwargs))

    monkeypatch.setattr(JITFunction, "run", only_compile)

    def call(capability: int, function: Callable[[int], object]) -> list:
        kernels.clear()
        monkeypatch.setattr(triton.runtime.driver, "_active", NoDevice(capability))
        function(capability)
        return list(kernels)

    return call


def resources(kernel, folder: Path) -> dict[str, int]:
    """What ptxas gave it: registers, and bytes of stack and of local memory (spills)."""
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    report = subprocess.run([CUOBJDUMP, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
    line = report.stdout.split("Function")[1]
    return {name: int(re.search(rf"{name}:(\d+)", line)[1]) for name in ("REG", "STACK", "LOCAL")}


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def attention(
    rows, query_len, heads, kv_heads, dim, tokens=None, dtype=BF16, max_pages=512, **spec
) -> Callable[[int], object]:
    """`tokens` of all rows, if not each has the longest query."""
    pool, query = meta(1000, 16, kv_heads, dim, dtype=dtype), meta(tokens or rows * query_len, heads, dim, dtype=dtype)
    return lambda capability: paged_attention(
        query,
        query,
        pool,
        pool,
        meta(rows, max_pages, dtype=torch.int32),
        meta(rows + 1, dtype=torch.int32),
        meta(rows, dtype=torch.int32),
        max_query_len=query_len,
        scale=dim**-0.5,
        gpu=Gpu(132, capability),
        **spec,
    )


def rope(heads: int, kv_heads: int, dim: int, norm: bool) -> Callable[[int], object]:
    pool, longs = meta(1000, 16, kv_heads, dim), meta(64, dtype=torch.int64)
    table = meta(4096, 2, dim, dtype=torch.float32)
    weight = meta(heads + kv_heads, dim, dtype=torch.float32) if norm else None
    qkv = meta(64, (heads + 2 * kv_heads) * dim)
    return lambda capability: rope_and_store(qkv, pool, pool, table, longs, longs, norm_weight=weight, eps=1e-6)


def moe(tokens: int) -> Callable[[int], object]:
    chosen = meta(tokens, 8, dtype=torch.int64)
    weights = (meta(128, 1536, 2048), meta(128, 2048, 768), meta(tokens, 8))
    return lambda capability: experts(meta(tokens, 2048), *weights, chosen, "silu")


def choose(capability: int) -> None:
    logits, scales = meta(64, 151936, dtype=torch.float32), meta(64, dtype=torch.float32)
    sampling.choose(logits, scales, meta(64, 2, dtype=torch.int32), borders=scales)


def norm(width: int, post: bool = False) -> Callable[[int], object]:
    residual, weight = meta(64, width, dtype=torch.float32), meta(width, dtype=torch.float32)
    delta_weight = weight if post else None
    return lambda capability: add_rms_norm(residual, meta(64, width), weight, 1e-6, BF16, delta_weight=delta_weight)


# What to call, and how many kernels it launches. Llama 3.1 8B has 32 heads of 128 over 8, Qwen3 0.6B 16 over 8, Gemma 3
# 270M 4 of 256 over 1, SmolLM2 135M 9 of 64 over 3.
CALLS: dict[str, tuple[Callable[[int], object], int]] = {
    "decode, Llama": (attention(64, 1, 32, 8, 128), 1),
    "decode, Qwen, split": (attention(1, 1, 16, 8, 128), 2),
    "decode, Gemma, local": (attention(64, 1, 4, 1, 256, window=512), 2),
    "decode, Gemma, global": (attention(64, 1, 4, 1, 256, max_pages=2048), 2),
    "decode, wide heads and a window": (attention(64, 1, 8, 4, 256, window=1024), 2),
    "decode, heads of 80": (attention(64, 1, 32, 32, 80), 1),
    "decode, heads of 96": (attention(64, 1, 32, 32, 96), 1),
    "decode, float32": (attention(8, 1, 4, 2, 128, dtype=torch.float32), 2),
    "prefill, Llama": (attention(2, 4096, 32, 8, 128), 1),
    "prefill, Qwen": (attention(2, 4096, 16, 8, 128), 1),
    "prefill, Gemma, local": (attention(4, 4096, 4, 1, 256, window=512), 1),
    "prefill, narrow heads and a softcap": (attention(2, 4096, 9, 3, 64, softcap=50.0), 1),
    "prefill, wide heads and a window": (attention(2, 4096, 8, 4, 256, window=1024), 1),
    "prefill, heads of 80": (attention(2, 4096, 32, 32, 80), 1),
    "chunk, Llama, split": (attention(1, 16, 32, 8, 128), 2),
    "chunks, Llama, smallest graph": (attention(8, 16, 32, 8, 128, tokens=16), 2),
    "chunks, Llama, largest graph": (attention(8, 256, 32, 8, 128, tokens=256), 1),
    "chunks, Qwen, a graph of 64": (attention(8, 64, 16, 8, 128, tokens=64), 2),
    "chunks, Gemma, a graph of 64": (attention(8, 64, 4, 1, 256, tokens=64), 2),
    "rope and store, Llama": (rope(32, 8, 128, False), 1),
    "rope and store, Qwen": (rope(16, 8, 128, True), 1),
    "rope and store, Gemma": (rope(4, 1, 256, True), 1),
    "norm, Llama": (norm(4096), 1),
    "norm, Gemma": (norm(640, post=True), 1),
    "gated, Llama": (lambda capability: gated(meta(64, 2 * 14336), "silu"), 1),
    "gated, Gemma": (lambda capability: gated(meta(64, 2 * 2048), "gelu_pytorch_tanh"), 1),
    "float8, Llama": (lambda capability: to_fp8(meta(64, 14336)), 1),
    "float8, Llama 70B": (lambda capability: to_fp8(meta(64, 28672)), 1),
    "few tokens for experts": (moe(4), 3),
    "many tokens for experts": (moe(4096), 3),
    "choose": (choose, 1),
}


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("name", CALLS)
def test_fits_in_registers_and_shared_memory(name, capability, compiled, tmp_path):
    if name.startswith("float8") and capability < 89:
        pytest.skip("there is no float8 before compute capability 8.9")
    function, launches = CALLS[name]
    kernels = compiled(capability, function)
    assert len(kernels) == launches
    for kernel in kernels:
        used = resources(kernel, tmp_path)
        assert used["REG"] <= 255 and kernel.metadata.shared <= SHARED[capability], kernel.metadata.name
        if "float32" not in name:  # which no tensor core computes exactly, so that it takes more than there are
            assert used["LOCAL"] == 0 and used["STACK"] <= 8, kernel.metadata.name
        if capability == 90 and name.startswith("prefill"):
            assert "wgmma" in kernel.asm["ptx"]
        if name == "choose":
            # A fast logarithm has no digits left near 1, and could be 0: a token with infinite noise.
            assert "lg2.approx" not in kernel.asm["ptx"]
