"""What the HTTP process needs to know, resolved by the launcher and frozen."""

from typing import Any, Literal

import msgspec

ToolCallForm = Literal["none", "hermes", "llama3", "mistral", "json"]
ReasoningFamily = Literal["none", "think", "deepseek-r1", "qwen3", "mistral"]


class Tls(msgspec.Struct, frozen=True, kw_only=True):
    """Paths of PEM files. With `ca_certs` every client must show a certificate that one of them signed."""

    certfile: str
    keyfile: str | None = None
    keyfile_password: str | None = None
    ca_certs: str | None = None


class FrontendConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`served_names[0]` is what `/v1/models` lists first; each of them and `model_path` are accepted as `model`.

    `default_sampling` holds the model's own generation defaults (temperature, top_p, top_k, min_p,
    repetition_penalty), used where a request is silent. An empty `api_keys` accepts any key. `settings` is what
    `/get_server_info` shows, free of secrets. `kv_tokens` is known when the scheduler is ready.
    `batch_window` is how many lines of a batch are in the engine at the same time, at most. Without a
    `file_storage_path` files and batches are refused.

    `marker_ids`: those markers of the two parsers that are tokens of their own; `markers_are_special` if leaving out
    special tokens would hide one. `template_variables`: what the chat template reads.

    A server either generates or embeds (`is_embedding`). `embedding_size` is that of its vectors, known when the
    scheduler is ready; they may be cut to one of `dimensions` (any length if empty), unless that is None.
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
    max_queued_requests: int = 1024
    max_body_bytes: int = 32 * 1024 * 1024
    drain_timeout_s: float = 30.0
    file_storage_path: str = ""
    max_file_bytes: int = 512 * 2**20
    max_storage_bytes: int | None = None
    batch_window: int = 80
    max_batch_lines: int = 50_000
    completion_window_s: int = 24 * 3600
    log_level: str = "info"
    log_requests: bool = False
    cors_allow_origins: tuple[str, ...] = ()
    tls: Tls | None = None
    settings: dict[str, Any] = {}
    kv_tokens: int = 0
    is_embedding: bool = False
    embedding_size: int = 0
    dimensions: tuple[int, ...] | None = None
