"""Paged attention in plain torch: correct on any device, the twin that every faster backend is held to.

Decode rows are padded to the longest context and computed together; prefill chunks one row at a time. Scores and
softmax are in float32, so that a row's result hardly depends on the rows beside it.
"""

import torch
from torch import Tensor

from ramet.model_runner.attention.base import AttentionBackend
from ramet.model_runner.context import AttentionSpec, ForwardContext


class TorchBackend(AttentionBackend):
    capturable = False

    def forward(self, spec: AttentionSpec, query: Tensor, ctx: ForwardContext) -> Tensor:
        pool, decodes, lengths = ctx.kv_pool, ctx.num_decodes, ctx.query_lens
        keys, values = pool.keys[spec.layer], pool.values[spec.layer]
        together = [(0, decodes)] if decodes else []
        together += [(row, row + 1) for row in range(decodes, len(lengths))]
        outputs, first = [], 0
        for row, end in together:
            shape = (end - row, lengths[row])
            tokens = slice(first, first + shape[0] * shape[1])
            pages = ctx.block_table[row:end, : -(-max(ctx.context_lens[row:end]) // pool.page_size)].long()
            # [R, pages, page_size, heads, dim] -> [R, context, heads, dim]
            key, value = keys[pages].flatten(1, 2), values[pages].flatten(1, 2)
            attended = _attend(spec, query[tokens].unflatten(0, shape), key, value, ctx.positions[tokens].view(shape))
            outputs.append(attended.flatten(0, 1))
            first = tokens.stop
        return torch.cat(outputs)


def _attend(spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
    """query [B, Q, heads, dim], key and value [B, K, kv_heads, dim], positions [B, Q] -> [B, Q, heads, value_dim].

    Key j stands at position j; those behind a query's position (later tokens, unwritten slots) are masked.
    """
    batch, q_len, heads, _ = query.shape
    kv_heads = key.shape[2]
    grouped = query.float().unflatten(2, (kv_heads, heads // kv_heads))  # [B, Q, kv_heads, group, dim]
    scores = torch.einsum("bqhgd,bkhd->bhgqk", grouped, key.float()) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    key_positions = torch.arange(key.shape[1], device=query.device)
    hidden = key_positions > positions[..., None]  # [B, Q, K]
    if spec.sliding_window is not None:
        hidden |= key_positions <= positions[..., None] - spec.sliding_window
    scores.masked_fill_(hidden[:, None, None], float("-inf"))
    weights = scores.softmax(dim=-1)
    # Behind a row's context may be what another request left in the page: a NaN there would survive a weight of 0.
    beyond = key_positions > positions.amax(dim=-1, keepdim=True)  # [B, K]
    value = value.float().masked_fill(beyond[..., None, None], 0.0)
    output = torch.einsum("bhgqk,bkhd->bqhgd", weights, value)
    return output.reshape(batch, q_len, heads, value.shape[-1]).to(query.dtype)
