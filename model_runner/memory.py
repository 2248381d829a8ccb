"""How large the KV pool may be."""

import dataclasses
import logging

import psutil
import torch

from ramet.model_runner.config import RunnerConfig
from ramet.model_runner.kv_pool import KVSpec

log = logging.getLogger(__name__)

# Without a wish of the user, a pool on CPU memory stops here (or at four whole contexts): a server on someone's own
# machine should not take half of it.
_CPU_TOKENS = 65_536


class PoolTooLarge(ValueError):
    """The memory that is free does not hold what was asked; the message has the numbers."""


@dataclasses.dataclass(frozen=True)
class PoolSize:
    num_pages: int
    bytes_per_page: int


def size_pool(config: RunnerConfig, specs: list[KVSpec], dtype: torch.dtype, device: torch.device) -> PoolSize:
    """The number of pages, from `max_total_tokens` or from the memory that is free now.

    Raises `PoolTooLarge` if the pool asked for does not fit, or not even one page does.
    """
    per_page = config.page_size * sum(spec.bytes_per_token(dtype) for spec in specs)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if config.max_total_tokens is not None:
        pages = -(-config.max_total_tokens // config.page_size)
        if pages * per_page > free:
            raise PoolTooLarge(
                f"a KV pool of {config.max_total_tokens} tokens needs {_mib(pages * per_page)} MiB, "
                f"{_mib(free)} MiB are free on {device}: lower --max-total-tokens"
            )
        return PoolSize(pages, per_page)
    pages = int(free * config.memory_fraction) // per_page
    if device.type == "cpu":
        pages = min(pages, max(_CPU_TOKENS, 4 * config.context_length) // config.page_size)
    if pages < 1:
        raise PoolTooLarge(
            f"{_mib(free)} MiB are free on {device}; {config.memory_fraction:g} of it does not hold one page of "
            f"{_mib(per_page)} MiB: raise --mem-fraction-static or free memory"
        )
    log.info(
        "KV pool: %d pages of %d tokens (%d MiB); --max-total-tokens or --mem-fraction-static changes it",
        pages,
        config.page_size,
        _mib(pages * per_page),
    )
    return PoolSize(pages, per_page)


def _mib(num_bytes: float) -> int:
    return int(num_bytes) // 2**20
