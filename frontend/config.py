"""What the HTTP process needs to know, resolved by the launcher and frozen."""

from typing import Any, Literal

import msgspec

ToolCallForm = Literal["none", "hermes", "llama3", "mistral", "json"]
ReasoningFamily = Literal["none", "think", "deepseek-r1", "qwen3", "mistral"]
# What the log says of each request: nothing; ids, counts and times; the parameters too; prompt and answer too.
RequestLogLevel = Literal["off", "summary", "parameters", "content"]

_TOKENS = (1.0, *(float(4**i) for i in range(2, 6)), 2048.0, 4096.0, 8192.0, 16384.0, 32768.0, 65536.0, 131072.0)
# Upper bounds of the histograms of `/metrics`, which bear these names after `ramet_`. Steps on a GPU take a
# millisecond, on a CPU up to a second.
BUCKETS: dict[str, tuple[float, ...]] = {
    "time_to_first_token_seconds": (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 30.0, 60.0),
    "inter_token_latency_seconds": (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5),
    "request_duration_seconds": (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0),
    "request_queue_seconds": (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
    "request_prompt_tokens": _TOKENS,
    "request_generation_tokens": _TOKENS,
    "scheduler_step_seconds": tuple(round(0.0001 * 2**i, 4) for i in range(16)),
    "scheduler_step_rows": (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0),
}


class Tls(msgspec.Struct, frozen=True, kw_only=True):
    """Paths of PEM files, named as in uvicorn. With `ssl_ca_certs` every client must show a certificate that one of
    them signed."""

    ssl_certfile: str
    ssl_keyfile: str | None = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: str | None = None


class FrontendConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`served_names[0]` is what `/v1/models` lists first; each of them and `model_path` are accepted as `model`.

    `default_sampling` holds the model's own generation defaults (temperature, top_p, top_k, min_p,
    repetition_penalty), used where a request is silent. An empty `api_keys` accepts any key. `settings` is what
    `/get_server_info` shows, free of secrets. `kv_tokens` is known when the scheduler is ready.
    `request_timeout_s` is the time from a request's admission to its end; `client_timeout_s` that for which a client
    may stop sending its request or reading its answer.
    `batch_window` is how many lines of a batch are in the engine at the same time, at most. Without a
    `file_storage_path` files and batches are refused.

    A process whose loop has not turned for `watchdog_timeout_s` is not healthy.

    `marker_ids`: those markers of the two parsers that are tokens of their own; `markers_are_special` if leaving out
    special tokens would hide one. `template_variables`: what the chat template reads. `tokenizer_info`: itself, and the
    special tokens by their names.

    A server either generates or embeds (`is_embedding`). `embedding_size` is that of its vectors, known when the
    scheduler is ready; they may be cut to one of `dimensions` (any length if empty), unless that is None.

    `metrics_buckets` stand in place of those of `BUCKETS`. Without an `otlp_traces_endpoint` nothing is traced.
    """

    host: str
    port: int
    served_names: tuple[str, ...]
    model_path: str
    context_length: int
    vocab_size: int
    api_keys: tuple[str, ...] = ()
    default_sampling: dict[str, float] = {}
    tool_call_parser: ToolCallForm = "json"
    reasoning_parser: ReasoningFamily = "none"
    marker_ids: dict[str, int] = {}
    markers_are_special: bool = False
    template_variables: tuple[str, ...] = ()
    tokenizer_info: dict[str, str | None] = {}
    max_queued_requests: int = 1024
    max_queued_tokens: int | None = None
    request_timeout_s: float | None = None
    client_timeout_s: float = 60.0
    max_body_bytes: int = 32 * 1024 * 1024
    drain_timeout_s: float = 30.0
    watchdog_timeout_s: float = 60.0
    file_storage_path: str = ""
    max_file_bytes: int = 512 * 2**20
    max_storage_bytes: int | None = None
    batch_window: int = 80
    max_batch_lines: int = 50_000
    completion_window_s: int = 24 * 3600
    log_level: str = "info"
    log_requests: RequestLogLevel = "off"
    metrics_buckets: dict[str, tuple[float, ...]] = {}
    otlp_traces_endpoint: str | None = None
    cors_allow_origins: tuple[str, ...] = ()
    tls: Tls | None = None
    settings: dict[str, Any] = {}
    kv_tokens: int = 0
    is_embedding: bool = False
    embedding_size: int = 0
    dimensions: tuple[int, ...] | None = None

    def serves(self, model: str) -> bool:
        return model in self.served_names or model == self.model_path
