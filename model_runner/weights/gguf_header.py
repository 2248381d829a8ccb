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
from collections.abc import Sequence
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
    # What is missing, a length beyond all files, no UTF-8; a type without a known size; arrays of arrays of arrays …
    except (ValueError, OverflowError, struct.error, KeyError, RecursionError) as error:
        raise WeightsError(f"{path} is not a readable GGUF file: {error}") from error


def _parse(data: mmap.mmap) -> GGUFHeader:
    """Reading beyond the end gives what there is, which is then too short to be unpacked."""
    if data.read(4) != _MAGIC:
        raise ValueError("it does not begin with the letters GGUF")
    version, num_tensors, num_values = _unpack(data, "<IQQ")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}; versions {_VERSIONS} are known")
    metadata: dict[str, object] = {}
    for _ in range(num_values):
        (name,) = _strings(data, 1)
        metadata[name] = _value(data, *_unpack(data, "<I"))
    infos = [_tensor_info(data) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    data_start = -(-data.tell() // alignment) * alignment
    tensors = {info.name: dataclasses.replace(info, offset=info.offset + data_start) for info in infos}
    if len(tensors) < num_tensors:
        raise ValueError("two tensors have the same name")
    for info in tensors.values():
        if info.offset + info.nbytes > len(data):
            raise ValueError(f"tensor {info.name} ends at byte {info.offset + info.nbytes} of {len(data)}: cut short")
    return GGUFHeader(metadata, tensors)


def _tensor_info(data: mmap.mmap) -> TensorInfo:
    """With its offset from the start of the tensors' data."""
    (name,) = _strings(data, 1)
    (num_dimensions,) = _unpack(data, "<I")
    shape = _unpack(data, f"<{num_dimensions}Q")[::-1]
    kind, offset = _unpack(data, "<IQ")
    ggml_type = GGMLQuantizationType(kind)
    block_size, block_bytes = GGML_QUANT_SIZES[ggml_type]
    if not math.prod(shape) or not shape or shape[-1] % block_size:
        raise ValueError(f"tensor {name} has shape {list(shape)}, but {ggml_type.name} has blocks of {block_size}")
    return TensorInfo(name, shape, ggml_type, offset, math.prod(shape) // block_size * block_bytes)


def _unpack(data: mmap.mmap, form: str) -> tuple[int, ...]:
    return struct.unpack(form, data.read(struct.calcsize(form)))


def _strings(data: mmap.mmap, count: int) -> list[str]:
    read, unpack = data.read, struct.Struct("<Q").unpack
    return [read(*unpack(read(8))).decode() for _ in range(count)]


def _value(data: mmap.mmap, kind: int) -> object:
    if kind != _ARRAY:
        return _values(data, kind, 1)[0]
    item_kind, count = _unpack(data, "<IQ")
    return _values(data, item_kind, count)


def _values(data: mmap.mmap, kind: int, count: int) -> Sequence[object]:
    if kind == _ARRAY:
        return [_value(data, kind) for _ in range(count)]
    if kind == _STRING:
        return _strings(data, count)
    if kind not in _SCALARS:
        raise ValueError(f"unknown value type {kind}")
    values: list[object] = np.frombuffer(data.read(_SCALARS[kind].itemsize * count), _SCALARS[kind], count).tolist()
    return values
