"""Architectures without a native file: what works through transformers, and what is refused instead of served wrongly.

Parity of GPT-2 and OLMo 2 is in test_model_parity.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.gguf_files import write_gguf
from support.model_driver import ModelDriver, load
from support.tiny_models import make_tiny_model

from ramet.model_runner.config import LoadFormat
from ramet.model_runner.models import hf_fallback
from ramet.model_runner.models.decoder import Decoder
from ramet.model_runner.models.hf_fallback import FallbackLM
from ramet.model_runner.weights.errors import WeightsError

SMALL = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}


def make(folder: Path, kind: str, **settings: Any) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.for_model(kind, **(SMALL | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.data.normal_(std=1.3 * min(parameter.shape[-2:]) ** -0.5)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gemma2", {"head_dim": 16, "sliding_window": 16}),  # softcaps in attention and head, windows
        ("granite", {"logits_scaling": 3.0, "attention_multiplier": 0.3}),  # scaled logits
        ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),  # decoder inside the model, learned positions
        ("deepseek_v3", _LATENT),  # keys and values of unequal size
    ],
)
def test_logits_equal_transformers(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    reference = make(tmp_path, kind, **settings)
    model = load(tmp_path)
    assert isinstance(model, FallbackLM)
    tokens = [(17 * i + 3) % 197 + 3 for i in range(60)]
    driver = ModelDriver(model)
    found = torch.cat([driver.step({"a": chunk})["a"] for chunk in (tokens[:33], tokens[33:59], tokens[59:])])
    with torch.no_grad():
        expected = reference(torch.tensor([tokens]), use_cache=False).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}, "adds s_aux to its attention"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "does not use transformers' attention interface"),
        ("mamba", {}, "layers of kind linear_attention"),
    ],
)
def test_what_paged_attention_cannot_honour_is_refused(
    kind: str, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    make(tmp_path, kind, **settings)
    with pytest.raises(WeightsError, match=words):
        load(tmp_path)


@pytest.mark.parametrize("load_format", [LoadFormat.SAFETENSORS, LoadFormat.DUMMY])
def test_a_model_whose_own_code_fails_is_refused_in_words(load_format: LoadFormat, tmp_path: Path) -> None:
    make(tmp_path, "granite", num_key_value_heads=3)
    with pytest.raises(WeightsError, match=r"cannot load GraniteForCausalLM .*, or not run it: RuntimeError: .*size"):
        load(tmp_path, load_format=load_format)


def test_rounding_in_bfloat16_is_no_difference(tmp_path: Path) -> None:
    """Many layers of experts with random weights amplify rounding as no trained model does."""
    make(tmp_path, "mixtral", num_local_experts=8, num_hidden_layers=16, sliding_window=None)
    assert isinstance(load(tmp_path, dtype="bfloat16"), FallbackLM)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_that_differs_from_the_models_own_is_refused(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A term that no list knows of shows when the model is loaded."""
    make_tiny_model("olmo2", tmp_path)
    load(tmp_path, dtype=dtype)
    own_logits = hf_fallback._own_logits

    def with_a_further_term(model: transformers.PreTrainedModel) -> tuple[torch.Tensor, float]:
        for layer in model.model.layers:
            layer.self_attn.scaling *= 0.9
        result = own_logits(model)
        for layer in model.model.layers:
            layer.self_attn.scaling /= 0.9
        return result

    monkeypatch.setattr(hf_fallback, "_own_logits", with_a_further_term)
    with pytest.raises(WeightsError, match="gives other logits with paged attention than with its own"):
        load(tmp_path, dtype=dtype)


def test_positions_beyond_a_learned_table_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "gpt2", max_position_embeddings=128)
    load(tmp_path, context_length=128)
    with pytest.raises(WeightsError, match="no position 199: the context length is too long"):
        load(tmp_path, context_length=200)


def test_rope_that_depends_on_the_longest_request_is_refused(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128, **factors}
    make(tmp_path, "phi3", rope_parameters=rope, original_max_position_embeddings=128)
    load(tmp_path, context_length=128)
    with pytest.raises(WeightsError, match="context length must be at most 128, got 256"):
        load(tmp_path, context_length=256)


def test_no_causal_language_model(tmp_path: Path) -> None:
    config = transformers.T5Config(
        d_model=32, num_layers=1, vocab_size=100, architectures=["T5ForConditionalGeneration"]
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="T5ForConditionalGeneration is not a causal language model"):
        load(tmp_path)


def test_gguf(tmp_path: Path) -> None:
    reference = make(tmp_path, "starcoder2", sliding_window=None)
    write_gguf(tmp_path, "starcoder2", tmp_path / "m.gguf")
    model = load(tmp_path, weights=str(tmp_path / "m.gguf"), load_format=LoadFormat.GGUF)
    tokens = list(range(3, 60))
    with torch.no_grad():
        expected = reference(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(ModelDriver(model).step({"a": tokens})["a"], expected, atol=1e-4, rtol=0)


CUSTOM_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class HouseConfig(LlamaConfig):
    model_type = "house"

class HouseForCausalLM(LlamaForCausalLM):
    config_class = HouseConfig
"""


def test_remote_code_only_when_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder = tmp_path / "model"
    reference = make(folder, "llama")
    (folder / "house.py").write_text(CUSTOM_CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "house", "architectures": ["HouseForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "house.HouseConfig", "AutoModelForCausalLM": "house.HouseForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="trust_remote_code"):
        load(folder)
    model = load(folder, trust_remote_code=True)
    assert type(model.model).__name__ == "HouseForCausalLM"
    with torch.no_grad():
        expected = reference(torch.tensor([[5, 6, 7]])).logits[0]
    torch.testing.assert_close(ModelDriver(model).step({"a": [5, 6, 7]})["a"], expected, atol=1e-4, rtol=0)
    # Of a native name, it is still the folder's code that counts if it is trusted.
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    assert isinstance(load(folder), Decoder)
    assert type(load(folder, trust_remote_code=True).model).__name__ == "HouseForCausalLM"


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    make_tiny_model("olmo2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tmp_path)
    with pytest.raises(WeightsError, match="transformers cannot load Olmo2ForCausalLM"):
        load(tmp_path, load_format=LoadFormat.PICKLE)
