"""Encoders of the BERT family: BERT, RoBERTa, XLM-RoBERTa, CamemBERT and DistilBERT, without heads or poolers.

Post-norm blocks of bidirectional attention and MLP (Devlin et al., 2018). The families differ in the names of their
tensors, in where positions begin, and in token types, of which only the first is ever given. Tensors are flat over the
tokens of a step: [N, hidden]. The residual stream and norms are float32, as in `decoder.py`.
"""

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ramet.model_runner.context import AttentionContext, AttentionSpec
from ramet.model_runner.layers.embedding import VocabMatrix
from ramet.model_runner.layers.linear import ColumnParallelLinear, RowParallelLinear, empty_parameter
from ramet.model_runner.layers.mlp import activation
from ramet.model_runner.layers.norm import LayerNorm
from ramet.model_runner.models.model_config import ModelConfig
from ramet.model_runner.parallel import TpGroup
from ramet.model_runner.weights.errors import WeightsError
from ramet.model_runner.weights.mapping import WeightPart


@dataclasses.dataclass(frozen=True)
class Family:
    """In what the families differ. `prefix` stands before all names in checkpoints with a head, `layers` before the
    number of a layer; `qkv` to `mlp_norm` name its parts. `inner_size` and `act` are keys of the config.
    `starts_behind_padding`: positions are counted from the padding token's id on, where that token itself is."""

    prefix: str = "bert."
    layers: str = "encoder.layer."
    qkv: tuple[str, str, str] = ("attention.self.query", "attention.self.key", "attention.self.value")
    out: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    mlp_norm: str = "output.LayerNorm"
    inner_size: str = "intermediate_size"
    act: str = "hidden_act"
    starts_behind_padding: bool = False


class EncoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, family: Family, index: int, group: TpGroup, dtype: torch.dtype) -> None:
        super().__init__()
        size, inner = config.hidden_size, getattr(config, family.inner_size)
        self.head_dim = dim = size // config.num_attention_heads
        self.spec = AttentionSpec(index, dim**-0.5)
        self.family = family
        self.qkv = ColumnParallelLinear(size, dict.fromkeys(family.qkv, size), group, dtype, bias=True, unit=dim)
        self.out = RowParallelLinear(size, size, group, dtype, bias=True, unit=dim)
        self.up = ColumnParallelLinear(size, {family.up: inner}, group, dtype, bias=True)
        self.down = RowParallelLinear(inner, size, group, dtype, bias=True)
        self.act = activation(getattr(config, family.act))
        self.attention_norm, self.mlp_norm = _norm(config), _norm(config)
        self.dtype = dtype

    def forward(self, hidden: Tensor, ctx: AttentionContext) -> Tensor:
        heads = self.qkv(hidden.to(self.dtype)).unflatten(-1, (-1, self.head_dim))
        attended = ctx.attend(self.spec, *heads.chunk(3, dim=1))
        hidden = self.attention_norm(hidden + self.out(attended.flatten(1)))
        return self.mlp_norm(hidden + self.down(self.act(self.up(hidden.to(self.dtype)))))

    def weight_parts(self, prefix: str) -> Iterator[WeightPart]:
        yield from self.qkv.weight_parts(prefix)
        yield from self.out.weight_parts(prefix + self.family.out)
        yield from self.attention_norm.weight_parts(prefix + self.family.attention_norm)
        yield from self.up.weight_parts(prefix)
        yield from self.down.weight_parts(prefix + self.family.down)
        yield from self.mlp_norm.weight_parts(prefix + self.family.mlp_norm)


class Encoder(nn.Module):
    """Parameters are uninitialised until `weight_parts` are filled."""

    def __init__(self, config: ModelConfig, family: Family, group: TpGroup, dtype: torch.dtype) -> None:
        super().__init__()
        # A decoder of this family attends to what came before alone.
        for key, supported in (("position_embedding_type", "absolute"), ("is_decoder", False)):
            if (found := getattr(config, key, supported)) != supported:
                raise WeightsError(f"{key} {found!r} is not supported, only {supported!r} is")
        size, num_layers = config.hidden_size, config.num_hidden_layers
        self.family = family
        self.vocab_size = config.vocab_size
        self.embedding = VocabMatrix(config.vocab_size, size, group, dtype)
        self.positions = empty_parameter(config.max_position_embeddings, size, dtype=dtype)
        self.padding = config.pad_token_id if family.starts_behind_padding else None
        self.num_types = getattr(config, "type_vocab_size", 0)
        self.token_type = empty_parameter(1, size, dtype=dtype) if self.num_types else None
        self.norm = _norm(config)
        self.layers = nn.ModuleList([EncoderLayer(config, family, i, group, dtype) for i in range(num_layers)])

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, ctx: AttentionContext) -> Tensor:
        """token_ids [N] int64 -> hidden states [N, hidden] float32."""
        hidden = self.embedding.embed(token_ids).float()
        if self.token_type is not None:
            hidden = hidden + self.token_type
        hidden = self.norm(hidden + F.embedding(self._positions(token_ids, ctx.positions), self.positions))
        for layer in self.layers:
            hidden = layer(hidden, ctx)
        return hidden

    def _positions(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Rows of the table. A text may hold the padding token, which is then not counted."""
        if self.padding is None:
            return positions
        counted = token_ids != self.padding
        before = counted.cumsum(0) - counted.long()  # in the whole step
        starts = torch.arange(len(positions), device=positions.device) - positions
        return self.padding + counted * (before - before[starts] + 1)

    def weight_parts(self, prefix: str) -> Iterator[WeightPart]:
        embeddings = f"{prefix}embeddings."
        yield from self.embedding.weight_parts(f"{embeddings}word_embeddings")
        yield WeightPart(f"{embeddings}position_embeddings.weight", self.positions, tuple(self.positions.shape))
        if self.token_type is not None:
            types = (self.num_types, self.token_type.shape[1])
            yield WeightPart(f"{embeddings}token_type_embeddings.weight", self.token_type, types, dim=0, span=range(1))
        yield from self.norm.weight_parts(f"{embeddings}LayerNorm")
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, EncoderLayer)
            yield from layer.weight_parts(f"{prefix}{self.family.layers}{index}.")


def _norm(config: ModelConfig) -> LayerNorm:
    # DistilBERT has no such setting, whatever its config.json says.
    return LayerNorm(config.hidden_size, 1e-12 if config.model_type == "distilbert" else config.layer_norm_eps)


_ROBERTA = Family(prefix="roberta.", starts_behind_padding=True)
# By `model_type`; the keys are those of `ENCODER_TYPES` in `model_runner/config.py`.
ENCODERS = {
    "bert": Family(),
    "camembert": _ROBERTA,
    "distilbert": Family(
        prefix="distilbert.",
        layers="transformer.layer.",
        qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        out="attention.out_lin",
        attention_norm="sa_layer_norm",
        up="ffn.lin1",
        down="ffn.lin2",
        mlp_norm="output_layer_norm",
        inner_size="hidden_dim",
        act="activation",
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}
