"""Python's side of `paged_attention.c`: checks tensors and passes their addresses."""

import ctypes

import torch
from torch import Tensor

from ramet.kernels.cpu.build import load_kernel


class _Args(ctypes.Structure):
    """The struct of the same name in paged_attention.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("out", "query", "keys", "values", "block_table", "cu_q", "seq_lens")),
        *((name, ctypes.c_int64) for name in ("rows", "table_width", "heads", "kv_heads", "key_dim", "value_dim")),
        *((name, ctypes.c_int64) for name in ("page_size", "window", "bfloat16")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]


class PagedAttention:
    """Raises KernelUnavailable if the kernel cannot be built on this machine."""

    def __init__(self) -> None:
        self._call = load_kernel("paged_attention").paged_attention
        self._call.argtypes, self._call.restype = [ctypes.POINTER(_Args)], ctypes.c_int

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        block_table: Tensor,
        cu_q: Tensor,
        seq_lens: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """query [N, heads, key_dim]; keys [pages, page_size, kv_heads, key_dim] and values likewise, contiguous, in
        bfloat16 or float32; block_table [R, width], cu_q [R + 1] and seq_lens [R], int32 and contiguous.

        Returns [N, heads, value_dim] float32. Row r's tokens are the last of its `seq_lens[r]`; each sees itself and
        the `window - 1` before it (None: all). Source: docstring of the C file.
        """
        assert keys.dtype in (torch.bfloat16, torch.float32) and keys.dtype == values.dtype
        assert all(t.is_contiguous() for t in (keys, values, block_table, cu_q, seq_lens))
        query = query.float().contiguous()
        _, page_size, kv_heads, key_dim = keys.shape
        out = torch.empty(*query.shape[:2], values.shape[-1])
        args = _Args(
            *(t.data_ptr() for t in (out, query, keys, values, block_table, cu_q, seq_lens)),
            *(*block_table.shape, query.shape[1], kv_heads, key_dim, values.shape[-1], page_size),
            *(window or 0, keys.dtype == torch.bfloat16, scale, softcap or 0.0),
        )
        if self._call(ctypes.byref(args)):
            raise MemoryError("no memory for the scratch space of paged attention")
        return out
