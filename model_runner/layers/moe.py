"""Mixture of experts: a router picks `top_k` gated MLPs for each token and weighs their outputs.

Experts are stored fused, [experts, out, in]. The loop runs over the experts that were hit; each sees its tokens as
one batch.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ramet.model_runner.layers.linear import empty_parameter, linear
from ramet.model_runner.layers.mlp import activation
from ramet.model_runner.parallel import TpGroup
from ramet.model_runner.weights.mapping import WeightPart


@dataclasses.dataclass(frozen=True)
class MoESpec:
    """`normalize`: the weights of the chosen experts are scaled to sum to one."""

    num_experts: int
    top_k: int
    intermediate_size: int
    normalize: bool


class MoE(nn.Module):
    """Each expert is split over the ranks."""

    def __init__(self, hidden_size: int, spec: MoESpec, act: str, group: TpGroup, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = spec
        self.group = group
        self.act = activation(act)
        self.span = group.shard(spec.intermediate_size, "expert intermediate size")
        num_experts = spec.num_experts
        self.router = empty_parameter(num_experts, hidden_size, dtype=dtype)
        self.gate_up = empty_parameter(num_experts, 2 * len(self.span), hidden_size, dtype=dtype)
        self.down = empty_parameter(num_experts, hidden_size, len(self.span), dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, hidden] -> [N, hidden]."""
        weights, chosen = self.route(hidden)
        # Sorted by expert, the assignments of one expert are neighbours: [N * top_k].
        order = chosen.flatten().argsort(stable=True)
        tokens = order // self.spec.top_k
        counts = torch.bincount(chosen.flatten(), minlength=self.router.shape[0]).tolist()
        output = torch.zeros_like(hidden)
        for expert, (assigned, rows) in enumerate(zip(order.split(counts), tokens.split(counts), strict=True)):
            if not len(rows):
                continue
            gate, up = linear(hidden[rows], self.gate_up[expert]).chunk(2, dim=-1)
            expert_output = linear(self.act(gate) * up, self.down[expert])
            output.index_add_(0, rows, expert_output * weights.flatten()[assigned, None])
        return self.group.all_reduce(output)

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [N, top_k] in hidden's precision, and experts [N, top_k] int64."""
        probabilities = linear(hidden, self.router).softmax(-1, dtype=torch.float32)
        weights, chosen = probabilities.topk(self.spec.top_k, dim=-1)
        if self.spec.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(hidden.dtype), chosen

    def weight_parts(self, prefix: str) -> Iterator[WeightPart]:
        num_experts, hidden_size = self.router.shape
        size, local = self.spec.intermediate_size, len(self.span)
        yield WeightPart(f"{prefix}gate.weight", self.router, (num_experts, hidden_size))
        for expert in range(num_experts):
            name = f"{prefix}experts.{expert}."
            gate_up, shape = self.gate_up[expert], (size, hidden_size)
            yield WeightPart(f"{name}gate_proj.weight", gate_up[:local], shape, dim=0, span=self.span)
            yield WeightPart(f"{name}up_proj.weight", gate_up[local:], shape, dim=0, span=self.span)
            yield WeightPart(f"{name}down_proj.weight", self.down[expert], (hidden_size, size), dim=1, span=self.span)
