"""activation(gate) * up, of the fused product of both; computed in float32, rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# By the names of Hugging Face configs.
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_BLOCK = 1024


def gated(gate_up: Tensor, act: str) -> Tensor:
    """gate_up [N, 2 * width], gate first, contiguous rows -> [N, width]. `act` is a key of `ACTIVATIONS`."""
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    grid = (num_tokens, -(-width // _BLOCK))
    args = (out, gate_up, width, gate_up.stride(0), out.stride(0))
    _gated[grid](*args, ACT=ACTIVATIONS[act], BLOCK=_BLOCK, enable_fp_fusion=True)
    return out


@triton.jit
def _gated(out, gate_up, width, in_row, out_row, ACT: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    gate = tl.load(gate_up + token * in_row + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * in_row + width + at, mask=mask, other=0.0).to(tl.float32)
    if ACT == "silu":
        gate *= tl.sigmoid(gate)
    else:
        # (1 + tanh(x)) / 2 = sigmoid(2 x)
        gate *= tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    tl.store(out + token * out_row + at, (gate * up).to(out.dtype.element_ty), mask=mask)
