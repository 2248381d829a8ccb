"""The gated feed-forward block: down(activation(gate(x)) * up(x)), gate and up in one matrix product."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ramet.model_runner.layers.linear import ColumnParallelLinear, RowParallelLinear
from ramet.model_runner.parallel import TpGroup
from ramet.model_runner.weights.errors import WeightsError
from ramet.model_runner.weights.mapping import WeightPart

# torch shares larger element-wise work out among threads, at places that depend on the size of the whole.
_ONE_THREAD_ELEMENTS = 16384


def _in_blocks(function: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """`function` of [N, features]. In float32 on a CPU the last elements of a thread's share, which do not fill a
    vector register, are computed by another formula than the rest; whole rows go to one thread, so that the bits of a
    row do not depend on N."""
    if hidden.device.type != "cpu" or hidden.dtype is not torch.float32 or hidden.numel() < _ONE_THREAD_ELEMENTS:
        return function(hidden)
    rows = max(1, (_ONE_THREAD_ELEMENTS - 1) // hidden.shape[1])
    return torch.cat([function(block) for block in hidden.split(rows)])


_tanh_gelu = partial(_in_blocks, partial(F.gelu, approximate="tanh"))
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": partial(_in_blocks, F.silu),
    "gelu": lambda hidden: F.gelu(hidden.contiguous()),  # another formula again if it is not
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": F.relu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """By the name that Hugging Face configs use. Raises WeightsError if it is not known."""
    if name not in _ACTIVATIONS:
        raise WeightsError(f"activation {name!r} is not supported; known are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


class GatedMLP(nn.Module):
    def __init__(
        self, hidden_size: int, intermediate_size: int, act: str, group: TpGroup, dtype: torch.dtype, *, bias: bool
    ) -> None:
        super().__init__()
        outputs = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up = ColumnParallelLinear(hidden_size, outputs, group, dtype, bias=bias)
        self.down = RowParallelLinear(intermediate_size, hidden_size, group, dtype, bias=bias)
        self.act = activation(act)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)

    def weight_parts(self, prefix: str) -> Iterator[WeightPart]:
        yield from self.gate_up.weight_parts(prefix)
        yield from self.down.weight_parts(f"{prefix}down_proj")
