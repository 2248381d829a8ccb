"""Without a GPU the kernel tests run under Triton's interpreter, which must be chosen before triton is imported: in a
process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import triton
from support.triton_device import DEVICE, INTERPRETED

KERNEL_TESTS = Path(__file__).parent, Path(__file__).parents[2] / "model_runner/test_cuda_decoder.py"
# numpy warns of overflows and infinities, which the kernels mean; older interpreters use what it deprecates.
IGNORED = ["-W", "ignore::RuntimeWarning", "-W", "ignore::DeprecationWarning"]
TIMEOUT_S = 1800  # on a busy machine


@pytest.mark.skipif(INTERPRETED or DEVICE.type == "cuda", reason="the kernel tests run in this process")
@pytest.mark.skipif(
    triton.__version__ < "3.7" and np.__version__ >= "2.4", reason="triton 3.6 cannot be interpreted with numpy 2.4"
)
@pytest.mark.parametrize("tests", KERNEL_TESTS, ids=["kernels", "decoder"])
def test_kernels_interpreted(tests: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *IGNORED, str(tests)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout
