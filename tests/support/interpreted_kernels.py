"""The kernel tests in processes of their own, interpreted, beside the other tests: they take one core for a minute and
more, and most tests leave one idle. At the lowest priority, for some tests look at the clock."""

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import numpy as np
import triton
from support.triton_device import DEVICE, INTERPRETED

from ramet.launch.child import die_with_parent

TESTS = Path(__file__).parents[1]
KERNEL_TESTS = [TESTS / "kernels/triton", TESTS / "model_runner/test_cuda_decoder.py"]
# Why they are not.
NOT_RUN: str | None = None
if INTERPRETED or DEVICE.type == "cuda":
    NOT_RUN = "the kernel tests run in this process"
elif triton.__version__ < "3.7" and np.__version__ >= "2.4":
    NOT_RUN = "triton 3.6 cannot be interpreted with numpy 2.4"
# numpy warns of overflows and infinities, which the kernels mean; older interpreters use what it deprecates.
_IGNORED = ["-W", "ignore::RuntimeWarning", "-W", "ignore::DeprecationWarning"]
_TIMEOUT_S = 1800  # at the lowest priority


class InterpretedKernels:
    """Runs from its making on; `outcomes` waits for the end."""

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()
        self._runs = [self._start(tests) for tests in KERNEL_TESTS]

    def outcomes(self) -> list[tuple[int, str]]:
        """Of each run the exit status, and what pytest printed."""
        ended = []
        for process, output in self._runs:
            status = process.wait(_TIMEOUT_S)
            output.seek(0)
            ended.append((status, output.read()))
        return ended

    def stop(self) -> None:
        self._open.close()

    def _start(self, tests: Path) -> tuple[subprocess.Popen[str], IO[str]]:
        output = self._open.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))  # noqa: SIM115
        process = subprocess.Popen(
            ["nice", "-n", "19", sys.executable, "-m", "pytest", "-q", *_IGNORED, str(tests)],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=functools.partial(die_with_parent, os.getpid()),
        )
        self._open.callback(process.wait)
        self._open.callback(process.kill)
        return process, output
