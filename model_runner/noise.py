"""Counter-based noise for sampling: a pure function of (seed, position, token id).

So a seeded request draws the same numbers whatever else is in the batch, before and after a preemption, and after a
restart. The mixing is a 32-bit finaliser with two rounds of multiply and xor-shift (see C. Wellons, "Prospecting for
hash functions", 2018), keyed per row by splitmix64 (Steele et al., "Fast splittable pseudorandom number generators",
2014) of seed and position.
"""

import numpy as np
import torch
from torch import Tensor

MASK64 = (1 << 64) - 1
# The odd multipliers as signed 32-bit numbers: products wrap, as they should.
_MIX = (0x21F0AAAD, 0x735A2D97)
_STRIDE = 0x9E3779B1 - (1 << 32)


def keyed_gumbel(keys: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise [rows, vocab_size] float32, by `row_keys` [rows, 2] int32."""
    x = torch.arange(vocab_size, dtype=torch.int32, device=keys.device) * _STRIDE + keys[:, :1]
    x = _mix(x) ^ keys[:, 1:]
    x = _mix(x)
    # 23 bits, centred so that neither 0 nor 1 occurs: with one bit more, the half would round up to 1 in float32, and a
    # token with infinite noise wins against any logits.
    uniform = ((x & 0x7FFFFF).float() + 0.5) * 2.0**-23
    return uniform.log_().neg_().log_().neg_()


def _mix(x: Tensor) -> Tensor:
    for shift, factor in zip((16, 15), _MIX, strict=True):
        # `>>` keeps the sign; the mask makes it a logical shift.
        x = x ^ ((x >> shift) & (0xFFFFFFFF >> shift))
        x = x * factor
    return x ^ ((x >> 15) & (0xFFFFFFFF >> 15))


def row_keys(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """What makes a row's noise its own: [rows, 2] int32 from seeds [rows] uint64 and positions [rows]."""
    return _splitmix64(_splitmix64(seeds) + positions.astype(np.uint64)).view(np.int32).reshape(-1, 2)


def _splitmix64(value: np.ndarray) -> np.ndarray:
    """[rows] uint64, wrapping."""
    z = value + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
