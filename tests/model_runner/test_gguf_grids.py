"""GGUF's 4-bit blocks in the CPU kernel's own form: every value is the file's, to the last bit of float32."""

import logging
from pathlib import Path

import pytest
import torch
import transformers
from support.gguf_files import QUANT, write_gguf
from support.model_driver import ModelDriver, load
from support.tiny_models import make_tiny_model
from torch import Tensor

from ramet.kernels.cpu.build import KernelUnavailable
from ramet.kernels.cpu.decoder import DecoderKernel, Packed, interleave
from ramet.model_runner.config import LoadFormat
from ramet.model_runner.models.cpu_decoder import CpuDecoder
from ramet.model_runner.weights.errors import WeightsError

TOKENS = [(31 * i + 7) % 384 for i in range(60)]
ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3", "gemma3": "gemma3"}


@pytest.fixture(autouse=True)
def kernel() -> None:
    try:
        DecoderKernel()
    except KernelUnavailable as error:
        pytest.skip(str(error))


def unpacked(packed: Packed) -> Tensor:
    """[out, in] float32, from the layout that decoder_matmul.h describes."""
    assert packed.bits == 4 and packed.scales is not None
    low_high = torch.stack([packed.weight & 15, packed.weight >> 4], dim=2)  # [tiles, in / 8, 2, 32, 4]
    numbers = low_high.permute(0, 3, 1, 2, 4).flatten(2).unflatten(2, (-1, 32))  # [tiles, 32, groups, 32]
    scales, minima = packed.scales.float().permute(2, 0, 3, 1)[..., None]
    return (scales * numbers + minima).flatten(2).flatten(0, 1)


def matrices(model: CpuDecoder) -> dict[str, Tensor]:
    found = {}
    for index, layer in enumerate(model._model.layers):
        linears = {
            "qkv": layer.attention.qkv,
            "o": layer.attention.out,
            "gate_up": layer.mlp.gate_up,
            "down": layer.mlp.down,
        }
        found |= {f"{index}.{name}": unpacked(model._weights[id(linear)]) for name, linear in linears.items()}
    return found


def from_file(stored: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    found = {}
    for index in range(layers):
        weight = {
            name: stored[f"model.layers.{index}.{block}.{name}_proj.weight"]
            for block, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
            for name in names
        }
        found |= {
            f"{index}.qkv": torch.cat([weight["q"], weight["k"], weight["v"]]),
            f"{index}.o": weight["o"],
            f"{index}.gate_up": interleave(weight["gate"], weight["up"]),
            f"{index}.down": weight["down"],
        }
    return found


def load_int4(folder: Path, path: Path) -> CpuDecoder:
    model = load(folder, weights=str(path), load_format=LoadFormat.GGUF, dtype="bfloat16", quantization="int4")
    assert isinstance(model, CpuDecoder)
    return model


@pytest.mark.parametrize("quant", [QUANT.Q4_0, QUANT.Q4_1], ids=lambda quant: quant.name)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_values_are_the_files_own(
    arch: str, quant: QUANT, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, path = make_tiny_model(arch, tmp_path / "model"), tmp_path / "m.gguf"
    stored = {name: torch.tensor(array) for name, array in write_gguf(folder, ARCHITECTURES[arch], path, quant).items()}
    with caplog.at_level(logging.INFO):
        model = load_int4(folder, path)
    layers = len(model.spec.layers)
    assert f"{7 * layers} of {7 * layers} matrices keep their 4-bit values from {path}" in caplog.text
    found, expected = matrices(model), from_file(stored, layers)
    assert found.keys() == expected.keys()
    for name, matrix in expected.items():
        assert torch.equal(found[name][: len(matrix)], matrix), name
        assert not found[name][len(matrix) :].any()

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.load_state_dict(stored, strict=False)
    with torch.no_grad():
        exact = theirs(torch.tensor([TOKENS]), use_cache=False).logits[0]
    error = ModelDriver(model, torch.bfloat16).step({"a": TOKENS})["a"] - exact
    assert error.square().mean().sqrt() < 0.1 * exact.std()


def test_other_types_beside_them_are_rounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A fused matrix may hold both; the tied embedding stays in bfloat16, and the head made of it in 8 bits."""
    folder, path = make_tiny_model("llama", tmp_path / "model", tie_word_embeddings=True), tmp_path / "m.gguf"
    value, embedding = "model.layers.1.self_attn.v_proj.weight", "model.embed_tokens.weight"
    others = {value: QUANT.Q8_0, "model.layers.2.mlp.up_proj.weight": QUANT.Q4_0, embedding: QUANT.Q8_0}
    written = write_gguf(folder, "llama", path, QUANT.Q4_1, others=others)
    stored = {name: torch.tensor(array) for name, array in written.items()}
    with caplog.at_level(logging.INFO):
        model = load_int4(folder, path)
    assert "20 of 21 matrices keep their 4-bit values" in caplog.text
    found, expected = matrices(model), from_file(stored, 3)
    rows = len(stored[value])
    mixed, wanted = found.pop("1.qkv"), expected.pop("1.qkv")
    assert torch.equal(mixed[: len(wanted) - rows], wanted[:-rows])
    off = (mixed[len(wanted) - rows : len(wanted)] - wanted[-rows:]).abs().max()
    assert 0 < off < 0.1 * wanted[-rows:].abs().max()
    for name, matrix in expected.items():
        assert torch.equal(found[name][: len(matrix)], matrix), name
    assert torch.equal(model._model.embedding.weight[:384], stored[embedding].bfloat16())
    assert model._head.bits == 8


def test_a_matrix_of_another_shape_is_an_error(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model")
    write_gguf(folder, "llama", tmp_path / "m.gguf", QUANT.Q4_0)
    other = make_tiny_model("llama", tmp_path / "other", intermediate_size=128)
    with pytest.raises(WeightsError, match=r"gate_proj\.weight has shape \[96, 64\] in .*gguf, not \[128, 64\]"):
        load_int4(other, tmp_path / "m.gguf")
