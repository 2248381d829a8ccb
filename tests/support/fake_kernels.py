"""Stand-ins for the Triton kernels on a `FakeCuda`: the wrappers run as they are, with their allocations and launches,
which are checked instead of made; then plain torch computes what the kernels would have."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from support.fake_cuda import DeviceTensor, FakeCuda, device_tensors, inner
from torch import Tensor
from triton.runtime import interpreter

from ramet.kernels.triton import fp8, sampling
from ramet.model_runner.attention import triton_backend
from ramet.model_runner.attention.torch_backend import _attend
from ramet.model_runner.context import AttentionSpec
from ramet.model_runner.layers.linear import _to_fp8 as to_fp8_plainly
from ramet.model_runner.layers.mlp import activation
from ramet.model_runner.layers.rope import rotate
from ramet.model_runner.models import cuda_decoder
from ramet.model_runner.noise import keyed_gumbel
from ramet.model_runner.runner import ModelRunner

_OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion"}


def install(device: FakeCuda, patch: pytest.MonkeyPatch) -> None:
    """And from now on no launch of a step may wait."""
    launch_step = ModelRunner.launch

    def launch_without_waiting(*args: Any) -> Any:
        device.waiting = False
        try:
            return launch_step(*args)
        finally:
            device.waiting = True

    patch.setattr(ModelRunner, "launch", launch_without_waiting)

    def launch_kernel(kernel: Any, *args: Any, **settings: Any) -> None:
        _launch(kernel, *args, **settings)
        device.launch(kernel.fn.__name__)

    patch.setattr(triton.runtime.jit.JITFunction, "run", launch_kernel)
    places: list[tuple[Any, str, Callable[..., object]]] = [
        (triton_backend, "paged_attention", _paged_attention),
        (cuda_decoder, "add_rms_norm", _add_rms_norm),
        (cuda_decoder, "rope_and_store", _rope_and_store),
        (cuda_decoder, "gated", _gated),
        (cuda_decoder, "experts", _experts),
        (sampling, "choose", _choose),
        (fp8, "to_fp8", _to_fp8),
    ]
    for module, name, compute in places:
        patch.setattr(module, name, _standing_in(device, getattr(module, name), compute))


def interpret(device: FakeCuda, patch: pytest.MonkeyPatch) -> None:
    """The kernels themselves, where the process was started for Triton's interpreter."""
    run = interpreter.GridExecutor.__call__

    def launch(executor: Any, *args: Any, **settings: Any) -> None:
        inner_args, inner_settings = inner((args, settings))
        device.put(lambda: run(executor, *inner_args, **inner_settings), device_tensors(args, settings))

    patch.setattr(interpreter.GridExecutor, "__call__", launch)


def _launch(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **settings: Any) -> None:
    named = {name: settings.pop(name) for name in list(settings) if name not in _OPTIONS}
    inspect.signature(kernel.fn).bind(*args, **named)
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    assert tensors and all(isinstance(tensor, DeviceTensor) for tensor in tensors), "a kernel needs the device's memory"
    assert 1 <= len(grid) <= 3 and all(type(size) is int for size in grid), grid
    assert grid[0] < 2**31 and all(size < 2**16 for size in grid[1:]), grid


def _standing_in(device: FakeCuda, wrapper: Callable[..., Any], compute: Callable[..., object]) -> Callable[..., Any]:
    def stand_in(*args: Any, **named: Any) -> Any:
        result = wrapper(*args, **named)
        out, inner_args, inner_named = inner((result, args, named))
        device.put(lambda: compute(out, *inner_args, **inner_named), device_tensors(result, args, named))
        return result

    return stand_in


def _paged_attention(
    _: None, out: Tensor, query: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, cu_q: Tensor,
    seq_lens: Tensor, *, max_query_len: int, scale: float, gpu: Any, window: int | None, softcap: float | None,
    splits: int | None = None,
) -> None:  # fmt: skip
    spec, page_size = AttentionSpec(0, scale, window, softcap), keys.shape[1]
    assert len(query) == len(out) and len(cu_q) == len(seq_lens) + 1 == len(block_table) + 1
    starts = (cu_q - cu_q[0]).tolist()
    for row, length in enumerate(seq_lens.tolist()):
        first, last = starts[row], starts[row + 1]
        assert 0 <= last - first <= max_query_len and last <= len(out)
        if first == last:
            continue
        pages = block_table[row, : -(-length // page_size)].long()
        key, value = (pool[pages].flatten(0, 1)[None, :length] for pool in (keys, values))
        positions = torch.arange(length - (last - first), length)[None]
        out[first:last] = _attend(spec, query[None, first:last], key, value, positions)[0]


def _add_rms_norm(
    out: Tensor, residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype,
    delta_weight: Tensor | None = None,
) -> None:  # fmt: skip
    if delta is not None:
        added = delta.float()
        residual += added if delta_weight is None else F.rms_norm(added, added.shape[-1:], delta_weight, eps)
    out.copy_(F.rms_norm(residual.float(), residual.shape[-1:], weight, eps))


def _rope_and_store(
    query: Tensor, qkv: Tensor, keys: Tensor, values: Tensor, rope_table: Tensor, positions: Tensor,
    slot_mapping: Tensor, norm_weight: Tensor | None = None, eps: float = 0.0,
) -> None:  # fmt: skip
    heads, kv_heads, dim = query.shape[1], *keys.shape[2:]
    split = qkv.float().unflatten(-1, (-1, dim))
    turned, value = split[:, : heads + kv_heads], split[:, heads + kv_heads :]
    if norm_weight is not None:
        turned = F.rms_norm(turned, (dim,), eps=eps) * norm_weight
    rows = rope_table.index_select(0, positions)
    turned = rotate(turned, rows[:, :1], rows[:, 1:])
    query.copy_(turned[:, :heads])
    keys.view(-1, kv_heads, dim).index_copy_(0, slot_mapping, turned[:, heads:].to(keys.dtype))
    values.view(-1, kv_heads, dim).index_copy_(0, slot_mapping, value.to(values.dtype))


def _gated(out: Tensor, gate_up: Tensor, act: str) -> None:
    gate, up = gate_up.float().chunk(2, dim=-1)
    out.copy_(activation(act)(gate) * up)


def _experts(
    out: Tensor, hidden: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, chosen: Tensor, act: str
) -> None:
    for token, experts in enumerate(chosen.tolist()):
        summed = torch.zeros(hidden.shape[1])
        for share, expert in zip(weights[token], experts, strict=True):
            between = torch.empty(1, down.shape[2], dtype=hidden.dtype)
            _gated(between, F.linear(hidden[token, None], gate_up[expert]), act)
            summed += share.float() * F.linear(between, down[expert])[0].float()
        out[token] = summed


def _choose(
    chosen: tuple[Tensor, Tensor], logits: Tensor, scales: Tensor, keys: Tensor, borders: Tensor | None = None
) -> None:
    random = scales[:, None] > 0
    scaled = torch.where(random, logits * scales[:, None], logits)
    if borders is not None:
        scaled = scaled.masked_fill(random & (scaled < borders), float("-inf"))
    best, tokens = torch.where(random, scaled + keyed_gumbel(keys, logits.shape[1]), scaled).max(dim=-1)
    chosen[0].copy_(tokens)
    chosen[1].copy_(best)


def _to_fp8(rounded: tuple[Tensor, Tensor], rows: Tensor) -> None:
    for target, found in zip(rounded, to_fp8_plainly(rows), strict=True):
        target.copy_(found)
