"""The one decoder that all native architectures share; an architecture is a `DecoderSpec` made from its config.

Pre-norm blocks of attention and gated MLP (or experts), with the variations that `DecoderSpec` names. Knows nothing
of configs, files or batches. Tensors are flat over the tokens of a step: [N, hidden]. The residual stream, norms and
rope are float32 whatever the weights' type: only the matrix products round.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ramet.model_runner.context import AttentionContext, AttentionSpec
from ramet.model_runner.kv_pool import KVSpec
from ramet.model_runner.layers.embedding import VocabMatrix
from ramet.model_runner.layers.linear import (
    FP8_SIZE_MULTIPLE,
    ColumnParallelLinear,
    RowParallelLinear,
    can_pack,
    pack_weight,
    round_weight,
)
from ramet.model_runner.layers.mlp import GatedMLP
from ramet.model_runner.layers.moe import MoE, MoESpec
from ramet.model_runner.layers.norm import QKNorm, RMSNorm
from ramet.model_runner.layers.rope import RopeFrequencies, rotate
from ramet.model_runner.models.base import CausalLM
from ramet.model_runner.parallel import TpGroup
from ramet.model_runner.weights.mapping import WeightPart

_RopeTables = Mapping[str, tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What differs between the layers of one model. `rope` names an entry of `DecoderSpec.ropes`; `moe` None is a
    dense MLP."""

    sliding_window: int | None = None
    rope: str = "default"
    moe: MoESpec | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """Sizes and variations of a decoder.

    `norm_offset`: norms multiply by offset + weight. `post_norms`: the outputs of attention and MLP are normalised
    before they are added (Gemma's sandwich). `embedding_scale` multiplies the token embeddings. `attention_scale`
    None is head_dim ** -0.5. A softcap c turns x into c * tanh(x / c).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    layers: tuple[LayerSpec, ...]
    ropes: Mapping[str, RopeFrequencies]
    act: str = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    post_norms: bool = False
    embedding_scale: float | None = None
    attention_scale: float | None = None
    logit_softcap: float | None = None
    tied_embeddings: bool = False


class Attention(nn.Module):
    def __init__(self, spec: DecoderSpec, index: int, group: TpGroup, dtype: torch.dtype) -> None:
        super().__init__()
        layer, dim = spec.layers[index], spec.head_dim
        outputs = {"q_proj": spec.num_heads * dim, "k_proj": spec.num_kv_heads * dim, "v_proj": spec.num_kv_heads * dim}
        self.heads = len(group.shard(spec.num_heads, "query heads"))
        self.kv_heads = len(group.shard(spec.num_kv_heads, "key-value heads", replicated=True))
        self.qkv = ColumnParallelLinear(
            spec.hidden_size, outputs, group, dtype, bias=spec.qkv_bias, unit=dim, replicated=("k_proj", "v_proj")
        )
        self.out = RowParallelLinear(spec.num_heads * dim, spec.hidden_size, group, dtype, bias=spec.o_bias, unit=dim)
        self.head_dim = dim
        self.norm = QKNorm(self.heads, self.kv_heads, dim, spec.norm_eps, spec.norm_offset) if spec.qk_norm else None
        self.rope = layer.rope
        scale = spec.attention_scale if spec.attention_scale is not None else dim**-0.5
        self.spec = AttentionSpec(index, scale, layer.sliding_window)

    def forward(self, hidden: Tensor, ropes: _RopeTables, ctx: AttentionContext) -> Tensor:
        heads = self.qkv(hidden).unflatten(-1, (-1, self.head_dim))
        rotated_heads = self.heads + self.kv_heads
        query_key, value = heads[:, :rotated_heads].float(), heads[:, rotated_heads:]
        if self.norm is not None:
            query_key = self.norm(query_key)
        query_key = rotate(query_key, *ropes[self.rope])
        attended = ctx.attend(self.spec, query_key[:, : self.heads], query_key[:, self.heads :], value)
        return self.out(attended.flatten(1))

    def weight_parts(self, prefix: str) -> Iterator[WeightPart]:
        yield from self.qkv.weight_parts(prefix)
        yield from self.out.weight_parts(f"{prefix}o_proj")
        if self.norm is not None:
            yield from self.norm.weight_parts(prefix)


class DecoderLayer(nn.Module):
    def __init__(self, spec: DecoderSpec, index: int, group: TpGroup, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention = Attention(spec, index, group, dtype)
        self.mlp: GatedMLP | MoE
        if (moe := spec.layers[index].moe) is not None:
            self.mlp = MoE(spec.hidden_size, moe, spec.act, group, dtype)
        else:
            self.mlp = GatedMLP(spec.hidden_size, spec.intermediate_size, spec.act, group, dtype, bias=spec.mlp_bias)

        def norm(output: torch.dtype) -> RMSNorm:
            return RMSNorm(spec.hidden_size, spec.norm_eps, output, spec.norm_offset)

        self.attention_norm, self.mlp_norm = norm(dtype), norm(dtype)
        self.attention_post_norm = norm(torch.float32) if spec.post_norms else None
        self.mlp_post_norm = norm(torch.float32) if spec.post_norms else None

    def forward(self, hidden: Tensor, ropes: _RopeTables, ctx: AttentionContext) -> Tensor:
        output = self.attention(self.attention_norm(hidden), ropes, ctx)
        if self.attention_post_norm is not None:
            output = self.attention_post_norm(output)
        hidden = hidden + output
        output = self.mlp(self.mlp_norm(hidden))
        if self.mlp_post_norm is not None:
            output = self.mlp_post_norm(output)
        return hidden + output

    def weight_parts(self, prefix: str) -> Iterator[WeightPart]:
        yield from self.attention.weight_parts(f"{prefix}self_attn.")
        yield from self.mlp.weight_parts(f"{prefix}mlp.")
        yield from self.attention_norm.weight_parts(f"{prefix}input_layernorm")
        if self.attention_post_norm is None or self.mlp_post_norm is None:
            # The checkpoints' name for it: it comes after attention.
            yield from self.mlp_norm.weight_parts(f"{prefix}post_attention_layernorm")
        else:
            yield from self.attention_post_norm.weight_parts(f"{prefix}post_attention_layernorm")
            yield from self.mlp_norm.weight_parts(f"{prefix}pre_feedforward_layernorm")
            yield from self.mlp_post_norm.weight_parts(f"{prefix}post_feedforward_layernorm")


class Decoder(CausalLM):
    """Parameters are uninitialised until `weight_parts` are filled. `context_length` sizes the rope tables."""

    def __init__(self, spec: DecoderSpec, context_length: int, group: TpGroup, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = spec
        self.vocab_size = spec.vocab_size
        self.embedding = VocabMatrix(spec.vocab_size, spec.hidden_size, group, dtype)
        layers = [DecoderLayer(spec, index, group, dtype) for index in range(len(spec.layers))]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps, dtype, spec.norm_offset)
        self.head = (
            self.embedding if spec.tied_embeddings else VocabMatrix(spec.vocab_size, spec.hidden_size, group, dtype)
        )
        device = self.embedding.weight.device
        self.rope_tables = {name: frequencies.table(context_length, device) for name, frequencies in spec.ropes.items()}
        # Rounded to the model's precision, as the reference implementation does.
        scale = spec.embedding_scale
        self.embedding_scale = None if scale is None else torch.tensor(scale, dtype=dtype, device="cpu").item()
        kv_heads = layers[0].attention.kv_heads
        self.kv_specs = [KVSpec(kv_heads, spec.head_dim, spec.head_dim) for _ in spec.layers]

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, ctx: AttentionContext) -> Tensor:
        hidden = self.embedding.embed(token_ids).float()
        if self.embedding_scale is not None:
            hidden = hidden * self.embedding_scale
        ropes = {}
        for name, table in self.rope_tables.items():
            rows = table.index_select(0, ctx.positions)
            ropes[name] = (rows[:, :1], rows[:, 1:])
        for layer in self.layers:
            hidden = layer(hidden, ropes, ctx)
        return self.norm(hidden)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        logits = self.head.logits(hidden)
        cap = self.spec.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def check_fp8(self) -> None:
        """Raises ValueError for products that float8 has not."""
        if any(layer.moe is not None for layer in self.spec.layers):
            raise ValueError("experts are not rounded, and would be most of the model")
        for size in (size for module in self._products() for size in module.weight.shape):
            if size % FP8_SIZE_MULTIPLE:
                raise ValueError(f"a layer's size is {size}, but must be a multiple of {FP8_SIZE_MULTIPLE}")

    def round_to_fp8(self) -> None:
        """Round the weights of the dense products, now loaded; embedding and head stay as they are."""
        for module in self._products():
            round_weight(module)

    def pack(self) -> None:
        """Bring the weights, now loaded, into the layout that multiplies fastest here, where there is one."""
        if can_pack(self.embedding.weight):
            for module in self._products():
                pack_weight(module)
            self.head.pack()

    def _products(self) -> list[ColumnParallelLinear | RowParallelLinear]:
        return [m for m in self.modules() if isinstance(m, ColumnParallelLinear | RowParallelLinear)]

    def weight_parts(self) -> Iterator[WeightPart]:
        yield from self.embedding.weight_parts("model.embed_tokens")
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            yield from layer.weight_parts(f"model.layers.{index}.")
        yield from self.norm.weight_parts("model.norm")
        if self.head is not self.embedding:
            yield from self.head.weight_parts("lm_head")
