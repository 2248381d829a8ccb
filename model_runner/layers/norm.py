"""RMSNorm (Zhang and Sennrich, 2019) and LayerNorm (Ba et al., 2016), weights and computation in float32.

With an offset (Gemma: 1) the checkpoint stores weight - offset; rounding 1 + w to bfloat16 would lose most of w.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ramet.model_runner.layers.linear import empty_parameter
from ramet.model_runner.weights.mapping import WeightPart


class RMSNorm(nn.Module):
    """Over the last dimension, float32 in. `dtype` is that of the output: the model's where a matrix product follows,
    float32 where the result is added to the residual stream."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, offset: float = 0.0) -> None:
        super().__init__()
        self.eps = eps
        self.offset = offset
        self.dtype = dtype
        self.weight = empty_parameter(size, dtype=torch.float32)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden.float(), self.weight.shape, self.weight, self.eps).to(self.dtype)

    def weight_parts(self, prefix: str) -> Iterator[WeightPart]:
        yield WeightPart(f"{prefix}.weight", self.weight, tuple(self.weight.shape), offset=self.offset)


class QKNorm(nn.Module):
    """RMSNorm of each query and key head, with one weight for queries and one for keys: a single pass over both."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, eps: float, offset: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.eps = eps
        self.offset = offset
        self.weight = empty_parameter(num_heads + num_kv_heads, head_dim, dtype=torch.float32)

    def forward(self, heads: Tensor) -> Tensor:
        """[N, num_heads + num_kv_heads, head_dim] float32, queries first -> the same shape."""
        return F.rms_norm(heads, (heads.shape[-1],), eps=self.eps) * self.weight

    def weight_parts(self, prefix: str) -> Iterator[WeightPart]:
        shape = (self.weight.shape[1],)
        yield WeightPart(f"{prefix}q_norm.weight", self.weight[: self.num_heads], shape, offset=self.offset)
        yield WeightPart(f"{prefix}k_norm.weight", self.weight[self.num_heads :], shape, offset=self.offset)


class LayerNorm(nn.Module):
    """Over the last dimension, float32 in and out."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = empty_parameter(size, dtype=torch.float32)
        self.bias = empty_parameter(size, dtype=torch.float32)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.eps)

    def weight_parts(self, prefix: str) -> Iterator[WeightPart]:
        for name, parameter in (("weight", self.weight), ("bias", self.bias)):
            yield WeightPart(f"{prefix}.{name}", parameter, tuple(parameter.shape))
