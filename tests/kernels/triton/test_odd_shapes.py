"""Attention and the kernels around it over made-up shapes, under guard: no address outside of a tensor, no race, and
the numbers of a plain computation in float64."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.triton_device import DEVICE, INTERPRETED, assert_near, kernel_test, randn

from ramet.kernels.triton.attention import Gpu, paged_attention
from ramet.kernels.triton.rope_store import rope_and_store
from ramet.model_runner.kv_pool import KVPool, KVSpec

pytestmark = kernel_test
POISON = 2**30  # a page that is nowhere
made_up = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def attend(query, keys, values, scale, window, softcap):
    """query [new, heads, dim] of the last tokens of keys and values [context, kv_heads, dim], in float64."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (tensor.double().repeat_interleave(group, 1) for tensor in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    context = keys.shape[0]
    at, key_at = torch.arange(context - query.shape[0], context)[:, None], torch.arange(context)
    seen = (key_at <= at) & (key_at > at - (window or context))
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num()
    return torch.einsum("hqk,khd->qhd", weights, values)


@st.composite
def layouts(draw):
    page_size = draw(st.sampled_from([1, 7, 16, 32, 64]))
    edges = sorted({0, 1, page_size - 1, page_size, page_size + 1, 2 * page_size, 63, 64, 65, 128, 150, 300})
    decodes = draw(st.booleans())
    contexts = draw(st.lists(st.sampled_from(edges), min_size=1, max_size=4))
    rows = [(n, 1) for n in contexts] if decodes else [(n, draw(st.integers(0, min(n, 24)))) for n in contexts]
    if not any(new for _, new in rows):
        rows.append((page_size, 1))
    return page_size, rows, max(1, *(new for _, new in rows))


@made_up
@given(
    layout=layouts(),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 17]),
    dims=st.sampled_from([(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (24, 40)]),
    window=st.sampled_from([None, None, 1, 16, 33]),
    softcap=st.sampled_from([None, None, 5.0]),
    splits=st.sampled_from([None, None, 1, 4, 16]),
    gpu=st.sampled_from([Gpu(1, 90), Gpu(132, 90), Gpu(132, 80)]),
    spare=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_attention(layout, kv_heads, group, dims, window, softcap, splits, gpu, spare, dtype):
    """Rows without keys or without new tokens, more splits than keys, tables wider than needed and full of poison, NaN
    in all of the pool that is no row's."""
    page_size, rows, longest = layout
    heads, (key_dim, value_dim) = kv_heads * group, dims
    needed = [-(-context // page_size) for context, _ in rows]
    pool = KVPool([KVSpec(kv_heads, key_dim, value_dim)], sum(needed) + 1, page_size, dtype, DEVICE)
    keys, values = pool.keys[0].fill_(math.nan), pool.values[0].fill_(math.nan)
    table = torch.full((len(rows), max(needed) + spare + 1), POISON, dtype=torch.int32)
    pages = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(1)).int().split(needed)
    query = randn(sum(new for _, new in rows), heads, key_dim, dtype=dtype, seed=2)
    expected, first = [], 0
    for i, ((context, new), mine) in enumerate(zip(rows, pages, strict=True)):
        table[i, : len(mine)] = mine
        own = [randn(context, kv_heads, dim, dtype=dtype, seed=10 + i) for dim in dims]
        for cache, content in ((keys, own[0]), (values, own[1])):
            for n, page in enumerate(mine.tolist()):
                part = content[n * page_size : (n + 1) * page_size]
                cache[page, : len(part)] = part.to(DEVICE)
        expected.append(attend(query[first : first + new], *own, 0.1, window, softcap))
        first += new
    out = torch.full((len(query), heads, value_dim), math.nan, dtype=dtype, device=DEVICE)
    paged_attention(
        *(out, query.to(DEVICE), keys, values, table.to(DEVICE)),
        torch.tensor([0, *(new for _, new in rows)]).cumsum(0).int().to(DEVICE),
        torch.tensor([context for context, _ in rows], dtype=torch.int32, device=DEVICE),
        max_query_len=longest,
        scale=0.1,
        gpu=gpu,
        window=window,
        softcap=softcap,
        splits=splits,
    )
    expected = torch.cat([rows if len(rows) else rows.new_zeros(0, heads, value_dim) for rows in expected])
    live = torch.cat([torch.full((new,), context > 0) for context, new in rows])
    assert_near(out[live], expected[live])
    assert out[~live].eq(0).all()


@pytest.mark.skipif(not INTERPRETED, reason="takes memory that only a process that never touches it has")
def test_pools_of_more_than_two_to_the_31_elements():
    """Tokens beyond the reach of 32-bit offsets: in units of elements, and so of bytes."""
    page_size, kv_heads, dim = 16, 8, 128
    pages = 2**31 // (page_size * kv_heads * dim) + 40
    pool = KVPool([KVSpec(kv_heads, dim, dim)], pages, page_size, torch.bfloat16, DEVICE)
    keys, values = pool.keys[0], pool.values[0]
    tokens, heads = 20, 2 * kv_heads
    qkv = randn(tokens, (heads + 2 * kv_heads) * dim, dtype=torch.bfloat16)
    table = torch.stack([torch.ones(64, dim), torch.zeros(64, dim)], dim=1)  # no turn
    mine = torch.tensor([[pages - 1, pages - 3]], dtype=torch.int32)
    slots = torch.cat([page * page_size + torch.arange(page_size) for page in mine[0].long()])[:tokens]
    query = rope_and_store(qkv, keys, values, table, torch.arange(tokens), slots)
    own = qkv.unflatten(-1, (-1, dim)).split([heads, kv_heads, kv_heads], dim=1)
    assert torch.equal(keys.flatten(0, 1)[slots], own[1])
    out = torch.empty(1, heads, dim, dtype=torch.bfloat16)
    lengths = torch.tensor([tokens], dtype=torch.int32)
    paged_attention(
        *(out, query[-1:], keys, values, mine, torch.tensor([0, 1], dtype=torch.int32), lengths),
        max_query_len=1,
        scale=0.1,
        gpu=Gpu(1, 90),
    )
    assert_near(out, attend(own[0][-1:], own[1], own[2], 0.1, None, None))
