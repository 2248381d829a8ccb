"""The JSON files of a model (config, generation config, tokenizer) as a GGUF header tells them, without transformers.

Covers byte-level BPE tokenizers and the plain Llama-like architectures; for the rest the functions return None and
`launch/prepare.py` asks transformers. What is known to be wrong when guessed (an unknown pre-tokenizer, an unknown rope
scaling) is refused, and so is a key of the architecture that nobody reads. Names of keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from tokenizers.processors import TemplateProcessing

from ramet.launch.cache import ModelUnavailable

Json = dict[str, Any]


def _gpt4(digits: str) -> PreTokenizer:
    """That of the GPT-4 family; `digits` says how many of them stay together."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


_GPT2 = ByteLevel(add_prefix_space=False)
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_QWEN2 = _gpt4(r"\p{N}")
# `tokenizer.ggml.pre` -> how text is cut before BPE. A wrong one gives plausible, worse output, so none is guessed.
_PRE_TOKENIZERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": Sequence([Digits(individual_digits=True), _GPT2]),
    **dict.fromkeys(_LLAMA3_NAMES, _gpt4(r"\p{N}{1,3}")),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
_CONTROL, _USER_DEFINED = 3, 4  # token types that are matched as a whole, before BPE
# They end a turn, although files that were made early name only the token that ends a text.
_TURN_ENDS = {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>"}

_LLAMA_LIKE = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3moe": "Qwen3Moe"}
# Key below the architecture's name -> key of config.json.
_CONFIG_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OPTIONAL_KEYS = {
    "rope.freq_base": "rope_theta",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
# The last is of no use to these architectures.
_MORE_KEYS = {"rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "attention.layer_norm_epsilon"}
# Keys that change nothing, and values: two of them are Gemma 3's, and the pooling is the last token's.
_NEUTRAL_KEYS = {"rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout", "vocab_size"}
_NEUTRAL: Json = {"rope.scaling.type": "none", "attention.causal": True, "pooling_type": 3}
_NEUTRAL |= {"attention.sliding_window_pattern": 6, "rope.freq_base_swa": 10000.0}
_SAMPLING_NAMES = {"temp": "temperature", "penalty_repeat": "repetition_penalty"}
# `general.file_type` of files that are not quantised; a quantised one is computed in bfloat16.
_FILE_DTYPES = {0: "float32", 1: "float16"}


def dtype_name(metadata: Json) -> str:
    return _FILE_DTYPES.get(metadata.get("general.file_type", -1), "bfloat16")


def config_json(metadata: Json, tensor_names: set[str]) -> Json | None:
    """config.json, or None for an architecture that is not simple. The factors by which Llama 3.1 and later scale
    their rope are a tensor of the file, which the runner reads."""
    name, facts = metadata["general.architecture"], _facts(metadata)
    is_mixture = bool(facts.get("expert_count"))
    if name not in _LLAMA_LIKE or not _CONFIG_KEYS.keys() <= facts.keys() or is_mixture != (name == "qwen3moe"):
        return None
    config = {ours: facts[key] for key, ours in (_CONFIG_KEYS | _OPTIONAL_KEYS).items() if key in facts}
    config |= {
        "architectures": [f"{_LLAMA_LIKE[name]}ForCausalLM"],
        "model_type": name.replace("moe", "_moe"),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "head_dim": facts.get("attention.key_length", config["hidden_size"] // config["num_attention_heads"]),
        "hidden_act": "silu",
        # A file without its own output matrix shares the embedding's.
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "dtype": dtype_name(metadata),
    }
    if is_mixture:
        config["norm_topk_prob"] = True  # as all models of this architecture have it, but not the library's default
    refuse_unread(metadata, config, {*_CONFIG_KEYS, *_OPTIONAL_KEYS, *_MORE_KEYS})
    # A factor alone is linear.
    kind = facts.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ModelUnavailable(f"rope scaling {kind!r} is not known")
    if kind != "none" and (factor := facts.get("rope.scaling.factor") or facts.get("rope.scale_linear")):
        config["rope_scaling"] = {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            length = facts.get("rope.scaling.original_context_length", facts["context_length"])
            config["rope_scaling"]["original_max_position_embeddings"] = length
    return config


def _facts(metadata: Json) -> Json:
    """What the header says of the architecture, by the rest of the keys."""
    prefix = f"{metadata['general.architecture']}."
    return {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}


def refuse_unread(metadata: Json, config: Json, read: set[str]) -> None:
    """Raises ModelUnavailable for a key not in `read` with a value that is neither neutral nor the config's."""
    facts = _facts(metadata)
    head_dim = config.get("head_dim") or facts["embedding_length"] // facts["attention.head_count"]
    of_heads = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    neutral = _NEUTRAL | dict.fromkeys(of_heads, head_dim)
    for key, value in facts.items():
        same = neutral.get(key, config.get(key.removeprefix("attention."), 0))
        if key not in read | _NEUTRAL_KEYS and value != same:
            raise ModelUnavailable(f"its header has {key} = {value!r}, which is not supported")


def generation_json(metadata: Json) -> Json:
    """generation_config.json: the tokens that end generation, and the sampling defaults if the file has any."""
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    pairs = zip(metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", ()), strict=False)
    ends += [i for i, (token, kind) in enumerate(pairs) if token in _TURN_ENDS and kind == _CONTROL]
    prefix = "general.sampling."
    sampling = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    found = {_SAMPLING_NAMES.get(key, key): value for key, value in sampling.items()}
    return {"eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)), **found}


def tokenizer_config_json(metadata: Json) -> Json:
    """What tokenizer.json does not hold: the names of the special tokens, and the chat template."""
    tokens = metadata["tokenizer.ggml.tokens"]
    config: Json = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for ours, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None and token_id < len(tokens):
            config[f"{ours}_token"] = tokens[token_id]
    template = metadata.get("tokenizer.chat_template")
    return config | ({"chat_template": template} if template else {})


def tokenizer(metadata: Json) -> Tokenizer | None:
    """A byte-level BPE tokenizer, or None for another kind. Raises ModelUnavailable."""
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        return None
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _PRE_TOKENIZERS:
        raise ModelUnavailable(f"its pre-tokenizer {name!r} is not known; give the tokenizer with --tokenizer-path")
    tokens = metadata["tokenizer.ggml.tokens"]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    made = Tokenizer(BPE(vocab, merges, ignore_merges=name in _LLAMA3_NAMES))
    if _PRE_TOKENIZERS[name] is _QWEN2:
        made.normalizer = NFC()
    made.pre_tokenizer = _PRE_TOKENIZERS[name]
    made.decoder = decoders.ByteLevel()
    kinds = zip(tokens, metadata.get("tokenizer.ggml.token_type", ()), strict=False)
    whole = [(token, kind) for token, kind in kinds if kind in (_CONTROL, _USER_DEFINED)]
    made.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False) for token, kind in whole])
    # BOS and EOS around the text where the file asks for them; files of Llama 3 that say nothing mean BOS.
    pieces, special = ["$A"], []
    for kind, at, default in (("bos", 0, name in _LLAMA3_NAMES), ("eos", 2, False)):
        token_id = metadata.get(f"tokenizer.ggml.{kind}_token_id")
        if token_id is not None and metadata.get(f"tokenizer.ggml.add_{kind}_token", default):
            pieces.insert(at, tokens[token_id])
            special.append((tokens[token_id], token_id))
    if special:
        made.post_processor = TemplateProcessing(single=pieces, special_tokens=special)
    return made
