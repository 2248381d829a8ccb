"""`CudaDecoder`: a native decoder in fused Triton kernels around the layers' own matrix products.

Made of a loaded `Decoder`, whose layers it runs; that class is its plain twin and says what is computed. Additions to
the residual stream are done by the norm that follows them, in place. Nothing here waits for the device.
"""

import torch
from torch import Tensor

from ramet.kernels.triton.gated_mlp import ACTIVATIONS, gated
from ramet.kernels.triton.moe import experts
from ramet.kernels.triton.norm import add_rms_norm
from ramet.kernels.triton.rope_store import rope_and_store
from ramet.model_runner.context import ForwardContext
from ramet.model_runner.layers.mlp import GatedMLP
from ramet.model_runner.layers.moe import MoE
from ramet.model_runner.layers.norm import RMSNorm
from ramet.model_runner.models.base import CausalLM
from ramet.model_runner.models.decoder import Attention, Decoder, DecoderLayer


def covers(model: Decoder) -> bool:
    """Whether there are kernels for all that the model does."""
    return model.embedding.weight.device.type == "cuda" and model.spec.act in ACTIVATIONS


class CudaDecoder(CausalLM):
    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.spec, self.vocab_size, self.kv_specs = model.spec, model.vocab_size, model.kv_specs
        self._model = model

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        model = self._model
        residual = model.embedding.embed(token_ids).float()
        if model.embedding_scale is not None:
            residual *= model.embedding_scale
        delta: Tensor | None = None
        post_norm: RMSNorm | None = None
        for layer in model.layers:
            assert isinstance(layer, DecoderLayer)
            normed = _add_norm(residual, delta, post_norm, layer.attention_norm)
            delta = self._attend(layer.attention, normed, ctx)
            normed = _add_norm(residual, delta, layer.attention_post_norm, layer.mlp_norm)
            delta = self._feed(layer.mlp, normed)
            post_norm = layer.mlp_post_norm
        return _add_norm(residual, delta, post_norm, model.norm)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        return self._model.logits(hidden)

    def _attend(self, attention: Attention, normed: Tensor, ctx: ForwardContext) -> Tensor:
        layer, norm = attention.spec.layer, attention.norm
        query = rope_and_store(
            attention.qkv(normed),
            ctx.kv_pool.keys[layer],
            ctx.kv_pool.values[layer],
            self._model.rope_tables[attention.rope],
            ctx.positions,
            ctx.slot_mapping,
            norm_weight=None if norm is None else norm.weight,
            eps=self.spec.norm_eps,
        )
        return attention.out(ctx.backend.forward(attention.spec, query, ctx).flatten(1))

    def _feed(self, mlp: GatedMLP | MoE, normed: Tensor) -> Tensor:
        if isinstance(mlp, GatedMLP):
            return mlp.down(gated(mlp.gate_up(normed), self.spec.act))
        weights, chosen = mlp.route(normed)
        return mlp.group.all_reduce(experts(normed, mlp.gate_up, mlp.down, weights, chosen, self.spec.act))


def _add_norm(residual: Tensor, delta: Tensor | None, post_norm: RMSNorm | None, norm: RMSNorm) -> Tensor:
    """residual += delta, normalised first by `post_norm` if there is one; returns the norm of that."""
    delta_weight = None if post_norm is None else post_norm.weight
    return add_rms_norm(residual, delta, norm.weight, norm.eps, norm.dtype, delta_weight=delta_weight)
