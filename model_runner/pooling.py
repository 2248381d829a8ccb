"""From the hidden states of a sequence to its embedding, as the model's sentence-transformers files say.

Those are modules.json, a list of modules in order, and the config.json of the one that pools. A module or a mode that
is not known here is refused by name: without it the vectors would be another model's.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, arange

from ramet.model_runner.weights.errors import WeightsError

logger = logging.getLogger(__name__)

MODULES = "modules.json"


def _weighted_mean(hidden: Tensor) -> Tensor:
    """Later tokens count more (SGPT, Muennighoff, 2022)."""
    weights = arange(1, len(hidden) + 1, device=hidden.device, dtype=hidden.dtype)
    return (hidden * weights[:, None]).sum(0) / weights.sum()


# [length, hidden] -> [hidden]
Pooling = Callable[[Tensor], Tensor]
_MODES: dict[str, Pooling] = {
    "cls": lambda hidden: hidden[0],
    "lasttoken": lambda hidden: hidden[-1],
    "max": lambda hidden: hidden.amax(0),
    "mean": lambda hidden: hidden.mean(0),
    "mean_sqrt_len_tokens": lambda hidden: hidden.sum(0) / len(hidden) ** 0.5,
    "weightedmean": _weighted_mean,
}


def read_pooling(weights: Path, default_mode: str) -> Pooling:
    """To float32. `weights`: the model's folder or .gguf file. Raises WeightsError for what is not supported in them.

    Without sentence-transformers files: `default_mode`, and vectors of length 1, which users of this API expect.
    """
    if not (weights / MODULES).exists():
        logger.info("pooling: %s, normalised (automatic: the model has no %s)", default_mode, MODULES)
        return lambda hidden: F.normalize(_MODES[default_mode](hidden.float()), dim=0)
    mode, normalize = None, False
    for module in _read(weights / MODULES):
        # The class has moved within sentence-transformers over time; its name has stayed.
        kind, name = str(module.get("type")).rpartition(".")[2], str(module.get("path"))
        if kind == "Pooling":
            mode = _mode(_read(weights / name / "config.json"))
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise WeightsError(f"module {name!r} ({kind}) of {weights / MODULES} is not supported for embeddings")
    if mode is None:
        raise WeightsError(f"{weights / MODULES} has no module that pools")
    if mode not in _MODES:
        raise WeightsError(f"pooling {mode!r} is not supported; known are {', '.join(_MODES)}")
    logger.info("pooling: %s%s", mode, ", normalised" if normalize else "")
    pool = _MODES[mode]
    return lambda hidden: F.normalize(pool(hidden.float()), dim=0) if normalize else pool(hidden.float())


def _mode(config: dict[str, Any]) -> str:
    """The name; older files have a boolean for each mode, such as `pooling_mode_cls_token`."""
    modes = config.get("pooling_mode")
    if modes is None:
        flags = [key.removeprefix("pooling_mode_") for key, value in config.items() if value is True]
        names = {"cls_token": "cls", "max_tokens": "max", "mean_tokens": "mean", "weightedmean_tokens": "weightedmean"}
        modes = [names.get(flag, flag) for flag in flags if flag != "include_prompt"]
    return modes if isinstance(modes, str) else "+".join(modes) or "mean"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot read {path}: {error}") from error
