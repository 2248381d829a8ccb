"""Mistral 7B and its successors: Llama with, in some versions, a sliding window in all layers or in some."""

from transformers import PretrainedConfig

from ramet.model_runner.models.decoder import DecoderSpec, LayerSpec
from ramet.model_runner.models.llama import single_rope, sizes
from ramet.model_runner.models.qwen2 import windows


def mistral(config: PretrainedConfig, context_length: int) -> DecoderSpec:
    return DecoderSpec(
        **sizes(config),
        layers=tuple(LayerSpec(sliding_window=window) for window in windows(config)),
        ropes=single_rope(config, context_length),
    )
