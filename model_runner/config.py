"""What the model runner needs to know, resolved by the launcher and frozen."""

import enum
from typing import Literal

import msgspec


class LoadFormat(enum.StrEnum):
    """Where the weights come from. `pickle` is PyTorch's .bin format, read with `weights_only` and only on request."""

    SAFETENSORS = "safetensors"
    GGUF = "gguf"
    DUMMY = "dummy"
    PICKLE = "pickle"


# The `model_type`s of encoders: models that embed and cannot generate.
ENCODER_TYPES = frozenset({"bert", "camembert", "distilbert", "roberta", "xlm-roberta"})


class RunnerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`model_dir` holds config.json (and safetensors); `weights` is the .gguf file or the folder of weight files.

    `dtype` is a torch dtype's name. `device_index`: which GPU, if `device` is cuda. `max_total_tokens` is the size of
    the KV pool; None sizes it from `memory_fraction`: on a CPU of the memory that is free once the weights are loaded,
    on CUDA the share of the device's memory that may be taken in all. `quantization` rounds weights on load. Decode
    steps of at most `cuda_graph_max_bs` rows are CUDA graphs; 0 for none. `config_cache`: the folder where full configs
    are kept; None for nowhere.
    """

    model_dir: str
    weights: str
    load_format: LoadFormat
    dtype: str
    device: str
    device_index: int = 0
    page_size: int
    max_running: int
    max_step_tokens: int
    context_length: int
    memory_fraction: float
    max_total_tokens: int | None = None
    attention_backend: str = "auto"
    trust_remote_code: bool = False
    seed: int = 0
    quantization: Literal["int8", "int4", "fp8"] | None = None
    cuda_graph_max_bs: int = 0
    config_cache: str | None = None
