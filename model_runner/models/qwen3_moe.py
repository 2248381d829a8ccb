"""Qwen3-MoE: Qwen3 whose MLPs are mixtures of experts, but for the layers that the config keeps dense."""

from ramet.model_runner.layers.moe import MoESpec
from ramet.model_runner.models.decoder import DecoderSpec, LayerSpec
from ramet.model_runner.models.llama import single_rope, sizes
from ramet.model_runner.models.model_config import ModelConfig


def qwen3_moe(config: ModelConfig, context_length: int) -> DecoderSpec:
    experts = MoESpec(
        config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size, config.norm_topk_prob
    )

    def layer(index: int) -> LayerSpec:
        sparse = (
            config.num_experts > 0
            and index not in config.mlp_only_layers
            and (index + 1) % config.decoder_sparse_step == 0
        )
        return LayerSpec(sliding_window=config.sliding_window, moe=experts if sparse else None)

    return DecoderSpec(
        **sizes(config),
        layers=tuple(layer(index) for index in range(config.num_hidden_layers)),
        ropes=single_rope(config, context_length),
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        qk_norm=True,
    )
