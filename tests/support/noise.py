"""The noise of sampling by seeds and positions, as tests want it."""

import numpy as np
import torch

from ramet.model_runner.noise import MASK64, keyed_gumbel, row_keys


def gumbel(seeds: list[int], positions: list[int], vocab_size: int, device: torch.device) -> torch.Tensor:
    """[rows, vocab_size] float32 for rows that draw the token at `positions`."""
    masked = np.array([seed & MASK64 for seed in seeds], dtype=np.uint64)
    return keyed_gumbel(torch.from_numpy(row_keys(masked, np.array(positions))).to(device), vocab_size)
