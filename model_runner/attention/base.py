"""The interface of an attention backend: attention of new tokens over the paged KV pool.

A backend reads the pool and the step's metadata; it never writes the pool (`ForwardContext.attend` has stored the new
keys and values before it is called).
"""

import abc

from torch import Tensor

from ramet.model_runner.context import AttentionSpec, ForwardContext


class AttentionBackend(abc.ABC):
    """Rows mix freely: one-token decodes first, then prefill chunks of any length."""

    name: str
    # Whether `forward` takes the rows' lengths from the device alone, beside `num_decodes` and the longest query, and
    # never waits for it: a decode step can then be captured in a CUDA graph.
    capturable: bool = True

    @abc.abstractmethod
    def forward(self, spec: AttentionSpec, query: Tensor, ctx: ForwardContext) -> Tensor:
        """query [N, heads, key_dim] -> [N, heads, value_dim]; causal, with GQA by `heads // kv_heads`."""
