"""Configs of the native architectures with settings at random, or with one setting changed, and models for them.

A model is written with config.json as it was given, not as transformers would write it: published configs spell the
same thing in many ways.
"""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from support.tiny_models import randomize

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
MODEL_TYPES = tuple(_CLASSES)
VOCAB = 200
POSITIONS = 256


def write_model(folder: Path, config: dict[str, Any], auto: Any = transformers.AutoModelForCausalLM) -> None:
    """config.json as given, and random weights for what transformers makes of it. Whatever it raises comes through."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    made = transformers.AutoConfig.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(made, dtype=torch.float32)
        randomize(model)
    if model.can_generate():
        model.generation_config = transformers.GenerationConfig()
    model.save_pretrained(folder)
    path.write_text(json.dumps(config))


def random_config(model_type: str, seed: int, for_kernel: bool = False) -> dict[str, Any]:
    """One that can be served: everything that a config of this type may say, at random. `for_kernel`: with sizes and
    activations that the C decoder computes in few bits too."""
    rng = random.Random(f"{model_type} {seed}")
    heads, layers = rng.choice([2, 4, 6]), rng.randint(1, 4)
    head_dim = 32 if for_kernel else rng.choice([8, 16, 32])
    activations = ["silu", "gelu_pytorch_tanh"] + ([] if for_kernel else ["gelu", "gelu_new", "relu"])
    config = {
        "architectures": [_CLASSES[model_type]],
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": 96 if for_kernel else heads * rng.choice([8, 16]),
        "intermediate_size": 160 if for_kernel else rng.choice([48, 96]),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([1, 2, heads]),
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": rng.choice([1e-6, 1e-5, 1e-2]),
        "tie_word_embeddings": rng.random() < 0.5,
        "hidden_activation" if model_type == "gemma3_text" else "hidden_act": rng.choice(activations),
        "pad_token_id": rng.choice([None, 0, 5]),
    }
    # transformers cannot do without it for Mistral with `layer_types`.
    if for_kernel or model_type in ("mistral", "qwen3", "gemma3_text") or rng.random() < 0.5:
        config["head_dim"] = head_dim
    else:
        head_dim = config["hidden_size"] // heads
    if model_type not in ("mistral", "qwen2"):
        config["attention_bias"] = rng.random() < 0.5
    if model_type == "llama":
        config["mlp_bias"] = rng.random() < 0.5
    config |= _windows(model_type, rng, layers)
    if model_type == "qwen3_moe":
        config |= _experts(rng, layers)
    if model_type == "gemma3_text":
        config |= {"query_pre_attn_scalar": rng.choice([8, 24]), "final_logit_softcapping": rng.choice([None, 5.0])}
    return config | _rope(model_type, rng, head_dim)


def _windows(model_type: str, rng: random.Random, layers: int) -> dict[str, Any]:
    if model_type == "llama":
        return {}
    config: dict[str, Any] = {"sliding_window": rng.choice([1, 8, 24, 4096])}
    if model_type == "mistral" and rng.random() < 0.3:
        config["sliding_window"] = None
    elif model_type == "gemma3_text" and rng.random() < 0.5:
        config["sliding_window_pattern"] = rng.randint(1, 3)
    elif model_type != "qwen3_moe" and rng.random() < 0.5:
        config["layer_types"] = rng.choices(["sliding_attention", "full_attention"], k=layers)
    if model_type.startswith("qwen"):
        config["use_sliding_window"] = "layer_types" in config or rng.random() < 0.7
        config["max_window_layers"] = rng.randint(0, layers)
    return config


def _experts(rng: random.Random, layers: int) -> dict[str, Any]:
    return {
        rng.choice(["num_experts", "num_local_experts"]): rng.choice([4, 7]),
        "num_experts_per_tok": rng.randint(1, 3),
        "moe_intermediate_size": rng.choice([16, 48]),
        "norm_topk_prob": rng.random() < 0.5,
        "decoder_sparse_step": rng.choice([1, 2]),
        "mlp_only_layers": rng.choice([[], [0], None]),
    }


def _rope(model_type: str, rng: random.Random, head_dim: int) -> dict[str, Any]:
    """In the old spelling or in the new one; of Gemma 3 one for each kind of layer."""
    theta, scaling = rng.choice([100.0, 10000, 1e6]), _scaling(rng, head_dim)
    old = {"rope_theta": theta, "rope_scaling": _with_type(rng, scaling) if scaling else None}
    new = {"rope_theta": theta, "rope_type": "default", **scaling}
    if model_type != "gemma3_text":
        return rng.choice([old, {"rope_parameters": new}])
    local = {"rope_theta": 500.0, "rope_type": "default"}
    nested = {"full_attention": new, "sliding_attention": local}
    return rng.choice([old | {"rope_local_base_freq": 500.0}, {"rope_parameters": nested}])


def _scaling(rng: random.Random, head_dim: int) -> dict[str, Any]:
    original = {"original_max_position_embeddings": rng.choice([16, 32])}
    short, long = ([first + i / 4 for i in range(head_dim // 2)] for first in (1.0, 2.0))
    scalings: list[dict[str, Any]] = [
        {},
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "proportional", "partial_rotary_factor": 0.5},
        {"rope_type": "yarn", "factor": 4.0, **original},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.8, "beta_fast": 8, "beta_slow": 2, **original},
        {"rope_type": "yarn", "factor": 4.0, "mscale": 1.2, "mscale_all_dim": 0.5, **original},
        {"rope_type": "yarn", "factor": None, "truncate": False, **original},
        {"rope_type": "longrope", "short_factor": short, "long_factor": long, **original},
        {"rope_type": "longrope", "short_factor": short, "long_factor": long, "factor": 4.0, "attention_factor": 1.1}
        | {"original_max_position_embeddings": POSITIONS},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **original},
    ]
    return rng.choice(scalings)


def _with_type(rng: random.Random, scaling: dict[str, Any]) -> dict[str, Any]:
    """The key was once called `type`."""
    rest = {key: value for key, value in scaling.items() if key != "rope_type"}
    return rest | {rng.choice(["type", "rope_type"]): scaling["rope_type"]}


# Settings of other architectures that change what they compute, and what any config may have.
_FOREIGN = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 3.0,
    "logit_scale": 0.5,
    "partial_rotary_factor": 0.5,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "attention_chunk_size": 8,
    "layer_types": ["chunked_attention"] * 3,
    "is_causal": False,
    "is_decoder": True,
    "use_bidirectional_attention": True,
    "per_layer_config": {"1": {"sliding_window": 8}},
    "head_dim": 8,
    "num_local_experts": 4,
    "mlp_only_layers": [0],
    "final_logit_softcapping": 2.0,
    "attn_logit_softcapping": 0.5,
    "query_pre_attn_scalar": 3,
    "attention_bias": True,
    "mlp_bias": True,
    "layer_norm_eps": 0.5,
    "position_embedding_type": "relative_key",
    "model_type": "granite",
}
# Who reads them computes nothing: names, and how transformers goes about its work.
_NOT_COMPUTED = re.compile(
    r"_name_or_path|architectures|dtype|torch_dtype|transformers_version|output_.*|return_dict|use_cache|id2label|label2id"
    r"|problem_type|chunk_size_feed_forward|vocab_size|max_position_embeddings"
)


def changed_configs(base: dict[str, Any], seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """`base` with one setting changed, for every setting that its class has and those of others: (which, config)."""
    full = transformers.AutoConfig.for_model(**base).to_dict()
    rng = random.Random(seed)
    for key in sorted(full.keys() | base.keys() | _FOREIGN.keys()):
        if _NOT_COMPUTED.fullmatch(key):
            continue
        old = base.get(key, full.get(key))
        values = [_FOREIGN[key]] if key in _FOREIGN and key not in full else _others(key, old)
        for value in rng.sample(values, min(1, len(values))):
            rest = {
                name: setting for name, setting in base.items() if name != "rope_parameters" or key != "rope_scaling"
            }
            yield f"{key}={value!r}", rest | {key: value}


def _others(key: str, old: Any) -> list[Any]:
    """Values that a setting may have instead."""
    if "act" in key.split("_"):
        return ["silu", "gelu", "gelu_new", "relu", "quick_gelu", "swish", "tanh"]
    if isinstance(old, bool):
        return [not old]
    if isinstance(old, int):
        return [old * 2, max(old // 2, 1), old + 1]
    if isinstance(old, float):
        return [old * 3 + 1e-3, old + 0.5]
    if isinstance(old, dict):
        return [
            old | {"rope_theta": 100.0},
            old | {"rope_type": "linear", "factor": 2.0},
            {"rope_type": "proportional"},
        ]
    if isinstance(old, list):
        return [[], [1], list(reversed(old))]
    return [True, 1, 0.5, 8]
