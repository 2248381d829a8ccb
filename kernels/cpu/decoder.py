"""Python's side of `decoder.c`: packs weights, and passes a list of operations and a step's tables.

An `Op` holds addresses: whoever makes one keeps the tensors alive.
"""

import ctypes
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ramet.kernels.cpu.build import KernelUnavailable, load_kernel
from ramet.kernels.cpu.huge_pages import HugePages

NORM, MATMUL, ROPE, ATTENTION, QUANTIZE = range(5)
STORE, ADD, GATED_SILU, GATED_GELU_TANH = range(4)
COLUMNS = 32  # outputs in a tile of packed weights
GROUP = 32  # inputs that share a scale in 4-bit weights

_ADDRESSES = ("in", "out", "weight", "bias", "table", "keys", "values", "scales", "row_scales", "group_sums")
_SIZES = ("bits", "width", "inner", "effect", "heads", "kv_heads", "dim", "window")


class Op(ctypes.Structure):
    """The struct of the same name in decoder_ops.h, which says what each kind of operation reads."""

    _fields_ = [
        ("kind", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in _ADDRESSES),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_float) for name in ("eps", "scale", "softcap")),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("positions", "slots", "block_table", "cu_q", "seq_lens")),
        *((name, ctypes.c_int64) for name in ("n", "rows", "table_width", "page_size")),
    ]


def op(kind: int, source: Tensor, out: Tensor, **fields: Tensor | float | None) -> Op:
    """Tensors become addresses; None is a null pointer."""
    values = {name: v.data_ptr() if isinstance(v, Tensor) else v for name, v in fields.items()}
    return Op(kind=kind, **{"in": source.data_ptr()}, out=out.data_ptr(), **values)


class DecoderKernel:
    """Raises KernelUnavailable if the kernel cannot be built, or would not run, on this machine."""

    def __init__(self) -> None:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            raise KernelUnavailable("the CPU has no bfloat16 instructions")
        self._call = load_kernel("decoder").run_ops
        self._call.argtypes = [ctypes.POINTER(Op), ctypes.c_int64, ctypes.POINTER(_Step)]
        self._call.restype = ctypes.c_int

    def run(self, ops: "ctypes.Array[Op]", n: int, tables: Sequence[Tensor] = (), page_size: int = 0) -> None:
        """`n` tokens; `tables`, for lists with attention: positions [n] and slots [n], int64; block_table [rows,
        width], cu_q [rows + 1] and seq_lens [rows], int32."""
        assert all(table.is_contiguous() for table in tables)
        step = _Step(*(table.data_ptr() for table in tables), n=n, page_size=page_size)
        if tables:
            step.rows, step.table_width = tables[2].shape
        if self._call(ops, len(ops), ctypes.byref(step)):
            raise MemoryError("no memory for the scratch space of a step")


def pack(weight: Tensor, together: int = 2) -> Tensor:
    """[out, in], `in` a multiple of `together` -> [tiles, in / together, 32, together]; more outputs are zeros."""
    out_features, in_features = weight.shape
    padded = F.pad(weight, (0, 0, 0, -out_features % COLUMNS))
    return padded.view(-1, COLUMNS, in_features // together, together).transpose(1, 2).contiguous()


class Grid(NamedTuple):
    """A matrix of 4 bits a weight, the form of GGUF's Q4_1: each is scale * number + minimum."""

    numbers: Tensor  # [out, in] uint8, up to 15
    scales: Tensor  # [out, in / 32] float16
    minima: Tensor  # likewise

    @classmethod
    def of(cls, weight: Tensor) -> "Grid":
        """weight [out, in], rounded; `in` is a multiple of 32."""
        groups = weight.float().unflatten(1, (-1, GROUP))
        least, most = groups.aminmax(dim=2)
        scales, least = ((most - least) / 15).half(), least.half()
        rounded = (groups - least.float()[..., None]) / scales.float().clamp(min=1e-30)[..., None]
        return cls(rounded.round().clamp(0, 15).to(torch.uint8).flatten(1), scales, least)


@dataclasses.dataclass(frozen=True)
class Packed:
    """A matrix as the kernel wants it, of 16, 8 or 4 bits a weight; decoder_matmul.h says what the scales are."""

    bits: int
    weight: Tensor
    scales: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, bits: int) -> "Packed":
        """16 bits, or 8 by a scale of each output, symmetric. weight [out, in] bfloat16; `in` is even, for 8 bits a
        multiple of 32."""
        if bits == 16:
            return cls(bits, pack(weight))
        weight = F.pad(weight.float(), (0, 0, 0, -weight.shape[0] % COLUMNS))
        scales = weight.abs().amax(dim=1) / 127
        rounded = (weight / scales.clamp(min=1e-30)[:, None]).round() + 128
        return cls(bits, pack(rounded.to(torch.uint8), 4), scales)

    @classmethod
    def of_grid(cls, grid: Grid) -> "Packed":
        """4 bits; the values stay what they are."""
        nibbles = pack(grid.numbers, 4)  # [tiles, in / 4, 32, 4]
        halves = F.pad(torch.stack([grid.scales, grid.minima]), (0, 0, 0, -grid.scales.shape[0] % COLUMNS))
        halves = halves.unflatten(1, (-1, COLUMNS)).permute(1, 3, 0, 2)  # [tiles, groups, 2, 32]
        return cls(4, nibbles[:, ::2] | nibbles[:, 1::2] << 4, halves.contiguous())

    def kept_in(self, pages: HugePages) -> "Packed":
        return Packed(self.bits, pages.copy(self.weight), None if self.scales is None else pages.copy(self.scales))


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Two matrices (biases, scales) of the same shape as one: 16 outputs of the first, 16 of the second, and so on."""
    half = COLUMNS // 2
    parts = [part.unflatten(0, (-1, half)) for part in (gate, up)]
    return torch.stack(parts, dim=1).flatten(0, 2)
