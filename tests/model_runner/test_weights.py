"""Checkpoints in safetensors and pickle, random weights, and what is refused with which words."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.model_driver import ModelDriver, load
from support.tiny_models import make_tiny_model
from torch import Tensor

from ramet.model_runner.config import LoadFormat
from ramet.model_runner.models.base import CausalLM
from ramet.model_runner.weights.errors import WeightsError

TOKENS = [5, 80, 300, 12, 12, 44, 271, 9]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model("qwen2", tmp_path / "model")


def logits(model: CausalLM, dtype: torch.dtype = torch.float32) -> Tensor:
    return ModelDriver(model, dtype).step({"a": TOKENS})["a"]


def rewrite(folder: Path, change: dict[str, Tensor | None]) -> None:
    """Replace tensors of the checkpoint; None removes."""
    tensors = load_file(folder / "model.safetensors") | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder: Path) -> list[Path]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    return sorted(folder.glob("*.safetensors"))


def test_sharded_checkpoint_equals_single(folder: Path) -> None:
    expected = logits(load(folder))
    files = shard(folder)
    assert len(files) > 2
    # A file that the index does not name is somebody else's.
    save_file({"stranger": torch.zeros(1)}, folder / "adapter.safetensors")
    assert torch.equal(logits(load(folder)), expected)
    files[1].unlink()
    with pytest.raises(WeightsError, match=f"lacks {files[1].name}, which its index names"):
        load(folder)


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    """Which of them counts, nobody knows."""
    first, second = shard(folder)[:2]
    name = min(load_file(first))
    save_file(load_file(second) | {name: torch.zeros(1)}, second, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=f"{re.escape(name)} is in .*/{first.name} and in .*/{second.name}"):
        load(folder)


@pytest.mark.parametrize(
    ("arch", "changes", "words"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window must be at least 1, got 0"),
        ("qwen2", {"sliding_window": -1}, "sliding_window must be at least 1, got -1"),
        ("qwen2", {"head_dim": None, "hidden_size": 60}, "head_dim must be even, for rotary positions, got 15"),
        ("qwen3_moe", {"num_experts_per_tok": 0}, r"num_experts_per_tok must be 1 to 8 \(num_experts\), got 0"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, r"num_experts_per_tok must be 1 to 8 \(num_experts\), got 9"),
    ],
)
def test_impossible_numbers_of_a_config_are_named(
    tmp_path: Path, arch: str, changes: dict[str, Any], words: str
) -> None:
    folder = make_tiny_model(arch, tmp_path / "model")
    edit_config(folder, **changes)
    with pytest.raises(WeightsError, match=words):
        load(folder)


def test_single_file_path_and_progress(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(folder, weights=str(folder / "model.safetensors"), progress=lambda done, total: seen.append((done, total)))
    total = seen[0][1]
    assert seen == [(done, total) for done in range(total + 1)]
    assert total == len(load_file(folder / "model.safetensors"))


def test_wrong_tensors_are_named(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, {name: torch.zeros(96, 60)})
    with pytest.raises(WeightsError, match=rf"{name} has shape \[96, 60\] in .*/model, not \[96, 64\]"):
        load(folder)
    rewrite(folder, {name: None})
    with pytest.raises(WeightsError, match=f"/model lacks {name}"):
        load(folder)
    rewrite(folder, {name: torch.zeros(96, 64), "model.layers.7.mlp.up_proj.weight": torch.zeros(2)})
    with pytest.raises(WeightsError, match=r"no place for model\.layers\.7\.mlp\.up_proj\.weight"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_refused(folder: Path, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weight = load_file(folder / "model.safetensors")[name]
    weight[7, 3] = value
    rewrite(folder, {name: weight})
    with pytest.raises(WeightsError, match=f"{name} in .*/model has numbers that are NaN or infinite"):
        load(folder)


def test_numbers_beyond_the_type_to_compute_in_are_refused(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, {name: load_file(folder / "model.safetensors")[name] + 1e5})
    load(folder)
    with pytest.raises(WeightsError, match=f"{name} .* infinite in float16"):
        load(folder, dtype="float16")


def test_tensors_that_are_computed_may_be_left_over(folder: Path) -> None:
    rewrite(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    load(folder)


def test_stored_head_of_a_tied_model(tmp_path: Path) -> None:
    """A copy of the embedding is ignored; a head of its own counts, as in transformers."""
    folder = make_tiny_model("qwen3", tmp_path / "model")
    expected = logits(load(folder))
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, {"lm_head.weight": embedding.clone()})
    model = load(folder)
    assert model.head is model.embedding
    assert torch.equal(logits(model), expected)
    rewrite(folder, {"lm_head.weight": embedding * 2})
    torch.testing.assert_close(logits(load(folder)), expected * 2)


def test_missing_and_broken_files(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!")
    with pytest.raises(WeightsError, match="cannot read the safetensors weights"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"no \.safetensors file in"):
        load(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"config in .* cannot be used"):
        load(folder)


def test_a_broken_file_of_several_is_named(folder: Path) -> None:
    files = shard(folder)
    whole = files[1].read_bytes()
    for content in (b"", whole[:7], whole[:200], whole[:-1], whole + b"x", b"\xff" * 8 + whole[8:]):
        files[1].write_bytes(content)
        with pytest.raises(WeightsError, match=f"cannot read the safetensors weights in .*{files[1].name}"):
            load(folder)
    index = folder / "model.safetensors.index.json"
    for content in (b"", b"{}", b"[]", b'{"weight_map": []}', b'{"weight_map": {"x": 1}}', b"\xff\xfe"):
        index.write_bytes(content)
        with pytest.raises(WeightsError, match=r"index\.json is not a safetensors index"):
            load(folder)


def test_a_broken_pickle_is_named(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), path)
    whole = path.read_bytes()
    middle = whole.index(b"model.embed")
    for content in (b"", b"PK", whole[:500], whole[:-9], whole[:middle] + b"\xff" * 9 + whole[middle + 9 :]):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=r"pytorch_model\.bin cannot be read as plain tensors"):
            load(folder, load_format=LoadFormat.PICKLE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": "many"}, "hidden_size"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3 key-value heads evenly"),
        ({"head_dim": -16}, "RuntimeError"),
        ({"num_key_value_heads": 0}, "ZeroDivisionError"),
        ({"dtype": "float999"}, "float999"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope type 'spiral' is not supported"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"is_causal": False}, "attention in both directions"),
        ({"hidden_act": "quick_gelu"}, "activation 'quick_gelu' is not supported"),
    ],
)
def test_what_a_config_asks_is_honoured_or_refused(folder: Path, changes: dict[str, Any], words: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(WeightsError, match=words):
        load(folder)


def test_pickle_only_on_request(folder: Path) -> None:
    expected = logits(load(folder))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="ask for load format pickle"):
        load(folder)
    assert torch.equal(logits(load(folder, load_format=LoadFormat.PICKLE)), expected)


def test_pickle_with_code_is_refused(folder: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"model.norm.weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="cannot be read as plain tensors"):
        load(folder, load_format=LoadFormat.PICKLE)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("arch", ["qwen3_moe", "gemma3", "gpt2"])
def test_dummy_weights_need_only_a_config(arch: str, tmp_path: Path) -> None:
    source = make_tiny_model(arch, tmp_path / "model")
    folder = tmp_path / "config_only"
    folder.mkdir()
    shutil.copy(source / "config.json", folder)

    def dummy(seed: int) -> Tensor:
        model = load(folder, load_format=LoadFormat.DUMMY, seed=seed, dtype="bfloat16")
        assert all(not parameter.requires_grad for parameter in model.parameters()) or arch == "gpt2"
        return logits(model, torch.bfloat16)

    first = dummy(1)
    assert torch.isfinite(first).all()
    assert first.std() > 0
    assert torch.equal(first, dummy(1))
    assert not torch.equal(first, dummy(2))


def test_quantised_safetensors_are_refused(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(WeightsError, match=r"quantised \(awq\)"):
        load(folder)
