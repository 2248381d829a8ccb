"""`EngineConfig` is what the processes get; `resolve()` makes it of what the user typed (`launch/server_args.py`).

`resolve()` changes nothing: it returns a new object and logs every choice the user left open. Reads no weights, starts
nothing, imports no torch.
"""

import contextlib
import logging
import os
import ssl
from pathlib import Path
from typing import Any

import jinja2
import msgspec

from ramet.detokenizer.config import DetokenizerConfig
from ramet.frontend.config import FrontendConfig, Tls
from ramet.launch.cache import ModelUnavailable, cache_folder
from ramet.launch.hardware import cpu_has_bfloat16, cuda_is_usable
from ramet.launch.model_info import ModelInfo
from ramet.launch.model_source import ResolvedModel
from ramet.launch.parsers import choose_parsers
from ramet.launch.placement import Placement, computing, parse_cpus
from ramet.launch.server_args import SECRETS, ConfigError, ServerArgs, parse_buckets, parse_size, request_log_level
from ramet.launch.tensor_parallel import tensor_parallel
from ramet.model_runner.config import RunnerConfig
from ramet.scheduler.config import SchedulerConfig
from ramet.tokenizer_worker.chat_template import load_chat_template
from ramet.tokenizer_worker.config import TokenizerConfig

logger = logging.getLogger(__name__)


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What each process is started with. `num_ranks` scheduler processes run on this machine, the first at the place in
    `scheduler.tp`, each in this `placement`."""

    frontend: FrontendConfig
    tokenizer: TokenizerConfig
    detokenizer: DetokenizerConfig
    scheduler: SchedulerConfig
    runner: RunnerConfig
    num_ranks: int
    placement: Placement


# Tokens of a step, those of prompts beside decoding rows, requests of the batch, share of the memory.
# On a CPU a step of 512 prompt tokens takes about half a second for a small model; longer ones would freeze streams.
_DEFAULTS = {"cpu": (512, 256, 64, 0.5), "cuda": (8192, 2048, 256, 0.95)}

# Attention backends that run nowhere else; auto and torch run everywhere.
_BACKENDS = {"cpu": ("cpu",), "cuda": ("triton", "fa3", "flashinfer")}

# Each captured batch size takes a second at start and some memory.
_CUDA_GRAPH_MAX_BS = 256


def resolve(args: ServerArgs, model: ResolvedModel) -> EngineConfig:
    """Settle every choice left open. Raises ConfigError if the arguments contradict the model or each other."""
    device = args.device if args.device != "auto" else _log("device", "cuda" if cuda_is_usable() else "cpu")
    if args.attention_backend not in ("auto", "torch", *_BACKENDS[device]):
        raise ConfigError(f"attention_backend {args.attention_backend} is not for {device}, where the model runs")
    step_tokens, prefill_tokens, running, memory_fraction = _DEFAULTS[device]
    template = _read_template(args.chat_template)
    is_embedding = _is_embedding(args, model)
    context_length = _context_length(args.context_length, model, is_embedding)
    max_step_tokens = args.chunked_prefill_size or step_tokens
    max_running = args.max_running_requests or min(running, max_step_tokens)
    if max_running > max_step_tokens:
        raise ConfigError(
            f"max_running_requests ({max_running}) is above chunked_prefill_size ({max_step_tokens}): "
            "each running request needs a token of every step"
        )
    dtype = args.dtype if args.dtype != "auto" else _log("dtype", _choose_dtype(model.info.dtype, device, is_embedding))
    _check_quantization(args, model.info, device, dtype)
    with_graphs = device == "cuda" and not args.disable_cuda_graph
    runner = RunnerConfig(
        model_dir=model.model_dir,
        weights=model.weights,
        load_format=model.load_format,
        dtype=dtype,
        device=device,
        device_index=args.base_gpu_id,
        page_size=args.page_size,
        max_running=max_running,
        max_step_tokens=max_step_tokens,
        context_length=context_length,
        memory_fraction=args.mem_fraction_static or memory_fraction,
        max_total_tokens=args.max_total_tokens,
        attention_backend=args.attention_backend,
        trust_remote_code=args.trust_remote_code,
        seed=args.random_seed,
        quantization=args.quantization,
        config_cache=_config_cache(),
        cuda_graph_max_bs=min(args.cuda_graph_max_bs or _CUDA_GRAPH_MAX_BS, max_running) if with_graphs else 0,
    )
    num_ranks = args.tp_size // args.nnodes
    cpus = parse_cpus(args.cpu_bind) if args.cpu_bind is not None else None
    return EngineConfig(
        frontend=_frontend(args, model, runner, is_embedding, _parsers(args, model, template)),
        tokenizer=TokenizerConfig(
            tokenizer_dir=model.tokenizer_dir,
            context_length=context_length,
            vocab_size=model.info.vocab_size,
            chat_template=template,
            lowercase=is_embedding and model.info.embedding.lowercase,
        ),
        detokenizer=DetokenizerConfig(tokenizer_dir=model.tokenizer_dir, stream_interval=args.stream_interval),
        scheduler=SchedulerConfig(
            page_size=args.page_size,
            max_running=max_running,
            max_step_tokens=max_step_tokens,
            max_prefill_tokens=min(prefill_tokens, max_step_tokens),
            context_length=context_length,
            eos_ids=model.info.eos_ids,
            tokenizer_dir=model.tokenizer_dir,
            policy=args.schedule_policy,
            prefix_cache=not args.disable_radix_cache,
            tp=tensor_parallel(args, model.info, device, is_embedding),
            steps_ahead=int(device == "cuda" and not args.disable_overlap_schedule),
        ),
        runner=runner,
        num_ranks=num_ranks,
        placement=computing(cpus, args.num_threads, os.environ, num_ranks),
    )


def _config_cache() -> str | None:
    with contextlib.suppress(ModelUnavailable):  # no home: a model that lies in a folder can be served all the same
        return str(cache_folder() / "configs")
    return None


def _frontend(
    args: ServerArgs, model: ResolvedModel, runner: RunnerConfig, is_embedding: bool, parsers: dict[str, Any]
) -> FrontendConfig:
    settings = {name: value for name, value in msgspec.to_builtins(args).items() if name not in SECRETS}
    served_names = args.served_model_name or (model.name,)
    settings |= {
        "model_path": model.name,
        "served_model_name": served_names,
        "is_embedding": is_embedding,
        "device": runner.device,
        "dtype": runner.dtype,
        "context_length": runner.context_length,
        "max_running_requests": runner.max_running,
        "chunked_prefill_size": runner.max_step_tokens,
        "mem_fraction_static": runner.memory_fraction,
    }
    return FrontendConfig(
        host=args.host,
        port=args.port,
        served_names=served_names,
        model_path=model.name,
        context_length=runner.context_length,
        vocab_size=model.info.vocab_size,
        api_keys=args.api_key,
        default_sampling=model.info.default_sampling,
        **parsers,
        max_queued_requests=args.max_queued_requests,
        max_queued_tokens=args.max_queued_tokens,
        request_timeout_s=args.request_timeout,
        client_timeout_s=args.client_timeout,
        drain_timeout_s=args.drain_timeout,
        watchdog_timeout_s=args.watchdog_timeout,
        file_storage_path=args.file_storage_path or default_storage(args.port),
        max_file_bytes=parse_size(args.max_file_size),
        max_storage_bytes=parse_size(args.max_storage_size) if args.max_storage_size is not None else None,
        # A quarter more than run at the same time, so that the scheduler always has one to start.
        batch_window=max(1, min(runner.max_running * 5 // 4, args.max_queued_requests // 2)),
        log_level=args.log_level,
        log_requests=request_log_level(args),
        metrics_buckets=parse_buckets(args.metrics_buckets),
        otlp_traces_endpoint=args.otlp_traces_endpoint,
        max_body_bytes=parse_size(args.max_body_size),
        cors_allow_origins=args.cors_allow_origins,
        tls=tls(args),
        settings=settings,
        is_embedding=is_embedding,
        dimensions=model.info.embedding.dimensions,
    )


def default_storage(port: int) -> str:
    """A folder in `$XDG_DATA_HOME`; one for each port, because two servers cannot share it."""
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return f"{base}/ramet/{port}"


def tls(args: ServerArgs) -> Tls | None:
    """The files of https, which have been read once to see that they serve. Raises ConfigError."""
    if args.ssl_certfile is None:
        for name in ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs"):
            if getattr(args, name) is not None:
                raise ConfigError(f"{name} needs ssl_certfile beside it")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    files = f"ssl_certfile {args.ssl_certfile!r} with ssl_keyfile {args.ssl_keyfile!r}"
    try:
        # Without a function for the password OpenSSL would ask for it on the terminal.
        context.load_cert_chain(args.ssl_certfile, args.ssl_keyfile, lambda: args.ssl_keyfile_password or "")
        if args.ssl_ca_certs is not None:
            files = f"ssl_ca_certs {args.ssl_ca_certs!r}"
            context.load_verify_locations(args.ssl_ca_certs)
    except OSError as error:
        raise ConfigError(f"{files} cannot be used: {error}") from error
    return msgspec.convert(args, Tls, from_attributes=True)


def _parsers(args: ServerArgs, model: ResolvedModel, template_source: str | None) -> dict[str, Any]:
    try:
        template = load_chat_template(model.tokenizer_dir, template_source)
        parsers = choose_parsers(args.tool_call_parser, args.reasoning_parser, template, model.info.added_tokens)
        info = model.info.special_tokens | {"chat_template": template and template.source}
        return parsers | {"tokenizer_info": info}
    except jinja2.TemplateError as error:
        raise ConfigError(f"the chat template is not valid: {error}") from error


def _is_embedding(args: ServerArgs, model: ResolvedModel) -> bool:
    reason = model.info.embedding.reason
    wanted = args.is_embedding or reason is not None
    if wanted and not args.is_embedding:
        logger.info("is_embedding: True, because %s (automatic)", reason)
    for name in ("max_total_tokens", "mem_fraction_static", "quantization"):
        if wanted and getattr(args, name) is not None:
            raise ConfigError(f"{name} is not for servers that embed: they have no KV cache and do not quantise")
    return wanted


def _check_quantization(args: ServerArgs, info: ModelInfo, device: str, dtype: str) -> None:
    """What would be found only when the processes have been started. Raises ConfigError."""
    if (wanted := args.quantization) is None:
        return
    needed = ("cuda" if wanted == "fp8" else "cpu", "bfloat16")
    if (device, dtype) != needed:
        raise ConfigError(f"quantization {wanted} needs {' and '.join(needed)}, got {device} and {dtype}")
    if info.num_experts:
        raise ConfigError(f"quantization {wanted} is for dense models, and this one has {info.num_experts} experts")
    for name, limit, is_met in (  # of the C kernel of whole decoders
        ("tp_size", "1", args.tp_size == 1),
        ("attention_backend", "auto or cpu", args.attention_backend in ("auto", "cpu")),
        ("page_size", "a multiple of 16", args.page_size % 16 == 0),
    ):
        if wanted != "fp8" and not is_met:
            raise ConfigError(f"quantization {wanted} needs {name} to be {limit}, got {getattr(args, name)}")


def _context_length(wanted: int | None, model: ResolvedModel, is_embedding: bool) -> int:
    """Longer inputs than an embedding model was trained on, up to its positions, only if the user wants them."""
    largest = model.info.context_length
    if largest is None:
        if wanted is None:
            raise ConfigError("the model's config.json does not say how long its context is: give --context-length")
        return wanted
    if wanted is None:
        trained = model.info.embedding.max_tokens if is_embedding else None
        return _log("context_length", min(largest, trained or largest))
    if wanted > largest:
        raise ConfigError(f"context_length {wanted} is above the {largest} tokens that the model was made for")
    return wanted


def _choose_dtype(model_dtype: str, device: str, is_embedding: bool) -> str:
    """The model's own dtype on CUDA. A CPU computes half types well only with bfloat16 instructions, whose rounding
    would show in embeddings."""
    if is_embedding and device == "cpu":
        return "float32"
    if device == "cuda" or model_dtype == "float32":
        return model_dtype
    return "bfloat16" if cpu_has_bfloat16() else "float32"


def _read_template(given: str | None) -> str | None:
    """The Jinja source of `--chat-template`: a template has braces, a path has not."""
    if given is None or "{" in given:
        return given
    try:
        return Path(os.path.expanduser(given)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template {given!r} is neither a template nor a readable file: {error}") from error


def _log(name: str, value: Any) -> Any:
    logger.info("%s: %s (automatic)", name, value)
    return value
