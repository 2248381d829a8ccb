"""`CpuDecoder`: a native decoder as one call of the C kernel per step (`kernels/cpu/decoder.c`).

Made of a loaded `Decoder`, whose weights it takes over and packs; that class is its plain twin and says what is
computed. It covers dense bfloat16 models on one CPU rank, and rounds their weights to 8 or 4 bits if asked, but for
those that a file has in such 4 bits. The inputs of these products are rounded to 8 bits, each 32 or 64 by a scale.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ramet.kernels.cpu import decoder as kernel
from ramet.kernels.cpu.decoder import Grid, Op, Packed, interleave, op
from ramet.kernels.cpu.huge_pages import HugePages
from ramet.model_runner.context import ForwardContext
from ramet.model_runner.kv_pool import KVPool
from ramet.model_runner.layers.linear import ColumnParallelLinear, RowParallelLinear
from ramet.model_runner.layers.mlp import GatedMLP
from ramet.model_runner.layers.norm import RMSNorm
from ramet.model_runner.models.base import CausalLM
from ramet.model_runner.models.decoder import Attention, Decoder, DecoderLayer

_LOG2_E = math.log2(math.e)  # the kernel's softmax has base 2
_GATED = {"silu": kernel.GATED_SILU, "gelu_pytorch_tanh": kernel.GATED_GELU_TANH}


def covers(model: Decoder, page_size: int, bits: int) -> bool:
    """Whether the kernel can compute this model with pages of that size and weights of so many bits."""
    spec, unit = model.spec, 32 if bits < 16 else 16
    weight = model.embedding.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype is torch.bfloat16
        and model.embedding.group.size == 1
        and all(layer.moe is None for layer in spec.layers)
        and spec.act in _GATED
        and spec.head_dim % 16 == page_size % 16 == 0
        and all(size % unit == 0 for size in (spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim))
    )


class CpuDecoder(CausalLM):
    """Raises KernelUnavailable if the kernel cannot be used on this machine; the model is then as it was.

    `stored`, for 4 bits: what stands for the matrices at these addresses in the model's weights. It is used up.
    """

    def __init__(self, model: Decoder, bits: int, stored: dict[int, Grid]) -> None:
        super().__init__()
        self._bits = bits
        self._kernel = kernel.DecoderKernel()
        self.spec, self.vocab_size, self.kv_specs = model.spec, model.vocab_size, model.kv_specs
        self._model = model
        # Packed one after the other, each in place of the plain one.
        pages = HugePages()
        self._weights = {id(module): _take_weight(module, bits, stored).kept_in(pages) for module in self._linears()}
        self._biases = {id(module): _bias(module) for module in self._linears()}
        # 4 bits are too few for the head: its error goes straight into the logits.
        self._head = Packed.of(model.head.weight, max(bits, 8)).kept_in(pages)
        self._capacity = 0
        self._scratch: dict[str, Tensor] = {}
        self._pool: KVPool | None = None

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        n = token_ids.shape[0]
        if n > self._capacity or ctx.kv_pool is not self._pool:
            self._prepare(max(n, self._capacity), ctx.kv_pool)
        residual = self._scratch["residual"][:n]
        residual.copy_(self._model.embedding.embed(token_ids))
        if self._model.embedding_scale is not None:
            residual *= self._model.embedding_scale
        tables = (ctx.positions, ctx.slot_mapping, ctx.block_table, ctx.cu_q, ctx.seq_lens)
        self._kernel.run(self._ops, n, tables, ctx.kv_pool.page_size)
        attended, normed = self._scratch["attended"], self._scratch["normed"]
        if ctx.wanted is None or len(ctx.wanted) == n:
            self._kernel.run(self._last_ops, n)
            return normed[:n]
        # After the last keys and values are stored, only what is read of the result needs computing.
        wanted = len(ctx.wanted)
        attended[:wanted], residual[:wanted] = attended[ctx.wanted], residual[ctx.wanted]
        self._kernel.run(self._last_ops, wanted)
        hidden = torch.empty_like(normed[:n])
        hidden[ctx.wanted] = normed[:wanted]
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        hidden = hidden.contiguous()
        logits = torch.empty(hidden.shape[0], self.vocab_size)
        rounded = _Rounded(*hidden.shape) if self._bits < 16 else None
        ops = _product(self._head, None, hidden, rounded, logits, kernel.STORE)
        self._kernel.run((Op * len(ops))(*ops), hidden.shape[0])
        cap = self.spec.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _linears(self) -> list[ColumnParallelLinear | RowParallelLinear]:
        return [m for m in self._model.modules() if isinstance(m, ColumnParallelLinear | RowParallelLinear)]

    def _prepare(self, capacity: int, pool: KVPool) -> None:
        """Buffers for so many tokens, and the operations that work in them."""
        spec = self.spec
        heads = spec.num_heads + 2 * spec.num_kv_heads
        pages = HugePages()

        def buffer(width: int, dtype: torch.dtype) -> Tensor:
            return pages.take((capacity, width), dtype)

        self._scratch = {
            "residual": buffer(spec.hidden_size, torch.float32),
            "normed": buffer(spec.hidden_size, torch.bfloat16),
            "qkv": buffer(heads * spec.head_dim, torch.float32),
            "query": buffer(spec.num_heads * spec.head_dim, torch.bfloat16),
            "attended": buffer(spec.num_heads * spec.head_dim, torch.bfloat16),
            "gated": buffer(spec.intermediate_size, torch.bfloat16),
            "output": buffer(spec.hidden_size, torch.float32),
        }
        widest = max(spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim)
        self._rounded = _Rounded(capacity, widest) if self._bits < 16 else None
        self._capacity, self._pool = capacity, pool
        ops: list[Op] = []
        for layer in self._model.layers:
            assert isinstance(layer, DecoderLayer) and isinstance(layer.mlp, GatedMLP)
            ops.append(self._norm(layer.attention_norm))
            ops += self._attention(layer.attention, pool)
            num_before_last = len(ops)
            ops += self._add(layer.attention.out, "attended", layer.attention_post_norm)
            ops.append(self._norm(layer.mlp_norm))
            ops += self._matmul(layer.mlp.gate_up, "normed", "gated", _GATED[spec.act])
            ops += self._add(layer.mlp.down, "gated", layer.mlp_post_norm)
        ops.append(self._norm(self._model.norm))
        first, last = ops[:num_before_last], ops[num_before_last:]
        self._ops, self._last_ops = (Op * len(first))(*first), (Op * len(last))(*last)

    def _norm(self, norm: RMSNorm, source: str = "residual", out: str = "normed", effect: int = kernel.STORE) -> Op:
        sizes = {"width": self.spec.hidden_size, "effect": effect, "eps": norm.eps}
        return op(kernel.NORM, self._scratch[source], self._scratch[out], weight=norm.weight, **sizes)

    def _matmul(self, linear: ColumnParallelLinear | RowParallelLinear, source: str, out: str, effect: int) -> list[Op]:
        weight, bias = self._weights[id(linear)], self._biases[id(linear)]
        return _product(weight, bias, self._scratch[source], self._rounded, self._scratch[out], effect)

    def _add(self, linear: RowParallelLinear, source: str, post_norm: RMSNorm | None) -> list[Op]:
        """A product that is added to the residual stream, normalised before if the model does so."""
        if post_norm is None:
            return self._matmul(linear, source, "residual", kernel.ADD)
        return [
            *self._matmul(linear, source, "output", kernel.STORE),
            self._norm(post_norm, "output", "residual", kernel.ADD),
        ]

    def _attention(self, attention: Attention, pool: KVPool) -> list[Op]:
        spec, norm = attention.spec, attention.norm
        shape: dict[str, Tensor | float | None] = {
            "keys": pool.keys[spec.layer],
            "values": pool.values[spec.layer],
            "heads": attention.heads,
            "kv_heads": attention.kv_heads,
            "dim": attention.head_dim,
        }
        turn = {"table": self._model.rope_tables[attention.rope], "scale": spec.scale * _LOG2_E, **shape}
        if norm is not None:
            turn |= {"weight": norm.weight, "eps": norm.eps}
        limits = {"window": spec.sliding_window or 0, "softcap": (spec.softcap or 0.0) * _LOG2_E}
        rope = op(kernel.ROPE, self._scratch["qkv"], self._scratch["query"], **turn)
        attend = op(kernel.ATTENTION, self._scratch["query"], self._scratch["attended"], **limits, **shape)
        return [*self._matmul(attention.qkv, "normed", "qkv", kernel.STORE), rope, attend]


class _Rounded:
    """Where rounded inputs are kept: one product's at a time."""

    def __init__(self, tokens: int, width: int) -> None:
        self.values = torch.empty(tokens, width, dtype=torch.uint8)
        groups = -(-width // kernel.GROUP)
        self.scales, self.sums = torch.empty(tokens, groups), torch.empty(tokens, groups, dtype=torch.int32)


def _product(
    weight: Packed, bias: Tensor | None, source: Tensor, rounded: _Rounded | None, out: Tensor, effect: int
) -> list[Op]:
    """out [n, width] from source [n, in] bfloat16, through `rounded` if the weight has fewer bits."""
    inner, ops, inputs = source.shape[1], [], {}
    if rounded is not None:
        inputs = {"row_scales": rounded.scales, "group_sums": rounded.sums}
        ops.append(op(kernel.QUANTIZE, source, rounded.values, width=inner, bits=weight.bits, **inputs))
        source = rounded.values
    fields = {"weight": weight.weight, "scales": weight.scales, "bias": bias, **inputs}
    sizes = {"width": out.shape[1], "inner": inner, "effect": effect, "bits": weight.bits}
    return [*ops, op(kernel.MATMUL, source, out, **fields, **sizes)]


def _is_gated(module: ColumnParallelLinear | RowParallelLinear) -> bool:
    return isinstance(module, ColumnParallelLinear) and "gate_proj" in module.outputs


def _in_order(module: ColumnParallelLinear | RowParallelLinear, tensor: Tensor) -> Tensor:
    """What the layer has for each output, in the order in which the kernel wants the outputs."""
    return interleave(*tensor.chunk(2)) if _is_gated(module) else tensor


def _take_weight(module: ColumnParallelLinear | RowParallelLinear, bits: int, stored: dict[int, Grid]) -> Packed:
    """The weight, packed; the plain one is taken out of the layer."""
    weight = module.weight.detach()
    del module.weight
    if bits != 4:
        return Packed.of(_in_order(module, weight), bits)
    parts = weight.split(module.local_sizes) if isinstance(module, ColumnParallelLinear) else [weight]
    grids = [stored.pop(part.data_ptr()) if part.data_ptr() in stored else Grid.of(part) for part in parts]
    return Packed.of_grid(Grid(*(_in_order(module, torch.cat(pieces)) for pieces in zip(*grids, strict=True))))


def _bias(module: ColumnParallelLinear | RowParallelLinear) -> Tensor | None:
    if module.bias is None:
        return None
    bias = _in_order(module, module.bias.detach().float())
    return F.pad(bias, (0, -bias.shape[0] % kernel.COLUMNS))
