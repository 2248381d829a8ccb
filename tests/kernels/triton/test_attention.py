"""The attention kernel equals the torch backend, whatever the rows, shapes, pages and splits."""

import pytest
import torch
from support.attention_cases import Case
from support.triton_device import DEVICE, assert_near, kernel_test

from ramet.kernels.triton.attention import EVERY_KIND, Gpu, choose_splits, choose_tiling, paged_attention
from ramet.model_runner.attention import triton_backend
from ramet.model_runner.attention.torch_backend import TorchBackend
from ramet.model_runner.attention.triton_backend import TritonBackend
from ramet.model_runner.context import AttentionSpec

pytestmark = kernel_test

MIXED = [(1, 1), (65, 1), (100, 1), (5, 5), (70, 33)]


def check(case: Case, num_sms: int = 1, **spec) -> None:
    query, ctx = case.context([(row, 0, new) for row, (_, new) in enumerate(case.rows)], None)
    spec = AttentionSpec(0, 0.125, **spec)
    assert_near(TritonBackend(Gpu(num_sms, 90)).forward(spec, query, ctx), TorchBackend().forward(spec, query, ctx))


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"heads": 4, "kv_heads": 4},
        {"heads": 7, "kv_heads": 1, "key_dim": 128, "value_dim": 128},
        {"heads": 6, "kv_heads": 3, "key_dim": 24, "value_dim": 40},
        {"heads": 10, "kv_heads": 2, "key_dim": 80, "value_dim": 80, "page_size": 32},
        {"heads": 2, "kv_heads": 1, "key_dim": 96, "value_dim": 96, "page_size": 64},
        {"heads": 2, "kv_heads": 1, "key_dim": 256, "value_dim": 256},
        {"heads": 18, "kv_heads": 1, "page_size": 7},
        {"heads": 2, "kv_heads": 2, "page_size": 1},
    ],
    ids=str,
)
def test_shapes(shape):
    check(Case(MIXED, dtype=torch.float32, device=DEVICE, **shape))


@pytest.mark.parametrize("shape", [{}, {"heads": 2, "kv_heads": 1, "key_dim": 96, "value_dim": 96}], ids=str)
def test_bfloat16(shape):
    check(Case(MIXED, dtype=torch.bfloat16, device=DEVICE, **shape))


@pytest.mark.parametrize("spec", [{"sliding_window": 24}, {"sliding_window": 1}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("num_sms", [1, 64])
def test_windows_and_softcaps(spec, num_sms):
    check(Case(MIXED, heads=4, dtype=torch.float32, device=DEVICE), num_sms, **spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [{}, {"sliding_window": 300}], ids=str)
def test_split_over_the_keys(spec, dtype):
    """Rows of all lengths beside one that is split four ways, in decodes and in a chunk."""
    check(Case([(1100, 1), (257, 1), (3, 1), (700, 9)], 4, 1, dtype=dtype, device=DEVICE), 64, **spec)


def test_more_new_tokens_than_a_tile():
    check(Case([(150, 150), (90, 70)], heads=2, kv_heads=1, dtype=torch.float32, device=DEVICE))


@pytest.mark.parametrize("num_sms", [1, 64])
def test_empty_rows_are_zeros_and_padding_rows_disturb_nobody(num_sms):
    """As in a captured batch: rows without keys, a table wider than any row, more rows than requests."""
    case = Case([(300, 1), (40, 1)], heads=4, dtype=torch.float32, device=DEVICE)
    query, ctx = case.context([(0, 0, 1), (1, 0, 1)], None)
    expected = TorchBackend().forward(AttentionSpec(0, 0.125), query, ctx)
    wide = torch.full((4, 80), 2**30, dtype=torch.int32, device=DEVICE)  # what is not a row's own is not looked at
    wide[[0, 2], : ctx.block_table.shape[1]] = ctx.block_table
    out = torch.full((4, 4, 64), float("nan"), device=DEVICE)
    paged_attention(
        out,
        torch.stack([query[0], query[0], query[1], query[1]]),
        case.pool.keys[0],
        case.pool.values[0],
        wide,
        torch.arange(5, dtype=torch.int32, device=DEVICE),
        torch.tensor([300, 0, 40, 0], dtype=torch.int32, device=DEVICE),
        max_query_len=1,
        scale=0.125,
        gpu=Gpu(num_sms, 80),
    )
    assert_near(out[[0, 2]], expected)
    assert out[[1, 3]].eq(0).all()


@pytest.mark.parametrize("num_sms", [1, 64])
def test_nan_beyond_a_row_does_not_spread_and_its_own_does(num_sms):
    case = Case([(530, 1), (20, 4)], heads=4, kv_heads=1, dtype=torch.float32, device=DEVICE)
    backend = TritonBackend(Gpu(num_sms, 90))
    expected = case.run(backend)
    others = torch.ones(case.pool.keys[0].shape[:2], dtype=torch.bool, device=DEVICE)
    for pages, (context, _) in zip(case.tables, case.rows, strict=True):
        others[pages] = False
        others[pages[-1], context % 16 :] = True
    case.pool.keys[0][others] = case.pool.values[0][others] = float("nan")
    assert torch.equal(case.run(backend), expected)
    case.pool.keys[0][case.tables[0][0], 3] = float("nan")
    assert case.run(backend)[0].isnan().all()


def test_launching_every_kind_first_changes_nothing(monkeypatch):
    case, found = Case([(40, 1), (30, 9)], 2, 1, dtype=torch.float32, device=DEVICE), []
    for kinds in ((), EVERY_KIND):
        monkeypatch.setattr(triton_backend, "EVERY_KIND", kinds)
        found.append(case.run(TritonBackend(Gpu(64, 90))))
    assert torch.equal(*found)


def test_tiles_and_splits_depend_on_shapes_alone():
    cases = ((1, 4, 128), (1, 24, 128), (9, 4, 128), (512, 4, 128), (512, 4, 256))
    assert [choose_tiling(*case, itemsize=2, capability=90).block_m for case in cases] == [16, 32, 64, 128, 64]
    assert choose_splits(8, capacity=8192, num_sms=132) == 64  # one row, eight KV heads
    assert choose_splits(2048, capacity=8192, num_sms=132) == 1
    assert choose_splits(1, capacity=100, num_sms=132) == 1


def test_heads_too_wide_are_refused():
    case = Case([(3, 1)], heads=1, kv_heads=1, key_dim=320, value_dim=64, device=DEVICE)
    with pytest.raises(ValueError, match="at most 256 dimensions, not 320 and 64"):
        case.run(TritonBackend(Gpu(1, 80)))
