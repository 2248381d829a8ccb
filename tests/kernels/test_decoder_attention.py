"""Rope, store and attention of the decoder kernel over random shapes, against float64.

What no token has written is NaN, and what lies around the outputs must stay as it was.
"""

import dataclasses
import math
import random

import pytest
import torch
from torch import Tensor

from ramet.kernels.cpu import decoder as kernel
from ramet.kernels.cpu.build import KernelUnavailable
from ramet.kernels.cpu.decoder import DecoderKernel, Op, op

LOG2_E = math.log2(math.e)
GUARD = 7.0


@pytest.fixture(scope="module")
def decoder() -> DecoderKernel:
    try:
        return DecoderKernel()
    except KernelUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dataclasses.dataclass
class Shape:
    """`rows` are (tokens before, new tokens); the first `shared` pages of all are the same."""

    kv_heads: int
    group: int
    dim: int
    page_size: int
    rows: list[tuple[int, int]]
    shared: int = 0
    window: int = 0
    softcap: float = 0.0
    norm: bool = False
    threads: int = 1

    @classmethod
    def drawn(cls, seed: int) -> "Shape":
        draw = random.Random(seed)
        page_size = draw.choice([16, 16, 32, 48, 112])
        shared = draw.choice([0, 0, 1, 128 // page_size + 1])
        lengths = [1, 1, 1, 2, 16, draw.choice([47, 48, 49]), draw.choice([95, 96, 97]), draw.randint(1, 120)]
        before = [shared * page_size + draw.choice([0, 1, 14, 15, 16, 62, 63, 64, 65, 150]) for _ in range(12)]
        new = sorted(draw.choice(lengths[: draw.choice([3, 8])]) for _ in range(draw.choice([1, 2, 12])))
        return cls(
            kv_heads=draw.choice([1, 2, 3]),
            group=draw.choice([1, 2, 3, 4, 7, 12, 13, 16, 50]),
            dim=draw.choice([16, 32, 48, 64, 80, 144]),
            page_size=page_size,
            rows=list(zip(before, new, strict=False)),
            shared=shared,
            window=draw.choice([0, 0, 1, 16, 63, 64, 100]),
            softcap=draw.choice([0.0, 0.0, 3.0]),
            norm=draw.random() < 0.3,
            threads=draw.choice([1, 2, 3, 17]),
        )


class Step:
    """Random tokens of a shape, and a pool whose last page is in use."""

    def __init__(self, shape: Shape) -> None:
        self.shape, generator = shape, torch.Generator().manual_seed(1)
        heads, kv_heads, dim = shape.kv_heads * shape.group, shape.kv_heads, shape.dim
        totals = [before + new for before, new in shape.rows]
        own = [-(-total // shape.page_size) - shape.shared for total in totals]
        pages = torch.randperm(shape.shared + sum(own), generator=generator)
        common, *rest = pages.flip(0).split([shape.shared, *own])
        self.tables = torch.zeros(len(totals), shape.shared + max(own), dtype=torch.int32)
        for row, mine in enumerate(rest):
            self.tables[row, : shape.shared + len(mine)] = torch.cat([common, mine])
        # Equal positions of shared pages have equal content.
        longest = torch.randn(max(totals), heads + 2 * kv_heads, dim, generator=generator)
        self.qkv = [torch.randn(total, *longest.shape[1:], generator=generator) for total in totals]
        for rows in self.qkv:
            rows[: shape.shared * shape.page_size] = longest[: shape.shared * shape.page_size]
        angles = torch.randn(max(totals), dim // 2, generator=generator)
        cos, sin = angles.cos(), angles.sin()
        self.rope = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], 1)
        self.norm = 1 + torch.rand(heads + kv_heads, dim, generator=generator) if shape.norm else None
        self.scale = dim**-0.5
        self.num_stored = sum(totals) - (len(totals) - 1) * shape.shared * shape.page_size
        size = (len(pages), shape.page_size, kv_heads, dim)
        self.keys, self.values = (torch.full(size, float("nan"), dtype=torch.bfloat16) for _ in range(2))

    def run(self, decoder: DecoderKernel) -> Tensor:
        """First what came before is stored, then the step: [new tokens, heads * dim]."""
        shape = self.shape
        self._call(decoder, [(0, before) for before, _ in shape.rows], attend=False)
        return self._call(decoder, [(before, before + new) for before, new in shape.rows], attend=True)

    def _call(self, decoder: DecoderKernel, spans: list[tuple[int, int]], attend: bool) -> Tensor:
        shape, width = self.shape, self.shape.kv_heads * self.shape.group * self.shape.dim
        positions = torch.cat([torch.arange(*span) for span in spans])
        of_row = torch.repeat_interleave(torch.arange(len(spans)), torch.tensor([b - a for a, b in spans]))
        slots = self.tables[of_row, positions // shape.page_size] * shape.page_size + positions % shape.page_size
        n = len(positions)
        source = torch.cat([rows[a:b] for rows, (a, b) in zip(self.qkv, spans, strict=True)])
        query, out = (torch.full((n + 1, width), GUARD, dtype=torch.bfloat16) for _ in range(2))
        fields = {"keys": self.keys, "values": self.values, "dim": shape.dim}
        fields |= {"heads": shape.kv_heads * shape.group, "kv_heads": shape.kv_heads}
        turned = {"weight": self.norm, "eps": 1e-5, "scale": self.scale * LOG2_E, "table": self.rope}
        ops = [op(kernel.ROPE, source, query, **turned, **fields)]
        if attend:
            limits = {"window": shape.window, "softcap": shape.softcap * LOG2_E}
            ops.append(op(kernel.ATTENTION, query, out, **limits, **fields))
        cu_q = torch.tensor([0, *(b - a for a, b in spans)]).cumsum(0).int()
        seq_lens = torch.tensor([b for _, b in spans], dtype=torch.int32)
        tables = (positions, slots.long(), self.tables, cu_q, seq_lens)
        decoder.run((Op * len(ops))(*ops), n, tables, shape.page_size)
        assert (query[n] == GUARD).all() and (out[n] == GUARD).all()
        return out[:n]

    def expected(self) -> Tensor:
        return torch.cat([self._row(row) for row in range(len(self.shape.rows))])

    def _row(self, row: int) -> Tensor:
        shape, (before, new) = self.shape, self.shape.rows[row]
        total, heads = before + new, shape.kv_heads * shape.group
        turned, value = self.qkv[row].split([heads + shape.kv_heads, shape.kv_heads], dim=1)
        if self.norm is not None:
            turned = torch.nn.functional.rms_norm(turned, (shape.dim,), eps=1e-5) * self.norm
        cos, sin = self.rope[:total, None].unbind(2)
        turned = turned * cos + turned.roll(shape.dim // 2, -1) * sin
        query = (turned[before:, :heads] * (self.scale * LOG2_E)).bfloat16().double() / LOG2_E
        key, value = (x.bfloat16().double().repeat_interleave(shape.group, 1) for x in (turned[:, heads:], value))
        scores = torch.einsum("qhd,khd->hqk", query, key)
        if shape.softcap:
            scores = torch.tanh(scores / shape.softcap) * shape.softcap
        behind = torch.arange(before, total)[:, None] - torch.arange(total)
        unseen = (behind < 0) | ((behind >= shape.window) if shape.window else False)
        weights = scores.masked_fill(unseen, -math.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(decoder: DecoderKernel, seed: int) -> None:
    shape = Shape.drawn(seed)
    step, again = Step(shape), Step(shape)
    torch.set_num_threads(1)
    found = step.run(decoder)
    # Weights are rounded to bfloat16, and so are the results.
    torch.testing.assert_close(found.double(), step.expected(), rtol=2**-6, atol=0.02, msg=lambda m: f"{shape}\n{m}")
    torch.set_num_threads(shape.threads)
    assert torch.equal(again.run(decoder), found), shape
    # Each key that was to be stored is there, and nothing else.
    assert (~step.keys.isnan()).sum() == step.num_stored * shape.kv_heads * shape.dim
