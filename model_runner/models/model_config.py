"""`read_config`: what transformers makes of a model's config.json, with all of its defaults, as plain values.

To ask transformers takes three seconds, nearly all of them for imports that nothing else here needs, so its answer is
kept in a file, by the content of config.json and the version of the library. Knows no architecture.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ramet.model_runner.config import LoadFormat, RunnerConfig
from ramet.model_runner.weights.errors import WeightsError

logger = logging.getLogger(__name__)

# To be raised when other values are kept.
_FORMAT = 1


class ModelConfig(SimpleNamespace):
    """The attributes of transformers' config, also under the names that its class maps to others, and two more.

    `causal_lm` is the class that transformers would run for this `model_type`, None if there is none.
    `layers_differ`: in their sizes.
    """


def read_config(config: RunnerConfig) -> ModelConfig:
    """Raises WeightsError, with words for the user."""
    kept = _kept_in(config)
    values = None
    if kept is not None:
        with contextlib.suppress(OSError, ValueError):  # not there yet, or cut short by a full disk
            values = json.loads(kept.read_bytes())
    if values is None:
        values = _ask_transformers(config)
        if kept is not None:
            _keep(values, kept)
    found = ModelConfig(**values)
    method = getattr(found, "quantization_config", None)
    if method is not None and config.load_format is not LoadFormat.GGUF:
        raise WeightsError(
            f"the checkpoint is quantised ({method.get('quant_method')}); quantised safetensors are not supported"
        )
    if getattr(found, "transformers_weights", None):
        raise WeightsError("transformers_weights in config.json, which names a file of weights, is not supported")
    return found


def _kept_in(config: RunnerConfig) -> Path | None:
    """The file for the answer; None if it depends on more than the content of config.json."""
    if config.config_cache is None or config.trust_remote_code:
        return None
    folder = Path(config.model_dir)
    try:
        if "model_type" not in json.loads((folder / "config.json").read_bytes()):
            return None  # some versions of transformers guess it from the folder's name
    except (OSError, TypeError, ValueError):
        return None  # transformers has words for it
    sources = [path.read_bytes() for path in sorted(folder.glob("config*.json"))]  # one may refer to others
    made_of = [b"%d" % _FORMAT, importlib.metadata.version("transformers").encode(), *sources]
    key = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]
    return Path(config.config_cache) / f"{key}.json"


def _ask_transformers(config: RunnerConfig) -> dict[str, Any]:
    # Imported when needed, for they are slow.
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        found = transformers.AutoConfig.from_pretrained(config.model_dir, trust_remote_code=config.trust_remote_code)
        values: dict[str, Any] = json.loads(found.to_json_string(use_diff=False))
    except Exception as error:  # of many kinds: a config is checked by the library, and may bring code
        raise WeightsError(f"the model's config in {config.model_dir} cannot be used: {error}") from error
    aliases = {name: getattr(found, name) for name in found.attribute_map if hasattr(found, name)}
    return (
        aliases
        | values
        | {
            "causal_lm": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(found.model_type),
            "layers_differ": found.is_heterogeneous,
        }
    )


def _keep(values: dict[str, Any], path: Path) -> None:
    beside = path.with_suffix(f".{os.getpid()}")  # others may write at the same time
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(values), encoding="utf-8")
        beside.rename(path)
    except OSError as error:
        logger.warning("each start will be slower by some seconds, for the model's config cannot be kept: %s", error)
