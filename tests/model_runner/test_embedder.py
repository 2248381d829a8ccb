"""Embeddings agree with transformers' models and pooling, and do not depend on what is embedded beside them."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.model_driver import runner_config
from support.tiny_embedders import DECODERS, ENCODERS, add_pooling, make_tiny_embedder

from ramet.model_runner.config import ENCODER_TYPES
from ramet.model_runner.embedder import Embedder
from ramet.model_runner.models import bert
from ramet.model_runner.weights.errors import WeightsError

VOCAB = 384
# Of float32 sums in another order, over three layers; a wrong position, mask or norm shows in the first digits.
TOLERANCE = 2e-5


def embedder(folder: Path, **changes: Any) -> Embedder:
    torch.set_num_threads(1)
    return Embedder(runner_config(folder, **({"context_length": 128} | changes)), lambda text: None)


def vectors(model: Embedder, prompts: list[list[int]]) -> list[np.ndarray]:
    found = model.execute(prompts)
    assert all(vector is not None for vector in found)
    return [np.frombuffer(vector or b"", "<f4") for vector in found]


def prompts(*lengths: int) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(3, VOCAB) for _ in range(length)] for length in lengths]


@torch.inference_mode()
def hidden_states(folder: Path, prompt: list[int]) -> torch.Tensor:
    reference = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return reference.eval()(torch.tensor([prompt])).last_hidden_state[0]


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    left, right = left.astype(np.float64), right.astype(np.float64)
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        return made.setdefault(name, made.get(name) or make_tiny_embedder(name, tmp_path_factory.mktemp(name)))

    return get


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_as_transformers(tiny: Any, name: str) -> None:
    """Longer than the sliding window of one of them (16), up to the last position of the encoders."""
    batch = prompts(1, 2, 5, 17, 128, 40)
    for prompt, vector in zip(batch, vectors(embedder(tiny(name)), batch), strict=True):
        hidden = hidden_states(tiny(name), prompt)
        expected = (hidden.mean(0) if name in ENCODERS else hidden[-1]).numpy()
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=TOLERANCE)


@pytest.mark.parametrize("name", ["roberta", "xlmr_mlm", "bert"])
def test_padding_in_a_text_has_the_position_that_transformers_gives_it(tiny: Any, name: str) -> None:
    """RoBERTa does not count it (id 1 here; for BERT it is a token like others)."""
    batch = [[1, *prompt[:3], 1, 1, *prompt[3:], 1] for prompt in prompts(9, 4, 40)] + [[1]]
    for prompt, vector in zip(batch, vectors(embedder(tiny(name)), batch), strict=True):
        expected = hidden_states(tiny(name), prompt).mean(0).numpy()
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "threads", "times"), [("bert", 1, 3), ("qwen3", 1, 3), ("mistral", 1, 3), ("bert", 2, 1), ("qwen3", 2, 1)]
)
def test_the_same_bits_alone_and_among_others(tiny: Any, name: str, threads: int, times: int) -> None:
    """With several threads, each step is shared out in another way."""
    model = embedder(tiny(name))
    rng = random.Random(2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for prompt in prompts(1, 2, 3, 5, 9, 11, 26, 61, 127):
            [alone] = model.execute([prompt])
            for _ in range(times):
                batch = prompts(*[rng.randrange(1, 40) for _ in range(20)])
                at = rng.randrange(21)
                batch.insert(at, prompt)
                assert model.execute(batch)[at] == alone
    finally:
        torch.set_num_threads(before)


_KINDS = {
    "cls_token": lambda h: h[0],
    "max_tokens": lambda h: h.max(0).values,
    "mean_tokens": lambda h: h.mean(0),
    "mean_sqrt_len_tokens": lambda h: h.sum(0) / len(h) ** 0.5,
    "weightedmean_tokens": lambda h: sum((i + 1) * row for i, row in enumerate(h)) / sum(range(1, len(h) + 1)),
    "lasttoken": lambda h: h[-1],
}


@pytest.mark.parametrize("kind", _KINDS)
def test_pooling_as_the_models_files_say(tmp_path: Path, kind: str) -> None:
    folder = make_tiny_embedder("bert", tmp_path, ["Transformer", "Pooling"])
    flags = {f"pooling_mode_{name}": name == kind for name in _KINDS}
    add_pooling(folder, {"word_embedding_dimension": 64, **flags, "include_prompt": True})
    [prompt] = prompts(23)
    [vector] = vectors(embedder(folder), [prompt])
    np.testing.assert_allclose(vector, _KINDS[kind](hidden_states(folder, prompt)).numpy(), atol=2e-4)
    assert abs(np.linalg.norm(vector) - 1) > 0.1  # no Normalize among the modules


def test_pooling_in_the_newer_form_and_normalize(tmp_path: Path) -> None:
    folder = make_tiny_embedder("qwen3", tmp_path, ["Transformer", "Pooling", "Normalize"])
    add_pooling(folder, {"embedding_dimension": 64, "pooling_mode": "cls"})
    [prompt] = prompts(9)
    expected = hidden_states(folder, prompt)[0].numpy()
    [vector] = vectors(embedder(folder), [prompt])
    np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("modules", "pooling", "words"),
    [
        (["Transformer", "Pooling", "Dense"], {"pooling_mode": "mean"}, r"module '2_Dense' \(Dense\)"),
        (["Transformer", "Normalize"], None, "has no module that pools"),
        (["Transformer", "Pooling"], {"pooling_mode": "median"}, "pooling 'median' is not supported; known are cls"),
        (["Transformer", "Pooling"], {"pooling_mode": ["cls", "mean"]}, r"pooling 'cls\+mean' is not supported"),
        (["Transformer", "Pooling"], None, "cannot read .*1_Pooling/config.json"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, modules: list[str], pooling: dict[str, Any] | None, words: str
) -> None:
    folder = make_tiny_embedder("bert", tmp_path, modules)
    if pooling is not None:
        add_pooling(folder, pooling)
    with pytest.raises(WeightsError, match=words):
        embedder(folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cross_encoder", "BertForSequenceClassification does not embed"),
        (
            "gpt2",
            "GPT2LMHeadModel of model_type gpt2 is not supported for embeddings; supported are .*Qwen3ForCausalLM",
        ),
    ],
)
def test_other_architectures_are_refused(tiny: Any, name: str, words: str) -> None:
    with pytest.raises(WeightsError, match=words):
        embedder(tiny(name))


def test_the_launcher_knows_the_same_encoders() -> None:
    assert set(bert.ENCODERS) == ENCODER_TYPES


def test_a_vector_that_is_not_finite_is_none(tiny: Any) -> None:
    model = embedder(tiny("bert"))
    with torch.no_grad():
        model._model.embedding.weight[7] = torch.nan
    [bad, good] = model.execute([[5, 7, 9], [5, 8, 9]])
    assert bad is None
    assert good is not None


TEXTS = [
    "Hi",
    "A man is eating a piece of bread.",
    "Ein Mann isst ein Stück Brot. 一個男人正在吃麵包。 Мужчина ест хлеб. 🍞🥖 naïve façade",
    "def main():\n    return {'a': [1, 2, 3]}  # \u200b \x07 \t tabs",
    "word " * 253,
    "Antidisestablishmentarianism " * 30,
]


@pytest.mark.minilm
def test_minilm_as_transformers(minilm: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    batch = [tokenizer(text).input_ids for text in TEXTS]
    assert max(map(len, batch)) > 200
    model = embedder(minilm, context_length=256)
    for prompt, vector in zip(batch, vectors(model, batch), strict=True):
        assert vector.shape == (384,)
        assert cosine(vector, hidden_states(minilm, prompt).mean(0).numpy()) > 1 - 1e-6
        assert abs(np.linalg.norm(vector.astype(np.float64)) - 1) < 1e-6
    # In half precision, as on request, it is the same model still.
    half = embedder(minilm, context_length=256, dtype="bfloat16")
    for full, rounded in zip(vectors(model, batch), vectors(half, batch), strict=True):
        assert cosine(full, rounded) > 0.999
