"""Experts as grouped matrix products: the tokens of each expert are tiles of one launch, whose grid is the worst case
over all routings, so that nothing waits for the host to count."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ramet.kernels.triton.gated_mlp import gated


def experts(hidden: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, chosen: Tensor, act: str) -> Tensor:
    """hidden [N, width], gate_up [experts, 2 * size, width], down [experts, width, size], weights and chosen
    [N, top_k] -> [N, width]: the outputs of each token's experts, weighed and summed in float32."""
    num_tokens, top_k = chosen.shape
    num_experts = gate_up.shape[0]
    # Tiles about as high as an expert's share of the tokens.
    share = num_tokens * top_k // num_experts
    block_m = 16 if share <= 16 else 64 if share <= 64 else 128
    sorted_experts, order = chosen.flatten().sort(stable=True)
    ids = torch.arange(num_experts + 1, device=chosen.device)
    starts = torch.searchsorted(sorted_experts, ids)
    tile_ends = ((starts.diff() + block_m - 1) // block_m).cumsum(0)
    most = num_tokens * top_k // block_m + min(num_experts, num_tokens * top_k)
    tile_experts = torch.searchsorted(tile_ends, torch.arange(most, device=chosen.device), right=True)
    plan = (order, starts, tile_ends, tile_experts)
    between = _grouped(hidden, gate_up, plan, block_m, top_k)
    outputs = _grouped(gated(between, act), down, plan, block_m, 1, weights.flatten())
    return outputs.view(num_tokens, top_k, -1).sum(dim=1).to(hidden.dtype)


def _grouped(
    inputs: Tensor, weight: Tensor, plan: tuple[Tensor, ...], block_m: int, share: int, scales: Tensor | None = None
) -> Tensor:
    """[assignments, out] of weight [experts, out, in]: assignment i takes row i // share of `inputs`. With scales
    [assignments] the result is scaled, in float32."""
    order, tile_experts = plan[0], plan[3]
    dtype = inputs.dtype if scales is None else torch.float32
    half = inputs.dtype.itemsize <= 2
    num_experts, width, inner = weight.shape
    out = torch.empty(order.shape[0], width, dtype=dtype, device=inputs.device)
    block_n = 128 if half else 32
    _grouped_linear[(tile_experts.shape[0], -(-width // block_n))](
        *(out, inputs, weight, *plan, scales, num_experts, width, inner),
        *(inputs.stride(0), out.stride(0), *weight.stride()[:2]),
        *(share, scales is not None, block_m, block_n, 64 if half else 32),
        num_warps=8 if block_m == 128 else 4,
        num_stages=3,
        enable_fp_fusion=True,
    )
    return out


@triton.jit
def _grouped_linear(
    out, inputs, weight, order, starts, tile_ends, tile_experts, scales, num_experts, width, inner,
    in_row, out_row, expert_stride, weight_row,
    SHARE: tl.constexpr, SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    expert = tl.load(tile_experts + tile)
    if expert >= num_experts:
        return
    start, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    # The tile's place among those of its expert, counted back from the last.
    start += (tile - tl.load(tile_ends + expert) + tl.cdiv(end - start, BLOCK_M)) * BLOCK_M
    member = start + tl.arange(0, BLOCK_M)
    live = member < end
    assignment = tl.load(order + member, mask=live, other=0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = inputs + (assignment // SHARE * in_row)[:, None] + k[None, :]
    columns = weight + expert * expert_stride + (column * weight_row)[:, None] + k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(0, inner, BLOCK_K):
        inside = (k < inner - at)[None, :]
        a = tl.load(rows + at, mask=live[:, None] & inside, other=0.0)
        b = tl.load(columns + at, mask=(column < width)[:, None] & inside, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    if SCALE:
        acc *= tl.load(scales + assignment, mask=live, other=0.0).to(tl.float32)[:, None]
    mask = live[:, None] & (column < width)[None, :]
    tl.store(out + (assignment * out_row)[:, None] + column[None, :], acc.to(out.dtype.element_ty), mask=mask)
