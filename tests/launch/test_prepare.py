"""The JSON files made of GGUF files and of slow tokenizers."""

import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ramet.launch import gguf_files, prepare
from ramet.launch.cache import ModelUnavailable
from ramet.launch.model_info import read_model_info
from ramet.launch.prepare import prepared_folder
from ramet.model_runner.weights.gguf_header import read_header

TEXT = ["The rain in Spain, 1234 times.", "def f(x):\n    return x + 10_000", "I'm sure it's naïve: 東京 🎉"] * 3
SAMPLES = [*TEXT, "", "  two  spaces\n\n\ttab", "We'LL see 2024-12-31", "<|im_start|>user\nhi<|im_end|>", "e\u0301"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# What each model family's own tokenizer.json says, written with the library and not with our table.
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
EXPECTED = {
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(_GPT4), "isolated"), _BYTES]),
    "qwen2": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(_GPT4.replace("{1,3}", "")), "isolated"), _BYTES]
    ),
}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def trained(pre: str) -> Tokenizer:
    """A small byte-level BPE tokenizer as its family would publish it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = EXPECTED[pre]
    if pre == "qwen2":
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def write_file(
    path: Path,
    tokenizer: Tokenizer,
    pre: str,
    arch: str = "llama",
    sizes: dict[str, float] | None = None,
    **more: bool,
) -> None:
    model = json.loads(tokenizer.to_str())["model"]
    vocab = sorted(model["vocab"], key=model["vocab"].__getitem__)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocab)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in vocab])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_eot_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    for name, number in (sizes or {}).items():
        (writer.add_uint32 if isinstance(number, int) else writer.add_float32)(f"{arch}.{name}", number)
    for name, value in more.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.add_tensor("token_embd.weight", np.zeros((len(vocab), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("pre", EXPECTED)
def test_a_byte_level_tokenizer(tmp_path: Path, pre: str) -> None:
    path, original = tmp_path / "m.gguf", trained(pre)
    write_file(path, original, pre, add_bos_token=False)
    made = Tokenizer.from_file(str(prepared_folder(path) / "tokenizer.json"))
    for text in SAMPLES:
        ids = made.encode(text).ids
        assert ids == original.encode(text).ids
        if pre != "qwen2":  # which composes e + accent
            assert made.decode(ids, skip_special_tokens=False) == text
    assert made.get_vocab() == original.get_vocab()


@pytest.mark.parametrize("flags", [{"bos"}, {"eos"}, {"bos", "eos"}])
def test_bos_and_eos_are_added_where_the_file_asks(tmp_path: Path, flags: set[str]) -> None:
    path = tmp_path / "m.gguf"
    write_file(path, trained("gpt-2"), "gpt-2", **{f"add_{name}_token": True for name in flags})
    made = Tokenizer.from_file(str(prepared_folder(path) / "tokenizer.json"))
    plain = made.encode("rain", add_special_tokens=False).tokens
    expected = ["<|im_start|>"] * ("bos" in flags) + plain + ["<|endoftext|>"] * ("eos" in flags)
    assert made.encode("rain").tokens == expected


def test_facts_of_a_llama_like_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_file(path, trained("smollm"), "smollm")
    folder = prepared_folder(path)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 8)
    assert (config["rope_theta"], config["tie_word_embeddings"]) == (5000.0, True)
    info = read_model_info(folder, folder, folder)
    assert (info.context_length, info.vocab_size) == (128, config["vocab_size"])
    assert info.eos_ids == (0, 2)  # end of text, end of turn
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["chat_template"] == "{{ messages[0].content }}"
    assert (tokenizer["bos_token"], tokenizer["eos_token"]) == ("<|im_start|>", "<|endoftext|>")


def test_a_turn_ends_although_the_file_names_only_the_end_of_texts() -> None:
    tokens = ["<|end_of_text|>", "<|im_end|>", "a", "<|eot_id|>"]
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 1, 1, 3],  # here the second is ordinary text
        "tokenizer.ggml.eos_token_id": 0,
    }
    assert gguf_files.generation_json(metadata) == {"eos_token_id": [0, 3]}


def test_the_folder_is_made_once_for_a_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_file(path, trained("gpt-2"), "gpt-2")
    folder = prepared_folder(path)
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert prepared_folder(path) == folder
    assert (folder / "config.json").stat().st_mtime_ns == stamp
    os.utime(path, (1, 1))  # another file under the same name
    assert prepared_folder(path) != folder


def test_an_unknown_pre_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_file(path, trained("gpt-2"), "brand-new")
    with pytest.raises(ModelUnavailable, match="pre-tokenizer 'brand-new' is not known; give the tokenizer with"):
        prepared_folder(path)


def header(arch: str = "qwen2", **more: object) -> dict[str, Any]:
    """Facts of a small model, with `more` keys below the architecture's name ('__' is a dot)."""
    facts: dict[str, object] = {f"{arch}.{key}": 64 for key in gguf_files._CONFIG_KEYS}
    facts |= {"general.architecture": arch, "tokenizer.ggml.tokens": ["a"], f"{arch}.attention.head_count": 4}
    return facts | {f"{arch}.{key.replace('__', '.')}": value for key, value in more.items()}


YARN = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"rope__scaling__factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope__scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 2.0}, None),
        ({"rope__scaling__type": "linear"}, None),
        (YARN, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
        (
            YARN | {"rope__scaling__original_context_length": 32},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_rope_scaling(keys: dict[str, object], expected: dict[str, object] | None) -> None:
    """A factor is linear unless something else is said, and a context that is not told the one that there is."""
    config = gguf_files.config_json(header(**keys), {"output.weight"})
    assert config is not None
    assert config.get("rope_scaling") == expected
    assert config["tie_word_embeddings"] is False


def test_other_architectures_and_scalings() -> None:
    with pytest.raises(ModelUnavailable, match="rope scaling 'longrope' is not known"):
        gguf_files.config_json(header(rope__scaling__type="longrope"), set())
    assert gguf_files.config_json(header("bloom"), set()) is None


# What a header may say below the architecture's name without changing what is computed.
NEUTRAL = {
    "attention.layer_norm_epsilon",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "tensor_data_layout",
    "vocab_size",
}


def config_or_words(facts: dict[str, Any]) -> dict[str, Any] | str | None:
    try:
        return gguf_files.config_json(facts, set())
    except ModelUnavailable as error:
        return str(error)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_every_key_of_a_header_is_honoured_or_refused(arch: str) -> None:
    known = gguf.constants.Keys
    keys = [str(value) for group in (known.LLM, known.Attention, known.Rope) for value in vars(group).values()]
    plain, overlooked = config_or_words(header(arch)), set()
    for key in {key.removeprefix("{arch}.") for key in keys if key.startswith("{arch}.")}:
        found = config_or_words(header(arch) | {f"{arch}.{key}": "linear" if key.endswith(".type") else 2})
        assert isinstance(found, dict) or (found is not None and key in found) or key == "expert_count"
        overlooked |= {key} if found == plain else set()
    assert overlooked == NEUTRAL | {"rope.scaling.type"}


def test_a_config_by_transformers_has_all_that_the_header_says(tmp_path: Path) -> None:
    """It overlooks some keys."""
    path = tmp_path / "m.gguf"
    for key, value in {"attention.sliding_window": 24, "rope.freq_base_swa": 10000.0}.items():
        write_file(path, trained("gpt-2"), "gpt-2", "gemma3", sizes={key: value})
        config = prepare._config_by_transformers(path, read_header(path).metadata)
        assert config["sliding_window"] == (24 if key == "attention.sliding_window" else 4096)
    for key, value in {"final_logit_softcapping": 30.0, "rope.scaling.factor": 8.0, "rope.freq_base_swa": 5e3}.items():
        write_file(path, trained("gpt-2"), "gpt-2", "gemma3", sizes={key: value})
        with pytest.raises(ModelUnavailable, match=f"its header has {key} = {value}, which is not supported"):
            prepare._config_by_transformers(path, read_header(path).metadata)


def test_a_slow_tokenizer_and_a_short_config(tmp_path: Path) -> None:
    """Both go through transformers: a vocabulary with merges, and a config that leaves the vocabulary's size out."""
    source = tmp_path / "model"
    source.mkdir()
    original = trained("gpt-2")
    original.model.save(str(source))
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": 32}
    (source / "config.json").write_text(json.dumps(config))
    folder = prepared_folder(source)
    info = read_model_info(folder, folder, folder)
    assert (info.vocab_size, info.context_length) == (50257, 32)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert made.encode(TEXT[0]).ids == original.encode(TEXT[0]).ids


@pytest.mark.smollm2
def test_smollm2_against_transformers(smollm2_gguf: Path, smollm2_reference: tuple[Any, Any]) -> None:
    """Equal to what transformers makes of the file, but for the digits, which it forgets to take apart."""
    from transformers import AutoConfig

    folder = prepared_folder(smollm2_gguf)
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs, model = smollm2_reference
    assert made.get_vocab() == theirs.get_vocab()
    for text in SAMPLES:
        assert made.decode(made.encode(text).ids, skip_special_tokens=False) == text
        if not any(character.isdigit() for character in text):
            assert made.encode(text).ids == theirs(text)["input_ids"]
    assert made.encode("2024").tokens == ["2", "0", "2", "4"]
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == theirs.chat_template

    ours = AutoConfig.from_pretrained(folder).to_dict()
    expected = model.config.to_dict()
    same = {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps"}
    same |= {"num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_parameters"}
    same |= {"tie_word_embeddings", "hidden_act", "attention_bias", "mlp_bias"}
    assert {key: ours[key] for key in same} == {key: expected[key] for key in same}
