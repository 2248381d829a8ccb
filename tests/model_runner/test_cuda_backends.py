"""The attention backends for CUDA: when they are refused, what they leave alone, and how FlashAttention-3 is called."""

import subprocess
import sys
import types

import pytest
import torch
from support.attention_cases import Case

from ramet.model_runner.attention.fa3_backend import Fa3Backend
from ramet.model_runner.attention.registry import make_backend
from ramet.model_runner.attention.torch_backend import TorchBackend
from ramet.model_runner.attention.triton_backend import TritonBackend
from ramet.model_runner.context import AttentionSpec

CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", ["triton", "fa3", "flashinfer"])
def test_refused_on_a_cpu(name):
    with pytest.raises(ValueError, match=f"the {name} backend works on CUDA, not on cpu"):
        make_backend(name, torch.device("cpu"), torch.bfloat16)


def test_an_unknown_name_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="'fa4' is not known; there are: auto, cpu, torch, triton, fa3, flashinfer"):
        make_backend("fa4", CUDA, torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("fa3", "flash_attn_interface", "tokenspeed-fa3"), ("flashinfer", "flashinfer", "flashinfer-python")],
)
def test_a_missing_package_is_named(monkeypatch, name, module, package):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"the {name} backend needs a package: pip install {package}"):
        make_backend(name, CUDA, torch.bfloat16)


@pytest.mark.parametrize("name", ["fa3", "flashinfer"])
def test_half_types_are_needed(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ValueError, match=f"the {name} backend needs a half type, not torch.float32"):
        make_backend(name, CUDA, torch.float32)


def test_fa3_needs_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"needs an H100 or H200 \(sm_90\), not sm_80"):
        make_backend("fa3", CUDA, torch.bfloat16)


def test_auto_on_cuda_is_triton(monkeypatch):
    found = types.SimpleNamespace(multi_processor_count=132, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert isinstance(make_backend("auto", CUDA, torch.bfloat16), TritonBackend)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, *, cache_seqlens, page_table, cu_seqlens_q, max_seqlen_q, softmax_scale, causal, window_size
):
    """What the package's documentation says of these arguments, row by row in float32."""
    assert causal and q.dtype is k_cache.dtype and max_seqlen_q == cu_seqlens_q.diff().max()
    left, right = (10**9 if side == -1 else side for side in window_size)
    rows = []
    for row, length in enumerate(cache_seqlens.tolist()):
        query = q[cu_seqlens_q[row] : cu_seqlens_q[row + 1]].float()
        key, value = (cache[page_table[row]].flatten(0, 1)[:length].float() for cache in (k_cache, v_cache))
        key, value = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (key, value))
        ahead = torch.arange(length) - torch.arange(length - len(query), length)[:, None]
        seen = (ahead <= min(right, 0)) & (ahead >= -left)
        scores = torch.einsum("qhd,khd->hqk", query, key) * softmax_scale
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        rows.append(torch.einsum("hqk,khd->qhd", weights, value))
    return torch.cat(rows).to(q.dtype)


@pytest.mark.parametrize("spec", [{}, {"sliding_window": 1}, {"sliding_window": 24}])
def test_fa3_is_told_what_the_torch_backend_computes(monkeypatch, spec):
    module = types.SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    case = Case([(65, 1), (7, 1), (70, 33)], dtype=torch.float32)
    torch.testing.assert_close(case.run(Fa3Backend(), **spec), case.run(TorchBackend(), **spec))
    with pytest.raises(ValueError, match="no attention softcap"):
        Fa3Backend().forward(AttentionSpec(0, 1.0, softcap=3.0), *case.context([(0, 0, 1)], None))


def test_a_cpu_runner_does_not_import_the_kernels():
    code = (
        "import sys, torch; import ramet.model_runner.runner as r\n"
        "r.make_backend('auto', torch.device('cpu'), torch.float32); r.make_chooser(torch.device('cpu'))\n"
        "assert not [name for name in sys.modules if name.startswith('ramet.kernels.triton')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
