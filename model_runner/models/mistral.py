"""Mistral 7B and its successors: Llama with, in some versions, a sliding window in all layers or in some."""

from ramet.model_runner.models.decoder import DecoderSpec, LayerSpec
from ramet.model_runner.models.llama import single_rope, sizes
from ramet.model_runner.models.model_config import ModelConfig
from ramet.model_runner.models.qwen2 import windows


def mistral(config: ModelConfig, context_length: int) -> DecoderSpec:
    return DecoderSpec(
        **sizes(config),
        layers=tuple(LayerSpec(sliding_window=window) for window in windows(config)),
        ropes=single_rope(config, context_length),
    )
