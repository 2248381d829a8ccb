"""Reads safetensors checkpoints: one file, or several with or without an index. Only the slices asked are read."""

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ramet.model_runner.weights.errors import WeightsError
from ramet.model_runner.weights.mapping import WeightPart, WeightSource

INDEX = "model.safetensors.index.json"


class SafetensorsSource(WeightSource):
    """Files stay open (memory-mapped) until `close`."""

    def __init__(self, path: Path) -> None:
        """`path`: a .safetensors file, or the folder of a checkpoint. Raises WeightsError if there is none."""
        self.path = path
        self._files: dict[str, Any] = {}  # tensor name -> open file
        owners: dict[str, Path] = {}
        for file in _checkpoint_files(path):
            try:
                handle = safe_open(file, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise WeightsError(f"cannot read the safetensors weights in {file}: {error}") from error
            if (twice := min(owners.keys() & handle.keys(), default=None)) is not None:
                raise WeightsError(f"{twice} is in {owners[twice]} and in {file}: one of them is not of this model")
            owners |= dict.fromkeys(handle.keys(), file)
            self._files |= dict.fromkeys(handle.keys(), handle)

    def names(self, wanted: Set[str] = frozenset()) -> Set[str]:
        return self._files.keys()

    def shape(self, part: WeightPart) -> tuple[int, ...]:
        return tuple(self._files[part.name].get_slice(part.name).get_shape())

    def read(self, part: WeightPart) -> Tensor:
        file = self._files[part.name]
        tensor: Tensor = file.get_tensor(part.name) if part.dim is None else file.get_slice(part.name)[part.index]
        return tensor

    def close(self) -> None:
        self._files.clear()


def _checkpoint_files(path: Path) -> list[Path]:
    """The files that make up the checkpoint. With an index, exactly those it names (others may be another model's)."""
    if path.is_file():
        return [path]
    if (path / INDEX).is_file():
        try:
            weight_map = json.loads((path / INDEX).read_bytes())["weight_map"]
            files = sorted({path / name for name in weight_map.values()})
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise WeightsError(f"{path / INDEX} is not a safetensors index: {error!r}") from error
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise WeightsError(f"{path} lacks {', '.join(absent)}, which its index names")
        return files
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if files := sorted(path.glob("*.safetensors")):
        return files
    hint = " (it has .bin files: ask for load format pickle to read those)" if list(path.glob("*.bin")) else ""
    raise WeightsError(f"no .safetensors file in {path}{hint}")
