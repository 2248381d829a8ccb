"""Paged attention on CUDA by the Triton kernel: one launch for the decodes of a step, one for its prompt chunks.

Reads only what is on the device, beside two host integers: `num_decodes` and the longest chunk. All kernels for a layer
are launched at its first call: what is compiled later holds up a step for a second.
"""

from typing import Any

import torch
from torch import Tensor

from ramet.kernels.triton.attention import EVERY_KIND, MAX_HEAD_DIM, Gpu, paged_attention
from ramet.model_runner.attention.base import AttentionBackend
from ramet.model_runner.context import AttentionSpec, ForwardContext


class TritonBackend(AttentionBackend):
    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._seen: set[int] = set()  # layers

    @classmethod
    def on(cls, device: torch.device) -> "TritonBackend":
        found = torch.cuda.get_device_properties(device)
        return cls(Gpu(found.multi_processor_count, 10 * found.major + found.minor))

    def forward(self, spec: AttentionSpec, query: Tensor, ctx: ForwardContext) -> Tensor:
        """Raises ValueError for heads that are too wide for the kernel."""
        keys, values = ctx.kv_pool.keys[spec.layer], ctx.kv_pool.values[spec.layer]
        if max(keys.shape[3], values.shape[3]) > MAX_HEAD_DIM:
            raise ValueError(
                f"the triton backend takes heads of at most {MAX_HEAD_DIM} dimensions, not {keys.shape[3]} and "
                f"{values.shape[3]}: use --attention-backend torch"
            )
        query = query if query.stride(2) == 1 else query.contiguous()
        out = torch.empty(*query.shape[:2], values.shape[3], dtype=values.dtype, device=query.device)
        options: dict[str, Any] = {"scale": spec.scale, "gpu": self._gpu}
        options |= {"window": spec.sliding_window, "softcap": spec.softcap}
        if spec.layer not in self._seen:
            self._seen.add(spec.layer)
            cu_q = torch.arange(2, dtype=torch.int32, device=query.device)  # a row of one token, with one key
            for longest, splits in EVERY_KIND:
                one = (out[:1], query[:1], keys, values, ctx.block_table[:1], cu_q, cu_q[1:])
                paged_attention(*one, max_query_len=longest, splits=splits, **options)
        for tokens, longest, *rows in ctx.parts:
            paged_attention(out[tokens], query[tokens], keys, values, *rows, max_query_len=longest, **options)
        return out
