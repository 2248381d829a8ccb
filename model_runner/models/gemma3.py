"""Gemma 3 (text): sandwich norms of 1 + weight, scaled embeddings, and a sliding window with a rope of its own in
most layers."""

from ramet.model_runner.layers.rope import rope_frequencies
from ramet.model_runner.models.decoder import DecoderSpec, LayerSpec
from ramet.model_runner.models.llama import sizes
from ramet.model_runner.models.model_config import ModelConfig
from ramet.model_runner.models.qwen2 import windows


def gemma3(config: ModelConfig, context_length: int) -> DecoderSpec:
    kinds = config.layer_types
    if config.attn_logit_softcapping is not None:
        # transformers has the setting and does nothing with it; who trained with it, nobody knows.
        raise ValueError(f"attn_logit_softcapping must be null for Gemma 3, got {config.attn_logit_softcapping}")
    return DecoderSpec(
        **sizes(config) | {"act": config.hidden_activation},
        layers=tuple(
            LayerSpec(sliding_window=window, rope=kind) for window, kind in zip(windows(config), kinds, strict=True)
        ),
        ropes={kind: rope_frequencies(config, context_length, kind) for kind in sorted(set(kinds))},
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        qk_norm=True,
        norm_offset=1.0,
        post_norms=True,
        embedding_scale=config.hidden_size**0.5,
        attention_scale=config.query_pre_attn_scalar**-0.5,
        logit_softcap=config.final_logit_softcapping,
    )
