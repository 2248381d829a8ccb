"""Without a GPU the kernel tests run under Triton's interpreter, which must be chosen before triton is imported."""

import pytest
from support.interpreted_kernels import NOT_RUN, InterpretedKernels


@pytest.mark.skipif(NOT_RUN is not None, reason=str(NOT_RUN))
def test_kernels_interpreted(interpreted_kernels: InterpretedKernels) -> None:
    for status, output in interpreted_kernels.outcomes():
        assert status == 0, output[-8000:]
        assert " passed" in output
