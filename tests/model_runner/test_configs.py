"""Whatever a config says, a model computes what transformers computes, or is refused: nothing is overlooked.

Two kinds of configs: all settings at random, which must be served, and one setting changed, whatever it is.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from support.model_driver import ModelDriver, load, runner_config
from support.random_configs import MODEL_TYPES, POSITIONS, VOCAB, changed_configs, random_config, write_model

from ramet.kernels.cpu.build import KernelUnavailable
from ramet.kernels.cpu.decoder import DecoderKernel
from ramet.model_runner.embedder import Embedder
from ramet.model_runner.models.base import CausalLM
from ramet.model_runner.models.cpu_decoder import CpuDecoder
from ramet.model_runner.models.decoder import Decoder
from ramet.model_runner.weights.errors import WeightsError

# Float32 sums in another order, of logits that spread over several units: up to 1.2e-4 in 800 configs.
TOLERANCE = 5e-4
# Whatever transformers raises for a config that it cannot use.
UNUSABLE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, StrictDataclassError)
ENCODERS = ("bert", "roberta", "distilbert")


def prompt(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(6, VOCAB) for _ in range(rng.randint(40, 90))]


def logits_of(model: CausalLM, tokens: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """In two chunks and some decodes."""
    driver, last = ModelDriver(model, dtype), len(tokens) - 4
    chunks = [tokens[:27], tokens[27:last], *([token] for token in tokens[last:])]
    return torch.cat([driver.step({"a": chunk})["a"] for chunk in chunks])


@torch.no_grad()
def expected_logits(folder: Path, tokens: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """In float64 if the weights are of a half type."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    model = model if dtype is torch.float32 else model.double()
    ids = torch.tensor([tokens])
    return model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_settings_at_random(model_type: str, tmp_path: Path) -> None:
    for seed in range(8):
        config, tokens = random_config(model_type, seed), prompt(seed)
        write_model(tmp_path, config)
        model = load(tmp_path, context_length=POSITIONS)
        assert isinstance(model, Decoder), config
        expected = expected_logits(tmp_path, tokens)
        torch.testing.assert_close(
            logits_of(model, tokens), expected, atol=TOLERANCE, rtol=0, msg=lambda text, c=config: f"{text}\n{c}"
        )


def differences(folder: Path, base: dict[str, Any], run: Any, expect: Any, auto: Any) -> Iterator[str]:
    """Changes to a config that we run and that then give another result than transformers'; the last is a count of
    those that changed transformers' result and ours alike."""
    write_model(folder, base, auto)
    original, alike = expect(folder), 0
    for change, config in changed_configs(base, seed=1):
        try:
            write_model(folder, config, auto)
            expected = expect(folder)
        except UNUSABLE:
            continue
        try:
            found = run(folder)
        except WeightsError:
            continue
        if found.shape != expected.shape or not torch.allclose(found, expected, atol=TOLERANCE, rtol=0, equal_nan=True):
            yield change
        alike += expected.shape == original.shape and not torch.allclose(expected, original, atol=TOLERANCE, rtol=0)
    assert alike >= 4  # else this test sees nothing


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_one_setting_changed(model_type: str, tmp_path: Path) -> None:
    random_parts = ("layer_types", "rope_parameters", "mlp_only_layers")
    base = {name: value for name, value in random_config(model_type, 3).items() if name not in random_parts}
    base |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    base |= {"head_dim": 16, "rope_scaling": None, "rope_theta": 10000.0}
    tokens = prompt(1)

    def run(folder: Path) -> torch.Tensor:
        return logits_of(load(folder, context_length=128), tokens)

    auto = transformers.AutoModelForCausalLM
    assert not list(differences(tmp_path, base, run, lambda folder: expected_logits(folder, tokens), auto))


@pytest.mark.parametrize("model_type", ENCODERS)
def test_one_setting_of_an_encoder_changed(model_type: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    if model_type == "distilbert":
        sizes = {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4}
    base = {"model_type": model_type, "vocab_size": VOCAB, "max_position_embeddings": 128, **sizes}
    tokens = prompt(1)

    def run(folder: Path) -> torch.Tensor:
        [vector] = Embedder(runner_config(folder, context_length=100), lambda text: None).execute([tokens])
        return torch.from_numpy(np.frombuffer(vector or b"", "<f4").copy())

    @torch.inference_mode()
    def expect(folder: Path) -> torch.Tensor:
        model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        mean = model(torch.tensor([tokens])).last_hidden_state[0].mean(0)
        return mean / mean.norm()

    assert not list(differences(tmp_path, base, run, expect, transformers.AutoModel))


# Shares of the logits' spread: rounding to bfloat16, to 8 and to 4 bits.
BOUNDS = {None: 0.1, "int8": 0.25, "int4": 0.9}


@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name != "qwen3_moe"])
def test_settings_at_random_in_fewer_bits(model_type: str, tmp_path: Path) -> None:
    try:
        DecoderKernel()
    except KernelUnavailable as error:
        pytest.skip(str(error))
    for seed in range(4):
        config, tokens = random_config(model_type, seed, for_kernel=True), prompt(seed)
        write_model(tmp_path, config)
        exact = expected_logits(tmp_path, tokens, torch.bfloat16)
        for quantization, bound in BOUNDS.items():
            model = load(tmp_path, dtype="bfloat16", quantization=quantization, context_length=POSITIONS)
            assert isinstance(model, CpuDecoder)
            error_of = (logits_of(model, tokens, torch.bfloat16) - exact).square().mean().sqrt()
            assert error_of < bound * exact.std(), (quantization, config)
