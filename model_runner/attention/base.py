"""The interface of an attention backend: attention of new tokens over the paged KV pool.

A backend reads the pool and the step's metadata; it never writes the pool (`ForwardContext.attend` has stored the new
keys and values before it is called).
"""

import abc
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from ramet.model_runner.context import AttentionSpec, ForwardContext


class AttentionBackend(abc.ABC):
    """Rows mix freely: one-token decodes first, then prefill chunks of any length."""

    # Whether `forward` takes the rows' lengths from `plan` or from the device alone, beside `num_decodes` and the
    # longest query, and never waits for it: a step can then be captured in a CUDA graph.
    capturable: bool = True

    def plan(self, step: Mapping[str, np.ndarray], pages: np.ndarray, page_size: int, captured: bool) -> None:  # noqa: B027
        """Hear of a step before its `forward`s, or, if it was `captured`, also before each replay of them. `step` as of
        `step_arrays`; pages [slots, max_pages], the page tables."""

    @abc.abstractmethod
    def forward(self, spec: AttentionSpec, query: Tensor, ctx: ForwardContext) -> Tensor:
        """query [N, heads, key_dim] -> [N, heads, value_dim]; causal, with GQA by `heads // kv_heads`."""
