"""Interpreted Triton kernels under guard: each launch runs on copies of its tensors that lie apart, with poison between
them, so that every address that a lane touches can be held to the elements of a tensor.

Programs run in random order, and none may touch what another one of its launch writes: on a GPU they run side by side.
A masked load that names no value for its dead lanes gets NaN there, and fresh memory is NaN, as it may be on a GPU.
Tensors of more than `HUGE` bytes are not copied; their programs' order is not watched.
"""

import contextlib
import itertools
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

HUGE = 2**26
_GUARD = 4096  # bytes before and after each tensor
_NOBODY, _SEVERAL = -1, -2


class IllegalAccess(AssertionError):
    pass


class _Launch:
    """Memory of one launch. `legal`: by byte, the size of the element that begins there; `writer` and `reader`: by
    byte, the program that has touched the element."""

    def __init__(self, tensors: list[Tensor], programs: int, seed: int) -> None:
        self.order = random.Random(seed).sample(range(programs), programs)
        self.program = 0
        small = [tensor for tensor in tensors if _span(tensor) <= HUGE]
        self._huge = [(t.data_ptr(), t.data_ptr() + _span(t)) for t in tensors if _span(t) > HUGE]
        starts, end = [], _GUARD
        for tensor in small:
            starts.append(end)
            end += -(-_span(tensor) // 64) * 64 + _GUARD
        self._memory = torch.full((end + 64,), 0xFF, dtype=torch.uint8)  # a NaN in any type, an index of -1
        shift = -self._memory.data_ptr() % 64
        self._base = self._memory.data_ptr() + shift
        legal = torch.zeros(end, dtype=torch.uint8)
        self.copies = {id(tensor): tensor for tensor in tensors}
        for tensor, start in zip(small, starts, strict=True):
            size, strides = tensor.element_size(), tensor.stride()
            legal.as_strided(tensor.shape, [size * stride for stride in strides], start).fill_(size)
            typed = self._memory[shift + start : shift + end - (end - start) % size].view(tensor.dtype)
            self.copies[id(tensor)] = typed.as_strided(tensor.shape, strides).copy_(tensor)
        self._legal = legal.numpy()
        self._writer, self._reader = np.full((2, end), _NOBODY, dtype=np.int32)

    def touch(self, pointers: np.ndarray, mask: np.ndarray, size: int, values: np.ndarray | None = None) -> None:
        """A load, or a store of `values`, of elements of `size` bytes."""
        mask = np.broadcast_to(mask, pointers.shape)
        addresses = pointers[mask].astype(np.int64)
        apart = np.zeros(addresses.shape, dtype=bool)
        for first, last in self._huge:
            apart |= (addresses >= first) & (addresses + size <= last)
        at = addresses[~apart] - self._base
        if at.size == 0:
            return
        wrong = (at < 0) | (at >= len(self._legal))
        wrong[~wrong] = self._legal[at[~wrong]] != size
        if wrong.any():
            what = "store" if values is not None else "load"
            raise IllegalAccess(f"{what} of {size} bytes outside of all tensors, by {wrong.sum()} of {at.size} lanes")
        writers, readers, me = self._writer[at], self._reader[at], self.program
        if ((writers != _NOBODY) & (writers != me)).any():
            raise IllegalAccess(f"program {me} touches what another writes")
        if values is None:
            self._reader[at] = np.where((readers == _NOBODY) | (readers == me), me, _SEVERAL)
        else:
            if ((readers != _NOBODY) & (readers != me)).any():
                raise IllegalAccess(f"program {me} writes what another reads")
            self._writer[at] = me


def _span(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


@contextlib.contextmanager
def guarded_launches() -> Iterator[None]:
    from triton.runtime import interpreter

    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    seeds = itertools.count()
    current: _Launch

    def copy_in(self, args, kwargs):
        tensors = {id(arg): arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)}
        grid = (*self.grid, 1, 1)[:3]
        nonlocal current
        current = _Launch(list(tensors.values()), int(np.prod(grid)), next(seeds))
        found = current.copies
        return [found.get(id(arg), arg) for arg in args], {name: found.get(id(a), a) for name, a in kwargs.items()}

    def copy_out(self, args, copies, kwargs, kwarg_copies):
        for arg, copy in (*zip(args, copies, strict=True), *((kwargs[name], kwarg_copies[name]) for name in kwargs)):
            if isinstance(arg, Tensor) and arg is not copy:
                arg.copy_(copy)

    def set_program(self, *index):
        current.program = current.order[int(np.ravel_multi_index(index, self.grid_dim))]
        self.grid_idx = tuple(int(i) for i in np.unravel_index(current.program, self.grid_dim))

    def checked_load(self, pointers, mask, other, *rest):
        loaded_type = interpreter._get_np_dtype(pointers.get_element_ty())
        current.touch(pointers.data, mask.data, loaded_type.itemsize)
        loaded = load(self, pointers, mask, other, *rest)
        if other is None:
            loaded.data[~np.broadcast_to(mask.data, loaded.data.shape)] = _poison(loaded_type)
        return loaded

    def checked_store(self, pointers, value, mask, *rest):
        current.touch(pointers.data, mask.data, value.data.dtype.itemsize, value.data)
        return store(self, pointers, value, mask, *rest)

    def no_atomics(self, *_):
        raise NotImplementedError("atomics are not watched")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "_init_args_hst", copy_in)
        patch.setattr(executor, "_restore_args_dev", copy_out)
        patch.setattr(builder, "set_grid_idx", set_program)
        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        for name in ("create_atomic_cas", "create_atomic_rmw"):
            patch.setattr(builder, name, no_atomics)
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)  # which fills what `torch.empty` gives
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def _poison(dtype: type) -> object:
    """Of the interpreter's types: bfloat16 is kept as uint16."""
    return np.full(1, -1, dtype=np.dtype(dtype).str.replace("f", "i").replace("u", "i")).view(dtype)[0]
