"""Ramet: an LLM serving engine that speaks the OpenAI API.

This module stays light: importing `ramet` imports neither torch nor any worker. The names of the offline API are
imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ramet.ipc.errors import RequestError as RequestError
    from ramet.ipc.sampling import SamplingParams as SamplingParams
    from ramet.launch.engine import Engine as Engine

__version__ = "0.1.0"

_OFFLINE = {"Engine": "ramet.launch.engine", "RequestError": "ramet.ipc.errors", "SamplingParams": "ramet.ipc.sampling"}


def __getattr__(name: str) -> Any:
    if name not in _OFFLINE:
        raise AttributeError(f"module 'ramet' has no attribute {name!r}")
    return getattr(importlib.import_module(_OFFLINE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_OFFLINE])
