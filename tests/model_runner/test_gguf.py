"""GGUF files: the header reader, and models whose weights come from one."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file
from support.gguf_files import QUANT, write_gguf
from support.model_driver import ModelDriver, load
from support.tiny_models import make_tiny_model

from ramet.launch import gguf_files
from ramet.model_runner.config import LoadFormat
from ramet.model_runner.weights.errors import WeightsError
from ramet.model_runner.weights.gguf_header import read_header

TOKENS = [(31 * i + 7) % 384 for i in range(90)]
TINY = {"llama": "llama", "qwen2": "qwen2", "qwen3_moe": "qwen3moe", "gemma3": "gemma3", "qwen3": "qwen3"}


def reference_logits(folder: Path, weights: dict[str, np.ndarray] | None = None) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if weights is not None:
        copy = folder.parent / f"{folder.name}-copy"
        shutil.copytree(folder, copy)
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in weights.items()}, copy / "model.safetensors")
        model = transformers.AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)
    ids = torch.tensor([TOKENS])
    with torch.no_grad():
        return model(ids, attention_mask=torch.ones_like(ids)).logits[0]


# Every architecture in two formats, every format with two architectures.
ROUND_TRIPS = [(arch, quant) for arch in TINY for quant in (QUANT.F32, QUANT.Q4_1)]
ROUND_TRIPS += [(arch, quant) for arch in ("llama", "qwen3_moe") for quant in (QUANT.F16, QUANT.Q8_0, QUANT.Q4_0)]


@pytest.mark.parametrize(("arch", "quant"), ROUND_TRIPS, ids=lambda value: getattr(value, "name", value))
def test_round_trip(arch: str, quant: QUANT, tmp_path: Path) -> None:
    """The file's own (rounded) weights through transformers give the same logits as the file through us."""
    # GGUF has no names for dense layers between layers of experts.
    changes: dict[str, Any] = {"mlp_only_layers": []} if arch == "qwen3_moe" else {}
    folder = make_tiny_model(arch, tmp_path / "model", **changes)
    stored = write_gguf(folder, TINY[arch], tmp_path / "model.gguf", quant)
    model = load(folder, weights=str(tmp_path / "model.gguf"), load_format=LoadFormat.GGUF)
    found = ModelDriver(model).step({"a": TOKENS})["a"]
    torch.testing.assert_close(found, reference_logits(folder, stored), atol=1e-4, rtol=0)


def test_rope_factors_are_honoured(tmp_path: Path) -> None:
    """A converter writes Llama 3 scaling as divisors; they count once, whether or not the config tells it too."""
    scaled = make_tiny_model("llama3_rope", tmp_path / "scaled")
    config = transformers.AutoConfig.from_pretrained(scaled)
    model = transformers.AutoModelForCausalLM.from_config(config)
    plain = 10000.0 ** (-torch.arange(0, 32, 2) / 32)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    assert factors.max() > 2
    write_gguf(scaled, "llama", tmp_path / "m.gguf", extra={"rope_freqs.weight": factors})
    unscaled = tmp_path / "unscaled"
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    config.save_pretrained(unscaled)
    expected = reference_logits(scaled)
    for folder in (scaled, unscaled):
        model = load(folder, weights=str(tmp_path / "m.gguf"), load_format=LoadFormat.GGUF)
        torch.testing.assert_close(ModelDriver(model).step({"a": TOKENS})["a"], expected, atol=1e-4, rtol=0)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "rms_norm_eps": 1e-3}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
        ("qwen2", {"rope_scaling": YARN, "rope_theta": 500.0, "use_sliding_window": False}),
        ("qwen3", {"rope_scaling": YARN, "num_key_value_heads": 4}),
        ("qwen3_moe", {"mlp_only_layers": [], "num_experts_per_tok": 3, "rope_theta": 1e6}),
    ],
)
def test_the_config_from_a_header_gives_the_models_logits(arch: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """The header as llama.cpp's converter writes it."""
    changes = {"rope_parameters": None, "rope_theta": 10000.0} | changes
    folder = make_tiny_model(arch, tmp_path / "model", **changes)
    write_gguf(folder, TINY[arch], tmp_path / "m.gguf")
    config = transformers.AutoConfig.from_pretrained(folder)
    rope = config.rope_parameters
    facts = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope["rope_theta"],
    }
    if "factor" in rope:
        facts |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
        facts["rope.scaling.original_context_length"] = rope.get("original_max_position_embeddings", 0)
    if arch.startswith("qwen3"):
        facts |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    else:
        facts["rope.dimension_count"] = config.hidden_size // config.num_attention_heads
    if arch == "qwen3_moe":
        facts |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
        facts["expert_feed_forward_length"] = config.moe_intermediate_size
    metadata: dict[str, Any] = {f"{TINY[arch]}.{key}": value for key, value in facts.items()}
    metadata |= {"general.architecture": TINY[arch], "tokenizer.ggml.tokens": [""] * config.vocab_size}
    made = gguf_files.config_json(metadata, set(read_header(tmp_path / "m.gguf").tensors))
    assert made is not None
    (tmp_path / "config.json").write_text(json.dumps(made))
    settings = {"weights": str(tmp_path / "m.gguf"), "load_format": LoadFormat.GGUF}
    found = ModelDriver(load(tmp_path, **settings)).step({"a": TOKENS})["a"]
    torch.testing.assert_close(found, reference_logits(folder), atol=1e-4, rtol=0)


def test_leftover_and_unknown_architecture_are_refused(tmp_path: Path) -> None:
    folder, path = make_tiny_model("llama", tmp_path / "model"), tmp_path / "m.gguf"
    write_gguf(folder, "llama", path, extra={"blk.0.mystery.weight": np.zeros(3, np.float32)})
    with pytest.raises(WeightsError, match=r"no place for blk\.0\.mystery\.weight"):
        load(folder, weights=str(path), load_format=LoadFormat.GGUF)
    write_gguf(folder, "mamba", path)
    with pytest.raises(WeightsError, match="GGUF architecture 'mamba' is not known"):
        load(folder, weights=str(path), load_format=LoadFormat.GGUF)


def test_header_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    folder, path = make_tiny_model("qwen3", tmp_path / "model"), tmp_path / "m.gguf"
    write_gguf(folder, "qwen3", path, QUANT.Q8_0)
    header, reader = read_header(path), gguf.GGUFReader(path)
    assert set(header.tensors) == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert info.ggml_type is tensor.tensor_type
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata == fields
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    assert tokens[3] == "t3é"


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    with pytest.raises(WeightsError, match=r"cannot read .*bad\.gguf"):
        read_header(path)
    for content in (
        b"",
        b"GGUF",
        b"PK\x03\x04" + bytes(100),
        b"GGUF\x01" + bytes(100),
        b"GGUF\x03\0\0\0" + b"\xff" * 64,
    ):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=r"bad\.gguf is not a readable GGUF file"):
            read_header(path)
    folder, whole = make_tiny_model("llama", tmp_path / "model"), tmp_path / "whole.gguf"
    write_gguf(folder, "llama", whole)
    for size in (200, 5000, whole.stat().st_size - 1):
        path.write_bytes(whole.read_bytes()[:size])
        with pytest.raises(WeightsError, match=r"bad\.gguf is not a readable GGUF file"):
            read_header(path)


def header(*, values: bytes = b"", num_values: int = 0, tensors: bytes = b"", num_tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_values) + values + tensors + bytes(4096)


def tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int = 0) -> bytes:
    start = struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return start + struct.pack("<IQ", kind, offset)


VALUE = struct.pack("<Q", 1) + b"a"
HOSTILE = {
    "arrays of arrays": header(values=VALUE + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000, num_values=1),
    "endless array": header(values=VALUE + struct.pack("<IIQ", 9, 0, 2**64 - 1), num_values=1),
    "endless text": header(values=VALUE + struct.pack("<IQ", 8, 2**63), num_values=1),
    "more values than bytes": header(num_values=2**64 - 1),
    "more tensors than bytes": header(num_tensors=2**40),
    "unknown type": header(tensors=tensor(b"t", (32,), 999), num_tensors=1),
    "many dimensions": header(tensors=struct.pack("<Q", 1) + b"t" + b"\xff" * 20, num_tensors=1),
    "beyond the end": header(tensors=tensor(b"t", (32,), 0, 2**63), num_tensors=1),
    "larger than all memory": header(tensors=tensor(b"t", (2**63, 2**63), 0), num_tensors=1),
    "no dimension": header(tensors=tensor(b"t", (), 0), num_tensors=1),
    "no element": header(tensors=tensor(b"t", (0, 3), 0), num_tensors=1),
    "half a block": header(tensors=tensor(b"t", (16, 2), QUANT.Q4_0), num_tensors=1),
    "twice": header(tensors=tensor(b"t", (32,), 0) * 2, num_tensors=2),
    "no alignment": header(
        values=struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 0), num_values=1
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(WeightsError, match=r"bad\.gguf is not a readable GGUF file"):
        read_header(path)


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_numbers_that_are_none_are_refused(tmp_path: Path, quantization: str | None) -> None:
    folder, path = make_tiny_model("llama", tmp_path / "model"), tmp_path / "m.gguf"
    write_gguf(folder, "llama", path, QUANT.Q4_1)
    info = read_header(path).tensors["blk.1.ffn_up.weight"]
    data = bytearray(path.read_bytes())
    data[info.offset + 40 : info.offset + 42] = np.float16("nan").tobytes()  # the scale of the third block
    path.write_bytes(data)
    if quantization and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no kernel for 4 bits")
    with pytest.raises(WeightsError, match=r"up_proj\.weight in .*m\.gguf has numbers that are NaN or infinite"):
        load(folder, weights=str(path), load_format=LoadFormat.GGUF, dtype="bfloat16", quantization=quantization)


def test_rope_factors_of_another_size_are_refused(tmp_path: Path) -> None:
    folder, path = make_tiny_model("llama", tmp_path / "model"), tmp_path / "m.gguf"
    write_gguf(folder, "llama", path, extra={"rope_freqs.weight": np.ones(1, np.float32)})
    with pytest.raises(WeightsError, match=r"m\.gguf: rope_freqs\.weight has shape \[1\], not \[8\]"):
        load(folder, weights=str(path), load_format=LoadFormat.GGUF)


@pytest.mark.smollm2
def test_smollm2_logits(smollm2_gguf: Path, smollm2_reference: tuple[Any, Any], tmp_path: Path) -> None:
    """Against transformers' own dequantised load, in float32: within 2e-3 of logits that reach about 30."""
    _, theirs = smollm2_reference
    theirs.config.save_pretrained(tmp_path)
    model = load(tmp_path, weights=str(smollm2_gguf), load_format=LoadFormat.GGUF, context_length=512)
    tokens = [
        1,
        9690,
        198,
        2683,
        359,
        253,
        5356,
        5646,
        11173,
        2,
        198,
        1,
        4093,
        198,
        1780,
        314,
        260,
        3575,
        282,
        4649,
        47,
    ]
    driver = ModelDriver(model)
    found = torch.cat([driver.step({"a": tokens[:12]})["a"], driver.step({"a": tokens[12:]})["a"]])
    with torch.no_grad():
        ids = torch.tensor([tokens])
        expected = theirs(ids, attention_mask=torch.ones_like(ids)).logits[0]
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
