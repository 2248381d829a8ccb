"""Every access of the kernels, of odd shapes too, is watched; and the watch sees what is wrong."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention_cases import Case
from support.triton_device import INTERPRETED, assert_near, kernel_test
from triton.runtime.errors import InterpreterError

from ramet.kernels.triton.attention import Gpu
from ramet.model_runner.attention.torch_backend import TorchBackend
from ramet.model_runner.attention.triton_backend import TritonBackend

pytestmark = [*kernel_test, pytest.mark.skipif(not INTERPRETED, reason="only interpreted accesses can be watched")]


@triton.jit
def _shift(out, x, by, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        tl.store(out + at, tl.load(x + at + by, mask=at + by < n), mask=at < n)
    else:
        tl.store(out + at, tl.load(x + at + by))


def shift(out: torch.Tensor, x: torch.Tensor, by: int, masked: bool = False) -> torch.Tensor:
    _shift[(out.numel() // 8,)](out, x, by, out.numel(), 8, masked)
    return out


def test_what_is_legal_is_done() -> None:
    x = torch.arange(16.0)
    assert shift(torch.empty(16), x, 0).equal(x)
    assert shift(torch.empty(8), x, 8).equal(x[8:])
    rows = torch.zeros(3, 16)  # the gaps between a view's rows belong to nobody
    assert shift(rows[1], x, 0).equal(x)
    assert rows[[0, 2]].eq(0).all()


@pytest.mark.parametrize("by", [-1, 1, 400, -5000])
def test_beyond_a_tensor(by: int) -> None:
    with pytest.raises(InterpreterError, match="load of 4 bytes outside of all tensors"):
        shift(torch.empty(16), torch.arange(16.0), by)


def test_between_the_rows_of_a_view() -> None:
    with pytest.raises(InterpreterError, match="store of 4 bytes outside of all tensors, by 4 of 8 lanes"):
        shift(torch.zeros(2, 8)[:, :4], torch.arange(8.0), 0)


def test_lanes_without_a_value_are_poison() -> None:
    assert shift(torch.zeros(16), torch.arange(16.0), 3, masked=True)[13:].isnan().all()


def test_programs_that_depend_on_each_other() -> None:
    x = torch.arange(16.0)
    with pytest.raises(InterpreterError, match=r"program . (touches what another writes|writes what another reads)"):
        shift(x, x, 4, masked=True)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 40)), min_size=1, max_size=3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 5),
    dims=st.sampled_from([(64, 64), (80, 80), (24, 40), (128, 128)]),
    page_size=st.sampled_from([1, 7, 16, 32]),
    window=st.none() | st.integers(1, 90),
    num_sms=st.sampled_from([1, 64]),
)
def test_attention_of_any_shape(rows, kv_heads, group, dims, page_size, window, num_sms) -> None:
    rows = [(before + new, new) for before, new in rows]
    case = Case(rows, group * kv_heads, kv_heads, *dims, page_size=page_size, dtype=torch.float32)
    expected = case.run(TorchBackend(), sliding_window=window)
    assert_near(case.run(TritonBackend(Gpu(num_sms, 90)), sliding_window=window), expected)
