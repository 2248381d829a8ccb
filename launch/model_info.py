"""`ModelInfo`: the facts of a model that the launcher composes configurations from.

Read once, as plain JSON, from config.json, generation_config.json, the tokenizer's and sentence-transformers' files;
knows neither transformers nor weights. How hidden states are pooled is read by the model runner
(`model_runner/pooling.py`), which alone needs it.
"""

import logging
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ramet.launch.cache import ModelUnavailable
from ramet.model_runner.config import ENCODER_TYPES
from ramet.tokenizer_worker.chat_template import special_tokens

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Where architectures keep the longest context; the first one present counts.
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "n_ctx")
_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# What else of generation_config.json chooses tokens, and the value that does not.
_UNREAD = "suppress_tokens begin_suppress_tokens forced_eos_token_id bad_words_ids sequence_bias no_repeat_ngram_size "
_UNREAD += "min_length min_new_tokens stop_strings epsilon_cutoff eta_cutoff xtc_probability mirostat"
_NEUTRAL = {"num_beams": 1, "typical_p": 1.0, "guidance_scale": 1.0} | dict.fromkeys(_UNREAD.split(), 0)
# Of what sentence_bert_config.json hands on to transformers (`model_args`, `processor_kwargs` and so on): what changes
# no result but for its rounding, or is settled by flags here.
_UNFELT = {"attn_implementation", "dtype", "model_max_length", "padding_side", "torch_dtype", "trust_remote_code"}
# Their position embeddings begin with rows that no token uses.
_OFFSET_POSITIONS = {"camembert", "roberta", "xlm-roberta"}
_DTYPES = ("bfloat16", "float16", "float32")


class AddedToken(msgspec.Struct, frozen=True):
    """A token that is always found whole in a text. Those that are not `special` are text themselves."""

    id: int
    content: str
    special: bool = False


class EmbeddingInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a model's files say about embedding.

    `reason`: why the model is taken to embed although nobody asked for it; None if it is not. `max_tokens`: longest
    input of the sentence-transformers files. `lowercase`: they want texts so. `dimensions`: lengths to which embeddings
    may be cut, empty for any; None if they may not (the model is not Matryoshka).
    """

    reason: str | None = None
    max_tokens: int | None = None
    lowercase: bool = False
    dimensions: tuple[int, ...] | None = None


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`context_length` is None if the config does not tell. `dtype` is that of the published weights.

    `eos_ids`: tokens that end generation. `default_sampling`: the model's own defaults, for parameters a request
    leaves out. `special_tokens`: those with names such as `bos_token`, by these. `num_heads`, `num_kv_heads`,
    `num_experts`: None if the config does not tell.
    """

    context_length: int | None
    vocab_size: int
    dtype: str
    eos_ids: tuple[int, ...]
    default_sampling: dict[str, float]
    added_tokens: tuple[AddedToken, ...] = ()
    special_tokens: dict[str, str] = {}
    embedding: EmbeddingInfo = EmbeddingInfo()
    num_heads: int | None = None
    num_kv_heads: int | None = None
    num_experts: int | None = None


class _SentenceConfig(msgspec.Struct):
    """sentence_bert_config.json (for some families it has another name) and config_sentence_transformers.json."""

    max_seq_length: int | None = None
    do_lower_case: bool | None = None
    default_prompt_name: str | None = None


class _Tokenizer(msgspec.Struct):
    added_tokens: tuple[AddedToken, ...] = ()
    normalizer: dict[str, Any] | None = None


def read_model_info(model_dir: Path, tokenizer_dir: Path, source: Path) -> ModelInfo:
    """`source` is the model's own folder or .gguf file. Raises ModelUnavailable."""
    text = _text_config(model_dir)
    generation: dict[str, Any] = _read(model_dir / "generation_config.json", dict, {})
    vocab_size = text.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise ModelUnavailable(f"{model_dir / 'config.json'} has no vocab_size")
    model_type = str(text.get("model_type"))
    context_length = next((text[key] for key in _CONTEXT_KEYS if isinstance(text.get(key), int)), None)
    if context_length is not None and model_type in _OFFSET_POSITIONS:
        context_length -= text.get("pad_token_id", 1) + 1
    # Of tokenizer.json the parts that are needed here; the vocabulary is skipped without being built.
    tokenizer = _read(tokenizer_dir / "tokenizer.json", _Tokenizer, _Tokenizer())
    settings: dict[str, Any] = _read(tokenizer_dir / "tokenizer_config.json", dict, {})
    if settings.get("split_special_tokens"):
        raise ModelUnavailable("tokenizer_config.json has split_special_tokens, which is not supported")
    dtype = str(text.get("dtype") or text.get("torch_dtype") or "float32").removeprefix("torch.")
    return ModelInfo(
        context_length=context_length,
        vocab_size=vocab_size,
        dtype=dtype if dtype in _DTYPES else "bfloat16",  # for example float8 weights, which are computed in bfloat16
        eos_ids=_eos_ids(text, generation, settings.get("eos_token"), tokenizer.added_tokens),
        default_sampling=_default_sampling(generation),
        added_tokens=tokenizer.added_tokens,
        special_tokens=special_tokens(settings),
        embedding=_embedding_info(source, text, model_type in ENCODER_TYPES),
        num_heads=text.get("num_attention_heads"),
        num_kv_heads=text.get("num_key_value_heads"),
        num_experts=text.get("num_experts") or text.get("num_local_experts"),
    )


def overrides_tokenizer(folder: Path) -> bool:
    """Whether the files beside tokenizer.json have tokens that it lacks, or other settings of BERT's normalizer, whose
    tokenizer class goes by them."""
    settings: dict[str, Any] = _read(folder / "tokenizer_config.json", dict, {})
    tokenizer = _read(folder / "tokenizer.json", _Tokenizer)
    beside: dict[str, Any] | None = settings.get("added_tokens_decoder")
    if beside is None:  # two older files count then
        beside = {name: name for name in _read(folder / "added_tokens.json", dict, {})}
        settings |= _read(folder / "special_tokens_map.json", dict, {})
    names = {*special_tokens(settings | {f"{key}_token": token for key, token in beside.items()}).values()}
    known, normalizer = {token.content for token in tokenizer.added_tokens}, tokenizer.normalizer or {}
    wanted = {"lowercase": settings.get("do_lower_case", True), "strip_accents": settings.get("strip_accents")}
    wanted["handle_chinese_chars"] = settings.get("tokenize_chinese_chars", True)
    is_bert = "Bert" in normalizer.get("type", "") and "Bert" in str(settings.get("tokenizer_class", "BertTokenizer"))
    return not names <= known or (is_bert and not wanted.items() <= (wanted | normalizer).items())


def lacks_facts(model_dir: Path) -> bool:
    """Whether config.json leaves needed facts to the defaults of transformers' config class."""
    text = _text_config(model_dir)
    return "vocab_size" not in text or text.keys().isdisjoint(_CONTEXT_KEYS)


def _text_config(model_dir: Path) -> dict[str, Any]:
    """config.json. A multimodal one nests the language model's; its own keys are then only a fallback."""
    config: dict[str, Any] = _read(model_dir / "config.json", dict)
    return {**config, **(config.get("text_config") or {})}


def _eos_ids(
    text: dict[str, Any], generation: dict[str, Any], token: Any, added_tokens: tuple[AddedToken, ...]
) -> tuple[int, ...]:
    """Those of generation_config (else config), and the tokenizer's own: chat models often end turns only with it."""
    given: Any = next((x for config in (generation, text) if (x := config.get("eos_token_id")) is not None), [])
    content = token.get("content") if isinstance(token, dict) else token
    own = [item.id for item in added_tokens if item.content == content]
    return tuple(dict.fromkeys([*(given if isinstance(given, list) else [given]), *own]))


def _embedding_info(source: Path, config: dict[str, Any], is_encoder: bool) -> EmbeddingInfo:
    """`is_matryoshka` and `matryoshka_dimensions` of the config are the keys that vLLM reads too."""
    described = (source / "modules.json").exists()
    reason = "it has a modules.json" if described else "it is an encoder" if is_encoder else None
    lengths = tuple(config.get("matryoshka_dimensions") or ())
    found = none = _SentenceConfig()
    if described:
        for path in sorted(source.glob("sentence_*_config.json"))[:1]:
            found, given = _read(path, _SentenceConfig), _read(path, dict[str, Any])
            handed_on = {key: value or {} for key, value in given.items() if key.endswith("args")}
            if unread := [f"{key}.{name}" for key, value in handed_on.items() for name in {*value} - _UNFELT]:
                raise ModelUnavailable(f"{path}: {', '.join(unread)}: not supported")
        if name := _read(source / "config_sentence_transformers.json", _SentenceConfig, none).default_prompt_name:
            logger.warning("the model's default prompt %r is not put before inputs: clients have to", name)
    return EmbeddingInfo(
        reason=reason,
        max_tokens=found.max_seq_length,
        lowercase=bool(found.do_lower_case),
        dimensions=lengths if lengths or config.get("is_matryoshka") else None,
    )


def _default_sampling(generation: dict[str, Any]) -> dict[str, float]:
    """`do_sample: false` says that the other values are not meant to be used."""
    if unread := [key for key, neutral in _NEUTRAL.items() if generation.get(key) not in (None, [], neutral)]:
        logger.warning("generation_config.json: %s: not applied; requests have to ask for it", ", ".join(unread))
    if generation.get("do_sample") is False:
        return {}
    return {key: generation[key] for key in _SAMPLING_KEYS if isinstance(generation.get(key), (int, float))}


def _read(path: Path, kind: type[T], default: T | None = None) -> T:
    """The content of a JSON file. Raises ModelUnavailable, also for one that is missing unless there is a default."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError as error:
        if default is None:
            raise ModelUnavailable(f"{path} does not exist") from error
        return default
    except (OSError, msgspec.MsgspecError) as error:
        raise ModelUnavailable(f"cannot read {path}: {error}") from error
