"""Rows of attention over a pool with random content and scattered pages, for any backend."""

import torch

from ramet.model_runner.context import AttentionSpec, ForwardContext
from ramet.model_runner.kv_pool import KVPool, KVSpec

CPU = torch.device("cpu")


class Case:
    """A pool with random content and rows with random page tables; `rows` are (context, new tokens)."""

    def __init__(
        self, rows, heads=6, kv_heads=2, key_dim=64, value_dim=64, page_size=16, dtype=torch.bfloat16, device=CPU
    ):
        self.device = device
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.rows = rows
        pages_needed = [-(-context // page_size) for context, _ in rows]
        num_pages = sum(pages_needed) + 3
        self.pool = KVPool([KVSpec(kv_heads, key_dim, value_dim)], num_pages, page_size, dtype, device)
        self.pool.keys[0].copy_(randn(*self.pool.keys[0].shape))
        self.pool.values[0].copy_(randn(*self.pool.values[0].shape))
        # Page 0, which unused table entries name, is nobody's.
        order = (1 + torch.randperm(num_pages - 1, generator=generator)).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in pages_needed]
        self.queries = [randn(new, heads, key_dim) for _, new in rows]

    def context(self, parts: list[tuple[int, int, int]], backend) -> tuple[torch.Tensor, ForwardContext]:
        """`parts`: (row, first, last) of the row's new tokens."""
        lengths = [last - first for _, first, last in parts]
        starts = [self.rows[row][0] - self.rows[row][1] + first for row, first, _ in parts]
        ends = torch.tensor([0, *lengths]).cumsum(0)
        table = torch.zeros(len(parts), max(len(self.tables[row]) for row, _, _ in parts), dtype=torch.int32)
        for i, (row, _, _) in enumerate(parts):
            table[i, : len(self.tables[row])] = torch.tensor(self.tables[row])
        seq_lens = [start + length for start, length in zip(starts, lengths, strict=True)]
        ctx = ForwardContext(
            positions=torch.cat([torch.arange(s, e) for s, e in zip(starts, seq_lens, strict=True)]).to(self.device),
            slot_mapping=torch.empty(0),
            cu_q=ends.int().to(self.device),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=self.device),
            block_table=table.to(self.device),
            query_lens=lengths,
            context_lens=seq_lens,
            num_decodes=sum(length == 1 for length in lengths),
            kv_pool=self.pool,
            backend=backend,
        )
        return torch.cat([self.queries[row][first:last] for row, first, last in parts]).to(self.device), ctx

    def run(self, backend, parts=None, **spec) -> torch.Tensor:
        parts = parts or [(row, 0, new) for row, (_, new) in enumerate(self.rows)]
        query, ctx = self.context(parts, backend)
        return backend.forward(AttentionSpec(0, 0.125, **spec), query, ctx)
