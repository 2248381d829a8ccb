"""Choosing tokens: the largest logit, or the largest after scale, a border and Gumbel noise. The noise is that of
`model_runner/noise.py`, whose tests say what it must be; its bits are the same here, its logarithms may differ in the
last place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
# Wrapping 32-bit multipliers of the hash.
_FIRST, _SECOND, _STRIDE = tl.constexpr(0x21F0AAAD), tl.constexpr(0x735A2D97), tl.constexpr(0x9E3779B1 - (1 << 32))


def choose(logits: Tensor, scales: Tensor, keys: Tensor, borders: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logits [R, vocab] float32, contiguous rows; scales [R] float32: 1 / temperature, 0 for greedy; keys [R, 2]
    int32, the noise's. borders [R, 1] float32: scaled logits below are left out. Returns tokens [R] int64, the lowest
    on a tie, and what they won with [R]: NaN if a logit is NaN, -inf if none is left."""
    rows, vocab = logits.shape
    blocks = triton.cdiv(vocab, _BLOCK)
    best = torch.empty(rows, blocks, device=logits.device)
    tokens = torch.empty(rows, blocks, dtype=torch.int64, device=logits.device)
    _best_of_block[(rows, blocks)](
        *(best, tokens, logits, scales, keys, borders, vocab, logits.stride(0)),
        FILTER=borders is not None,
        BLOCK=_BLOCK,
        enable_fp_fusion=False,  # the bits of the plain choice
    )
    best, block = best.max(dim=-1)
    return tokens.gather(1, block[:, None]).squeeze(1), best


@triton.jit
def _best_of_block(best, tokens, logits, scales, keys, borders, vocab, row_stride, FILTER: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip # noqa: E501
    row, block = tl.program_id(0), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row.to(tl.int64) * row_stride + token, mask=token < vocab, other=float("-inf"))
    scale = tl.load(scales + row)
    if scale > 0:
        value *= scale
        if FILTER:
            value = tl.where(value < tl.load(borders + row), float("-inf"), value)
        value += _gumbel(token, tl.load(keys + 2 * row), tl.load(keys + 2 * row + 1))
    winner, at = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
    broken = tl.max((value != value).to(tl.int32), 0) > 0
    place = row * tl.num_programs(1) + block
    tl.store(best + place, tl.where(broken, float("nan"), winner))
    tl.store(tokens + place, (block * BLOCK + at).to(tl.int64))


@triton.jit
def _gumbel(token, first_key, second_key):
    x = _mix(_mix(token * _STRIDE + first_key) ^ second_key)
    uniform = ((x & 0x7FFFFF).to(tl.float32) + 0.5) * (2.0**-23)
    return -tl.log(-tl.log(uniform))


@triton.jit
def _mix(x):
    # Shifts keep the sign: the masks make them logical.
    x = (x ^ ((x >> 16) & 0xFFFF)) * _FIRST
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _SECOND
    return x ^ ((x >> 15) & 0x1FFFF)
