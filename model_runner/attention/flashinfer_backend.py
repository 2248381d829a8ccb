"""Paged attention by FlashInfer, an optional package (Ye et al., 2025), whose kernels are scheduled on the host.

A step's lengths and pages are made known by `plan`; each kind of layer has a wrapper of the package, planned once a
step. Those of a captured step keep their buffers, and are planned again before each replay. Knows no requests.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ramet.model_runner.attention.base import AttentionBackend
from ramet.model_runner.context import AttentionSpec, ForwardContext
from ramet.model_runner.logits import send

HEAD_DIMS = (64, 128, 256)
_WORKSPACE_BYTES = 384 * 2**20  # the parts of split rows


class PagedRows(NamedTuple):
    """A step as the package wants it, int32: where each row's tokens and pages begin [R + 1], the pages of all rows one
    after the other, and how many tokens are in each row's last page [R], 0 if it has none."""

    cu_q: np.ndarray
    indptr: np.ndarray
    indices: np.ndarray
    last_page_len: np.ndarray


class _Kind(NamedTuple):
    """What a plan depends on beside the rows. `sizes`: heads, KV heads, their dimensions, tokens of a page."""

    sizes: tuple[int, int, int, int]
    dtype: torch.dtype
    scale: float
    window: int | None
    softcap: float | None


_Key = tuple[tuple[int, int] | None, _Kind]  # rows and tokens of a captured step


def paged_rows(step: Mapping[str, np.ndarray], pages: np.ndarray, page_size: int) -> PagedRows:
    """Of `step_arrays`; pages [slots, max_pages]."""
    seq_lens, row_slots = step["seq_lens"], step["row_slots"]
    counts = -(-seq_lens // page_size)
    ends = counts.cumsum()
    place = np.arange(ends[-1]) - np.repeat(ends - counts, counts)  # within the row
    indptr = np.concatenate(([0], ends)).astype(np.int32)
    last = seq_lens - np.maximum(counts - 1, 0) * page_size
    return PagedRows(step["cu_q"], indptr, pages[np.repeat(row_slots, counts), place], last.astype(np.int32))


class FlashInferBackend(AttentionBackend):
    """Raises ImportError if the package is missing."""

    def __init__(self, device: torch.device) -> None:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        self._make: Any = BatchPrefillWithPagedKVCacheWrapper
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrappers: dict[_Key, Any] = {}
        self._planned: set[_Key] = set()
        self._captured: tuple[int, int] | None = None
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def plan(self, step: Mapping[str, np.ndarray], pages: np.ndarray, page_size: int, captured: bool) -> None:
        if self._copied is not None:
            # Plans are copied to the device from memory of the wrapper's, which the next one overwrites.
            self._copied.synchronize()
        self._rows = paged_rows(step, pages, page_size)
        self._captured = (len(step["seq_lens"]), int(step["cu_q"][-1])) if captured else None
        self._planned.clear()
        for key in self._wrappers:
            if captured and key[0] == self._captured:
                self._plan(key)

    def forward(self, spec: AttentionSpec, query: Tensor, ctx: ForwardContext) -> Tensor:
        """Raises ValueError for heads that the package has no kernels for."""
        keys, values = ctx.kv_pool.keys[spec.layer], ctx.kv_pool.values[spec.layer]
        _, page_size, kv_heads, dim = keys.shape
        if dim not in HEAD_DIMS or values.shape[3] != dim:
            raise ValueError(
                f"the flashinfer backend takes heads of {', '.join(map(str, HEAD_DIMS))} dimensions, not {dim} and "
                f"{values.shape[3]}: use --attention-backend triton"
            )
        sizes = (query.shape[1], kv_heads, dim, page_size)
        key = self._captured, _Kind(sizes, keys.dtype, spec.scale, spec.sliding_window, spec.softcap)
        if key not in self._wrappers:
            self._wrappers[key] = self._wrapper(ctx.block_table.numel())
        if key not in self._planned:
            self._plan(key)
        attended: Tensor = self._wrappers[key].run(query.to(keys.dtype), (keys, values))
        return attended

    def _wrapper(self, max_pages: int) -> Any:
        if self._captured is None:
            return self._make(self._workspace, "NHD")
        rows = self._captured[0]
        sizes = {"qo_indptr": rows + 1, "paged_kv_indptr": rows + 1, "paged_kv_last_page_len": rows}
        sizes["paged_kv_indices"] = max_pages
        device = self._workspace.device
        buffers = {f"{name}_buf": torch.zeros(n, dtype=torch.int32, device=device) for name, n in sizes.items()}
        # fa2 splits long rows, which decodes need; what is chosen for the device may not.
        return self._make(self._workspace, "NHD", use_cuda_graph=True, backend="fa2", **buffers)

    def _plan(self, key: _Key) -> None:
        rows, kind = self._rows, key[1]
        self._wrappers[key].plan(
            torch.from_numpy(rows.cu_q),
            torch.from_numpy(rows.indptr),
            send(torch.from_numpy(rows.indices), self._workspace.device),
            torch.from_numpy(rows.last_page_len),
            *kind.sizes,
            causal=True,
            sm_scale=kind.scale,
            # The window counts the keys to the left of a token, without itself.
            window_left=-1 if kind.window is None else kind.window - 1,
            logits_soft_cap=kind.softcap,
            q_data_type=kind.dtype,
            kv_data_type=kind.dtype,
        )
        self._planned.add(key)
        if self._copied is not None:
            self._copied.record()
