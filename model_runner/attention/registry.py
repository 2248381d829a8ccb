"""Attention backends by the name that `--attention-backend` takes."""

from ramet.model_runner.attention.base import AttentionBackend
from ramet.model_runner.attention.torch_backend import TorchBackend

BACKENDS: dict[str, type[AttentionBackend]] = {TorchBackend.name: TorchBackend}


def make_backend(name: str) -> AttentionBackend:
    """Raises ValueError naming the backends there are."""
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is not known; there are: {', '.join(sorted(BACKENDS))}")
    return BACKENDS[name]()
