"""Triton's interpreter, for these tests: under guard (`support/guarded_launches.py`), and mended. It holds bfloat16 as
16-bit integers, and would multiply matrices of them as such; it rounds to float8 without carrying into the exponent."""

import contextlib

import numpy as np
import pytest
import torch
from support.guarded_launches import guarded_launches
from support.interpreter import patched_once_a_launch
from support.triton_device import INTERPRETED


@pytest.fixture(scope="session", autouse=True)
def bfloat16_matrix_products():
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_dot

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            InterpreterBuilder, "create_dot", lambda self, a, b, *rest: original(self, widened(a), widened(b), *rest)
        )
        yield


@pytest.fixture(scope="session", autouse=True)
def rounding_to_float8():
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_fp_to_fp

    def convert(self, source: TensorHandle, kind: tl.dtype, rounding: object) -> TensorHandle:
        if kind.scalar != tl.float8e4nv or source.dtype.scalar != tl.float32:
            return original(self, source, kind, rounding)
        rounded = torch.from_numpy(source.data).to(torch.float8_e4m3fn)
        return TensorHandle(rounded.view(torch.uint8).numpy(), kind.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_fp_to_fp", convert)
        yield


@pytest.fixture(scope="session", autouse=True)
def patched_once():
    with patched_once_a_launch() if INTERPRETED else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_ahead():
    """Interpreted kernels are not compiled, so that the backend need not launch all of them first, at seconds each."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            patch.setattr("ramet.model_runner.attention.triton_backend.EVERY_KIND", ())
        yield


@pytest.fixture(scope="module", autouse=True)
def guarded():
    """Every access of every kernel test here that is interpreted. Not of the tests of whole models, whose padding
    tokens write over each other on the dummy page."""
    if not INTERPRETED:
        yield
        return
    with guarded_launches():
        yield
