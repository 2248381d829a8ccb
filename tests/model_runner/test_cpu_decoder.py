"""The C kernel of a whole decoder against its plain twin and transformers, in bfloat16."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from support.model_driver import ModelDriver, load
from support.tiny_models import NATIVE_ARCHITECTURES, make_tiny_model

from ramet.kernels.cpu.build import KernelUnavailable
from ramet.kernels.cpu.decoder import DecoderKernel
from ramet.model_runner.models.base import CausalLM
from ramet.model_runner.models.cpu_decoder import CpuDecoder
from ramet.model_runner.models.decoder import Decoder
from ramet.model_runner.weights.errors import WeightsError

DENSE = [name for name in NATIVE_ARCHITECTURES if name != "qwen3_moe"]
# Sizes that fill no tile, and every bias.
ODD = {"hidden_size": 96, "intermediate_size": 160, "attention_bias": True, "mlp_bias": True, "head_dim": 48}


@pytest.fixture(scope="module", autouse=True)
def kernel() -> None:
    try:
        DecoderKernel()
    except KernelUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=[*DENSE, "odd sizes"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    if request.param == "odd sizes":
        return make_tiny_model("llama", folder, **ODD)
    return make_tiny_model(request.param, folder)


@pytest.fixture(scope="module", params=[None, "int8", "int4"])
def fused(request: pytest.FixtureRequest, folder: Path) -> CausalLM:
    return load(folder, dtype="bfloat16", quantization=request.param)


def exact_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    """bfloat16 weights, everything else in float64."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    ).double()
    with torch.no_grad():
        return theirs(torch.tensor([tokens]), use_cache=False).logits[0]


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(384, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits_of(model: CausalLM, chunks: list[list[int]]) -> torch.Tensor:
    driver = ModelDriver(model, torch.bfloat16)
    return torch.cat([driver.step({"a": chunk})["a"] for chunk in chunks])


def test_it_is_as_close_to_exact_arithmetic_as_the_plain_twin(folder: Path) -> None:
    fused, plain = (load(folder, dtype="bfloat16", attention_backend=backend) for backend in ("auto", "torch"))
    assert isinstance(fused, CpuDecoder) and isinstance(plain, Decoder)
    tokens = prompt(100, seed=1)
    chunks = [tokens[:61], tokens[61:90], *([token] for token in tokens[90:])]
    exact = exact_logits(folder, tokens)
    errors = [(logits_of(model, chunks) - exact).square().mean().sqrt() for model in (fused, plain)]
    assert errors[0] <= 1.1 * errors[1]
    assert errors[0] < 0.1 * exact.std()


@pytest.mark.parametrize(("quantization", "least", "most"), [("int8", 0.005, 0.1), ("int4", 0.03, 0.6)])
def test_fewer_bits_cost_what_they_should(folder: Path, quantization: str, least: float, most: float) -> None:
    tokens = prompt(100, seed=1)
    exact = exact_logits(folder, tokens)
    error = logits_of(load(folder, dtype="bfloat16", quantization=quantization), [tokens]) - exact
    assert least * exact.std() < error.square().mean().sqrt() < most * exact.std()


@pytest.mark.parametrize(
    "changes", [{"dtype": "float32"}, {"page_size": 24}, {"attention_backend": "torch"}, {"weights": "qwen3_moe"}]
)
def test_rounding_that_cannot_be_computed_is_refused_before_weights_are_read(
    tiny_model: Callable[[str], Path], changes: dict[str, str]
) -> None:
    read: list[int] = []
    changes = {"dtype": "bfloat16", "quantization": "int8", **changes}
    with pytest.raises(WeightsError, match="quantization int8 cannot be used: the C kernel"):
        load(tiny_model(changes.pop("weights", "llama")), progress=lambda done, total: read.append(done), **changes)
    assert not read


def test_a_token_has_the_same_bits_alone_in_a_batch_and_in_any_chunk(fused: CausalLM) -> None:
    tokens = prompt(150, seed=2)
    expected = logits_of(fused, [tokens])
    assert torch.equal(
        logits_of(fused, [tokens[:7], tokens[7:8], tokens[8:21], tokens[21:120], tokens[120:]]), expected
    )
    driver = ModelDriver(fused, torch.bfloat16, num_pages=128)
    driver.step({name: prompt(3 + i, seed=9 + i) for i, name in enumerate("bcdefghijklmn")})
    found = []
    for i, token in enumerate(tokens[:20]):
        rows = {name: prompt(1, seed=i) for name in "bcdefghijklmn"[: i % 14]}
        found.append(driver.step(rows | {"a": [token]})["a"])
    assert torch.equal(torch.cat(found), expected[:20])


def test_requests_that_share_pages_have_the_bits_they_have_alone(fused: CausalLM) -> None:
    prefix = prompt(128, seed=4)
    driver = ModelDriver(fused, torch.bfloat16, num_pages=128)
    driver.step({"a": prefix})
    tails = {name: prompt(2 + 9 * i, seed=i) for i, name in enumerate("bcdefg")}
    shared = dict.fromkeys(tails, 128) | {"e": 64}
    for name, length in shared.items():
        driver.pages[name], driver.lengths[name] = driver.pages["a"][: length // 16], length
    driver.step({name: tail[:-1] for name, tail in tails.items()})
    found = driver.step({name: tail[-1:] for name, tail in tails.items()})
    for name, tail in tails.items():
        assert torch.equal(found[name], logits_of(fused, [prefix[: shared[name]] + tail])[-1:])


def test_what_is_not_wanted_does_not_change_the_rest(fused: CausalLM) -> None:
    driver = ModelDriver(fused, torch.bfloat16)
    rows = {"a": prompt(1, seed=1), "b": prompt(30, seed=2), "c": prompt(20, seed=3)}
    token_ids = torch.tensor([token for tokens in rows.values() for token in tokens])
    context = driver._context(rows)
    expected = fused(token_ids, context).clone()
    for wanted in ([0, 30, 50], [7, 8], []):
        some = dataclasses.replace(context, wanted=torch.tensor(wanted, dtype=torch.int64))
        assert torch.equal(fused(token_ids, some)[wanted], expected[wanted])


def test_a_nan_stays_in_its_row(fused: CausalLM) -> None:
    hidden = torch.zeros(3, fused.spec.hidden_size, dtype=torch.bfloat16)
    hidden[1, 4] = float("nan")
    assert fused.logits(hidden).isnan().any(dim=1).tolist() == [False, True, False]
