"""`--quantization fp8`: how weights and activations are rounded, and where it is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.model_driver import ModelDriver, load
from support.tiny_models import make_tiny_model

from ramet.model_runner.layers.linear import RowParallelLinear, linear, round_weight
from ramet.model_runner.models import loader
from ramet.model_runner.models.decoder import Decoder
from ramet.model_runner.parallel import TpGroup
from ramet.model_runner.weights.errors import WeightsError

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def products() -> None:
    """float8 products on this CPU with a scale for each row; torch before 2.12 has them on CUDA alone."""
    scale = torch.ones(16, 1)
    try:
        torch._scaled_mm(*[torch.zeros(16, 16).to(torch.float8_e4m3fn)] * 2, scale, scale.t(), out_dtype=BF16)
    except RuntimeError as error:
        pytest.skip(f"torch {torch.__version__} on a CPU: {error}")


def rounded_layer(weight: torch.Tensor, bias: bool = False) -> RowParallelLinear:
    layer = RowParallelLinear(weight.shape[1], weight.shape[0], TpGroup(), BF16, bias=bias)
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(torch.arange(weight.shape[0]))
    round_weight(layer)
    return layer


def test_each_output_and_each_token_has_a_scale_of_its_own(products) -> None:
    """Rows a million times as large as others lose no more, beside the sizes of what is added up, than they."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator) * torch.logspace(-3, 3, 48)[:, None]
    hidden = torch.randn(7, 64, generator=generator) * torch.logspace(-3, 3, 7)[:, None]
    layer = rounded_layer(weight)
    assert layer.weight.dtype is torch.float8_e4m3fn and layer.weight_scale.shape == (1, 48)
    error = (layer(hidden.to(BF16)).float() - linear(hidden, weight)).abs()
    assert (error / linear(hidden.abs(), weight.abs())).max() < 0.03


def test_a_row_of_zeros_and_a_bias(products) -> None:
    layer = rounded_layer(torch.zeros(32, 16), bias=True)
    assert torch.equal(layer(torch.zeros(3, 16, dtype=BF16)), torch.arange(32, dtype=BF16).expand(3, -1))


@pytest.fixture
def load_plain(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Decoder]:
    """Loads a model in bfloat16 and leaves its weights in the layout in which they are rounded on a GPU."""
    monkeypatch.setattr(Decoder, "pack", lambda model: None)

    def load_it(folder: Path) -> Decoder:
        model = load(folder, dtype="bfloat16", attention_backend="torch")
        assert isinstance(model, Decoder)
        return model

    return load_it


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3"])
def test_a_rounded_model_is_near_the_plain_one(tiny_model, load_plain, arch, products) -> None:
    tokens = {"r": [5, 77, 130, 8, 250, 91, 4, 33]}
    model = load_plain(tiny_model(arch))
    plain = ModelDriver(model, BF16).step(tokens)["r"].log_softmax(-1)
    model.round_to_fp8()
    rounded = ModelDriver(model, BF16).step(tokens)["r"].log_softmax(-1)
    assert not torch.equal(plain, rounded)
    assert torch.nn.functional.cosine_similarity(plain, rounded).min() > 0.97


def test_it_is_refused_without_a_device_that_has_it(tiny_model, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    words = "quantization fp8 cannot be used: it needs compute capability 8.9 or newer, and cpu has 8.6"
    with pytest.raises(WeightsError, match=words):
        load(tiny_model("llama"), dtype="bfloat16", quantization="fp8")


def test_sizes_that_cannot_be_multiplied_are_refused_before_weights_are_read(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(loader, "fill", lambda *args: pytest.fail("a weight was read"))
    words = "quantization fp8 cannot be used: a layer's size is 200, but must be a multiple of 16"
    with pytest.raises(WeightsError, match=words):
        load(make_tiny_model("llama", tmp_path, intermediate_size=100), dtype="bfloat16", quantization="fp8")


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_the_fallback_refuses_to_round(tiny_model, quantization) -> None:
    with pytest.raises(WeightsError, match=f"quantization {quantization} is for native models"):
        load(tiny_model("gpt2"), quantization=quantization)
