"""Counter-based noise for sampling: a pure function of (seed, position, token id).

So a seeded request draws the same numbers whatever else is in the batch, before and after a preemption, and after a
restart. The mixing is a 32-bit finaliser with two rounds of multiply and xor-shift (see C. Wellons, "Prospecting for
hash functions", 2018), keyed per row by splitmix64 (Steele et al., "Fast splittable pseudorandom number generators",
2014) of seed and position.
"""

import numpy as np
import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
# The odd multipliers as signed 32-bit numbers: products wrap, as they should.
_MIX = (0x21F0AAAD, 0x735A2D97)
_STRIDE = 0x9E3779B1 - (1 << 32)


def gumbel(seeds: list[int], positions: list[int], vocab_size: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise [rows, vocab_size] float32 for rows that draw the token at `positions`."""
    keys = row_keys(seeds, positions).to(device)
    x = torch.arange(vocab_size, dtype=torch.int32, device=device) * _STRIDE + keys[:, :1]
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


def row_keys(seeds: list[int], positions: list[int]) -> Tensor:
    """What makes a row's noise its own: [rows, 2] int32."""
    keys = [_splitmix64(_splitmix64(s & _MASK64) + p) for s, p in zip(seeds, positions, strict=True)]
    return torch.from_numpy(np.array(keys, dtype=np.uint64).view(np.int32).reshape(-1, 2))


def _splitmix64(value: int) -> int:
    z = (value + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
