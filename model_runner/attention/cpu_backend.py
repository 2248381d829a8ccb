"""Paged attention on CPUs by the C kernel: a token's result does not depend on the batch or the chunk it is in."""

from torch import Tensor

from ramet.kernels.cpu.paged_attention import PagedAttention
from ramet.model_runner.attention.base import AttentionBackend
from ramet.model_runner.context import AttentionSpec, ForwardContext


class CpuBackend(AttentionBackend):
    """Raises KernelUnavailable if there is no compiler."""

    capturable = False

    def __init__(self) -> None:
        self._kernel = PagedAttention()

    def forward(self, spec: AttentionSpec, query: Tensor, ctx: ForwardContext) -> Tensor:
        return self._kernel(
            query,
            ctx.kv_pool.keys[spec.layer],
            ctx.kv_pool.values[spec.layer],
            ctx.block_table,
            ctx.cu_q,
            ctx.seq_lens,
            scale=spec.scale,
            window=spec.sliding_window,
            softcap=spec.softcap,
        )
