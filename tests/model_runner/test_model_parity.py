"""Every tiny architecture, native or fallback, gives the logits of transformers however a sequence is cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.model_driver import ModelDriver, load
from support.tiny_models import NATIVE_ARCHITECTURES, TINY_ARCHITECTURES, make_tiny_model

from ramet.model_runner.models.base import CausalLM
from ramet.model_runner.models.decoder import Decoder

# Logits spread over about +-12; float32 sums in another order differ by a few 1e-5.
TOLERANCE = 1e-4
VOCAB = 384


class Pair:
    """Our model and transformers' own, with the same weights."""

    def __init__(self, arch: str, folder: Path, **changes: Any) -> None:
        self.arch = arch
        make_tiny_model(arch, folder, **changes)
        self.ours: CausalLM = load(folder)
        self.theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )

    @torch.no_grad()
    def expected(self, tokens: list[int]) -> torch.Tensor:
        ids = torch.tensor([tokens])
        return self.theirs(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]


@pytest.fixture(scope="module", params=TINY_ARCHITECTURES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


_ORIGINAL = {"original_max_position_embeddings": 64}
_FACTORS = {"short_factor": [1 + i / 10 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
_LAYERS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 16}


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", rope("linear", factor=2.0)),
        ("mistral", rope("dynamic", factor=2.0)),
        ("qwen2", rope("yarn", factor=4.0, **_ORIGINAL)),
        ("llama", rope("yarn", factor=4.0, mscale=0.7, mscale_all_dim=0.5, beta_fast=16, truncate=False, **_ORIGINAL)),
        ("llama", rope("longrope", factor=4.0, **_FACTORS, **_ORIGINAL)),
        ("mistral", _LAYERS),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 16}),
        ("qwen3", {"attention_bias": True, "tie_word_embeddings": False, "num_key_value_heads": 1}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu"}),
        ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": [], "decoder_sparse_step": 2}),
        ("gemma3", {"final_logit_softcapping": 5.0, "attention_bias": True}),
    ],
)
def test_variants_of_configs(arch: str, changes: dict[str, Any], tmp_path: Path) -> None:
    pair, tokens = Pair(arch, tmp_path, **changes), prompt(100, seed=1)
    assert isinstance(pair.ours, Decoder)
    # Ours takes dynamic and longrope for the context length of the server, which is more than 64.
    assert_same(ModelDriver(pair.ours).step({"a": tokens})["a"], pair.expected(tokens))


def test_native_architectures_run_natively(pair: Pair) -> None:
    assert isinstance(pair.ours, Decoder) == (pair.arch in NATIVE_ARCHITECTURES)
    assert pair.ours.vocab_size == VOCAB


def test_one_prefill(pair: Pair) -> None:
    # Longer than every sliding window (16, 24) and than the original context of the scaled rope (64).
    tokens = prompt(100, seed=1)
    logits = ModelDriver(pair.ours).step({"a": tokens})["a"]
    assert_same(logits, pair.expected(tokens))


def test_chunked_prefill_then_decode(pair: Pair) -> None:
    tokens = prompt(60, seed=2)
    driver = ModelDriver(pair.ours)
    chunks = [tokens[:13], tokens[13:40], tokens[40:41], tokens[41:55], *([token] for token in tokens[55:])]
    logits = torch.cat([driver.step({"a": chunk})["a"] for chunk in chunks])
    assert_same(logits, pair.expected(tokens))


def test_mixed_batch_of_decodes_and_chunks(pair: Pair) -> None:
    sequences = {name: prompt(length, seed) for seed, (name, length) in enumerate({"a": 41, "b": 9, "c": 70}.items())}
    driver = ModelDriver(pair.ours)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in sequences}
    steps = [{"a": (0, 30), "b": (0, 7)}, {"a": (30, 31), "b": (7, 8), "c": (0, 33)}]
    steps += [{"a": (31, 40), "b": (8, 9), "c": (33, 69)}, {"a": (40, 41), "c": (69, 70)}]
    for step in steps:
        rows = {name: sequences[name][first:last] for name, (first, last) in step.items()}
        for name, logits in driver.step(rows).items():
            found[name].append(logits)
    for name, tokens in sequences.items():
        assert_same(torch.cat(found[name]), pair.expected(tokens))


def test_greedy_output_varies(pair: Pair) -> None:
    """A tiny model that repeats one token would let a wrong cache or position pass."""
    tokens = prompt(20, seed=3)
    driver = ModelDriver(pair.ours)
    logits = driver.step({"a": tokens})["a"]
    generated = []
    for _ in range(24):
        generated.append(int(logits[-1].argmax()))
        logits = driver.step({"a": generated[-1:]})["a"]
    assert len(set(generated)) >= 6
    assert_same(logits[-1], pair.expected(tokens + generated)[-1])
