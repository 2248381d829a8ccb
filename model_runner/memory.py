"""How large the KV pool may be: on a CPU a share of the memory that is free; on CUDA all that the largest step and
the graphs leave of a share of the device's memory."""

import logging

import psutil
import torch

from ramet.model_runner.config import RunnerConfig
from ramet.model_runner.kv_pool import KVSpec

logger = logging.getLogger(__name__)

# Without a wish of the user, a pool on CPU memory stops here (or at four whole contexts): a server on someone's own
# machine should not take half of it.
_CPU_TOKENS = 65_536


class PoolTooLarge(ValueError):
    """The memory that is free does not hold what was asked; the message has the numbers."""


def size_pool(
    config: RunnerConfig, specs: list[KVSpec], dtype: torch.dtype, device: torch.device, reserve: int = 0
) -> int:
    """The number of pages, from `max_total_tokens` or from the memory that is free now, of which `reserve` bytes must
    stay so.

    Raises `PoolTooLarge` if the pool asked for does not fit, or not even one page does.
    """
    per_page = config.page_size * sum(spec.bytes_per_token(dtype) for spec in specs)
    free, total = _memory(device)
    if config.max_total_tokens is not None:
        pages = -(-config.max_total_tokens // config.page_size)
        if pages * per_page > free - reserve:
            raise PoolTooLarge(
                f"a KV pool of {config.max_total_tokens} tokens needs {_mib(pages * per_page)} MiB, {_mib(free)} MiB "
                f"are free on {device}, {_mib(reserve)} of them for the steps: lower --max-total-tokens"
            )
        return pages
    if device.type == "cpu":
        pages = int(free * config.memory_fraction) // per_page
        pages = min(pages, max(_CPU_TOKENS, 4 * config.context_length) // config.page_size)
    else:
        pages = int(free - (1 - config.memory_fraction) * total - reserve) // per_page
    if pages < 1:
        raise PoolTooLarge(
            f"{_mib(free)} of {_mib(total)} MiB are free on {device}, {_mib(reserve)} of them for the steps; with a "
            f"share of {config.memory_fraction:g} that does not hold one page of {_mib(per_page)} MiB: raise "
            "--mem-fraction-static, free memory, or lower --chunked-prefill-size and --max-running-requests"
        )
    logger.info(
        "KV pool: %d pages of %d tokens (%d MiB); --max-total-tokens or --mem-fraction-static changes it",
        pages,
        config.page_size,
        _mib(pages * per_page),
    )
    return pages


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes that are free, and that there are."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def _mib(num_bytes: float) -> int:
    return int(num_bytes) // 2**20
