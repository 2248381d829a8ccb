"""What a model may read during one forward pass, passed explicitly down to each attention layer.

`ForwardContext` attends over pages, `SequencesContext` (for embeddings) over whole sequences that are kept nowhere.
N is the number of tokens in the step, R the number of rows (requests). Models know this module, not the batch that
fills it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ramet.model_runner.kv_pool import KVPool
from ramet.model_runner.weights.errors import WeightsError

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


class AttentionContext(Protocol):
    """What native models need of a context. positions: [N] int64, each token's position in its request."""

    @property
    def positions(self) -> Tensor: ...

    def attend(self, spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [N, heads, key_dim], key [N, kv_heads, key_dim], value [N, kv_heads, value_dim], rope applied; query
        and key may be of higher precision than value. Returns [N, heads, value_dim] in value's dtype."""
        ...


@dataclasses.dataclass(frozen=True)
class ForwardContext:
    """positions: [N] int64, each token's position in its request. slot_mapping: [N] int64, where its KV goes.

    cu_q: [R + 1] int32, where each row's tokens begin. seq_lens: [R] int32, tokens of each row's request once this
    step is stored. block_table: [R, max_pages] int32, pages of each row (unused entries 0). query_lens and
    context_lens are the same facts as plain lists on the host, for backends that loop over rows. num_decodes: the
    first so many rows have exactly one token. wanted: [S] int64, the tokens whose hidden states will be read (None:
    all); a model may return anything for the others.
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
    wanted: Tensor | None = None

    @functools.cached_property
    def parts(self) -> list[tuple[slice, int, Tensor, Tensor, Tensor]]:
        """Decodes and longer rows, as there are: their tokens, their longest query, block_table, cu_q and seq_lens. The
        same in all layers."""
        found, decodes, rows = [], self.num_decodes, len(self.query_lens)
        for first, last, longest in ((0, decodes, 1), (decodes, rows, max(self.query_lens))):
            if first < last:
                # A decode's row number is its token's.
                tokens = slice(first, decodes if last == decodes else None)
                table, seq_lens = self.block_table[first:last], self.seq_lens[first:last]
                found.append((tokens, longest, table, self.cu_q[first : last + 1], seq_lens))
        return found

    def attend(self, spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store this step's key and value, then attend causally over each row's whole context."""
        self.kv_pool.store(spec.layer, self.slot_mapping, key, value)
        return self.backend.forward(spec, query, self).to(value.dtype)


@dataclasses.dataclass(frozen=True)
class SequencesContext:
    """A step of whole sequences, one after the other. lengths: [R], tokens of each."""

    positions: Tensor
    lengths: list[int]
    causal: bool

    def attend(self, spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Each sequence by itself and in memory of its own, so that its bits cannot depend on the others."""
        if spec.softcap is not None:
            raise WeightsError("a softcap in attention is not supported for embeddings")
        # [N, heads, dim] -> per sequence [1, heads, length, dim]
        parts = [tensor.to(value.dtype).split(self.lengths) for tensor in (query, key, value)]
        attended = []
        for sequence in zip(*parts, strict=True):
            mask = self._window(len(sequence[0]), spec.sliding_window)
            q, k, v = (part.transpose(0, 1)[None].contiguous() for part in sequence)
            result = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=self.causal and mask is None,
                scale=spec.scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            attended.append(result[0].transpose(0, 1))
        return torch.cat(attended)

    def _window(self, length: int, window: int | None) -> Tensor | None:
        """[length, length] bool, what each token sees; None if the window is wider than the sequence."""
        if window is None or length <= window:
            return None
        ones = torch.ones(length, length, dtype=torch.bool, device=self.positions.device)
        return ones.tril().triu(1 - window) if self.causal else ones.tril(window - 1).triu(1 - window)
