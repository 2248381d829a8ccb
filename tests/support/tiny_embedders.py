"""Makes tiny embedding models with random weights: encoders of the BERT family and a decoder without a head."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from support.tiny_models import make_tiny_tokenizer

SIZE, POSITIONS = 64, 130

_ENCODER = {
    "hidden_size": SIZE,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
_DISTIL = {"dim": SIZE, "hidden_dim": 96, "n_layers": 3, "n_heads": 4, "max_position_embeddings": POSITIONS}
_DECODER = {**_ENCODER, "num_key_value_heads": 2}

# Name of the tiny model: (transformers class that is saved, config class, its settings).
_MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (transformers.BertModel, transformers.BertConfig, _ENCODER),
    "bert_mlm": (transformers.BertForMaskedLM, transformers.BertConfig, _ENCODER | {"hidden_act": "relu"}),
    "roberta": (transformers.RobertaModel, transformers.RobertaConfig, _ENCODER | {"pad_token_id": 1}),
    "xlmr_mlm": (transformers.XLMRobertaForMaskedLM, transformers.XLMRobertaConfig, _ENCODER | {"pad_token_id": 1}),
    "distilbert": (transformers.DistilBertModel, transformers.DistilBertConfig, _DISTIL),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, _DECODER | {"head_dim": 32}),
    "qwen3_body": (transformers.Qwen3Model, transformers.Qwen3Config, _DECODER | {"head_dim": 32}),
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig, _DECODER | {"sliding_window": 16}),
    "cross_encoder": (transformers.BertForSequenceClassification, transformers.BertConfig, _ENCODER),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config, {"n_embd": SIZE, "n_layer": 1, "n_head": 4}),
}

ENCODERS = ("bert", "bert_mlm", "roberta", "xlmr_mlm", "distilbert")
DECODERS = ("qwen3", "qwen3_body", "mistral")


def make_tiny_embedder(name: str, folder: Path, modules: list[str] | None = None, **changes: Any) -> Path:
    """Write a model with its tokenizer into `folder`. `modules`: names of sentence-transformers' classes for a
    modules.json (`add_pooling` writes the one that pools). `changes` replace settings of its config."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tiny_tokenizer(folder)
    model_class, config_class, settings = _MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config_class(vocab_size=len(tokenizer), **(settings | changes))).float()
        for parameter_name, parameter in model.named_parameters():
            # Activations of order one, and every parameter counts.
            scale = 1.3 * min(parameter.shape[-2:]) ** -0.5 if parameter.dim() > 1 else 0.2
            start = 1.0 if "norm" in parameter_name.lower() and parameter_name.endswith("weight") else 0.0
            parameter.data = start + scale * torch.randn_like(parameter)
    model.save_pretrained(folder)
    if modules is not None:
        package = "sentence_transformers.models"
        listed = [
            {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"{package}.{kind}"}
            for i, kind in enumerate(modules)
        ]
        (folder / "modules.json").write_text(json.dumps(listed))
    return folder


def add_pooling(folder: Path, config: dict[str, Any]) -> None:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
