"""Reads the header of a GGUF file: metadata and where each tensor lies, without touching the tensor data.

Imports no torch: the launcher reads model facts with it. Much faster on tokenizer arrays than the `gguf` package's
reader, which builds several numpy objects per token. Little-endian files of version 2 and 3.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from ramet.model_runner.weights.errors import WeightsError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = GGUFValueType.STRING, GGUFValueType.ARRAY
# GGUF value type -> numpy type of a scalar: both have the same names for them.
_SCALARS: dict[int, np.dtype[Any]] = {
    kind: np.dtype(kind.name.lower()).newbyteorder("<") for kind in GGUFValueType if kind not in (_STRING, _ARRAY)
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """`shape` is row-major (as in torch: the reverse of GGML's order). `offset` is absolute, in bytes."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class GGUFHeader:
    """`metadata` holds plain Python values: int, float, bool, str, and lists of them."""

    metadata: dict[str, object]
    tensors: dict[str, TensorInfo]


def read_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """Raises WeightsError if the file is not GGUF, cut short, or of a version or tensor type that is not known."""
    path = Path(path)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(data)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, struct.error) as error:  # an empty file, a length beyond the end, text that is not UTF-8
        raise WeightsError(f"{path} is not a readable GGUF file: {error}") from error


def _parse(data: mmap.mmap) -> GGUFHeader:
    if data[:4] != _MAGIC:
        raise ValueError("it does not begin with the letters GGUF")
    version, num_tensors, num_values = struct.unpack_from("<IQQ", data, 4)
    if version not in _VERSIONS:
        raise ValueError(f"version {version}; versions {_VERSIONS} are known")
    cursor = _Cursor(data, position=24)
    metadata: dict[str, object] = {}
    for _ in range(num_values):
        name = cursor.string()
        metadata[name] = cursor.value(cursor.unsigned("<I"))
    infos = [cursor.tensor_info() for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    data_start = -(-cursor.position // alignment) * alignment
    tensors = {info.name: dataclasses.replace(info, offset=info.offset + data_start) for info in infos}
    for info in tensors.values():
        if info.offset + info.nbytes > len(data):
            raise ValueError(f"tensor {info.name} ends at byte {info.offset + info.nbytes} of {len(data)}: cut short")
    return GGUFHeader(metadata, tensors)


class _Cursor:
    """Reads values one after the other."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self.data = data
        self.position = position

    def unsigned(self, form: str) -> int:
        (number,) = struct.unpack_from(form, self.data, self.position)
        self.position += struct.calcsize(form)
        return int(number)

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        data, position, size = self.data, self.position, len(self.data)
        read_length = struct.Struct("<Q").unpack_from
        result = []
        for _ in range(count):
            begin = position + 8
            position = begin + read_length(data, position)[0]
            if position > size:
                raise ValueError("a string reaches beyond the end of the file")
            result.append(data[begin:position].decode())
        self.position = position
        return result

    def scalars(self, dtype: np.dtype[Any], count: int) -> list[object]:
        begin, self.position = self.position, self.position + dtype.itemsize * count
        if self.position > len(self.data):
            raise ValueError("a value reaches beyond the end of the file")
        # A copy of the bytes: a view would keep the map open.
        values: list[object] = np.frombuffer(self.data[begin : self.position], dtype).tolist()
        return values

    def value(self, kind: int) -> object:
        if kind == _ARRAY:
            item_kind, count = self.unsigned("<I"), self.unsigned("<Q")
            if item_kind == _STRING:
                return self.strings(count)
            if item_kind == _ARRAY:
                return [self.value(item_kind) for _ in range(count)]
            return self.scalars(_dtype(item_kind), count)
        if kind == _STRING:
            return self.string()
        return self.scalars(_dtype(kind), 1)[0]

    def tensor_info(self) -> TensorInfo:
        name = self.string()
        shape = tuple(self.unsigned("<Q") for _ in range(self.unsigned("<I")))[::-1]
        ggml_type = GGMLQuantizationType(self.unsigned("<I"))
        block_size, block_bytes = GGML_QUANT_SIZES[ggml_type]
        nbytes = math.prod(shape) // block_size * block_bytes
        return TensorInfo(name, shape, ggml_type, self.unsigned("<Q"), nbytes)


def _dtype(kind: int) -> np.dtype[Any]:
    if kind not in _SCALARS:
        raise ValueError(f"unknown value type {kind}")
    return _SCALARS[kind]
