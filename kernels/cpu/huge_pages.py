"""Memory of 2 MiB pages, where the system has them, for what a step reads from end to end.

Zeroed, private and mapped when it is first written, so that a reservation costs what is used of it. (Memory that could
be shared with a child, which is what `mmap` gives unless told otherwise, gets no such pages from Linux.)
"""

import contextlib
import math
import mmap

import torch
from torch import Tensor

_CHUNK = 64 * 2**20  # bytes


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """In a mapping of its own, which lives as long as the tensor and its views."""
    num_bytes = max(math.prod(shape) * dtype.itemsize, 1)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # a system, or a kernel of it, without such pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)


class HugePages:
    """Tensors one after the other in the same pages: a matrix by itself may be smaller than one."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes > len(self._free):
            self._free = zeros((max(_CHUNK, num_bytes),), torch.uint8)
        taken, self._free = self._free[:num_bytes], self._free[-(-num_bytes // 64) * 64 :]
        return taken.view(dtype).view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        return self.take(tuple(tensor.shape), tensor.dtype).copy_(tensor)
