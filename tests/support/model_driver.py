"""Runs a model step by step without a scheduler: allocates pages (scattered on purpose) and builds the context."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ramet.model_runner.attention.base import AttentionBackend
from ramet.model_runner.attention.torch_backend import TorchBackend
from ramet.model_runner.config import LoadFormat, RunnerConfig
from ramet.model_runner.context import ForwardContext
from ramet.model_runner.kv_pool import KVPool
from ramet.model_runner.models.base import CausalLM
from ramet.model_runner.models.loader import load_model
from ramet.model_runner.parallel import TpGroup

PAGE_SIZE = 16
CPU = torch.device("cpu")


def runner_config(folder: Path, **changes: Any) -> RunnerConfig:
    settings = {
        "model_dir": str(folder),
        "weights": str(folder),
        "load_format": LoadFormat.SAFETENSORS,
        "dtype": "float32",
        "device": "cpu",
        "page_size": PAGE_SIZE,
        "max_running": 8,
        "max_step_tokens": 256,
        "context_length": 256,
        "memory_fraction": 0.5,
    }
    return RunnerConfig(**(settings | changes))


def load(folder: Path, *, progress: Callable[[int, int], None] = lambda done, total: None, **changes: Any) -> CausalLM:
    torch.set_num_threads(1)
    return load_model(runner_config(folder, **changes), TpGroup(), progress)


class ModelDriver:
    """Requests are known by name; each keeps its pages and its length between steps."""

    def __init__(
        self,
        model: CausalLM,
        dtype: torch.dtype = torch.float32,
        num_pages: int = 64,
        backend: AttentionBackend | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.model, self.backend, self.device = model, backend or TorchBackend(), device
        self.pool = KVPool(model.kv_specs, num_pages, PAGE_SIZE, dtype, device)
        self.free = random.Random(0).sample(range(num_pages), num_pages)
        self.pages: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    def step(self, rows: dict[str, list[int]]) -> dict[str, Tensor]:
        """One forward over new tokens of each request, decodes first. Returns logits [tokens, vocab] by request."""
        rows = dict(sorted(rows.items(), key=lambda item: len(item[1]) > 1))
        context = self._context(rows)
        token_ids = torch.tensor([token for tokens in rows.values() for token in tokens], device=self.device)
        logits = self.model.logits(self.model(token_ids, context))
        return dict(zip(rows, logits.split([len(tokens) for tokens in rows.values()]), strict=True))

    def _context(self, rows: dict[str, list[int]]) -> ForwardContext:
        positions, slots = [], []
        for name, tokens in rows.items():
            start = self.lengths.get(name, 0)
            self.lengths[name] = start + len(tokens)
            pages = self.pages.setdefault(name, [])
            while len(pages) * PAGE_SIZE < self.lengths[name]:
                pages.append(self.free.pop())
            for position in range(start, self.lengths[name]):
                positions.append(position)
                slots.append(pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE)
        query_lens = [len(tokens) for tokens in rows.values()]
        widest = max(len(self.pages[name]) for name in rows)
        table = [self.pages[name] + [0] * (widest - len(self.pages[name])) for name in rows]
        context_lens = [self.lengths[name] for name in rows]
        return ForwardContext(
            positions=torch.tensor(positions, device=self.device),
            slot_mapping=torch.tensor(slots, device=self.device),
            cu_q=torch.tensor([0, *query_lens], device=self.device).cumsum(0).int(),
            seq_lens=torch.tensor(context_lens, dtype=torch.int32, device=self.device),
            block_table=torch.tensor(table, dtype=torch.int32, device=self.device),
            query_lens=query_lens,
            context_lens=context_lens,
            num_decodes=sum(length == 1 for length in query_lens),
            kv_pool=self.pool,
            backend=self.backend,
        )
