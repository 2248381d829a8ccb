"""Reads PyTorch's pickle checkpoints (`pytorch_model*.bin`), only ever with `weights_only`: no code in them runs."""

from collections.abc import Set
from pathlib import Path

import torch
from torch import Tensor

from ramet.model_runner.weights.errors import WeightsError
from ramet.model_runner.weights.mapping import WeightPart, WeightSource


class PickleSource(WeightSource):
    """Memory-mapped where the file's format allows it."""

    def __init__(self, path: Path) -> None:
        """`path`: a .bin file or a folder of them. Raises WeightsError if there is none or one is refused."""
        self.path = path
        files = [path] if path.is_file() else sorted(path.glob("*.bin"))
        if not files:
            raise WeightsError(f"no .bin file in {path}")
        self._tensors: dict[str, Tensor] = {}
        for file in files:
            try:
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
            except Exception as error:  # whatever torch comes across in a file that is none
                raise WeightsError(f"{file} cannot be read as plain tensors: {error}") from error
            if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
                raise WeightsError(f"{file} does not hold a table of tensors by name")
            self._tensors |= loaded

    def names(self, wanted: Set[str] = frozenset()) -> Set[str]:
        return self._tensors.keys()

    def shape(self, part: WeightPart) -> tuple[int, ...]:
        return tuple(self._tensors[part.name].shape)

    def read(self, part: WeightPart) -> Tensor:
        return self._tensors[part.name][part.index]


def _is_zip(file: Path) -> bool:
    """Files of torch < 1.6 are bare pickles, which cannot be mapped."""
    with file.open("rb") as stream:
        return stream.read(2) == b"PK"
