"""Qwen2 and Qwen2.5: Llama with biases on query, key and value, and optional sliding windows in the upper layers."""

from ramet.model_runner.models.decoder import DecoderSpec, LayerSpec
from ramet.model_runner.models.llama import single_rope, sizes
from ramet.model_runner.models.model_config import ModelConfig


def qwen2(config: ModelConfig, context_length: int) -> DecoderSpec:
    return DecoderSpec(
        **sizes(config),
        layers=tuple(LayerSpec(sliding_window=window) for window in windows(config)),
        ropes=single_rope(config, context_length),
        qkv_bias=True,
    )


def windows(config: ModelConfig) -> list[int | None]:
    """The sliding window of each layer, of all if the config has no `layer_types`, which otherwise already accounts
    for `max_window_layers`. Raises LookupError for another kind of layer, ValueError for a window without a size."""
    if (kinds := getattr(config, "layer_types", None)) is None:
        return [config.sliding_window] * config.num_hidden_layers
    if config.sliding_window is None and "sliding_attention" in kinds:
        raise ValueError("layer_types has sliding_attention, but there is no sliding_window")
    window = {"full_attention": None, "sliding_attention": config.sliding_window}
    return [window[kind] for kind in kinds]
