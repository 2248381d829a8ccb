"""`ForwardContext`: what a model may read during one forward pass, passed explicitly down to each attention layer.

N is the number of tokens in the step, R the number of rows (requests). Models know this module, not the batch that
fills it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from torch import Tensor

from ramet.model_runner.kv_pool import KVPool

if TYPE_CHECKING:
    from ramet.model_runner.attention.base import AttentionBackend


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What makes one attention layer: its place, its scale, and how far it looks back.

    `sliding_window`: a token sees itself and the `sliding_window - 1` tokens before it; None is the whole context.
    `softcap`: logits become `softcap * tanh(logits / softcap)`; None is off.
    """

    layer: int
    scale: float
    sliding_window: int | None = None
    softcap: float | None = None


@dataclasses.dataclass(frozen=True)
class ForwardContext:
    """positions: [N] int64, each token's position in its request. slot_mapping: [N] int64, where its KV goes.

    cu_q: [R + 1] int32, where each row's tokens begin. seq_lens: [R] int32, tokens of each row's request once this
    step is stored. block_table: [R, max_pages] int32, pages of each row (unused entries 0). query_lens and
    context_lens are the same facts as plain lists on the host, for backends that loop over rows. num_decodes: the
    first so many rows have exactly one token.
    """

    positions: Tensor
    slot_mapping: Tensor
    cu_q: Tensor
    seq_lens: Tensor
    block_table: Tensor
    query_lens: list[int]
    context_lens: list[int]
    num_decodes: int
    kv_pool: KVPool
    backend: AttentionBackend

    def attend(self, spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store this step's key and value, then attend causally over each row's whole context.

        query [N, heads, key_dim], key [N, kv_heads, key_dim], value [N, kv_heads, value_dim], rope applied; query and
        key may be of higher precision than the pool. Returns [N, heads, value_dim] in value's dtype.
        """
        self.kv_pool.store(spec.layer, self.slot_mapping, key, value)
        return self.backend.forward(spec, query, self).to(value.dtype)
