"""Encoders of the BERT family: BERT, RoBERTa, XLM-RoBERTa, CamemBERT and DistilBERT, without heads or poolers.

Post-norm blocks of bidirectional attention and MLP (Devlin et al., 2018). The families differ in the names of their
tensors, in where positions begin, and in token types, of which only the first is ever given. Tensors are flat over the
tokens of a step: [N, hidden]. The residual stream and norms are float32, as in `decoder.py`.
"""

import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from ramet.model_runner.context import AttentionContext, AttentionSpec
from ramet.model_runner.layers.embedding import VocabMatrix
from ramet.model_runner.layers.linear import ColumnParallelLinear, RowParallelLinear, empty_parameter
from ramet.model_runner.layers.mlp import activation
from ramet.model_runner.layers.norm import LayerNorm
from ramet.model_runner.parallel import TpGroup
from ramet.model_runner.weights.errors import WeightsError
from ramet.model_runner.weights.mapping import WeightPart


@dataclasses.dataclass(frozen=True)
class LayerNames:
    """What a family calls the parts of a layer; `layers` is what stands before a layer's number."""

    layers: str = "encoder.layer."
    qkv: tuple[str, str, str] = ("attention.self.query", "attention.self.key", "attention.self.value")
    out: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    mlp_norm: str = "output.LayerNorm"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """`prefix` stands before all names in checkpoints with a head. The first token is at `first_position` of the
    position embeddings, of which there are `num_positions`. `num_types` 0: no token types."""

    prefix: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_layers: int
    num_positions: int
    norm_eps: float
    act: str
    first_position: int = 0
    num_types: int = 0
    names: LayerNames = LayerNames()


class EncoderLayer(nn.Module):
    def __init__(self, spec: EncoderSpec, index: int, group: TpGroup, dtype: torch.dtype) -> None:
        super().__init__()
        size, names, dim = spec.hidden_size, spec.names, spec.hidden_size // spec.num_heads
        self.head_dim = dim
        self.spec = AttentionSpec(index, dim**-0.5)
        self.names = names
        self.qkv = ColumnParallelLinear(size, dict.fromkeys(names.qkv, size), group, dtype, bias=True, unit=dim)
        self.out = RowParallelLinear(size, size, group, dtype, bias=True, unit=dim)
        self.up = ColumnParallelLinear(size, {names.up: spec.intermediate_size}, group, dtype, bias=True)
        self.down = RowParallelLinear(spec.intermediate_size, size, group, dtype, bias=True)
        self.act = activation(spec.act)
        self.attention_norm, self.mlp_norm = LayerNorm(size, spec.norm_eps), LayerNorm(size, spec.norm_eps)
        self.dtype = dtype

    def forward(self, hidden: Tensor, ctx: AttentionContext) -> Tensor:
        heads = self.qkv(hidden.to(self.dtype)).unflatten(-1, (-1, self.head_dim))
        attended = ctx.attend(self.spec, *heads.chunk(3, dim=1))
        hidden = self.attention_norm(hidden + self.out(attended.flatten(1)))
        return self.mlp_norm(hidden + self.down(self.act(self.up(hidden.to(self.dtype)))))

    def weight_parts(self, prefix: str) -> Iterator[WeightPart]:
        yield from self.qkv.weight_parts(prefix)
        yield from self.out.weight_parts(prefix + self.names.out)
        yield from self.attention_norm.weight_parts(prefix + self.names.attention_norm)
        yield from self.up.weight_parts(prefix)
        yield from self.down.weight_parts(prefix + self.names.down)
        yield from self.mlp_norm.weight_parts(prefix + self.names.mlp_norm)


class Encoder(nn.Module):
    """Parameters are uninitialised until `weight_parts` are filled."""

    def __init__(self, spec: EncoderSpec, group: TpGroup, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = spec
        self.vocab_size = spec.vocab_size
        self.embedding = VocabMatrix(spec.vocab_size, spec.hidden_size, group, dtype)
        self.positions = empty_parameter(spec.num_positions, spec.hidden_size, dtype=dtype)
        self.token_type = empty_parameter(1, spec.hidden_size, dtype=dtype) if spec.num_types else None
        self.norm = LayerNorm(spec.hidden_size, spec.norm_eps)
        self.layers = nn.ModuleList([EncoderLayer(spec, i, group, dtype) for i in range(spec.num_layers)])

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, ctx: AttentionContext) -> Tensor:
        """token_ids [N] int64 -> hidden states [N, hidden] float32."""
        hidden = self.embedding.embed(token_ids).float()
        if self.token_type is not None:
            hidden = hidden + self.token_type
        hidden = self.norm(hidden + F.embedding(ctx.positions + self.spec.first_position, self.positions))
        for layer in self.layers:
            hidden = layer(hidden, ctx)
        return hidden

    def weight_parts(self, prefix: str) -> Iterator[WeightPart]:
        spec, embeddings = self.spec, f"{prefix}embeddings."
        yield from self.embedding.weight_parts(f"{embeddings}word_embeddings")
        yield WeightPart(f"{embeddings}position_embeddings.weight", self.positions, tuple(self.positions.shape))
        if self.token_type is not None:
            types = (spec.num_types, spec.hidden_size)
            yield WeightPart(f"{embeddings}token_type_embeddings.weight", self.token_type, types, dim=0, span=range(1))
        yield from self.norm.weight_parts(f"{embeddings}LayerNorm")
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, EncoderLayer)
            yield from layer.weight_parts(f"{prefix}{spec.names.layers}{index}.")


def _bert(config: PretrainedConfig) -> EncoderSpec:
    if (kind := getattr(config, "position_embedding_type", "absolute")) != "absolute":
        raise WeightsError(f"position_embedding_type {kind!r} is not supported, only 'absolute' is")
    return EncoderSpec(
        prefix="bert.",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_layers=config.num_hidden_layers,
        num_positions=config.max_position_embeddings,
        norm_eps=config.layer_norm_eps,
        act=config.hidden_act,
        num_types=config.type_vocab_size,
    )


def _roberta(config: PretrainedConfig) -> EncoderSpec:
    """Positions begin behind that of the padding token."""
    return dataclasses.replace(_bert(config), prefix="roberta.", first_position=config.pad_token_id + 1)


def _distilbert(config: PretrainedConfig) -> EncoderSpec:
    return EncoderSpec(
        prefix="distilbert.",
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_heads=config.n_heads,
        num_layers=config.n_layers,
        num_positions=config.max_position_embeddings,
        norm_eps=1e-12,
        act=config.activation,
        names=LayerNames(
            layers="transformer.layer.",
            qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            out="attention.out_lin",
            attention_norm="sa_layer_norm",
            up="ffn.lin1",
            down="ffn.lin2",
            mlp_norm="output_layer_norm",
        ),
    )


# By `model_type`; the keys are those of `ENCODER_TYPES` in `model_runner/config.py`.
ENCODERS: dict[str, Callable[[PretrainedConfig], EncoderSpec]] = {
    "bert": _bert,
    "camembert": _roberta,
    "distilbert": _distilbert,
    "roberta": _roberta,
    "xlm-roberta": _roberta,
}
