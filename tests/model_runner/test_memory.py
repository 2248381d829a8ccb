"""The size of the KV pool, in numbers: on CUDA with what the device would say."""

from pathlib import Path

import pytest
import torch
from support.model_driver import runner_config

from ramet.model_runner import memory
from ramet.model_runner.cuda_graph import graph_bytes
from ramet.model_runner.kv_pool import KVPool, KVSpec
from ramet.model_runner.memory import PoolTooLarge, size_pool

CUDA, CPU, BF16 = torch.device("cuda"), torch.device("cpu"), torch.bfloat16
GIB = 2**30
SPECS = [KVSpec(8, 128, 128)] * 32  # Llama 3.1 8B: 2 MiB a page of 16 tokens


@pytest.fixture
def device_memory(monkeypatch):
    def say(free: int, total: int) -> None:
        monkeypatch.setattr(memory, "_memory", lambda device: (free, total))

    return say


def pages(device: torch.device, reserve: int = 0, **changes) -> int:
    return size_pool(runner_config(Path("m"), **changes), SPECS, BF16, device, reserve)


def test_on_cuda_all_but_the_share_of_others_and_what_steps_take(device_memory):
    device_memory(free=64 * GIB, total=80 * GIB)
    # 64 - 0.05 * 80 - 2 GiB
    assert pages(CUDA, 2 * GIB, memory_fraction=0.95) == 58 * 512
    assert pages(CUDA, 2 * GIB, memory_fraction=0.5) == 22 * 512


def test_on_a_cpu_a_share_of_what_is_free_with_a_bound(device_memory):
    device_memory(free=4 * GIB, total=80 * GIB)
    assert pages(CPU, memory_fraction=0.5) == 2 * 512
    device_memory(free=64 * GIB, total=80 * GIB)
    assert pages(CPU, memory_fraction=0.5) == 65536 // 16


def test_tokens_that_were_asked_for_must_leave_room_for_the_steps(device_memory):
    device_memory(free=10 * GIB, total=80 * GIB)
    assert pages(CUDA, 2 * GIB, max_total_tokens=8 * 512 * 16) == 8 * 512
    with pytest.raises(PoolTooLarge, match=r"needs 8194 MiB, 10240 MiB are free on cuda, 2048 of them for the steps"):
        pages(CUDA, 2 * GIB, max_total_tokens=8 * 512 * 16 + 1)


def test_no_room_for_a_page_is_told_with_the_numbers(device_memory):
    device_memory(free=6 * GIB, total=80 * GIB)
    words = (
        r"6144 of 81920 MiB are free on cuda, 2048 of them for the steps; with a share of 0.95 .*--mem-fraction-static"
    )
    with pytest.raises(PoolTooLarge, match=words):
        pages(CUDA, 2 * GIB, memory_fraction=0.95)


def test_a_pool_knows_its_bytes():
    assert KVPool(SPECS[:1], 3, 16, BF16, CPU).num_bytes == 4 * 16 * 8 * 256 * 2


def test_memory_is_left_for_graphs_if_there_will_be_any():
    none, some = (runner_config(Path("m"), cuda_graph_max_bs=n) for n in (0, 256))
    assert graph_bytes(none, 128256) == 0
    assert 3 * 256 * 128256 * 4 < graph_bytes(some, 128256) < GIB
    one = runner_config(Path("m"), cuda_graph_max_bs=1)
    assert graph_bytes(one, 128256) > 3 * 8 * 128256 * 4  # rows of prompt chunks
