"""Python's side of `sampling.c`: checks tensors and passes their addresses."""

import ctypes

import torch
from torch import Tensor

from ramet.kernels.cpu.build import load_kernel


class _Args(ctypes.Structure):
    """The struct of the same name in sampling.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "scales", "top_p", "log_min_p", "top_k", "keys")),
        *((name, ctypes.c_void_p) for name in ("tokens", "best")),
        *((name, ctypes.c_int64) for name in ("rows", "vocab")),
    ]


class ChooseKernel:
    """Raises KernelUnavailable if the kernel cannot be built on this machine."""

    def __init__(self) -> None:
        self._call = load_kernel("sampling").choose
        self._call.argtypes, self._call.restype = [ctypes.POINTER(_Args)], ctypes.c_int

    def __call__(
        self, logits: Tensor, scales: Tensor, top_p: Tensor, log_min_p: Tensor, top_k: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """logits [R, vocab], scales, top_p and log_min_p [R], float32; top_k [R] int64; keys [R, 2] int32; contiguous.

        A scale of 0 is no scale, no filter and no noise; a top_p of 1, a log_min_p of -inf and a top_k of 0 filter
        nothing. Returns the tokens [R] int64 and what they won with [R]; NaN where a logit is NaN.
        """
        inputs = (logits, scales, top_p, log_min_p, top_k, keys)
        assert all(tensor.is_contiguous() for tensor in inputs)
        rows, vocab = logits.shape
        tokens, best = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
        args = _Args(*(t.data_ptr() for t in (*inputs, tokens, best)), rows, vocab)
        if self._call(ctypes.byref(args)):
            raise MemoryError("no memory to choose tokens")
        return tokens, best
