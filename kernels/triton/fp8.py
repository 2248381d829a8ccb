"""Rows rounded to float8 (e4m3), each by a scale of its own. One program per row."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def to_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [N, K], contiguous in K -> the same in float8, and the scale [N, 1] float32 that brings each row back."""
    num_rows, width = rows.shape
    out = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=rows.device)
    scales = torch.empty(num_rows, 1, device=rows.device)
    block = 1 << (width - 1).bit_length()
    args = (out, scales, rows, width, rows.stride(0), out.stride(0))
    _to_fp8[(num_rows,)](*args, BLOCK=block, num_warps=min(max(block // 512, 1), 16), enable_fp_fusion=True)
    return out, scales


@triton.jit
def _to_fp8(out, scales, rows, width, in_row, out_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    values = tl.load(rows + row * in_row + at, mask=at < width, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 0), 1e-12) / 448.0  # the largest number of the type
    tl.store(scales + row, scale)
    tl.store(out + row * out_row + at, (values / scale).to(out.dtype.element_ty), mask=at < width)
