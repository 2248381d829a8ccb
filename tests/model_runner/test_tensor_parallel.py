"""Models over several ranks give what one rank gives: real processes, gloo, every native architecture in float32."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.engine import InlineEngine, runner_config
from support.tiny_models import NATIVE_ARCHITECTURES, make_tiny_model
from support.tp_ranks import requests_of, run_models

from ramet.model_runner.models.loader import WeightsError, load_model
from ramet.model_runner.parallel import TpGroup, use_device

# What no tiny model has by itself: one key-value head, a vocabulary that does not divide, biases after sums over ranks.
ODD = {"num_key_value_heads": 1, "vocab_size": 391, "attention_bias": True, "mlp_bias": True}


@pytest.fixture
def workspace() -> Iterator[Path]:
    """A short path: that of a socket is limited to 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="tp-") as folder:
        yield Path(folder) / "w"


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("odd"), **ODD)


def test_two_ranks_give_what_one_gives(tiny_model: Callable[[str], Path], odd_model: Path, workspace: Path) -> None:
    folders = {**{name: tiny_model(name) for name in NATIVE_ARCHITECTURES}, "odd": odd_model}
    *results, noticed_s = run_models(list(folders.values()), 2, workspace)
    assert noticed_s < 10, "rank 0 waited for a rank that had failed"
    torch.set_num_threads(1)
    for (name, folder), together in zip(folders.items(), results, strict=True):
        alone = requests_of(InlineEngine(folder))
        assert together["tokens"] == alone["tokens"], name
        assert together["ranked"] == alone["ranked"], name
        assert together["logprobs"] == pytest.approx(alone["logprobs"], abs=1e-3), name


def test_shards() -> None:
    whole = [unit for rank in range(3) for unit in TpGroup(rank, 3).padded_shard(10)]
    assert whole == list(range(10))
    assert [TpGroup(rank, 4).shard(2, "heads", replicated=True) for rank in range(4)] == [
        range(1),
        range(1),
        range(1, 2),
        range(1, 2),
    ]
    with pytest.raises(ValueError, match=r"heads \(3\) cannot be divided over 4 tensor-parallel ranks"):
        TpGroup(0, 4).shard(3, "heads", replicated=True)
    with pytest.raises(ValueError, match=r"heads \(2\) cannot be divided over 4 tensor-parallel ranks"):
        TpGroup(0, 4).shard(2, "heads")


def test_fewer_devices_than_ranks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no CUDA device 99: \d+ are visible, counted from 0"):
        use_device(runner_config(tmp_path, device="cuda", device_index=99))


def test_what_cannot_be_split_is_refused(tiny_model: Callable[[str], Path]) -> None:
    def load(name: str, size: int) -> None:
        load_model(runner_config(tiny_model(name)), TpGroup(0, size), lambda done, total: None)

    with pytest.raises(WeightsError, match=r"query heads \(4\) cannot be divided over 3 tensor-parallel ranks"):
        load("llama", 3)
    with pytest.raises(WeightsError, match="GPT2LMHeadModel runs through transformers, on one device only"):
        load("gpt2", 2)
