"""The guard of the interpreted tests sees what it is there for."""

import pytest
import torch
import triton
import triton.language as tl
from support.triton_device import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="there is a guard only under the interpreter")


@triton.jit
def _copy(out, source, width, reach, shift, BLOCK: tl.constexpr, MASK: tl.constexpr):
    at = tl.program_id(0) * reach + tl.arange(0, BLOCK)
    value = tl.load(source + shift + at, mask=at < width) if MASK else tl.load(source + shift + at)
    tl.store(out + at, value)


def copy(out, source, width, reach=8, shift=0, mask=False, programs=2):
    _copy[(programs,)](out, source, width, reach, shift, BLOCK=8, MASK=mask)


def test_what_is_right_passes_in_any_order():
    source, out = torch.arange(16.0), torch.empty(16)
    copy(out, source, 16)
    assert torch.equal(out, source)


@pytest.mark.parametrize(
    ("out", "source"),
    [
        (torch.empty(16), torch.zeros(15)),
        (torch.empty(15), torch.zeros(16)),
        (torch.empty(16), torch.zeros(32)[:15]),  # within the memory that is held, but not of the tensor
        (torch.empty(16), torch.zeros(16, 2)[:, 0]),  # between its elements
    ],
    ids=["load", "store", "view", "strides"],
)
def test_accesses_outside_of_tensors(out, source):
    with pytest.raises(triton.runtime.interpreter.InterpreterError, match="outside of all tensors"):
        copy(out, source, 16)


def test_what_lies_before_a_tensor():
    with pytest.raises(triton.runtime.interpreter.InterpreterError, match="load of 4 bytes outside"):
        copy(torch.empty(16), torch.zeros(17)[1:], 16, shift=-1)


def test_dead_lanes_without_a_value_are_nan():
    out = torch.empty(16)
    copy(out, torch.zeros(16), 10, mask=True)
    assert out.isnan().tolist() == [False] * 10 + [True] * 6


def test_programs_that_touch_the_same():
    with pytest.raises(triton.runtime.interpreter.InterpreterError, match="touches what another writes"):
        copy(torch.empty(16), torch.zeros(16), 16, reach=4)
    memory = torch.zeros(24)
    with pytest.raises(triton.runtime.interpreter.InterpreterError, match="what another"):
        copy(memory, memory, 24, shift=8)
