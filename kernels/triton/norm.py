"""RMSNorm, and the additions to the residual stream that precede it, in one kernel. One program per token."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def add_rms_norm(
    residual: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    delta_weight: Tensor | None = None,
) -> Tensor:
    """residual [N, hidden] float32 += delta, in place; returns its norm in `dtype`. With `delta_weight`, delta is
    normalised first. Without a delta this is a plain norm, of a residual of any type. Rows are contiguous."""
    num_tokens, width = residual.shape
    out = torch.empty(num_tokens, width, dtype=dtype, device=residual.device)
    block = 1 << (width - 1).bit_length()
    _add_rms_norm[(num_tokens,)](
        *(out, residual, delta, weight, delta_weight, eps, width),
        *(residual.stride(0), 0 if delta is None else delta.stride(0), out.stride(0)),
        ADD=delta is not None,
        NORM_DELTA=delta_weight is not None,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
        enable_fp_fusion=True,
    )
    return out


@triton.jit
def _add_rms_norm(
    out, residual, delta, weight, delta_weight, eps, width, residual_row, delta_row, out_row,
    ADD: tl.constexpr, NORM_DELTA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < width
    hidden = tl.load(residual + token * residual_row + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        added = tl.load(delta + token * delta_row + at, mask=mask, other=0.0).to(tl.float32)
        if NORM_DELTA:
            added *= tl.rsqrt(tl.sum(added * added, 0) / width + eps)
            added *= tl.load(delta_weight + at, mask=mask, other=0.0)
        hidden += added
        tl.store(residual + token * residual_row + at, hidden, mask=mask)
    normed = hidden * tl.rsqrt(tl.sum(hidden * hidden, 0) / width + eps) * tl.load(weight + at, mask=mask, other=0.0)
    tl.store(out + token * out_row + at, normed.to(out.dtype.element_ty), mask=mask)
