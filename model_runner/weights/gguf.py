"""Reads GGUF files under Hugging Face names, dequantised to float32 piece by piece, or 4-bit blocks as they are.

Undoes what llama.cpp's converter does to the tensors: Llama's query and key rows are permuted there, Gemma's norm
weights carry the offset 1, experts are stacked in one tensor. Architectures whose conversion is not known are refused.
"""

import re
from collections.abc import Set
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from ramet.kernels.cpu.decoder import Grid
from ramet.model_runner.weights.errors import WeightsError
from ramet.model_runner.weights.gguf_header import GGUFHeader, TensorInfo, read_header
from ramet.model_runner.weights.mapping import WeightPart, WeightSource

_Q4_0, _Q4_1 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_1
ROPE_FACTORS = "rope_freqs.weight"
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
# Mistral files are of architecture "llama" too.
_ARCHITECTURES = {"llama", "qwen2", "qwen3", "qwen3moe", "gemma3"}


class GGUFSource(WeightSource):
    def __init__(self, path: Path, num_layers: int, head_dim: int) -> None:
        """Raises WeightsError if the file is not readable GGUF, or of an architecture that is not known."""
        self.path = path
        self.header: GGUFHeader = read_header(path)
        self.architecture = str(self.header.metadata.get("general.architecture"))
        if self.architecture not in _ARCHITECTURES:
            known = ", ".join(sorted(_ARCHITECTURES))
            raise WeightsError(f"{path}: GGUF architecture {self.architecture!r} is not known; known are {known}")
        self._head_dim = head_dim
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        self._name_map = gguf.get_tensor_name_map(arch, num_layers)
        # As a plain array: slicing a memmap object is several times slower.
        self._data = np.asarray(np.memmap(path, mode="r"))

    def holds(self, name: str) -> bool:
        return self._stored_name(name) in self.header.tensors

    def names(self, wanted: Set[str] = frozenset()) -> Set[str]:
        held = set(filter(self.holds, wanted))
        return held | (self.header.tensors.keys() - set(map(self._stored_name, held)))

    def shape(self, part: WeightPart) -> tuple[int, ...]:
        shape = self.header.tensors[self._stored_name(part.name)].shape
        return shape[1:] if _EXPERT.search(part.name) else shape

    def read(self, part: WeightPart) -> Tensor:
        info = self.header.tensors[self._stored_name(part.name)]
        rows = part.index[0].indices(part.shape[0])[:2]
        if expert := _EXPERT.search(part.name):
            first = int(expert[1]) * part.shape[0]
            rows = (first + rows[0], first + rows[1])
        tensor = self._rows(info, *rows)[(slice(None), *part.index[1:])]
        return self._undo_conversion(part.name, tensor)

    def read_grid(self, part: WeightPart) -> Grid | None:
        """A whole matrix with the values of the file, whose blocks are of 32 inputs; None if it is not of 4 bits, or
        not of the part's shape."""
        info = self.header.tensors.get(self._stored_name(part.name))
        if info is None or info.shape != part.shape or info.ggml_type not in (_Q4_0, _Q4_1):
            return None
        numbers, scales, minima = _blocks_of_4_bits(self._raw(info, 0, info.shape[0]), info.ggml_type)
        if not (scales.float() + minima.float()).sum().isfinite():
            raise WeightsError(f"{part.name} in {self.path} has numbers that are NaN or infinite")
        numbers = numbers.flatten(1)
        return Grid(*(self._undo_conversion(part.name, tensor) for tensor in (numbers, scales, minima)))

    def rope_factors(self) -> Tensor | None:
        """[head_dim / 2] float32 divisors of the rope frequencies (Llama 3.1 and later), if the file has them."""
        info = self.header.tensors.get(ROPE_FACTORS)
        if info is not None and info.shape != (self._head_dim // 2,):
            raise WeightsError(f"{self.path}: {ROPE_FACTORS} has shape {list(info.shape)}, not [{self._head_dim // 2}]")
        return None if info is None else self._rows(info, 0, info.shape[0])

    def _stored_name(self, name: str) -> str:
        found: str | None = self._name_map.get_name(_EXPERT.sub(".experts.", name), try_suffixes=(".weight", ".bias"))
        return found or name

    def _rows(self, info: TensorInfo, first: int, last: int) -> Tensor:
        """Rows of the tensor seen as a matrix (its elements, if it has one dimension), float32."""
        raw = self._raw(info, first, last)
        if info.ggml_type in (_Q4_0, _Q4_1):  # to the same values as the library, in less time
            numbers, scales, minima = _blocks_of_4_bits(raw, info.ggml_type)
            found = numbers.float().mul_(scales.float()[..., None]).add_(minima.float()[..., None])
            return found.reshape(last - first, *info.shape[-1:]) if len(info.shape) > 1 else found.flatten()
        try:
            values = gguf.dequantize(raw, info.ggml_type)
        except NotImplementedError as error:
            raise WeightsError(f"{self.path}: {info.name} is of type {info.ggml_type.name}, not supported") from error
        values = values.reshape(last - first, *info.shape[-1:]) if len(info.shape) > 1 else values.reshape(-1)
        # torch wants memory it may write to; the file's map is not.
        return torch.from_numpy(np.require(values, np.float32, ["C", "W"]))

    def _raw(self, info: TensorInfo, first: int, last: int) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
        """The bytes of such rows, a view of the file."""
        count = int(np.prod(info.shape[:-1])) if len(info.shape) > 1 else info.shape[0]
        row_bytes = info.nbytes // count
        return self._data[info.offset + first * row_bytes : info.offset + last * row_bytes].reshape(-1, row_bytes)

    def _undo_conversion(self, name: str, tensor: Tensor) -> Tensor:
        if self.architecture == "llama" and re.search(r"\.self_attn\.[qk]_proj\.", name):
            # Stored as pairs (i, i + dim / 2) side by side.
            pairs = tensor.unflatten(0, (-1, self._head_dim // 2, 2))
            return pairs.transpose(1, 2).flatten(0, 2)
        if self.architecture == "gemma3" and name.endswith("norm.weight"):
            return tensor - 1.0
        return tensor


def _blocks_of_4_bits(raw: np.ndarray, kind: gguf.GGMLQuantizationType) -> tuple[Tensor, Tensor, Tensor]:
    """raw [rows, bytes] -> uint8 [rows, blocks, 32], and the scale and minimum of each block, float16."""
    # A block: a float16 scale, in Q4_1 a minimum, then 16 bytes with the numbers i (low half) and i + 16.
    blocks = torch.from_numpy(raw.copy()).unflatten(1, (-1, gguf.GGML_QUANT_SIZES[kind][1]))
    floats, nibbles = blocks[..., :-16].contiguous().view(torch.float16), blocks[..., -16:]
    scales = floats[..., 0]
    # In Q4_0 a weight is scale * (number - 8); the product is exact.
    minima = floats[..., 1] if kind == _Q4_1 else -8 * scales
    return torch.cat([nibbles & 15, nibbles >> 4], dim=2), scales, minima
