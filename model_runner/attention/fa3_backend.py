"""Paged attention on Hopper by FlashAttention-3, an optional package (Shah et al., 2024)."""

from torch import Tensor

from ramet.model_runner.attention.base import AttentionBackend
from ramet.model_runner.context import AttentionSpec, ForwardContext


class Fa3Backend(AttentionBackend):
    """Raises ImportError if the package is missing."""

    def __init__(self) -> None:
        from flash_attn_interface import flash_attn_with_kvcache

        self._attend = flash_attn_with_kvcache

    def forward(self, spec: AttentionSpec, query: Tensor, ctx: ForwardContext) -> Tensor:
        """Raises ValueError for a softcap, which the package is built without."""
        if spec.softcap is not None:
            raise ValueError("the fa3 backend has no attention softcap: use --attention-backend triton")
        keys, values = ctx.kv_pool.keys[spec.layer], ctx.kv_pool.values[spec.layer]
        # The window counts the keys to the left of a token, without itself.
        window = (-1, -1) if spec.sliding_window is None else (spec.sliding_window - 1, 0)
        attended: Tensor = self._attend(
            query.to(keys.dtype),
            keys,
            values,
            cache_seqlens=ctx.seq_lens,
            page_table=ctx.block_table,
            cu_seqlens_q=ctx.cu_q,
            max_seqlen_q=max(ctx.query_lens),
            softmax_scale=spec.scale,
            causal=True,
            window_size=window,
        )
        return attended
