"""`Embedder`: runs whole prompts through a model and pools each to one vector. Owns the model; keeps nothing between
steps, so there is no KV pool. What runs when is the scheduler's to decide.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from ramet.model_runner.config import RunnerConfig
from ramet.model_runner.context import SequencesContext
from ramet.model_runner.models.bert import Encoder
from ramet.model_runner.models.loader import load_embedder
from ramet.model_runner.parallel import TpGroup, use_device
from ramet.model_runner.pooling import read_pooling


class Embedder:
    """Raises `WeightsError` or ValueError, with words for the user, if it cannot be set up."""

    def __init__(self, config: RunnerConfig, progress: Callable[[str], None]) -> None:
        self._device = use_device(config)
        self._model = load_embedder(config, TpGroup(), lambda done, total: progress(f"loading weights {done}/{total}"))
        self._causal = not isinstance(self._model, Encoder)
        self._pooling = read_pooling(Path(config.weights), "lasttoken" if self._causal else "mean")
        progress("warming up")
        started_s = time.perf_counter()
        warm_up = self.execute([[0] * min(config.max_step_tokens, config.context_length)])
        self.warm_up_s = time.perf_counter() - started_s
        self.embedding_size = len(warm_up[0] or b"") // 4

    @torch.inference_mode()
    def execute(self, prompts: list[list[int]]) -> list[bytes | None]:
        """Token ids of each prompt -> little-endian float32 of its embedding; None where that has no finite values."""
        lengths = [len(prompt) for prompt in prompts]
        token_ids = torch.tensor([token for prompt in prompts for token in prompt], device=self._device)
        positions = torch.cat([torch.arange(length, device=self._device) for length in lengths])
        hidden = self._model(token_ids, SequencesContext(positions, lengths, self._causal))
        pooled = torch.stack([self._pooling(part) for part in hidden.split(lengths)]).cpu()
        finite = pooled.isfinite().all(dim=1).tolist()
        vectors = pooled.numpy().astype("<f4")
        return [vector.tobytes() if ok else None for vector, ok in zip(vectors, finite, strict=True)]
