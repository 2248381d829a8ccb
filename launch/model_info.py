"""`ModelInfo`: the facts of a model that the launcher composes configurations from.

Read once, as plain JSON, from config.json, generation_config.json and the tokenizer's files; knows neither
transformers nor weights.
"""

from pathlib import Path
from typing import Any

import msgspec

from ramet.launch.embedding_info import EmbeddingInfo, read_embedding_info
from ramet.model_runner.config import ENCODER_TYPES

# Where architectures keep the longest context; the first one present counts.
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "n_ctx")
_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# Their position embeddings begin with rows that no token uses.
_OFFSET_POSITIONS = {"camembert", "roberta", "xlm-roberta"}
_DTYPES = ("bfloat16", "float16", "float32")


class ModelInfoError(Exception):
    """A model folder whose JSON files are missing, malformed or lack a needed fact; the message names the file."""


class AddedToken(msgspec.Struct, frozen=True):
    """A token that is always found whole in a text. Those that are not `special` are text themselves."""

    id: int
    content: str
    special: bool = False


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`context_length` is None if the config does not tell. `dtype` is that of the published weights.

    `eos_ids`: tokens that end generation. `default_sampling`: the model's own defaults, for parameters a request
    leaves out.
    """

    architectures: tuple[str, ...]
    model_type: str
    context_length: int | None
    vocab_size: int
    dtype: str
    eos_ids: tuple[int, ...]
    default_sampling: dict[str, float]
    added_tokens: tuple[AddedToken, ...] = ()
    embedding: EmbeddingInfo = EmbeddingInfo()


class _AddedTokens(msgspec.Struct):
    """The one part of tokenizer.json that is needed here; the vocabulary is skipped without being built."""

    added_tokens: tuple[AddedToken, ...] = ()


def read_model_info(model_dir: Path, tokenizer_dir: Path, source: Path) -> ModelInfo:
    """`source` is the model's own folder or .gguf file. Raises ModelInfoError."""
    config = _read_json(model_dir / "config.json")
    generation = _read_json(model_dir / "generation_config.json", optional=True)
    # A multimodal config nests the language model's; its own keys are only a fallback.
    text = {**config, **config.get("text_config", {})}
    vocab_size = text.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise ModelInfoError(f"{model_dir / 'config.json'} has no vocab_size")
    model_type = str(config.get("model_type", ""))
    context_length = next((text[key] for key in _CONTEXT_KEYS if isinstance(text.get(key), int)), None)
    if context_length is not None and model_type in _OFFSET_POSITIONS:
        context_length -= text.get("pad_token_id", 1) + 1
    try:
        embedding = read_embedding_info(source, text, model_type in ENCODER_TYPES)
    except (OSError, msgspec.MsgspecError) as error:
        raise ModelInfoError(f"cannot read the sentence-transformers files in {source}: {error}") from error
    added_tokens = _added_tokens(tokenizer_dir)
    dtype = str(text.get("dtype") or text.get("torch_dtype") or "float32").removeprefix("torch.")
    return ModelInfo(
        architectures=tuple(config.get("architectures") or ()),
        model_type=model_type,
        context_length=context_length,
        vocab_size=vocab_size,
        dtype=dtype if dtype in _DTYPES else "bfloat16",  # for example float8 weights, which are computed in bfloat16
        eos_ids=_eos_ids(text, generation, tokenizer_dir, added_tokens),
        default_sampling=_default_sampling(generation),
        added_tokens=added_tokens,
        embedding=embedding,
    )


def lacks_facts(model_dir: Path) -> bool:
    """Whether config.json leaves needed facts to the defaults of transformers' config class."""
    config = _read_json(model_dir / "config.json")
    text = {**config, **config.get("text_config", {})}
    return "vocab_size" not in text or not any(key in text for key in _CONTEXT_KEYS)


def _eos_ids(
    text: dict[str, Any], generation: dict[str, Any], tokenizer_dir: Path, added_tokens: tuple[AddedToken, ...]
) -> tuple[int, ...]:
    """Those of generation_config (else config), and the tokenizer's own: chat models often end turns only with it."""
    given = generation.get("eos_token_id")
    if given is None:
        given = text.get("eos_token_id")
    ids = list(given) if isinstance(given, list) else [given] if given is not None else []
    token = _read_json(tokenizer_dir / "tokenizer_config.json", optional=True).get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    ids.extend(item.id for item in added_tokens if item.content == token)
    return tuple(dict.fromkeys(ids))


def _added_tokens(tokenizer_dir: Path) -> tuple[AddedToken, ...]:
    path = tokenizer_dir / "tokenizer.json"
    if not path.exists():
        return ()
    try:
        return msgspec.json.decode(path.read_bytes(), type=_AddedTokens).added_tokens
    except msgspec.MsgspecError as error:
        raise ModelInfoError(f"{path} is not a tokenizer: {error}") from error


def _default_sampling(generation: dict[str, Any]) -> dict[str, float]:
    """`do_sample: false` says that the other values are not meant to be used."""
    if generation.get("do_sample") is False:
        return {}
    return {key: generation[key] for key in _SAMPLING_KEYS if isinstance(generation.get(key), (int, float))}


def _read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError as error:
        if optional:
            return {}
        raise ModelInfoError(f"{path} does not exist") from error
    except (OSError, msgspec.MsgspecError) as error:
        raise ModelInfoError(f"cannot read {path}: {error}") from error
