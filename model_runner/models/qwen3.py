"""Qwen3: Qwen2 with a norm on each query and key head in place of the biases."""

from ramet.model_runner.models.decoder import DecoderSpec, LayerSpec
from ramet.model_runner.models.llama import single_rope, sizes
from ramet.model_runner.models.model_config import ModelConfig
from ramet.model_runner.models.qwen2 import windows


def qwen3(config: ModelConfig, context_length: int) -> DecoderSpec:
    return DecoderSpec(
        **sizes(config),
        layers=tuple(LayerSpec(sliding_window=window) for window in windows(config)),
        ropes=single_rope(config, context_length),
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        qk_norm=True,
    )
