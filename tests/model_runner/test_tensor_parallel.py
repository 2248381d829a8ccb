"""Models over several ranks give what one rank gives: real processes, gloo, every native architecture in float32."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.engine import runner_config
from support.tiny_models import NATIVE_ARCHITECTURES, make_tiny_model
from support.tp_ranks import Job, Results, run_jobs

from ramet.model_runner.models.loader import load_model
from ramet.model_runner.parallel import TpGroup, use_device
from ramet.model_runner.weights.errors import WeightsError

# What no tiny model has by itself: one key-value head, a vocabulary that does not divide, biases after sums over ranks.
ODD = {"num_key_value_heads": 1, "vocab_size": 391, "attention_bias": True, "mlp_bias": True}


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("odd"), **ODD)


@pytest.fixture(scope="module")
def jobs(tiny_model: Callable[[str], Path], odd_model: Path) -> dict[str, Job]:
    """Each architecture, then every kind of request."""
    folder = str(tiny_model("llama"))
    return {
        **{name: Job(str(tiny_model(name))) for name in NATIVE_ARCHITECTURES},
        "odd": Job(str(odd_model)),
        "in lock-step": Job(folder, "every kind", steps_ahead=0),
        "ahead": Job(folder, "every kind"),
        "graphs": Job(folder, "every kind", graphs=True),
        **({} if torch.cuda.is_available() else {"cuda": Job(folder, "every kind", cuda=True)}),
        "eventful": Job(folder, "eventful"),
        "plain": Job(folder, "plain"),
        "plain graphs": Job(folder, "plain", graphs=True),
    }


@pytest.fixture(scope="module")
def results(jobs: dict[str, Job]) -> Results:
    """What two ranks make of them."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="tp-") as folder:  # short: a socket's path is limited to 107 bytes
        return run_jobs(jobs, 2, Path(folder))


def test_two_ranks_give_what_one_gives(jobs: dict[str, Job], results: Results) -> None:
    for name in [*NATIVE_ARCHITECTURES, "odd"]:
        alone, together = jobs[name].run(jobs[name].engine()), results.jobs[name].told
        assert together["tokens"] == alone["tokens"], name
        assert together["ranked"] == alone["ranked"], name
        assert together["logprobs"] == pytest.approx(alone["logprobs"], abs=1e-3), name
        assert results.jobs[name].unknown > 10, "hardly a step was planned before its input was known"


def test_ranks_agree_on_the_tokens_of_every_kind_of_request(jobs: dict[str, Job], results: Results) -> None:
    """With steps ahead each rank must know what was chosen; in lock-step the plans tell."""
    in_lock_step, ahead, graphs = (results.jobs[name] for name in ("in lock-step", "ahead", "graphs"))
    assert ahead.told == graphs.told == in_lock_step.told
    assert in_lock_step.unknown == 0 < ahead.unknown
    alone = jobs["ahead"].run(jobs["ahead"].engine())
    assert {rid: told[:2] for rid, told in ahead.told.items()} == {rid: told[:2] for rid, told in alone.items()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device")
def test_ranks_on_simulated_devices_agree(results: Results) -> None:
    """Collectives in graphs and outside of them, a step ahead; logits are added up in another order than on a CPU."""
    cuda, cpu = results.jobs["cuda"], results.jobs["ahead"]
    assert {rid: told[:2] for rid, told in cuda.told.items()} == {rid: told[:2] for rid, told in cpu.told.items()}
    assert cuda.broadcasts > 0 < cuda.unknown


def test_ranks_stay_in_step_when_a_request_fails_or_leaves(jobs: dict[str, Job], results: Results) -> None:
    told = results.jobs["eventful"].told
    assert told == jobs["eventful"].run(jobs["eventful"].engine())
    ends = {rid: end.partition(" for")[0] for rid, end in told["ends"].items()}
    assert ends == {"stays": "length", "leaves": "abort", "NaN": "the model gave NaN logits", "comes": "length"}


@pytest.mark.parametrize("name", ["plain", "plain graphs"])
def test_nobody_is_told_what_all_ranks_find_by_themselves(jobs: dict[str, Job], results: Results, name: str) -> None:
    result = results.jobs[name]
    assert result.told == jobs[name].run(jobs[name].engine())
    assert result.unknown > 30 and result.broadcasts == 0


def test_a_rank_that_fails_is_noticed(results: Results) -> None:
    assert results.noticed_s < 10, "rank 0 waited for it"


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
    with pytest.raises(ValueError, match=r"there is no CUDA device 99: \d+ are visible, counted from 0.*--device cpu"):
        use_device(runner_config(tmp_path, device="cuda", device_index=99))


def test_what_cannot_be_split_is_refused(tiny_model: Callable[[str], Path]) -> None:
    def load(name: str, size: int) -> None:
        load_model(runner_config(tiny_model(name)), TpGroup(0, size), lambda done, total: None)

    with pytest.raises(WeightsError, match=r"query heads \(4\) cannot be divided over 3 tensor-parallel ranks"):
        load("llama", 3)
    with pytest.raises(WeightsError, match="GPT2LMHeadModel runs through transformers, on one device only"):
        load("gpt2", 2)
