"""`EmbeddingInfo`: what a model's files say about embedding, read once as plain JSON by the launcher.

How hidden states are pooled is read by the model runner (`model_runner/pooling.py`), which alone needs it.
"""

import logging
from pathlib import Path
from typing import Any

import msgspec

logger = logging.getLogger(__name__)


class EmbeddingInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`reason`: why the model is taken to embed although nobody asked for it; None if it is not.

    `max_tokens`: longest input of the sentence-transformers files. `lowercase`: they want texts so. `dimensions`:
    lengths to which embeddings may be cut, empty for any; None if they may not (the model is not Matryoshka).
    """

    reason: str | None = None
    max_tokens: int | None = None
    lowercase: bool = False
    dimensions: tuple[int, ...] | None = None


class _SentenceConfig(msgspec.Struct):
    """sentence_bert_config.json; for some families it has another name."""

    max_seq_length: int | None = None
    do_lower_case: bool | None = None


class _Prompts(msgspec.Struct):
    """config_sentence_transformers.json."""

    default_prompt_name: str | None = None


def read_embedding_info(source: Path, config: dict[str, Any], is_encoder: bool) -> EmbeddingInfo:
    """`source`: the model's folder or .gguf file. `is_matryoshka` and `matryoshka_dimensions` of the config are the
    keys that vLLM reads too. Raises msgspec.MsgspecError or OSError for files that cannot be read."""
    described = (source / "modules.json").exists()
    reason = "it has a modules.json" if described else "it is an encoder" if is_encoder else None
    lengths = tuple(config.get("matryoshka_dimensions") or ())
    found = _SentenceConfig()
    if described:
        for path in sorted(source.glob("sentence_*_config.json"))[:1]:
            found = msgspec.json.decode(path.read_bytes(), type=_SentenceConfig)
        prompts = source / "config_sentence_transformers.json"
        if prompts.exists() and (name := msgspec.json.decode(prompts.read_bytes(), type=_Prompts).default_prompt_name):
            logger.warning("the model's default prompt %r is not put before inputs: clients have to", name)
    return EmbeddingInfo(
        reason=reason,
        max_tokens=found.max_seq_length,
        lowercase=bool(found.do_lower_case),
        dimensions=lengths if lengths or config.get("is_matryoshka") else None,
    )
