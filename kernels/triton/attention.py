"""Attention of new tokens over the paged KV pool, one kernel for decodes and prompt chunks.

A tile is the query heads of one KV head for some tokens of a row, so that grouped heads share what is loaded; softmax
runs along the keys (FlashAttention-2, Dao, 2023). Where tiles are few, each is split over its keys and the parts are
combined (Flash-Decoding). The grid depends on shapes alone and all lengths are read on the device, so that a captured
launch is right for any content: splits and tiles that find no work end at once. Rows without keys give zeros.
"""

import functools
import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_HEAD_DIM = 256
# A split of fewer keys costs more to combine than it saves.
_MIN_SPLIT = tl.constexpr(128)
_MAX_SPLITS, _FEW_SPLITS = 64, 8
_LOG2E = tl.constexpr(1.4426950408889634)
# The longest query and the number of splits of calls that launch, together, all kernels that any call for such tensors
# may choose: what a server does before the first request, for which none is to be compiled.
EVERY_KIND = tuple(itertools.product((1, 2, 128), (1, _FEW_SPLITS, _MAX_SPLITS)))


class Gpu(NamedTuple):
    """`num_sms` multiprocessors of compute capability `capability` / 10."""

    num_sms: int
    capability: int


class Tiling(NamedTuple):
    """Rows (token, head) and keys of a tile; warps of a program, and stages of its pipeline, which copies the keys and
    values of all but one of them while it computes. Few kinds, since each is compiled by itself."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def choose_tiling(max_query_len: int, group: int, dim: int, itemsize: int, capability: int) -> Tiling:
    """For rows of up to `max_query_len` tokens, `group` query heads per KV head. tests/kernels/triton/test_compiled.py
    holds every choice to the registers and the shared memory that there are."""
    lowest = max(16, triton.next_power_of_2(group)) if max_query_len == 1 else 64
    if itemsize > 2:
        return Tiling(lowest, 32, 8, 2)
    if max_query_len == 1:
        # 16 KiB of keys and values a stage: the four programs of a multiprocessor have 128 KiB on the way.
        return Tiling(lowest, 64 if dim <= 64 else 32, 4, 3 if dim > 128 else 4)
    hopper = capability >= 90
    if dim > 128:
        return Tiling(lowest, 32, 8, 3 if hopper else 2)
    # Before Hopper, operands of a product take registers.
    return Tiling(lowest, 32, 4, 4) if max_query_len * group <= lowest else Tiling(128, 64 if hopper else 32, 8, 3)


def choose_splits(num_tiles: int, capacity: int, num_sms: int) -> int:
    """Over how many parts of the keys to split, for tiles (of all rows and KV heads) whose rows have at most
    `capacity` keys: as many as give each multiprocessor four programs."""
    wanted = min(4 * num_sms // num_tiles, capacity // _MIN_SPLIT.value, _MAX_SPLITS)
    return 1 << max(wanted, 1).bit_length() - 1


def paged_attention(
    out: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    cu_q: Tensor,
    seq_lens: Tensor,
    *,
    max_query_len: int,
    scale: float,
    gpu: Gpu,
    window: int | None = None,
    softcap: float | None = None,
    tiling: Tiling | None = None,
    splits: int | None = None,
) -> None:
    """query [N, heads, key_dim], keys and values [pages, page_size, kv_heads, dim] -> out [N, heads, value_dim]; all
    contiguous in their last dimension. block_table [R, max_pages], cu_q [R + 1] and seq_lens [R] are int32; cu_q may
    begin above 0, at the query's first token. `window` and `softcap` as in `AttentionSpec`. `tiling` and `splits` (a
    power of 2) are chosen if they are not given."""
    num_tokens, heads, key_dim = query.shape
    page_size, kv_heads, value_dim = values.shape[1:]
    rows, max_pages = block_table.shape
    capacity = max_pages * page_size if window is None else min(max_pages * page_size, window)
    tiling, tiles, splits, blocks = _plan(
        max_query_len, rows, heads, kv_heads, (key_dim, value_dim), capacity, values.dtype.itemsize, gpu, tiling, splits
    )
    parts = logsums = out  # unused at one split
    if splits > 1:
        parts = torch.empty(num_tokens, heads, splits, value_dim, device=query.device)
        logsums = torch.empty(num_tokens, heads, splits, device=query.device)
    out_strides = out.stride()[:2]
    _attend[(tiles * splits, kv_heads, rows)](
        *(out, parts, logsums, query, keys, values, block_table, cu_q, seq_lens),
        *(scale, softcap or 0.0, window or 0, splits, heads),
        *(*query.stride()[:2], *out_strides, *keys.stride()[:3], *values.stride()[:3], block_table.stride(0)),
        *(heads // kv_heads, page_size, key_dim, value_dim, tiling.block_m, tiling.block_n, *blocks),
        *(splits > 1, window is not None, softcap is not None),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        enable_fp_fusion=True,
    )
    if splits > 1:
        _combine[(num_tokens, heads)](
            *(out, parts, logsums, *out_strides, splits),
            *(value_dim, blocks[1], _FEW_SPLITS if splits <= _FEW_SPLITS else _MAX_SPLITS),
            enable_fp_fusion=True,
        )


@functools.lru_cache(256)  # the layers of a step ask alike, and launches from Python are what a small step waits for
def _plan(
    max_query_len: int,
    rows: int,
    heads: int,
    kv_heads: int,
    dims: tuple[int, int],
    capacity: int,
    itemsize: int,
    gpu: Gpu,
    tiling: Tiling | None,
    splits: int | None,
) -> tuple[Tiling, int, int, list[int]]:
    """Tiling, tiles of a row, splits, and the sizes of key and value in a tile."""
    group = heads // kv_heads
    tiling = tiling or choose_tiling(max_query_len, group, max(dims), itemsize, gpu.capability)
    tiles = triton.cdiv(max_query_len * group, tiling.block_m)
    splits = splits or choose_splits(tiles * rows * kv_heads, capacity, gpu.num_sms)
    return tiling, tiles, splits, [max(16, triton.next_power_of_2(dim)) for dim in dims]


# What varies from step to step must not start a compilation.
@triton.jit(
    do_not_specialize=["splits", "table_row"], do_not_specialize_on_alignment=["block_table", "cu_q", "seq_lens"]
)
def _attend(
    out, parts, logsums, query, keys, values, block_table, cu_q, seq_lens,
    scale, softcap, window, splits, heads,
    q_token, q_head, out_token, out_head, k_page, k_slot, k_head, v_page, v_slot, v_head, table_row,
    GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    SPLIT: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0) % splits
    # The last tiles of a row see most keys: they start first.
    tile = tl.num_programs(0) // splits - 1 - tl.program_id(0) // splits
    kv_head, row = tl.program_id(1), tl.program_id(2)
    row_start, seq_len = tl.load(cu_q + row), tl.load(seq_lens + row)
    query_len = tl.load(cu_q + row + 1) - row_start
    if tile * BLOCK_M >= query_len * GROUP:
        return
    member = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    index = member // GROUP  # within the row's new tokens
    live = index < query_len
    token = (row_start - tl.load(cu_q) + index).to(tl.int64)
    head = kv_head * GROUP + member % GROUP
    positions = seq_len - query_len + index
    # The positions of the tile's first and last query.
    first = seq_len - query_len + tile * BLOCK_M // GROUP
    last = seq_len - query_len + ((tile + 1) * BLOCK_M - 1) // GROUP
    begin, end = 0, tl.minimum(seq_len, last + 1)
    if WINDOW:
        begin = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
    if SPLIT:
        chunk = tl.maximum(tl.cdiv(tl.cdiv(end - begin, splits), BLOCK_N) * BLOCK_N, _MIN_SPLIT)
        begin += split * chunk
        end = tl.minimum(end, begin + chunk)

    dims_k, dims_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    q = tl.load(
        query + (token * q_token + head * q_head)[:, None] + dims_k[None, :],
        mask=live[:, None] & (dims_k < KEY_DIM)[None, :],
        other=0.0,
    ).to(keys.dtype.element_ty)
    keys += kv_head * k_head
    values += kv_head * v_head
    block_table += row.to(tl.int64) * table_row
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    # Keys from `clear` to `dark` are seen by every query of the tile.
    clear, dark = begin, tl.minimum(end, first + 1)
    if WINDOW:
        clear = last + 1 - window
    page = _pages(block_table, begin, end, PAGE_SIZE, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        slot = at % PAGE_SIZE
        there = at < end
        page = page.to(tl.int64)
        key = _gather(keys, page * k_page + slot * k_slot, there, KEY_DIM, BLOCK_K)
        scores = _scores(q, key, scale, softcap, SOFTCAP)
        if (start < clear) | (start + BLOCK_N > dark):
            seen = (at[None, :] <= positions[:, None]) & there[None, :]
            if WINDOW:
                seen = seen & (at[None, :] > positions[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        # Without a key yet, any finite number keeps inf - inf out.
        anchor = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(scores - anchor[:, None])
        shrink = tl.exp2(best - anchor)
        mass = mass * shrink + tl.sum(weights, 1)
        value = _gather(values, page * v_page + slot * v_slot, there, VALUE_DIM, BLOCK_V)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        best = new_best
        page = _pages(block_table, start + BLOCK_N, end, PAGE_SIZE, BLOCK_N)

    acc = acc / tl.where(mass == 0.0, 1.0, mass)[:, None]
    if SPLIT:
        part = (token * heads + head) * splits + split
        tl.store(logsums + part, best + tl.log2(mass), mask=live)
        mask = (live & (mass != 0.0))[:, None] & (dims_v < VALUE_DIM)[None, :]
        tl.store(parts + part[:, None] * VALUE_DIM + dims_v[None, :], acc, mask=mask)
    else:
        target = out + (token * out_token + head * out_head)[:, None] + dims_v[None, :]
        tl.store(target, acc.to(out.dtype.element_ty), mask=live[:, None] & (dims_v < VALUE_DIM)[None, :])


@triton.jit
def _scores(q, key, scale, softcap, SOFTCAP: tl.constexpr):
    """Logarithms to base 2, for `exp2`."""
    scores = tl.dot(q, tl.trans(key), input_precision="ieee")
    if SOFTCAP:
        # tanh(x) = 2 sigmoid(2 x) - 1
        return softcap * (2.0 * tl.sigmoid(scores * (2.0 * scale / softcap)) - 1.0) * _LOG2E
    else:
        return scores * (scale * _LOG2E)


@triton.jit
def _pages(block_table, start, end, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of the keys from `start` on. Loaded an iteration ahead, or the copies of keys and values, which need them, could
    not be."""
    at = start + tl.arange(0, BLOCK_N)
    return tl.load(block_table + at // PAGE_SIZE, mask=at < end, other=0)


@triton.jit
def _gather(base, offsets, there, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [len(offsets), BLOCK]; zeros where there is nothing, for what lies there may be NaN."""
    dims = tl.arange(0, BLOCK)
    return tl.load(base + offsets[:, None] + dims[None, :], mask=there[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit(do_not_specialize=["splits"])
def _combine(out, parts, logsums, out_token, out_head, splits, DIM: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr):  # fmt: skip # noqa: E501
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, dims = tl.arange(0, MOST), tl.arange(0, BLOCK)
    place = (token * tl.num_programs(1) + head) * splits + split
    logsum = tl.load(logsums + place, mask=split < splits, other=float("-inf"))
    used = logsum != float("-inf")
    best = tl.max(logsum, 0)
    weights = tl.where(used, tl.exp2(logsum - best), 0.0)
    part = tl.load(
        parts + place[:, None] * DIM + dims[None, :],
        mask=used[:, None] & (dims < DIM)[None, :],
        other=0.0,
    )
    mass = tl.sum(weights, 0)
    combined = tl.sum(part * weights[:, None], 0) / tl.where(mass == 0.0, 1.0, mass)
    tl.store(out + token * out_token + head * out_head + dims, combined.to(out.dtype.element_ty), mask=dims < DIM)
