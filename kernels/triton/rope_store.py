"""From the fused query-key-value product: norms of query and key heads, rope, and the store into the KV pool."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_HEADS = 8  # of a program


def rope_and_store(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """qkv [N, (heads + 2 * kv_heads) * dim], contiguous rows -> query [N, heads, dim], rotated, of the same type.

    keys and values [pages, page_size, kv_heads, dim] get the rest at slot_mapping [N] (page * page_size + offset).
    rope_table [length, 2, dim] float32: cos and signed sin, as `RopeFrequencies.table` makes it. norm_weight
    [heads + kv_heads, dim] float32, queries first, None for models that do not normalise heads."""
    kv_heads, dim = keys.shape[2:]
    total = qkv.shape[1] // dim
    heads = total - 2 * kv_heads
    out = torch.empty(qkv.shape[0], heads, dim, dtype=qkv.dtype, device=qkv.device)
    _rope_and_store[(qkv.shape[0], -(-total // _HEADS))](
        *(out, keys, values, qkv, rope_table, positions, slot_mapping, norm_weight, eps, heads, kv_heads),
        *(qkv.stride(0), *out.stride()[:2], *keys.stride()[1:3], *values.stride()[1:3]),
        *(norm_weight is not None, dim // 2, _HEADS, 1 << (dim // 2 - 1).bit_length()),
        num_warps=2,
        enable_fp_fusion=True,
    )
    return out


@triton.jit
def _rope_and_store(
    out, keys, values, qkv, rope_table, positions, slot_mapping, norm_weight, eps, heads, kv_heads,
    qkv_row, out_token, out_head, k_slot, k_head, v_slot, v_head,
    NORM: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, BLOCK)
    inside = dims < HALF
    rotated = head < heads + kv_heads
    mask = (head < heads + 2 * kv_heads)[:, None] & inside[None, :]
    source = qkv + token * qkv_row + head[:, None] * (2 * HALF) + dims[None, :]
    low = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    # Values pass unchanged: cos 1, sin 0, norm 1.
    turned = rotated[:, None] & inside[None, :]
    new_low, new_high = low, high
    if NORM:
        factor = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps)[:, None]
        weight = norm_weight + head[:, None] * (2 * HALF) + dims[None, :]
        new_low = low * factor * tl.load(weight, mask=turned, other=0.0)
        new_high = high * factor * tl.load(weight + HALF, mask=turned, other=0.0)
    row = rope_table + tl.load(positions + token).to(tl.int64) * (4 * HALF) + dims
    cos = tl.load(row, mask=inside, other=0.0)[None, :]
    sin = tl.load(row + 3 * HALF, mask=inside, other=0.0)[None, :]
    low, high = (
        tl.where(turned, new_low * cos - new_high * sin, low),
        tl.where(turned, new_high * cos + new_low * sin, high),
    )

    slot = tl.load(slot_mapping + token).to(tl.int64)
    target = out + token * out_token + head[:, None] * out_head + dims[None, :]
    _store_halves(target, low, high, (head < heads)[:, None] & inside[None, :], HALF)
    target = keys + slot * k_slot + (head[:, None] - heads) * k_head + dims[None, :]
    _store_halves(target, low, high, ((head >= heads) & rotated)[:, None] & inside[None, :], HALF)
    target = values + slot * v_slot + (head[:, None] - heads - kv_heads) * v_head + dims[None, :]
    _store_halves(target, low, high, mask & (head >= heads + kv_heads)[:, None], HALF)


@triton.jit
def _store_halves(target, low, high, mask, HALF: tl.constexpr):
    tl.store(target, low.to(target.dtype.element_ty), mask=mask)
    tl.store(target + HALF, high.to(target.dtype.element_ty), mask=mask)
