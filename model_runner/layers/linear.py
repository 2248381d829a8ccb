"""Linear layers over a tensor-parallel group: column-parallel (output split), row-parallel (input split), and fused.

A fused layer is one matrix product for several checkpoint matrices with the same input (query/key/value, gate/up).
Weights are [out, in], as in torch.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ramet.model_runner.parallel import TpGroup
from ramet.model_runner.weights.mapping import WeightPart


def empty_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A parameter that is to be filled by the loader, on the current default device."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


# On a CPU a product gives a row the same bits however many rows there are, but for those left over from blocks of so
# many, which may be added up in another order (seen with oneDNN and MKL). In float32 several threads share out the
# rows, so that any number that is not a multiple may leave some over; in half types only fewer than this do.
_INVARIANT_ROWS = 4


def can_pack(weight: Tensor) -> bool:
    """Whether `pack` makes products with this weight faster here: bfloat16 on a CPU that oneDNN computes it on."""
    usable = weight.device.type == "cpu" and weight.dtype is torch.bfloat16 and torch.backends.mkldnn.is_available()
    return usable and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(weight: Tensor) -> Tensor:
    """The weight [out, in] in the blocked layout that oneDNN multiplies with; only `linear` can use it.

    A plain weight is reordered, in effect, with every product: at few rows that takes as long as the product. The
    operators are those that torch's own compiler uses for frozen weights.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _INVARIANT_ROWS)


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, weight_scale: Tensor | None = None) -> Tensor:
    """hidden [N, in] -> [N, out]; the weight may be packed, or in 8 bits with a scale. On a CPU a row's result does not
    depend on N: what a request is answered must not depend on who else is in the batch."""
    if weight_scale is not None:
        return _fp8_linear(hidden, weight, weight_scale, bias)
    rows = hidden.shape[0]
    lacking = -rows % _INVARIANT_ROWS
    if lacking and hidden.device.type == "cpu" and (rows < _INVARIANT_ROWS or hidden.dtype is torch.float32):
        return linear(F.pad(hidden, (0, 0, 0, lacking)), weight, bias)[:rows]
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")
    return F.linear(hidden, weight, bias)


_FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(_FP8).max
FP8_SIZE_MULTIPLE = 16  # of both sizes of a matrix that `torch._scaled_mm` takes


def _fp8_linear(hidden: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """weight [out, in] in float8, weight_scale [1, out]. Each token is rounded by a scale of its own."""
    rounded, scale = _to_fp8(hidden)
    product = torch._scaled_mm(
        rounded, weight.t(), scale_a=scale, scale_b=weight_scale, out_dtype=hidden.dtype, use_fast_accum=True
    )
    return product if bias is None else product + bias


def _to_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [N, K] -> the same in float8, and the scale [N, 1] float32 that brings each row back. One kernel on CUDA."""
    if rows.is_cuda:
        from ramet.kernels.triton.fp8 import to_fp8  # a server on a CPU has no use for triton

        return to_fp8(rows)
    scale = rows.abs().amax(dim=-1, keepdim=True).float().clamp_min(1e-12) / _FP8_MAX
    return (rows.float() / scale).clamp(-_FP8_MAX, _FP8_MAX).to(_FP8), scale


def round_weight(module: "ColumnParallelLinear | RowParallelLinear") -> None:
    """Round a loaded layer's weight to float8 (e4m3), each output by a scale of its own."""
    rounded, scale = _to_fp8(module.weight)
    del module.weight  # a parameter's name takes no other tensor
    module.weight, module.weight_scale = rounded, scale.t().contiguous()


def pack_weight(module: "ColumnParallelLinear | RowParallelLinear") -> None:
    """Pack a layer's own weight, once it is loaded; the layer's `weight_parts` are of no use after it."""
    packed = pack(module.weight)
    del module.weight  # a parameter's name takes no other tensor
    module.weight = packed


class ColumnParallelLinear(nn.Module):
    """`outputs`: name of each fused matrix and its number of output features; each is split over the ranks.

    `unit`: output features come in blocks of so many that must stay together (a head). Blocks of those in `replicated`
    may be fewer than ranks, some of which then hold the same one. forward: [N, in] -> [N, sum of this rank's outputs],
    in the order of `outputs`.
    """

    def __init__(
        self,
        in_features: int,
        outputs: dict[str, int],
        group: TpGroup,
        dtype: torch.dtype,
        *,
        bias: bool = False,
        unit: int = 1,
        replicated: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.outputs = outputs
        self.spans = {}
        for name, features in outputs.items():
            what = f"{name} blocks of {unit} features"
            units = group.shard(features // unit, what, replicated=name in replicated)
            self.spans[name] = range(units.start * unit, units.stop * unit)
        self.local_sizes = [len(span) for span in self.spans.values()]
        self.weight: Tensor = empty_parameter(sum(self.local_sizes), in_features, dtype=dtype)
        self.bias = empty_parameter(sum(self.local_sizes), dtype=dtype) if bias else None
        self.weight_scale: Tensor | None = None  # [1, out] of a weight in float8

    def forward(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.weight, self.bias, self.weight_scale)

    def weight_parts(self, prefix: str) -> Iterator[WeightPart]:
        weights = self.weight.split(self.local_sizes)
        biases = None if self.bias is None else self.bias.split(self.local_sizes)
        for i, (name, features) in enumerate(self.outputs.items()):
            span = self.spans[name]
            yield WeightPart(f"{prefix}{name}.weight", weights[i], (features, self.in_features), dim=0, span=span)
            if biases is not None:
                yield WeightPart(f"{prefix}{name}.bias", biases[i], (features,), dim=0, span=span)


class RowParallelLinear(nn.Module):
    """The input is split over the ranks, the outputs are summed. forward: [N, this rank's in] -> [N, out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group: TpGroup,
        dtype: torch.dtype,
        *,
        bias: bool = False,
        unit: int = 1,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.group = group
        units = group.shard(in_features // unit, f"input blocks of {unit} features")
        self.span = range(units.start * unit, units.stop * unit)
        self.weight: Tensor = empty_parameter(out_features, len(self.span), dtype=dtype)
        self.bias = empty_parameter(out_features, dtype=dtype) if bias else None
        self.weight_scale: Tensor | None = None  # [1, out] of a weight in float8

    def forward(self, hidden: Tensor) -> Tensor:
        # Only one rank may add the bias: the outputs are summed.
        bias = self.bias if self.group.rank == 0 else None
        return self.group.all_reduce(linear(hidden, self.weight, bias, self.weight_scale))

    def weight_parts(self, prefix: str) -> Iterator[WeightPart]:
        out_features = self.weight.shape[0]
        yield WeightPart(f"{prefix}.weight", self.weight, (out_features, self.in_features), dim=1, span=self.span)
        if self.bias is not None:
            yield WeightPart(f"{prefix}.bias", self.bias, (out_features,))
