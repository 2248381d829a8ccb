"""Llama 2 to 3.x, and every checkpoint of its shape (SmolLM2, TinyLlama, Yi, …)."""

from typing import Any

from ramet.model_runner.layers.rope import RopeFrequencies, rope_frequencies
from ramet.model_runner.models.decoder import DecoderSpec, LayerSpec
from ramet.model_runner.models.model_config import ModelConfig


def llama(config: ModelConfig, context_length: int) -> DecoderSpec:
    return DecoderSpec(
        **sizes(config),
        layers=(LayerSpec(),) * config.num_hidden_layers,
        ropes=single_rope(config, context_length),
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
    )


def sizes(config: ModelConfig) -> dict[str, Any]:
    """The fields of `DecoderSpec` that all Llama-like configs spell alike."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "norm_eps": config.rms_norm_eps,
        "act": getattr(config, "hidden_act", "silu"),
        "tied_embeddings": config.tie_word_embeddings,
    }


def single_rope(config: ModelConfig, context_length: int) -> dict[str, RopeFrequencies]:
    """One rope for all layers."""
    return {"default": rope_frequencies(config, context_length)}
