"""Random weights from a config alone, to measure speed or test without a checkpoint."""

import zlib
from collections.abc import Set

import torch
from torch import Tensor

from ramet.model_runner.weights.mapping import WeightPart, WeightSource

_MATRIX_STD = 0.02


class RandomSource(WeightSource):
    """Matrices: normal with a small deviation, so that activations neither die nor overflow; norms 1; biases 0.

    The same seed gives the same weights on the same kind of device, where they are drawn.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def names(self, wanted: Set[str] = frozenset()) -> Set[str]:
        return wanted

    def shape(self, part: WeightPart) -> tuple[int, ...]:
        return part.shape

    def read(self, part: WeightPart) -> Tensor:
        weight = torch.empty_like(part.target)
        if len(part.shape) < 2:
            return weight.fill_(0.0 if part.name.endswith("bias") else 1.0 - part.offset)
        seed = self._seed * 1_000_003 + zlib.crc32(part.name.encode())
        return weight.normal_(0.0, _MATRIX_STD, generator=torch.Generator(weight.device).manual_seed(seed))
