"""`load_model`, `load_embedder`: from a `RunnerConfig` to a model with its weights on the device.

A native architecture is built empty and then filled part by part, so that weights are never held twice; any other
goes to `hf_fallback`. Knows formats by name only; `weights/` reads them.
"""

import contextlib
import dataclasses
import logging
from pathlib import Path

import torch

from ramet.kernels.cpu.build import KernelUnavailable
from ramet.kernels.cpu.decoder import DecoderKernel, Grid
from ramet.model_runner.config import LoadFormat, RunnerConfig
from ramet.model_runner.layers.rope import plain_frequencies
from ramet.model_runner.models.base import CausalLM
from ramet.model_runner.models.bert import ENCODERS, Encoder
from ramet.model_runner.models.cpu_decoder import CpuDecoder, covers
from ramet.model_runner.models.decoder import Decoder, DecoderSpec
from ramet.model_runner.models.model_config import ModelConfig, read_config
from ramet.model_runner.models.registry import NATIVE, SpecBuilder, architecture_of, native_builder
from ramet.model_runner.parallel import TpGroup
from ramet.model_runner.weights.dummy import RandomSource
from ramet.model_runner.weights.errors import WeightsError
from ramet.model_runner.weights.gguf import ROPE_FACTORS, GGUFSource
from ramet.model_runner.weights.mapping import Progress, WeightPart, WeightSource, fill
from ramet.model_runner.weights.pickle import PickleSource
from ramet.model_runner.weights.safetensors import SafetensorsSource

logger = logging.getLogger(__name__)

# Classes of an encoder's checkpoint that hold the encoder, and what only their heads need.
_ENCODER_CLASSES = ("Model", "ForMaskedLM", "ForPreTraining")
_HEADS = ("pooler.", "cls.", "lm_head.", "vocab_", "embeddings.position_ids")
# The attention backends beside which the C kernel of whole decoders may run, and what it rounds weights to.
_WHOLE_DECODERS = ("auto", "cpu")
_BITS: dict[str | None, int] = {"int8": 8, "int4": 4}


@torch.no_grad()
def load_model(config: RunnerConfig, group: TpGroup, progress: Progress) -> CausalLM:
    """`progress(done, total)` is called while weights are read, in tensors.

    Raises WeightsError, with words for the user, if the model cannot be run as its config asks.
    """
    model_config = read_config(config)
    architecture = architecture_of(model_config)
    build = native_builder(model_config, architecture, config.trust_remote_code)
    if build is None:
        if config.quantization is not None:
            raise WeightsError(f"quantization {config.quantization} is for native models, not for the fallback")
        # Imported when needed: transformers' modelling code takes two seconds to import.
        from ramet.model_runner.models.hf_fallback import load_fallback

        return load_fallback(config, architecture, group, progress)
    return _load_native(config, model_config, build, group, progress)


@torch.no_grad()
def load_embedder(config: RunnerConfig, group: TpGroup, progress: Progress) -> Encoder | CausalLM:
    """An encoder, or a decoder without its head. Raises WeightsError as `load_model` does."""
    model_config = read_config(config)
    architecture = (model_config.architectures or [f"{model_config.model_type} Model"])[0]
    if model_config.model_type in ENCODERS:
        if not architecture.endswith(_ENCODER_CLASSES) or architecture.endswith("LMHeadModel"):
            raise WeightsError(f"{architecture} does not embed: {', '.join(_ENCODER_CLASSES)} classes do")
        return _load_encoder(config, model_config, group, progress)
    # Published without a head, a decoder has the name of its body.
    name = architecture if architecture in NATIVE else f"{architecture.removesuffix('Model')}ForCausalLM"
    build = native_builder(model_config, name, config.trust_remote_code)
    if build is None:
        known = ", ".join([*ENCODERS, *NATIVE])
        words = f"{architecture} of model_type {model_config.model_type}"
        raise WeightsError(f"{words} is not supported for embeddings; supported are the models {known}")
    return _load_native(config, model_config, build, group, progress, headless=True)


def _load_encoder(config: RunnerConfig, model_config: ModelConfig, group: TpGroup, progress: Progress) -> Encoder:
    family = ENCODERS[model_config.model_type]
    with torch.device(config.device):
        model = Encoder(model_config, family, group, getattr(torch, config.dtype))
    head_dim = model_config.hidden_size // model_config.num_attention_heads
    with contextlib.closing(_open(config, model_config.num_hidden_layers, head_dim)) as source:
        names = source.names()
        prefix = family.prefix if any(name.startswith(family.prefix) for name in names) else ""
        unused = {name for name in names if name.removeprefix(prefix).startswith(_HEADS)}
        fill(model.weight_parts(prefix), source, unused, progress)
    return model.eval()


def _load_native(
    config: RunnerConfig,
    model_config: ModelConfig,
    build: SpecBuilder,
    group: TpGroup,
    progress: Progress,
    headless: bool = False,
) -> CausalLM:
    if getattr(model_config, "use_bidirectional_attention", False) or not getattr(model_config, "is_causal", True):
        raise WeightsError(
            "the model's config asks for attention in both directions (an embedding model): not supported"
        )
    try:
        spec = build(model_config, config.context_length)
        if spec.num_heads % spec.num_kv_heads:
            raise ValueError(f"{spec.num_heads} query heads cannot share {spec.num_kv_heads} key-value heads evenly")
        if spec.head_dim % 2:
            raise ValueError(f"head_dim must be even, for rotary positions, got {spec.head_dim}")
        for layer in spec.layers:
            if (window := layer.sliding_window) is not None and window < 1:
                raise ValueError(f"sliding_window must be at least 1, got {window}")
            if (moe := layer.moe) is not None and not 1 <= moe.top_k <= moe.num_experts:
                raise ValueError(f"num_experts_per_tok must be 1 to {moe.num_experts} (num_experts), got {moe.top_k}")
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f"the model's config in {config.model_dir} cannot be used: {error!r}") from error
    with contextlib.closing(_open(config, len(spec.layers), spec.head_dim)) as source:
        if isinstance(source, GGUFSource):
            spec = _as_in_gguf(spec, model_config, source)
        elif spec.tied_embeddings:
            spec = dataclasses.replace(spec, tied_embeddings=not _has_own_head(spec, source, group))
        if headless:
            spec = dataclasses.replace(spec, tied_embeddings=True)  # no memory for a head
        try:
            with torch.device(config.device):
                model = Decoder(spec, config.context_length, group, getattr(torch, config.dtype))
        except torch.OutOfMemoryError:
            raise
        # No layers, no sizes, or none that divide over the ranks.
        except (LookupError, RuntimeError, ValueError) as error:
            raise WeightsError(str(error)) from error
        if not headless:
            _check_quantization(model, config)
        parts = list(model.weight_parts())
        stored: dict[int, Grid] = {}
        if headless and not any(name.startswith(("model.", "token_embd.")) for name in source.names()):
            parts = [dataclasses.replace(part, name=part.name.removeprefix("model.")) for part in parts]
        unused = {ROPE_FACTORS, "lm_head.weight"}  # some checkpoints store the head although it is the embedding
        if isinstance(source, GGUFSource) and config.quantization == "int4" and not headless:
            stored = _read_grids(parts, source)
            unused |= {part.name for part in parts if part.target.data_ptr() in stored}
            parts = [part for part in parts if part.target.data_ptr() not in stored]
        fill(parts, source, unused, progress)
    del parts  # they hold the plain weights
    return model.eval() if headless else _pack(model, config, stored)


def _read_grids(parts: list[WeightPart], source: GGUFSource) -> dict[int, Grid]:
    """The matrices of the layers that the file has in the form of `Grid`, by the address of what they stand for."""
    matrices = [part for part in parts if part.name.endswith("_proj.weight")]
    found = {part.target.data_ptr(): source.read_grid(part) for part in matrices}
    grids = {address: grid for address, grid in found.items() if grid is not None}
    logger.info("%d of %d matrices keep their 4-bit values from %s", len(grids), len(matrices), source.path)
    return grids


def _check_quantization(model: Decoder, config: RunnerConfig) -> None:
    """Before any weight is read. Raises WeightsError."""
    try:
        if config.quantization == "fp8":
            major, minor = torch.cuda.get_device_capability(torch.device(config.device))
            if (major, minor) < (8, 9):
                raise ValueError(f"it needs compute capability 8.9 or newer, and {config.device} has {major}.{minor}")
            model.check_fp8()
        elif (bits := _BITS.get(config.quantization)) is not None:
            if config.attention_backend not in _WHOLE_DECODERS or not covers(model, config.page_size, bits):
                raise ValueError(
                    "the C kernel of whole decoders computes dense models in bfloat16 on one CPU rank, with "
                    "--attention-backend auto or cpu, pages of a multiple of 16 tokens and layers of one of 32"
                )
            DecoderKernel()
    except (KernelUnavailable, ValueError) as error:
        raise WeightsError(f"quantization {config.quantization} cannot be used: {error}") from error


def _pack(model: Decoder, config: RunnerConfig, stored: dict[int, Grid]) -> CausalLM:
    """The model in the form that is fastest here, its weights in the layout for it. Those in `stored` were not read
    otherwise; they are for 4 bits, which only the CPU's kernel computes."""
    if config.quantization == "fp8":
        model.round_to_fp8()
    elif config.quantization is not None:
        return CpuDecoder(model, _BITS[config.quantization], stored).eval()
    if config.attention_backend in _WHOLE_DECODERS and covers(model, config.page_size, 16):
        try:
            return CpuDecoder(model, 16, stored).eval()
        except KernelUnavailable as error:
            logger.warning("computing with plain torch, which is slower: %s", error)
    if config.attention_backend != "torch" and config.device.startswith("cuda"):
        # Imported when needed: a CPU has no use for triton.
        from ramet.model_runner.models import cuda_decoder

        if cuda_decoder.covers(model):
            return cuda_decoder.CudaDecoder(model).eval()
        logger.warning("computing with plain torch, which is slower: no kernel for the activation %s", model.spec.act)
    model.pack()
    return model.eval()


def _open(config: RunnerConfig, num_layers: int, head_dim: int) -> WeightSource:
    path = Path(config.weights)
    match config.load_format:
        case LoadFormat.SAFETENSORS:
            return SafetensorsSource(path)
        case LoadFormat.GGUF:
            return GGUFSource(path, num_layers, head_dim)
        case LoadFormat.PICKLE:
            return PickleSource(path)
        case LoadFormat.DUMMY:
            return RandomSource(config.seed)


def _has_own_head(spec: DecoderSpec, source: WeightSource, group: TpGroup) -> bool:
    """Whether the checkpoint holds a head unlike the embedding although its config ties them (as transformers reads
    such a checkpoint, the head counts). Each rank compares its rows."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    if not source.names() >= set(names):
        return False
    shape, span = (spec.vocab_size, spec.hidden_size), group.padded_shard(spec.vocab_size)
    head, embedding = (source.read(WeightPart(name, torch.empty(0), shape, 0, span)) for name in names)
    return group.minimum(int(torch.equal(head, embedding))) == 0


def _as_in_gguf(spec: DecoderSpec, model_config: ModelConfig, source: GGUFSource) -> DecoderSpec:
    """What only the GGUF file knows: whether there is a head of its own, and how the rope is scaled."""
    spec = dataclasses.replace(spec, tied_embeddings=not source.holds("lm_head.weight"))
    scaling = source.header.metadata.get(f"{source.architecture}.rope.scaling.type", "none")
    factors = source.rope_factors()
    if factors is not None:
        # They stand for the whole scaling, whatever the config says of it.
        theta = model_config.rope_parameters["rope_theta"]
        return dataclasses.replace(
            spec, ropes={name: plain_frequencies(theta, model_config).divided_by(factors) for name in spec.ropes}
        )
    parameters = model_config.rope_parameters
    kinds = {inner["rope_type"] for inner in parameters.values() if isinstance(inner, dict)}
    kinds = kinds or {parameters["rope_type"]}
    if scaling != "none" and kinds == {"default"}:
        raise WeightsError(f"{source.path} scales its rope ({scaling}) but the model's config does not say how")
    return spec
