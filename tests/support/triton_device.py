"""Where Triton kernels run in tests: on the GPU, or interpreted in a process started with TRITON_INTERPRET=1.

`kernel_test` marks tests that do either; elsewhere they are skipped, and tests/kernels/triton/test_interpreter.py
starts the process that runs them.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
kernel_test = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE.type == "cpu" and not INTERPRETED, reason="no CUDA; test_interpreter.py runs it interpreted"
    ),
]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """`expected` is computed in float32 or better from the same inputs; the tolerance is the rounding of the type of
    `actual` and of what its matrix products take in."""
    rtol, atol = {torch.bfloat16: (2e-2, 2e-2), torch.float32: (1e-4, 2e-5)}[actual.dtype]
    torch.testing.assert_close(actual.cpu().double(), expected.cpu().double(), rtol=rtol, atol=atol)
