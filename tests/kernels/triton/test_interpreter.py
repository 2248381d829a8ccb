"""Without a GPU the kernel tests run under Triton's interpreter, which must be chosen before triton is imported."""

import concurrent.futures
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import triton
from support.triton_device import DEVICE, INTERPRETED

TESTS = Path(__file__).parents[2]
KERNEL_TESTS = [TESTS / "kernels/triton", TESTS / "model_runner/test_cuda_decoder.py"]


@pytest.mark.skipif(
    triton.__version__ < "3.7" and np.__version__ >= "2.4", reason="triton 3.6 cannot be interpreted with numpy 2.4"
)
@pytest.mark.skipif(INTERPRETED or DEVICE.type == "cuda", reason="the kernel tests run in this process")
def test_kernels_interpreted():
    # numpy warns of overflows and infinities, which the kernels mean; older interpreters use what it deprecates.
    ignored = ["-W", "ignore::RuntimeWarning", "-W", "ignore::DeprecationWarning"]

    def run(tests: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *ignored, str(tests)],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=280,
        )

    with concurrent.futures.ThreadPoolExecutor(len(KERNEL_TESTS)) as pool:
        for done in pool.map(run, KERNEL_TESTS):
            assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
            assert " passed" in done.stdout
