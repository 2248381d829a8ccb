"""What the HTTP process needs to know, resolved by the launcher and frozen."""

import msgspec


class FrontendConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`served_names[0]` is what `/v1/models` lists first; each of them and `model_path` are accepted as `model`.

    `default_sampling` holds the model's own generation defaults (temperature, top_p, top_k, min_p,
    repetition_penalty), used where a request is silent. An empty `api_keys` accepts any key.
    """

    host: str
    port: int
    served_names: tuple[str, ...]
    model_path: str
    context_length: int
    vocab_size: int
    api_keys: tuple[str, ...] = ()
    default_sampling: dict[str, float] = {}
    max_queued_requests: int = 1024
    max_body_bytes: int = 32 * 1024 * 1024
    drain_timeout_s: float = 30.0
    log_level: str = "info"
    log_requests: bool = False
