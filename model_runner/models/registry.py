"""Which architectures have a native file, by the class name in a Hugging Face config."""

from collections.abc import Callable

from ramet.model_runner.models.decoder import DecoderSpec
from ramet.model_runner.models.gemma3 import gemma3
from ramet.model_runner.models.llama import llama
from ramet.model_runner.models.mistral import mistral
from ramet.model_runner.models.model_config import ModelConfig
from ramet.model_runner.models.qwen2 import qwen2
from ramet.model_runner.models.qwen3 import qwen3
from ramet.model_runner.models.qwen3_moe import qwen3_moe

# A builder takes the config and the context length to serve.
SpecBuilder = Callable[[ModelConfig, int], DecoderSpec]

NATIVE: dict[str, SpecBuilder] = {
    "Gemma3ForCausalLM": gemma3,
    "LlamaForCausalLM": llama,
    "MinistralForCausalLM": mistral,
    "MistralForCausalLM": mistral,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "Qwen3MoeForCausalLM": qwen3_moe,
}


def architecture_of(config: ModelConfig) -> str:
    """The class that runs the checkpoint. Configs made from a GGUF header may only tell the model type."""
    if config.architectures:
        return config.architectures[0]
    return config.causal_lm or config.model_type


def native_builder(config: ModelConfig, architecture: str, trust_remote_code: bool) -> SpecBuilder | None:
    """That of the class `architecture`. None also if transformers would run another one: it goes by `model_type`, and
    by code in the model's folder where that is trusted. Nor does any builder know layers that differ in their sizes."""
    own = NATIVE.get(config.causal_lm or "")
    remote = trust_remote_code and getattr(config, "auto_map", None)
    return None if own is not NATIVE.get(architecture) or remote or config.layers_differ else own
