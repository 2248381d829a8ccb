"""Mistral 7B and its successors: Llama with, in early versions, a sliding window in every layer."""

from transformers import PretrainedConfig

from ramet.model_runner.models.decoder import DecoderSpec, LayerSpec
from ramet.model_runner.models.llama import single_rope, sizes


def mistral(config: PretrainedConfig, context_length: int) -> DecoderSpec:
    return DecoderSpec(
        **sizes(config),
        layers=(LayerSpec(sliding_window=config.sliding_window),) * config.num_hidden_layers,
        ropes=single_rope(config, context_length),
    )
